"""How long may a peer be silent? Long enough for the jitter that it has shown, and for our own.

Hayashibara et al., "The phi accrual failure detector", SRDS 2004: judge a silence by the intervals seen before.
Dadgar et al., "Lifeguard: local health awareness for more accurate failure detection", DSN 2018: a process that
was itself held up has not heard, which is no evidence against anybody. Reads no clock.
"""

from collections import deque
from math import sqrt
from typing import Final

SAMPLES: Final = 64
# Phi 8 lies at 5.6 deviations of a normal distribution; real pauses have longer tails.
DEVIATIONS: Final = 8.0


class Liveness:
    """One peer's silences. Times in seconds, by the caller's clock."""

    def __init__(self, now: float, *, interval_s: float, floor_s: float, most_s: float) -> None:
        self.last_heard = now
        self._least_s, self._longest_s = floor_s, most_s
        self._space(interval_s)
        # The newest gaps in microseconds: their sums are kept up to date, and stay exact because they are integers.
        self._gaps_us: deque[int] = deque(maxlen=SAMPLES)
        self._sum_us = 0
        self._squares = 0
        self._sampled_at = now
        self._limit_s = self._floor_s

    def _space(self, interval_s: float) -> None:
        self._interval_s = interval_s
        # Of pings that are spared two may be apart by nearly two intervals. Two more must be missed, however short the
        # floor.
        self._floor_s = max(self._least_s, 4 * interval_s)
        self._most_s = max(self._longest_s, self._floor_s)

    def pace(self, interval_s: float) -> None:
        """It is to be heard so often from now on."""
        self._space(interval_s)
        self._limit_s = max(self._limit_s, self._floor_s)  # a shorter one shows in what is heard

    @property
    def limit_s(self) -> float:
        """A longer silence means that the peer is lost."""
        return self._limit_s

    @property
    def deadline(self) -> float:
        return self.last_heard + self._limit_s

    def heard(self, now: float) -> None:
        """Anything at all has come from the peer."""
        self.last_heard = now
        gap = now - self._sampled_at
        # Under bulk traffic thousands of gaps near zero would say nothing about how long a pause can be.
        if gap * 2 >= self._interval_s:
            self._sampled_at = now
            self._limit_s = self._fit(round(gap * 1e6))

    def forgive(self, seconds: float, now: float) -> None:
        """We were held up ourselves for so long: that part of the silence is ours, and never more than all of it."""
        seconds = min(seconds, max(0.0, now - self.last_heard))
        self.last_heard += seconds
        self._sampled_at += seconds

    def resume(self, now: float) -> None:
        """The peer is back after a break that was no jitter."""
        self.last_heard = self._sampled_at = now

    def _fit(self, gap_us: int) -> float:
        gaps = self._gaps_us
        if len(gaps) == SAMPLES:
            self._sum_us -= gaps[0]
            self._squares -= gaps[0] ** 2
        gaps.append(gap_us)
        self._sum_us += gap_us
        self._squares += gap_us**2
        n = len(gaps)
        mean_s = self._sum_us / n / 1e6
        deviation_s = sqrt(n * self._squares - self._sum_us**2) / n / 1e6
        return min(max(mean_s + DEVIATIONS * deviation_s + self._interval_s, self._floor_s), self._most_s)
