"""Who was heard lately? Leases that allow for jitter, and an observer that doubts itself first.

A lease ends `lease_s` after the member was last heard, plus what the member's own jitter asks for: `jitter_factor`
times the worst lateness of its renewals, which is forgotten slowly. One fixed second would fence healthy members of a
loaded machine, whose p99 was seen to reach that second.

Leases run on the observer's own time, which stands still while nobody looks: if the observer comes later than the
deadline it had asked for, it was held up, and renewals may lie unread before it. What was left of each lease when it
last looked is then still left (Dadgar, Phillips, Currey, "Lifeguard: Local Health Awareness for More Accurate Failure
Detection", 2017). That is granted once until a renewal is heard again, so that a lost member is found in any case. An
observer with more to read than it has time for looks often, and is late nevertheless: it says so (`first_ended`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import NamedTuple, TypeAlias

from .ids import JobId, MemberId
from .rules import Rules

MEMORY = (
    0.98  # what a renewal leaves of the lateness seen before: at 5 renewals a second half of it after 7 s
)

Key: TypeAlias = tuple[JobId, MemberId]


@dataclass(slots=True)
class Lease:
    """One member's. Times are the observer's own."""

    serial: int  # tells it from every other lease, of the same member too
    heard: float
    ends: float
    usual_gap_s: float | None = None  # smoothed; None before the first renewal
    lateness_s: float = 0.0  # the worst of late, beyond the usual gap
    times: float = 1.0  # as long as the rules say, for a member that speaks so much seldomer

    def renew(self, at: float, rules: Rules, times: float) -> None:
        gap = at - self.heard
        usual = gap if self.usual_gap_s is None else self.usual_gap_s
        self.lateness_s = max(gap - usual, MEMORY * self.lateness_s)
        self.usual_gap_s = usual + (gap - usual) / 8  # the gain of TCP's round-trip estimate, RFC 6298
        self.heard, self.times = at, times
        lasts_s = times * rules.lease_s + rules.jitter_factor * self.lateness_s
        lasts_s = min(lasts_s, times * rules.lease_most_s)
        self.ends = max(self.ends, at + lasts_s)  # a renewal never shortens: the heap relies on it


class Ended(NamedTuple):
    """A lease that ran out, and for how long its member had not been heard."""

    key: Key
    silent_s: float


class Leases:
    """All leases of the machine. Call `look` first with every new `now`; a renewal costs O(1).

    Invariant: `_heap` holds every lease exactly once, under an end that it had at some time, hence at or before its
    present one. Entries of leases that were dropped are skipped when they come up.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._leases: dict[Key, Lease] = {}
        self._heap: list[tuple[float, int, Key]] = []  # end, serial, whose
        self._serials = count()
        self._looked = -inf  # when it last looked, in the caller's time
        self._stood_still_s = 0.0  # caller's time minus own time
        self._excused = False  # it was held up, and has heard nobody since

    def __contains__(self, key: Key) -> bool:
        return key in self._leases

    def __iter__(self) -> Iterator[Key]:
        return iter(self._leases)

    def look(self, now: float) -> None:
        """It is `now`. If nobody has looked in time, leases stand still for as long as nobody did."""
        assert now >= self._looked, f"time went back from {self._looked} to {now}"
        deadline = self.next_deadline()
        if deadline is not None and now - deadline > self.rules.lag_s and not self._excused:
            self._stood_still_s += now - self._looked
            self._excused = True
        self._looked = now

    def grant(self, key: Key, lasts_s: float | None = None) -> None:
        """A member came, or is to be heard within `lasts_s` for a reason of the observer's own."""
        assert key not in self._leases, key
        here = self._here
        ends = here + (self.rules.lease_s if lasts_s is None else lasts_s)
        lease = self._leases[key] = Lease(next(self._serials), here, ends)
        heappush(self._heap, (lease.ends, lease.serial, key))

    def renew(self, key: Key, times: float = 1.0) -> None:
        """A member was heard, and will be again within `times` the usual."""
        self._leases[key].renew(self._here, self.rules, times)
        self._excused = False

    def drop(self, key: Key) -> None:
        """A member is gone, and known to be."""
        del self._leases[key]

    def silent_s(self, key: Key) -> float:
        return self._here - self._leases[key].heard

    def is_silent(self, key: Key) -> bool:
        """May it be given up for another that asks for its place?"""
        return self.silent_s(key) >= self._leases[key].times * self.rules.silent_s

    def first_ended(self, unread_s: float = 0.0) -> Ended | None:
        """The lease that ran out first and was not dropped yet. What came within the last `unread_s` was not read, and
        may be renewals: leases that were not over before are not over."""
        # In the caller's time, as in `next_deadline`: rounded otherwise, a lease would be due and not over.
        deadline = self.next_deadline()
        if deadline is None or deadline > self._looked - unread_s:
            return None
        _, _, key = self._heap[0]
        return Ended(key, self.silent_s(key))

    def ended(self) -> list[Ended]:
        """The leases that have run out, the earliest first; they are dropped."""
        found = []
        while (first := self.first_ended()) is not None:
            found.append(first)
            self.drop(first.key)
        return found

    def next_deadline(self) -> float | None:
        """When the earliest lease ends, in the caller's time."""
        first = self._first()
        return first[0] + self._stood_still_s if first is not None else None

    @property
    def _here(self) -> float:
        return self._looked - self._stood_still_s

    def _first(self) -> tuple[float, int, Key] | None:
        """The entry of the lease that ends first, after bringing up to date every entry before it."""
        while self._heap:
            end, serial, key = self._heap[0]
            lease = self._leases.get(key)
            if lease is None or lease.serial != serial:
                heappop(self._heap)
            elif lease.ends > end:
                heapreplace(self._heap, (lease.ends, serial, key))
            else:
                return self._heap[0]
        return None


class Unwatched(Leases):
    """The leases while a journal is read: who fell silent is written there, and nobody is heard.

    A shard's place is given away when it was silent for long enough; that it was, where it happened, is settled too.
    """

    def look(self, now: float) -> None:
        self._looked = now

    def is_silent(self, key: Key) -> bool:
        return True

    def silent_s(self, key: Key) -> float:
        return inf
