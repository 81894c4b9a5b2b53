"""What must hold after every run, whatever happened in it: compared are what the shards have written, replayed by a
model of our own, and what the recorder has heard. A broken rule is an `AssertionError` that says who, where and what.

    a step      counts on every shard that holds chunks, once, or on none; an acknowledged one is in every log, once
    a batch     is in the steps that count exactly once an epoch, and was reported to the ledger by one worker
    a bound     no worker commits a clock, or gets the parameters for one, while another is too far behind
    a version   of a chunk never goes back for a worker
    a fence     nothing of a worker is in a log behind its `Settle`, or behind the roster without it
    a log       makes the same shard, to the bit; and all workers end with the parameters that the shards publish
    a bucket    lives on one shard, the one that the newest edition of the placement names
    a move      is of what its source has, and what is staged of it counts where it is; both know of the same steps
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from zml.layout import Bucket, buckets
from zml.messages import (
    Advance,
    Assign,
    Cede,
    Commit,
    Enter,
    Graft,
    Load,
    Message,
    Muster,
    Push,
    Roster,
    Settle,
)
from zml.shard.begin import read_assignment

from .recorder import Recorder, Said, Who

Batch = tuple[int, int]  # epoch, number


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one worker that counts on a shard."""

    who: Who
    clock: int
    epoch: int
    done: int


@dataclass(slots=True)
class Stand:
    finished: int
    rests_until: int = 0

    @property
    def clock(self) -> int:
        return max(self.finished, self.rests_until)


@dataclass(slots=True)
class Account:
    """One shard, as its history alone tells it. `lows[n]` is where the slowest active worker stood after n records."""

    shard: str
    steps: list[Step] = field(default_factory=list)
    pushes: Counter[tuple[Who, int, int]] = field(default_factory=Counter)
    commits: Counter[tuple[Who, int]] = field(default_factory=Counter)
    lows: list[int | None] = field(default_factory=lambda: [None])
    trains: bool = False  # it holds chunks that take steps
    mine: tuple[Bucket, ...] = ()
    edition: int = -1  # of the placement; -1 before it had any
    doubt: int = 0  # the edition that it waits for, if there is one
    moves: int = 0  # editions by which it has got or given something


class Reader:
    """Reads a history from its beginning; a second opinion on `shard` and `staleness`, and much simpler."""

    def __init__(self, shard: str, bound: int | None, ceded: dict[int, "Reader"]) -> None:
        """`ceded`: by edition, who cedes for it, as it was then. All readers of a run share it."""
        self.bound = bound
        self.ceded = ceded
        self.account = Account(shard)
        self.cut: tuple[Bucket, ...] = ()
        self.gives: frozenset[int] = frozenset()  # the buckets that it has ceded, and may get back
        self.staged: set[tuple[Who, int, int]] = set()  # pushes of what lives here
        self.roster: dict[str, int] = {}
        self.over: set[Who] = set()  # settled, or out of the roster
        self.active: dict[str, Stand] = {}
        self.former: dict[str, int] = {}
        self.furthest = 0
        self.pushed: frozenset[int] = frozenset()

    def read(self, records: Iterable[tuple[Message, memoryview]]) -> Iterator[int]:
        """Yields each edition for which the source's history must be read first (`read_all`)."""
        for number, (message, payload) in enumerate(records):
            while isinstance(message, Graft) and message.edition not in self.ceded:
                yield message.edition
            self._take(number, message, payload)
            low = self._low()
            self.furthest = max(self.furthest, low or 0)
            self.account.lows.append(low)

    def _low(self) -> int | None:
        return min((stand.clock for stand in self.active.values()), default=None)

    def _take(self, number: int, message: Message, payload: memoryview) -> None:
        account = self.account
        if isinstance(message, Enter | Push | Commit | Advance | Load):
            who = Who(message.worker, message.incarnation)
            assert self.roster.get(who.worker) == who.incarnation and who not in self.over, (
                f"{account.shard} has written {message} of {who}, which is over, as record {number}"
            )
        match message:
            case Assign():
                self._assign(payload)
            case Cede():
                assert not account.doubt, f"{account.shard} cedes {message}, and waits for {account.doubt}"
                self._doubt(message.edition)
                self.gives = frozenset(message.buckets)
                assert self.gives <= {b.index for b in account.mine}, f"{account.shard} cedes {message}"
                assert message.edition not in self.ceded, f"two shards cede for edition {message.edition}"
                self.ceded[message.edition] = deepcopy(self, {id(self.ceded): self.ceded})
            case Graft():
                self._graft(self.ceded[message.edition])
            case Roster():
                self._muster(msgspec.msgpack.decode(payload, type=Muster))
            case Settle():
                self.over.add(Who(message.worker, message.incarnation))
            case Enter():
                self._enter(message.worker)
            case Push():
                held = message.bucket in self.pushed and message.bucket not in self.gives
                assert held, f"{account.shard} takes {message}, which it does not hold"
                account.pushes[who, message.clock, message.bucket] += 1
                self.staged.add((who, message.clock, message.bucket))
            case Commit():
                assert not account.doubt, f"{account.shard} counts {message}, and waits for {account.doubt}"
                account.commits[who, message.clock] += 1
                self._count(Step(who, message.clock, message.epoch, message.done))
            case Advance():
                stand = self.active[message.worker]
                stand.rests_until = max(stand.rests_until, message.clock)

    def _assign(self, payload: memoryview) -> None:
        registration, assignment = read_assignment(payload)
        account = self.account
        if assignment.edition <= account.edition:
            return
        self.cut = buckets(registration.layout, assignment.placement, registration.bucket_chunks)
        holders = assignment.holders or [bucket.shard for bucket in self.cut]
        had, first = {bucket.index for bucket in account.mine}, account.edition < 0
        mine = [bucket for bucket in self.cut if f"p{holders[bucket.index]}" == account.shard]
        assert first or {bucket.index for bucket in mine} <= had, (
            f"{account.shard} has only {sorted(had)}, and is told to hold {mine}"
        )
        if account.doubt:
            assert assignment.edition >= account.doubt, f"{account.shard} hears of {assignment.edition} only"
            account.moves += (len(mine) < len(had)) is bool(self.gives)
        account.edition, account.doubt, self.gives = assignment.edition, 0, frozenset()
        self._hold(mine)

    def _doubt(self, edition: int) -> None:
        account = self.account
        assert edition > account.edition, f"{account.shard} knows edition {account.edition}, not {edition}"
        account.doubt = edition

    def _hold(self, mine: Collection[Bucket]) -> None:
        self.account.mine = tuple(sorted(mine, key=lambda bucket: bucket.index))
        self.pushed = frozenset(bucket.index for bucket in mine if not bucket.frozen)
        self.account.trains = bool(self.pushed)
        self.staged = {push for push in self.staged if push[2] in self.pushed}

    def _graft(self, source: "Reader") -> None:
        """It gets what the source had when it ceded; one that held nothing stands where that one stood."""
        account, edition = self.account, source.account.doubt
        assert not account.doubt, f"{account.shard} takes on for {edition}, and waits for {account.doubt}"
        self._doubt(edition)
        assert source.roster == self.roster, f"{account.shard} and {source.account.shard} know other workers"
        if account.mine:
            ours, theirs = Counter(account.steps), Counter(source.account.steps)
            assert ours == theirs, (
                f"edition {edition}: only {account.shard} counts {ours - theirs}, only "
                + (f"{source.account.shard} {theirs - ours}")
            )
        else:
            account.steps = list(source.account.steps)
            self.active, self.former = deepcopy(source.active), dict(source.former)
            self.furthest = source.furthest
        self.over |= source.over
        self.staged |= {push for push in source.staged if push[2] in source.gives}
        self._hold([*account.mine, *(self.cut[index] for index in source.gives)])

    def _muster(self, muster: Muster) -> None:
        for step in muster.finished:
            who = Who(step.worker, step.incarnation)
            newest = max((s.clock for s in self.account.steps if s.who == who), default=-1)
            if not self.account.mine:
                continue  # what it knows, it will get from who cedes
            if self.roster.get(who.worker) == who.incarnation and newest < step.clock:
                self._count(Step(who, step.clock, step.epoch, step.done))
        named = {seat.worker: seat.incarnation for seat in muster.seats}
        for worker, incarnation in self.roster.items():
            if named.get(worker) != incarnation:
                self.over.add(Who(worker, incarnation))
                if worker in self.active:
                    self.former[worker] = self.active.pop(worker).finished
        for seat in muster.seats:
            if seat.founder:
                self.active.setdefault(seat.worker, Stand(0))
        self.roster = named

    def _enter(self, worker: str) -> None:
        """It begins where the slowest of the others stands, and never again at a clock that it has finished."""
        stand = self.active.get(worker)
        if stand is not None and stand.finished >= stand.rests_until:
            return
        own = stand.finished if stand is not None else self.former.get(worker, 0)
        others = [other.clock for name, other in self.active.items() if name != worker]
        furthest = max(self.furthest, *self.former.values(), 0)
        self.active[worker] = Stand(max(own, min(others, default=furthest)))

    def _count(self, step: Step) -> None:
        account = self.account
        lacking = [bucket for bucket in self.pushed if (step.who, step.clock, bucket) not in self.staged]
        assert not lacking, f"{account.shard} counts {step} without a push of the buckets {lacking}"
        earlier = [s for s in account.steps if s.who == step.who]
        assert all(s.clock < step.clock for s in earlier), (
            f"{account.shard} counts {step} after {earlier[-1]}"
        )
        low = self._low()
        # Where nothing is trained nobody is given parameters for a clock: who rests may not be heard of here yet.
        bound = self.bound if self.pushed else None
        if bound is not None and low is not None and step.who not in self.over:
            assert step.clock - low <= bound, f"{account.shard} counts {step}, and the slowest is at {low}"
        account.steps.append(step)
        stand = self.active[step.who.worker]
        stand.finished = max(stand.finished, step.clock + 1)


def read_all(
    histories: Mapping[str, Iterable[tuple[Message, memoryview]]], bound: int | None
) -> dict[str, Account]:
    """All shards; who gets buckets is read on when it is known what the source had."""
    ceded: dict[int, Reader] = {}
    readers = {shard: Reader(shard, bound, ceded) for shard in histories}
    reading = {shard: readers[shard].read(history) for shard, history in histories.items()}
    while reading:
        waits = {shard: next(records, None) for shard, records in reading.items()}
        reading = {shard: reading[shard] for shard, edition in waits.items() if edition is not None}
        asked = {edition for edition in waits.values() if edition is not None}
        assert len(reading) < len(waits) or asked & ceded.keys(), f"got from nobody, for the editions {asked}"
    return {shard: reader.account for shard, reader in readers.items()}


# -- the rules --------------------------------------------------------------------------------------------------


def every_bucket_lives_on_one_shard(accounts: Mapping[str, Account], holders: Sequence[int]) -> None:
    """Of those that know the newest edition; `holders` are its, or nobody's where nothing has ever moved."""
    newest = max(account.edition for account in accounts.values())
    for account in accounts.values():
        if holders and account.edition == newest and not account.doubt:
            ours = {bucket.index for bucket in account.mine}
            named = {bucket for bucket, holder in enumerate(holders) if f"p{holder}" == account.shard}
            assert ours == named, f"{account.shard} holds the buckets {ours}, and is to hold {named}"


def a_step_counts_on_all_or_none(accounts: Mapping[str, Account]) -> None:
    holding = [account for account in accounts.values() if account.mine]
    for one, other in pairwise(holding):
        ours, theirs = Counter(one.steps), Counter(other.steps)
        assert ours == theirs, f"only on {one.shard}: {ours - theirs}; only on {other.shard}: {theirs - ours}"


def what_was_acknowledged_is_in_the_logs(accounts: Mapping[str, Account], recorder: Recorder) -> None:
    for said in recorder.acknowledged | recorder.accepted:
        account = accounts[said.shard]
        if said.bucket >= 0:
            # Or its step counts, and came here with its bucket: a worker that had no answer from the former holder says
            # it once more. That no step counts without all of its pushes is seen where it counts.
            came = any((step.who, step.clock) == (said.who, said.clock) for step in account.steps)
            found = came or account.pushes[said.who, said.clock, said.bucket]
            assert found, f"{said} was acknowledged, and is not in the log"
        else:
            counted = sum((s.who, s.clock) == (said.who, said.clock) for s in account.steps)
            assert counted == 1, f"{said} was acknowledged, and counts {counted} times"
    for account in accounts.values():
        for (who, clock), found in account.commits.items():
            assert found == 1, f"{account.shard} has counted clock {clock} of {who} {found} times"
            said = Said(account.shard, who, clock, -1)
            assert said in recorder.accepted or said not in recorder.refused, (
                f"{said} was refused, and counts"
            )


def every_batch_counts_once(
    accounts: Mapping[str, Account], recorder: Recorder, batches: Collection[Batch]
) -> None:
    wanted = dict.fromkeys(batches, 1)
    for account in accounts.values():
        if not account.trains:
            continue
        found: Counter[Batch] = Counter()
        done: dict[tuple[Who, int], int] = {}
        for step in account.steps:
            before = done.get((step.who, step.epoch), 0)
            given = recorder.given.get((step.who, step.epoch), [])
            assert before < step.done <= len(given), f"{step} follows {before} batches, of {len(given)} given"
            found.update((step.epoch, batch) for batch in given[before : step.done])
            done[step.who, step.epoch] = step.done
        differ = {batch: found[batch] for batch in found | wanted if found[batch] != wanted.get(batch, 0)}
        assert not differ, f"in the parameters of {account.shard}, not once (epoch, batch): {differ}"
        for (who, epoch), claimed in recorder.claimed.items():
            counted = set(recorder.given.get((who, epoch), [])[: done.get((who, epoch), 0)])
            assert claimed <= counted, (
                f"{who} reported {claimed - counted} of epoch {epoch}: no step has them"
            )


def the_ledger_heard_of_every_batch_from_one_worker(recorder: Recorder, batches: Collection[Batch]) -> None:
    by: dict[Batch, set[Who]] = {}
    for (who, epoch), claimed in recorder.claimed.items():
        for batch in claimed:
            by.setdefault((epoch, batch), set()).add(who)
    for who, (_, epoch, done) in recorder.settled.items():
        for batch in recorder.given.get((who, epoch), [])[:done]:
            by.setdefault((epoch, batch), set()).add(who)
    doubled = {batch: whose for batch, whose in by.items() if len(whose) > 1}
    assert not doubled, f"more than one worker has finished these batches: {doubled}"
    lacking = set(batches) - by.keys()
    assert not lacking, f"nobody has reported these batches, and the epochs are over: {sorted(lacking)}"


def nobody_is_let_beyond_the_bound(
    accounts: Mapping[str, Account],
    recorder: Recorder,
    bound: int | None,
    counts: Callable[[str, str], int],
) -> None:
    """`counts(shard, log)` is how much of the log's history is the shard's in the end."""
    if bound is None:
        return
    for let in recorder.let:
        low = accounts[let.shard].lows[min(let.records, counts(let.shard, let.log))]
        assert low is None or let.clock - low <= bound, f"{let}, and the slowest stood at {low}"


def versions_never_go_back(recorder: Recorder) -> None:
    for (who, bucket), came in recorder.versions.items():
        for earlier, later in pairwise(came):
            back = [chunk for chunk, (a, b) in enumerate(zip(earlier, later, strict=True)) if b < a]
            assert not back, f"{who}: bucket {bucket} went back from {earlier} to {later}"


def applied_as_often_as_counted(account: Account, versions: Sequence[int], bound: int | None) -> None:
    """`versions` of the chunks that take steps: in sync an update for each clock, otherwise one for each step."""
    wanted = len({step.clock for step in account.steps}) if bound == 0 else len(account.steps)
    assert set(versions) <= {wanted}, f"{account.shard}: {wanted} updates count, {versions} are in its chunks"
