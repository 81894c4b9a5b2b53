"""The shard's rules, one message at a time: what counts, what is refused, and that a refusal changes nothing."""

import asyncio
import errno
import math
from collections.abc import Awaitable
from typing import Any

import pytest
import torch

from tests.simulation import simulate
from zml.codec import by_name
from zml.hyper import hyper_of, write_hyper
from zml.layout import Bucket, Registration, buckets
from zml.messages import (
    Advance,
    Commit,
    Delta,
    Enter,
    Entered,
    Finished,
    Hold,
    Load,
    Ok,
    Pull,
    Push,
    Seat,
    Wait,
)
from zml.records import NoRoom
from zml.scheduler.ids import JobId
from zml.shard.counts import figures
from zml.shard.shard import Shard
from zml.transport import Refusal
from zml.worker.binding import Binding
from zml.worker.outbox import Outbox
from zml.worker.replica import Replica

JOB = "job"


class Bench:
    """A shard that holds one small model, and the means to speak as any worker."""

    def __init__(self, staleness: int | None, workers: int = 2) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(5, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.registration = Registration.of(self.model, self.optimizer)
        layout = self.registration.layout
        self.cut: tuple[Bucket, ...] = buckets(layout, [0])
        self.binding = Binding(layout, self.model)
        self.shard = Shard(JobId(JOB), "p0")
        self.shard.assign(self.registration, [0], staleness, "none")
        self.seats = [Seat(f"w{index}", 1, True) for index in range(workers)]
        self.shard.roster(1, self.seats)
        for seat in self.seats:
            self.ask(seat.worker, Enter(JOB, seat.worker, 1))

    def ask(self, worker: str, message: Any, payload: bytes | None = None, peer: str = "") -> Any:
        view = None if payload is None else memoryview(payload)
        return self.shard.handle(peer or f"{worker}.1", message, view)

    def without_chunks(self, seats: list[Seat]) -> Shard:
        """Another shard of the job, which holds nothing."""
        shard = Shard(JobId(JOB), "p1")
        shard.assign(self.registration, [0], 0, "none")
        shard.roster(1, seats)
        return shard

    def load(self) -> None:
        values = torch.empty(self.registration.layout.chunks[0].size)
        self.binding.read(0, values)
        self.ask("w0", Load(JOB, "w0", 1, 0), values.numpy().tobytes())

    def gradient(self, value: float) -> bytes:
        outbox = Outbox(self.cut[0], self.registration.layout, by_name("none"))
        outbox.values[0].fill_(value)
        return bytes(outbox.pack())

    def push(self, worker: str, clock: int, value: float = 1.0) -> Any:
        return self.ask(worker, Push(JOB, worker, 1, clock, 0), self.gradient(value))

    def commit(self, worker: str, clock: int) -> Any:
        return self.ask(worker, Commit(JOB, worker, 1, clock, 1), write_hyper(hyper_of(self.optimizer)))

    def step(self, worker: str, clock: int, value: float = 1.0) -> None:
        assert self.push(worker, clock, value) == Ok()
        assert self.commit(worker, clock) == Ok()

    def held(self) -> torch.Tensor:
        """The parameters that a new worker would get."""
        assert self.shard.store is not None
        replica = Replica(self.binding, by_name("none"))
        replica.take([0], *self.shard.store.pull_bucket([0], [-1]))
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    def version(self) -> int:
        assert self.shard.store is not None
        return self.shard.store.version(0)


def test_in_bsp_a_clock_is_applied_once_when_the_last_worker_has_committed() -> None:
    bench = Bench(0)
    bench.load()
    before = bench.held()
    bench.step("w1", 0, 3.0)
    assert bench.version() == 0, "w0 is missing"
    bench.step("w0", 0, 1.0)
    assert bench.version() == 1
    assert torch.equal(bench.held(), before - 0.5 * torch.full_like(before, 2.0)), "the mean of 1 and 3"


@pytest.mark.parametrize("staleness", [3, None])
def test_otherwise_a_step_is_applied_as_it_comes(staleness: int | None) -> None:
    bench = Bench(staleness)
    bench.load()
    before = bench.held()
    bench.step("w1", 0, 3.0)
    assert torch.equal(bench.held(), before - 0.5 * torch.full_like(before, 3.0))


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_what_is_resent_counts_once(staleness: int | None) -> None:
    bench = Bench(staleness, workers=1)
    bench.load()
    bench.step("w0", 0)
    after, version = bench.held(), bench.version()
    bench.push("w0", 0, 9.0)
    bench.commit("w0", 0)
    assert torch.equal(bench.held(), after)
    assert bench.version() == version == 1


def test_a_push_before_the_commit_replaces_the_one_before_it() -> None:
    bench = Bench(0, workers=1)
    bench.load()
    before = bench.held()
    bench.push("w0", 0, 100.0)
    bench.push("w0", 0, 1.0)  # the script clipped its gradients after backward
    bench.commit("w0", 0)
    assert torch.equal(bench.held(), before - 0.5)


def test_a_commit_without_all_its_buckets_is_refused_and_may_come_again() -> None:
    bench = Bench(0, workers=1)
    bench.load()
    with pytest.raises(Refusal, match="0 of 1 buckets of clock 0"):
        bench.commit("w0", 0)
    bench.step("w0", 0)
    assert bench.version() == 1


@pytest.mark.parametrize("bad", [b"", b"\0" * 7, b"\xff" * 200])
def test_a_frame_that_cannot_be_read_is_refused_and_nothing_is_staged(bad: bytes) -> None:
    bench = Bench(0, workers=1)
    bench.load()
    if bad:
        with pytest.raises(Refusal) as refused:
            bench.ask("w0", Push(JOB, "w0", 1, 0, 0), bad)
        assert refused.value.code == "frame"
    else:
        assert bench.ask("w0", Push(JOB, "w0", 1, 0, 0), bad) == Ok(), "all parameters may be absent"
    with pytest.raises(Refusal):
        bench.commit("w0", 0)
    assert bench.version() == 0


def test_numbers_of_another_optimizer_are_refused_before_the_step_counts() -> None:
    bench = Bench(0, workers=1)
    bench.load()
    bench.push("w0", 0)
    adam = write_hyper(hyper_of(torch.optim.Adam(bench.model.parameters())))
    with pytest.raises(Refusal) as refused:
        bench.ask("w0", Commit(JOB, "w0", 1, 0, 1), adam)
    assert refused.value.code == "hyper"
    bench.commit("w0", 0)
    assert bench.version() == 1


def test_only_the_process_that_entered_speaks_as_the_worker() -> None:
    bench = Bench(0)
    bench.load()
    with pytest.raises(Refusal) as refused:
        bench.ask("w0", Push(JOB, "w0", 1, 0, 0), bench.gradient(1.0), peer="w1.1")
    assert refused.value.code == "identity"
    with pytest.raises(Refusal) as refused:
        bench.ask("w0", Enter(JOB, "w0", 1), peer="w1.1")
    assert refused.value.code == "identity"


def test_a_former_self_is_fenced_and_one_not_yet_announced_is_told_to_come_again() -> None:
    bench = Bench(0)
    bench.load()
    bench.shard.roster(2, [Seat("w0", 2, False), Seat("w1", 1, True)])
    with pytest.raises(Refusal) as refused:
        bench.push("w0", 0)
    assert refused.value.code == "fenced"
    with pytest.raises(Refusal) as refused:
        bench.ask("w7", Enter(JOB, "w7", 1))
    assert refused.value.code == "early"


def test_a_step_without_its_commit_is_gone_with_its_worker_and_one_with_it_stays() -> None:
    bench = Bench(0, workers=3)
    bench.load()
    before = bench.held()
    bench.step("w0", 0, 1.0)
    bench.push("w1", 0, 50.0)
    bench.step("w2", 0, 3.0)
    bench.shard.roster(2, [Seat("w0", 1, True)])  # w1 and w2 are lost
    assert torch.equal(bench.held(), before - 0.5 * 2.0), "the mean of w0's and w2's"


@pytest.mark.parametrize("chunks", [1, 0])
def test_a_step_that_counts_elsewhere_counts_here_before_its_worker_is_gone(chunks: int) -> None:
    """Also where a shard has no chunks, and is sent nothing of a step but its commit."""
    bench = Bench(0)
    if chunks:
        bench.load()
        bench.push("w1", 0)
    else:
        bench.shard = bench.without_chunks(bench.seats)
        for seat in bench.seats:
            bench.ask(seat.worker, Enter(JOB, seat.worker, 1))
    owed = Finished("w1", 1, 0, 0, 1, write_hyper(hyper_of(bench.optimizer)))
    bench.shard.roster(2, bench.seats[:1], [owed])
    assert list(bench.shard.committed[0]) == ["w1"]


def test_a_step_of_a_worker_that_never_entered_here_is_none_of_this_shard() -> None:
    bench = Bench(0)
    shard = bench.without_chunks([*bench.seats, Seat("w5", 1, False)])
    owed = Finished("w5", 1, 0, 0, 1, write_hyper(hyper_of(bench.optimizer)))
    shard.roster(2, bench.seats, [owed])
    assert shard.generation == 2 and shard.committed == {}


def test_an_older_roster_changes_nothing() -> None:
    bench = Bench(0)
    bench.shard.roster(5, bench.seats)
    bench.shard.roster(4, [])
    assert bench.shard.incarnations == {"w0": 1, "w1": 1}


def test_another_layout_is_refused_and_the_same_one_is_no_news() -> None:
    bench = Bench(0)
    bench.shard.assign(bench.registration, [0], 0, "none")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(Refusal) as refused:
        bench.shard.assign(
            Registration.of(other, torch.optim.SGD(other.parameters(), lr=1.0)), [0], 0, "none"
        )
    assert refused.value.code == "layout"


def test_a_pull_waits_by_name_and_is_answered_when_the_gate_opens() -> None:
    async def main() -> None:
        bench = Bench(0)
        pull = Pull(JOB, "w0", 1, 0, 0, [-1])
        first = bench.ask("w0", pull)
        assert isinstance(first, Awaitable)
        wait = await first
        assert isinstance(wait, Wait)
        assert wait.because == "nobody has brought the first parameters yet"
        bench.load()
        message, _ = bench.ask("w0", pull)
        assert message == Delta(0, [0], [1], 0, 2)
        bench.step("w0", 0)
        parked = bench.ask("w0", Pull(JOB, "w0", 1, 1, 0, [0]))
        wait = await parked
        assert wait.waiting_for == ["w1"]
        parked = bench.ask("w0", Pull(JOB, "w0", 1, 1, 0, [0]))
        asyncio.get_running_loop().call_later(0.5, bench.step, "w1", 0)
        message, payload = await parked
        assert message == Delta(0, [1], [1], 0, 2)
        assert payload

    simulate(main())


def test_a_step_is_staged_only_where_its_worker_stands() -> None:
    bench = Bench(0)
    bench.load()
    for clock in (1, 1 << 60):
        with pytest.raises(Refusal, match=f"w0 stands at clock 0, and sends clock {clock}") as refused:
            bench.push("w0", clock)
        assert refused.value.code == "clock"
        with pytest.raises(Refusal):
            bench.commit("w0", clock)
    assert not bench.shard.staged
    bench.ask("w0", Advance(JOB, "w0", 1, 7))
    assert bench.push("w0", 7) == Ok()


def test_resting_lets_the_others_go_on() -> None:
    bench = Bench(0)
    bench.load()
    bench.ask("w1", Advance(JOB, "w1", 1, 10))
    for clock in range(3):
        bench.step("w0", clock)
    assert bench.version() == 3
    bench.shard.roster(2, [*bench.seats, Seat("w2", 1, False)])
    assert bench.ask("w2", Enter(JOB, "w2", 1)) == Entered(3), "a late worker begins at the slowest clock"


def test_a_pull_that_waits_is_not_answered_by_a_shard_that_was_copied_and_moved_meanwhile() -> None:
    """When it came there was no copy that the answer had to wait for."""

    class Over:
        def append(self, message: Any, payload: Any = None) -> None: ...

        def settled(self) -> None:
            raise Refusal("moved", "it lives elsewhere")

    async def main() -> None:
        bench = Bench(0)
        bench.load()
        bench.step("w0", 0)
        pull = bench.ask("w0", Pull(JOB, "w0", 1, 1, 0, [0]))
        assert isinstance(pull, Awaitable)
        waiting = asyncio.ensure_future(pull)
        await asyncio.sleep(0)
        bench.shard.mirror = Over()  # type: ignore[assignment]
        with pytest.raises(Refusal, match="elsewhere"):
            bench.step("w1", 0)
        with pytest.raises(Refusal, match="elsewhere"):
            await waiting

    simulate(main())


def test_what_is_held_back_for_a_checkpoint_does_not_count_where_the_shard_lives_no_more() -> None:
    """Let go here it would be acknowledged, and the shard that serves elsewhere would not have it."""

    async def main() -> None:
        bench = Bench(None, workers=1)
        bench.load()
        bench.step("w0", 0)
        bench.shard.order(Hold(JOB, 1), b"")
        assert bench.push("w0", 1) == Ok()
        commit = bench.commit("w0", 1)
        assert isinstance(commit, Awaitable)
        waiting = asyncio.ensure_future(commit)
        await asyncio.sleep(0)
        bench.shard.end()
        with pytest.raises(Refusal, match="another process") as refused:
            await waiting
        assert refused.value.code == "moved" and bench.version() == 1

    simulate(main())


class Disk:
    """Of a push log, with room for so many records."""

    def __init__(self, room: int) -> None:
        self.room = room

    def append(self, message: Any, payload: Any = None) -> None:
        if not self.room:
            raise NoRoom(errno.ENOSPC, "no room for 9 bytes", "/small")
        self.room -= 1


def test_a_shard_without_room_changes_nothing_says_so_and_goes_on_when_there_is_some() -> None:
    async def main() -> None:
        bench = Bench(0)
        bench.load()
        bench.shard.log = disk = Disk(2)
        bench.step("w1", 0, 3.0)
        waiting = bench.ask("w1", Pull(JOB, "w1", 1, 1, 0, [0]))
        assert bench.shard.no_room == ""
        for _ in range(3):
            with pytest.raises(Refusal) as refused:
                bench.push("w0", 0)
            assert refused.value.code == "full"
        because = "p0 has no room for its push log in /small"
        assert figures(bench.shard, 0).no_room == because
        with pytest.raises(Refusal, match=because):  # not who is behind: that one is refused
            await waiting
        waiting = bench.ask("w1", Pull(JOB, "w1", 1, 1, 0, [0]))
        disk.room = 2
        bench.step("w0", 0, 1.0)
        assert bench.version() == 1
        assert isinstance((await waiting)[0], Delta)
        bench.shard.refused = -math.inf, because
        assert figures(bench.shard, 0).no_room == ""

    simulate(main())
