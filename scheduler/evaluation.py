"""Evaluations: which worker computes which batch, and the sums of what they found.

Batches go out in order to whoever asks, a few at a time and fewer towards the end, so that nobody waits for one that
does not come and all are done at about the same time. A batch counts when its result comes in, once, from the worker
that holds it; what a lost worker held goes out again. Everybody is told the same totals.

Sums are exact: a double is a whole number of 2**-1074, whole numbers add up without rounding, and only the total is
rounded to a double, as `math.fsum` does. So they depend neither on the order in which results come nor on the number
of workers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple, TypeAlias

from .batches import Mismatch, Taken, Waiting
from .ids import Seat, WorkerId

MOST_BATCHES = 1_000_000  # in one evaluation: a peer names the number, and memory is allocated by it
MOST_NAMES = 32
NAME_BYTES = 64
MOST_AT_ONCE = 16
REMEMBERED = 64  # evaluations: a worker may ask for the totals after the others have gone on
UNIT_BITS = 1074  # the smallest double is 2**-1074


class Key(NamedTuple):
    """Which evaluation: the `number`th since the script began `epoch`, -1 before the first. The same on all workers."""

    epoch: int
    number: int

    def __str__(self) -> str:
        when = f"after epoch {self.epoch + 1}" if self.epoch >= 0 else "before the first epoch"
        return f"evaluation {self.number} {when}"


@dataclass(slots=True)
class Sum:
    """An exact sum of doubles. What is not finite is added up apart, and wins."""

    units: int = 0
    special: float = 0.0

    def add(self, value: float) -> None:
        if not isfinite(value):
            self.special += value
            return
        numerator, denominator = value.as_integer_ratio()  # the denominator is a power of two
        self.units += numerator << (UNIT_BITS + 1 - denominator.bit_length())

    @property
    def total(self) -> float:
        if self.special:
            return self.special
        try:
            return self.units / (1 << UNIT_BITS)  # the division of whole numbers rounds correctly
        except OverflowError:
            return float("inf") if self.units > 0 else float("-inf")


class Sums:
    """One `Sum` for each name."""

    def __init__(self) -> None:
        self.of: dict[str, Sum] = {}

    def why_not(self, names: Iterable[str]) -> str:
        """Why results of these names cannot be added; empty if they can."""
        names = list(names)
        for name in names:
            if not 1 <= len(name.encode(errors="replace")) <= NAME_BYTES:
                return f"a name must have 1 to {NAME_BYTES} bytes: {name[:NAME_BYTES]!r}"
        if len(self.of.keys() | set(names)) > MOST_NAMES:
            return f"there are more than {MOST_NAMES} names"
        return ""

    def add(self, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.of.setdefault(name, Sum()).add(value)

    @property
    def totals(self) -> dict[str, float]:
        return {name: self.of[name].total for name in sorted(self.of)}


@dataclass(frozen=True, slots=True)
class Totals:
    """Every batch is in."""

    totals: dict[str, float]


Answer: TypeAlias = Taken | Waiting | Totals | Mismatch


@dataclass(slots=True)
class Evaluation:
    """Every batch is in exactly one of: not taken yet (from `next` on), `back`, `leases`, done."""

    batches: int
    opener: WorkerId
    done: bytearray
    to_go: int
    next: int = 0
    back: list[int] = field(default_factory=list)  # from lost workers, the last one goes out first
    leases: dict[int, WorkerId] = field(default_factory=dict)
    sums: Sums = field(default_factory=Sums)

    def lease(self, worker: WorkerId, most: int) -> tuple[int, ...]:
        taken: list[int] = []
        while len(taken) < most and (self.back or self.next < self.batches):
            if self.back:
                taken.append(self.back.pop())
            else:
                taken.append(self.next)
                self.next += 1
        self.leases.update(dict.fromkeys(taken, worker))
        return tuple(taken)

    def held(self, worker: WorkerId) -> set[int]:
        return {batch for batch, owner in self.leases.items() if owner == worker}

    def take_back(self, worker: WorkerId) -> None:
        held = self.held(worker)
        for batch in held:
            del self.leases[batch]
        self.back = sorted([*self.back, *held], reverse=True)

    def check(self) -> None:
        rest = [*range(self.next, self.batches), *self.back, *self.leases]
        assert sorted([*rest, *(b for b, flag in enumerate(self.done) if flag)]) == list(range(self.batches))
        assert self.to_go == len(rest)


class Evaluations:
    """Those of one job that are going on, and the totals of the latest that are over."""

    def __init__(self) -> None:
        self.incarnations: dict[WorkerId, int] = {}
        self.going: dict[Key, Evaluation] = {}
        self.over: dict[Key, dict[str, float]] = {}  # the oldest first

    def members(self, seats: Iterable[Seat]) -> None:
        """The active workers of a new generation. What others held goes out again."""
        former, self.incarnations = self.incarnations, {seat.worker: seat.incarnation for seat in seats}
        for worker, incarnation in former.items():
            if self.incarnations.get(worker) != incarnation:
                self.release(worker)

    def release(self, worker: WorkerId, but: Key | None = None) -> bool:
        """This worker does something else now: what it held goes out again. Whether it held anything."""
        held = [e for key, e in self.going.items() if key != but and worker in e.leases.values()]
        for evaluation in held:
            evaluation.take_back(worker)
        return bool(held)

    def report(
        self, worker: WorkerId, key: Key, results: Iterable[tuple[int, Mapping[str, float]]]
    ) -> Mismatch | None:
        """Results of batches that this worker holds. All are taken or none; what is known already is passed over."""
        if key in self.over:
            return None
        evaluation = self.going.get(key)
        new: dict[int, Mapping[str, float]] = {}
        for batch, numbers in results:
            if evaluation is None or not 0 <= batch < evaluation.batches:
                return Mismatch(
                    f"{worker} has a result of batch {batch} of {key}, which nobody has given out"
                )
            if evaluation.done[batch]:
                continue
            if evaluation.leases.get(batch) != worker:
                holder = evaluation.leases.get(batch, "nobody")
                return Mismatch(f"{worker} has a result of batch {batch} of {key}, which {holder} holds")
            new[batch] = numbers
        if evaluation is None or not new:
            return None
        if because := evaluation.sums.why_not({name for numbers in new.values() for name in numbers}):
            return Mismatch(f"{worker}, batch {min(new)} of {key}: {because}")
        for batch, numbers in new.items():
            evaluation.sums.add(numbers)
            evaluation.done[batch] = 1
            evaluation.to_go -= 1
            del evaluation.leases[batch]
        if not evaluation.to_go:
            self._finish(key, evaluation)
        return None

    def ask(self, worker: WorkerId, key: Key, batches: int, holds: Iterable[int] = ()) -> Answer:
        """More batches for this worker, or the totals. Whoever asks here holds nothing elsewhere.

        `holds` are those that it has and has told no result of: what it was given beyond them was in an answer that
        never reached it, and is given to it once again.
        """
        assert worker in self.incarnations, f"{worker} is not a member"
        self.release(worker, but=key)
        if key in self.over:
            return Totals(self.over[key])
        evaluation = self.going.get(key)
        if evaluation is None:
            if not 0 <= batches <= MOST_BATCHES:
                return Mismatch(
                    f"{worker} sees {batches:,} batches in {key}; at most {MOST_BATCHES:,} can be kept"
                )
            if len(self.going) >= REMEMBERED:
                return Mismatch(f"{worker} begins {key}, and {len(self.going)} evaluations are going on")
            evaluation = self.going[key] = Evaluation(batches, worker, bytearray(batches), batches)
            if not batches:
                self._finish(key, evaluation)
                return Totals(self.over[key])
        if batches != evaluation.batches:
            other = evaluation.opener
            return Mismatch(f"{worker} sees {batches:,} batches in {key}, and {other} {evaluation.batches:,}")
        if missed := evaluation.held(worker) - set(holds):
            return Taken(tuple(sorted(missed)))
        left = len(evaluation.back) + evaluation.batches - evaluation.next
        fair = left // (2 * len(self.incarnations))
        if taken := evaluation.lease(worker, max(1, min(MOST_AT_ONCE, fair))):
            return Taken(taken)
        holders = set(evaluation.leases.values())
        owing = tuple(worker for worker in self.incarnations if worker in holders)
        return Waiting(owing, f"{key} has {evaluation.to_go:,} of {batches:,} batches to go")

    def _finish(self, key: Key, evaluation: Evaluation) -> None:
        del self.going[key]
        self.over[key] = evaluation.sums.totals
        while len(self.over) > REMEMBERED:
            del self.over[next(iter(self.over))]

    def check(self) -> None:
        """Every invariant; for tests."""
        for evaluation in self.going.values():
            evaluation.check()
            assert evaluation.to_go, "an evaluation is over and goes on"
            assert set(evaluation.leases.values()) <= self.incarnations.keys()
