"""When a connection is pinged: often enough for both sides to know that it is there, and not while that shows anyway.

Whoever speaks and is spoken to needs no ping: each of thousands of members has its heartbeats. Reads no clock.
"""

from math import inf
from typing import Final

SPARED: Final = 7  # pings in a row, while messages go both ways; the next measures the round trip again


class Pings:
    """Of the side that dialled. Times in seconds, by the caller's clock."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self.due = inf
        self.rtt_s = 0.0  # smoothed; 0 before the first answer
        self.spoke = self.listened = False  # has anything gone, or come, since one was due?
        self._spared = 0
        self._number = 0  # of the newest
        self._sent_at = 0.0

    def begin(self, now: float) -> None:
        """The connection is there."""
        self.due = now + self.every_s

    def pace(self, every_s: float, now: float) -> None:
        self.every_s = every_s
        if self.due < inf:
            self.due = min(self.due, now + every_s)

    def end(self) -> None:
        self.due = inf

    def next(self, now: float, *, needed: bool) -> int | None:
        """One is due: its number, or None where it is spared. `needed`: something waits for what its answer says."""
        self.due = now + self.every_s
        spared = self.spoke and self.listened and self._spared < SPARED and not needed
        self.spoke = self.listened = False
        if spared:
            self._spared += 1
            return None
        self._spared = 0
        self._number += 1
        self._sent_at = now
        return self._number

    def answered(self, number: int, now: float) -> None:
        if number == self._number:
            rtt_s = now - self._sent_at
            self.rtt_s = rtt_s if self.rtt_s == 0 else 0.875 * self.rtt_s + 0.125 * rtt_s  # RFC 6298
