"""Chaos would find them: bugs planted one at a time, each a rule of the product that is no longer kept."""

import asyncio
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import msgspec
import pytest

from zml.coordinator import checkpoint_desk, holds
from zml.coordinator.docket import Docket
from zml.coordinator.facts import Fact, Spread
from zml.coordinator.rosters import Rosters
from zml.hyper import read_hyper
from zml.messages import Commit, Message, Ok, Published, Snap
from zml.scheduler.batches import Ledger, Taken
from zml.scheduler.events import BackupLost
from zml.scheduler.machine import EVENTS
from zml.scheduler.staleness import Gate
from zml.scheduler.state import State
from zml.shard import ceding
from zml.shard.counted import Last, Step
from zml.shard.holding import front_of
from zml.shard.mirror import Mirror, Stage
from zml.shard.shard import Shard
from zml.worker.client import Client

from .faults import Kind, kind_of
from .world import Outcome, quiet, run

SEEDS = 500  # as many as are always run
MORE = 3000  # of which few are housed or growing worlds
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Plant = Callable[[str], None]


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


def caught(kind: Kind = "fixed", within: int = SEEDS, begin: int = 0) -> Outcome:
    """The first seed from `begin` on, and then of those before it, in which a rule breaks. With one that once did it is
    a short search; where that one no longer does, as long as ever."""
    for seed in (seed for seed in (*range(begin, within), *range(begin)) if kind_of(seed) == kind):
        outcome = run(seed)
        if outcome.broken is not None:
            print(outcome)
            return outcome
    raise AssertionError(f"{within} seeds, and nothing broke")


def test_chaos_catches_a_shard_that_counts_a_step_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that is sent again, because its answer was lost with the shard, is counted again."""
    commit = Shard._commit
    steps: dict[tuple[Shard, str, int, int], Step] = {}

    def commit_again(self: Shard, worker: Any, message: Commit, payload: memoryview | None) -> Any:
        what = (self, worker, message.incarnation, message.clock)
        step = self.staged.get(worker, {}).get(message.clock) or steps.get(what)
        if message.clock < self.gate.frontier(worker) and step is not None:
            self.note(message, payload)
            hyper = read_hyper(payload or memoryview(b""), self._store().spec)
            last = Last(message.clock, message.epoch, message.done, bytes(payload or b""))
            self.count(worker, step, hyper, last)
            return Ok()
        if step is not None:
            steps[what] = step
        return commit(self, worker, message, payload)

    monkeypatch.setattr(Shard, "_commit", commit_again)
    assert caught(begin=64).broken


def test_chaos_catches_a_shard_that_answers_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Shard.note

    def note_later(self: Shard, message: Message, payload: Any = None) -> None:
        if not self.replaying:
            kept = bytes(payload) if payload is not None else None
            asyncio.get_running_loop().call_soon(note, self, message, kept)

    monkeypatch.setattr(Shard, "note", note_later)
    assert caught(begin=127).broken


def test_chaos_catches_a_ledger_that_commits_what_it_gives_out(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Ledger.take

    def take_and_commit(self: Ledger, worker: Any, epoch: int, *also: Any, **named: Any) -> Any:
        answer = take(self, worker, epoch, *also, **named)
        if isinstance(answer, Taken):
            self.commit(worker, epoch, answer.batches)
        return answer

    monkeypatch.setattr(Ledger, "take", take_and_commit)
    assert caught().broken


@pytest.mark.soak
def test_chaos_catches_rosters_that_do_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Rosters, place: Any) -> None:
        pass

    monkeypatch.setattr(Rosters, "_settle", nothing)
    assert caught().broken


@pytest.mark.soak
def test_chaos_catches_a_worker_that_resumes_at_a_wrong_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too low: what it sends for that clock looks as if it were sent again."""
    enter = Client.enter

    async def enter_too_low(self: Client, at_least: int = 0) -> int:
        return max(0, await enter(self, at_least) - 1)

    monkeypatch.setattr(Client, "enter", enter_too_low)
    assert caught().broken


@pytest.mark.soak
def test_chaos_catches_a_shard_that_does_not_write_what_it_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Shard.note

    def note_the_rest(self: Shard, message: Message, payload: Any = None) -> None:
        if not isinstance(message, Published):
            note(self, message, payload)

    monkeypatch.setattr(Shard, "note", note_the_rest)
    assert caught().broken


@pytest.mark.soak
def test_chaos_catches_a_shard_that_does_not_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where a lost worker stands, and takes more from it."""

    class Forgets(dict[Any, Any]):
        def __setitem__(self, worker: Any, incarnation: int) -> None:
            pass

    fresh = Shard.__init__

    def init(self: Shard, *arguments: Any) -> None:
        fresh(self, *arguments)
        self.fenced = Forgets()

    monkeypatch.setattr(Shard, "__init__", init)
    assert caught().broken


@pytest.mark.soak
def test_chaos_catches_a_gate_that_opens_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    may_start = Gate.may_start
    monkeypatch.setattr(Gate, "may_start", lambda self, worker, clock: may_start(self, worker, clock - 1))
    assert caught().broken


def test_chaos_catches_a_coordinator_that_answers_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Docket._write

    def write_later(self: Docket, *what: Any) -> None:
        asyncio.get_running_loop().call_later(0.02, write, self, *what)

    monkeypatch.setattr(Docket, "_write", write_later)
    assert caught().broken


def test_chaos_catches_a_worker_whose_commits_and_advances_overtake_a_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a shard that is pushed to none do: a push waits for the commit before it. Where all is frozen none is."""
    push, counted_before = Client._push, Client._counted_before
    pushing = ContextVar("pushing", default=False)

    async def push_marked(self: Client, *what: Any) -> None:
        pushing.set(True)  # each push is a task, with a context of its own
        await push(self, *what)

    async def counted_before_a_push(self: Client, clock: int, shard: str) -> None:
        if pushing.get():
            await counted_before(self, clock, shard)

    monkeypatch.setattr(Client, "_push", push_marked)
    monkeypatch.setattr(Client, "_counted_before", counted_before_a_push)
    assert caught(begin=378).broken


# -- what only housed worlds catch -----------------------------------------------------------------------------------


@pytest.mark.soak
def test_chaos_catches_a_backup_that_is_promoted_and_not_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator agrees that it is out of date, and counts on it all the same."""
    for state in (State.RUNNING, State.DRAINING):
        monkeypatch.setitem(EVENTS[state], BackupLost, lambda machine, job, event, now: iter(()))
    assert caught("housed", MORE).broken


@pytest.mark.soak
def test_chaos_catches_a_shard_that_answers_before_its_backup_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mirror, "settled", lambda self: None)
    assert caught("housed", MORE).broken


def test_chaos_catches_a_copy_that_lacks_what_came_while_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    append = Mirror.append

    def append_in_step(self: Mirror, message: Message, payload: Any = None) -> None:
        if self.stage is not Stage.COPYING:
            append(self, message, payload)

    monkeypatch.setattr(Mirror, "append", append_in_step)
    assert caught("housed", MORE).broken


def test_chaos_catches_a_checkpoint_of_shards_that_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Shard.order

    def order_anyhow(self: Shard, message: Any, payload: Any) -> Any:
        if isinstance(message, Snap):
            payload = msgspec.msgpack.encode(front_of(self))
        return order(self, message, payload)

    monkeypatch.setattr(Shard, "order", order_anyhow)
    monkeypatch.setattr(holds, "alike", lambda fronts: True)
    assert caught("housed", MORE, begin=170).broken


def test_chaos_catches_a_ledger_that_is_not_of_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the workers have reported, and not what the shards have applied."""
    monkeypatch.setattr(checkpoint_desk, "applied_batches", lambda applied, incarnations: {})
    assert caught("housed", MORE, begin=26).broken


# -- what only growing worlds catch ----------------------------------------------------------------------------------


def test_chaos_catches_a_source_that_goes_on_counting_while_it_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holding_up = Shard._holding_up

    def holding_up_others(self: Shard) -> Any:
        return None if self.doubt is not None and self.doubt.gives else holding_up(self)

    monkeypatch.setattr(Shard, "_holding_up", holding_up_others)
    assert caught("growing", MORE, begin=554).broken


@pytest.mark.soak
def test_chaos_catches_a_target_that_does_not_take_over_what_was_staged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_in = ceding._take_in

    def take_in_the_rest(core: Shard, account: Any, *what: Any) -> None:
        take_in(core, msgspec.structs.replace(account, staged={}), *what)

    monkeypatch.setattr(ceding, "_take_in", take_in_the_rest)
    assert caught("growing", MORE).broken


@pytest.mark.soak
def test_chaos_catches_an_edition_that_is_told_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fact = Docket.fact

    def fact_later(self: Docket, what: Fact) -> None:
        if not isinstance(what, Spread):
            fact(self, what)
            return
        self.facts.note(what)
        asyncio.get_running_loop().call_later(0.05, fact, self, what)

    monkeypatch.setattr(Docket, "fact", fact_later)
    assert caught("growing", MORE).broken
