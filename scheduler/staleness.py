"""When may a worker go on? Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server", NIPS 2013.

A worker that has finished clocks 0 .. c-1 stands at clock c. With the bound s it may compute clock c once every active
worker has finished clock c - s - 1, that is once low >= c - s, where low is where the slowest active worker stands:

    s = 0     BSP: nobody starts a clock before all have finished the one before it
    s > 0     SSP: nobody starts a clock more than s ahead of the slowest, so nobody ever stands more than s + 1 ahead
    s = None  asynchronous: nobody waits

In BSP the mean over clock t is complete when low > t. Each shard has a gate of its own; it counts, and knows no time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .ids import WorkerId


class Seat(Protocol):
    """One worker of the roster; rosters are in order of seniority."""

    @property
    def worker(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def founder(self) -> bool: ...


@dataclass(slots=True)
class Stand:
    """Where one active worker stands. While it rests nobody waits for it below `rests_until`."""

    finished: int  # every clock below it
    rests_until: int = 0

    @property
    def clock(self) -> int:
        return max(self.finished, self.rests_until)


@dataclass(frozen=True, slots=True)
class Account:
    """A gate in plain numbers and names, from which another like it is made."""

    incarnations: dict[str, int]
    active: dict[str, tuple[int, int]]  # finished, rests_until
    former: dict[str, int]
    ranks: dict[str, int]
    next_rank: int
    highest_low: int


W = TypeVar("W", bound=str)


class Gate:
    """Who stands where, and who has to wait for whom. Not thread-safe.

    Invariants: only workers of the newest roster are active. `low` never falls while anybody is active, so a clock that
    was complete stays complete, and a worker that was let go stays within its bound. No clock of one worker is ever
    used twice: it never enters below a clock that it has finished, in whatever incarnation.
    """

    def __init__(self, bound: int | None) -> None:
        assert bound is None or bound >= 0, bound
        self.bound = bound
        self.incarnations: dict[WorkerId, int] = {}  # the newest roster, in order of seniority
        self.active: dict[WorkerId, Stand] = {}  # those of the roster that are waited for
        self.former: dict[WorkerId, int] = {}  # who left: every clock below it is finished
        self.ranks: dict[WorkerId, int] = {}  # of all who ever were in a roster; the senior's is the lowest
        self._next_rank = 0
        self.low: int | None = None  # where the slowest active worker stands; None while nobody is active
        self.highest_low = 0  # the furthest that `low` ever was

    # -- who takes part ------------------------------------------------------------------------------

    def roster(self, seats: Iterable[Seat]) -> None:
        """The workers of a new generation. Whoever is not in it, or in it as a new incarnation, is waited for no more.

        A founder is waited for from clock 0 on, before it has said a word; any other worker once it has entered.
        """
        seats = list(seats)
        named = {WorkerId(seat.worker): seat.incarnation for seat in seats}
        for worker in list(self.active):
            if named.get(worker) != self.incarnations[worker]:
                self.former[worker] = self.active.pop(worker).finished
        for seat in seats:
            worker = WorkerId(seat.worker)
            if self.incarnations.get(worker) != seat.incarnation:
                self.ranks[worker] = self._next_rank
                self._next_rank += 1
            if seat.founder and worker not in self.active:
                self.active[worker] = Stand(0)
        self.incarnations = named
        self._look()

    def enter(self, worker: WorkerId) -> int:
        """The clock at which this worker begins; from there on it is waited for. Twice is the same as once.

        Whoever comes late, or comes back from a rest, begins where the slowest of the others stands; if there are none,
        where the furthest got.
        """
        assert worker in self.incarnations, f"{worker} is not in the roster"
        stand = self.active.get(worker)
        if stand is not None and stand.finished >= stand.rests_until:
            return stand.finished
        own = stand.finished if stand is not None else self.former.get(worker, 0)
        others = [other.clock for name, other in self.active.items() if name != worker]
        furthest = max(self.highest_low, *self.former.values(), 0)
        self.active[worker] = Stand(max(own, min(others, default=furthest)))
        self._look()
        return self.active[worker].finished

    # -- going on ------------------------------------------------------------------------------------

    def finish(self, worker: WorkerId, clock: int) -> None:
        """This worker has finished `clock`, and every clock below it. Twice is the same as once."""
        stand = self.active[worker]
        stand.finished = max(stand.finished, clock + 1)
        self._look()

    def advance(self, worker: WorkerId, to_clock: int) -> None:
        """This worker rests: nobody waits for it below `to_clock`. Twice is the same as once."""
        stand = self.active[worker]
        stand.rests_until = max(stand.rests_until, to_clock)
        self._look()

    def frontier(self, worker: WorkerId) -> int:
        """The clock at which an active worker stands: it has finished, or will never compute, every clock below it."""
        return self.active[worker].clock

    def may_start(self, worker: WorkerId, clock: int) -> bool:
        """May this worker compute `clock`, with parameters that hold all it is entitled to see?"""
        return self.bound is None or self.low is None or self.low >= clock - self.bound

    def waiting_for(self, clock: int) -> list[WorkerId]:
        """Who keeps `clock` from being computed, the senior first; nobody when it may be."""
        if self.bound is None:
            return []
        behind = clock - self.bound
        return [w for w in self.incarnations if w in self.active and self.active[w].clock < behind]

    # -- seniority -----------------------------------------------------------------------------------

    def senior(self) -> WorkerId | None:
        """The worker of the roster that was admitted first."""
        return next(iter(self.incarnations), None)

    def in_seniority(self, workers: Iterable[W]) -> list[W]:
        """In the order in which gradients are summed, so that a sum can be repeated bit for bit.

        Also for workers that have left: a step that was acknowledged counts, whatever became of its worker.
        """
        return sorted(workers, key=lambda worker: self.ranks[WorkerId(worker)])

    # -- coming back ---------------------------------------------------------------------------------

    def account(self) -> Account:
        """All that it knows."""
        active = {str(worker): (stand.finished, stand.rests_until) for worker, stand in self.active.items()}
        return Account(
            {str(worker): incarnation for worker, incarnation in self.incarnations.items()},
            active,
            {str(worker): clock for worker, clock in self.former.items()},
            {str(worker): rank for worker, rank in self.ranks.items()},
            self._next_rank,
            self.highest_low,
        )

    def restore(self, account: Account) -> None:
        """Become the gate that gave this account. Its bound is one's own."""
        self.incarnations = {WorkerId(worker): n for worker, n in account.incarnations.items()}
        self.active = {WorkerId(worker): Stand(*stand) for worker, stand in account.active.items()}
        self.former = {WorkerId(worker): clock for worker, clock in account.former.items()}
        self.ranks = {WorkerId(worker): rank for worker, rank in account.ranks.items()}
        self._next_rank, self.highest_low = account.next_rank, account.highest_low
        self._look()

    def _look(self) -> None:
        self.low = min((stand.clock for stand in self.active.values()), default=None)
        self.highest_low = max(self.highest_low, self.low or 0)
