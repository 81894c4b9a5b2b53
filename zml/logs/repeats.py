"""What is said too often is counted: a token bucket per message, and "repeated 312 times" for what did not fit.

The first `burst` of a message pass at once, then one in `every_s` seconds. What is held back is told as its number
and its newest, as soon as there is a token for it, when its message has to make room for others, and at the end. So
nothing is dropped without a word, and memory is bounded: `most` messages, one held item of each. Pure: time comes in.

`Flood` measures twice: the very same line, which says nothing new the twentieth time, and lines of one message about
different things, of which many in a row are news (a thousand jobs that end), and many without end are a flood.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

SAME = (20, 10.0)  # lines at once, and seconds for each further one
ALIKE = (1000, 0.1)
MOST = 512


@dataclass(slots=True)
class Bucket(Generic[T]):
    tokens: float
    at: float  # when they were counted
    held: int = 0
    newest: T | None = None  # of those held


class Repeats(Generic[T]):
    def __init__(self, burst: int, every_s: float, most: int = MOST) -> None:
        self.burst = burst
        self.every_s = every_s
        self.most = most
        self._buckets: dict[Hashable, Bucket[T]] = {}  # asked for longest ago first
        self._holding: dict[Hashable, None] = {}  # keys of buckets that hold something
        self._due: list[tuple[int, T]] = []
        self._look_at = 0.0

    def passes(self, key: Hashable, now: float) -> bool:
        """Is it to be told now? If not, give it to `hold`."""
        bucket = self._buckets.pop(key, None) or Bucket(float(self.burst), now)
        self._buckets[key] = bucket  # now the last
        if len(self._buckets) > self.most:
            self._release(oldest := next(iter(self._buckets)))
            del self._buckets[oldest]
        self._refill(bucket, now)
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        self._release(key)
        return True

    def hold(self, key: Hashable, item: T) -> None:
        bucket = self._buckets[key]
        bucket.held += 1
        bucket.newest = item
        self._holding[key] = None

    def due(self, now: float) -> list[tuple[int, T]]:
        """(how many, the newest of them) of what was held back and is to be told by now, the oldest first."""
        if self._holding and now >= self._look_at:
            self._look_at = now + self.every_s
            for key in list(self._holding):
                bucket = self._buckets[key]
                self._refill(bucket, now)
                if bucket.tokens >= 1:
                    bucket.tokens -= 1
                    self._release(key)
        due, self._due = self._due, []
        return due

    def rest(self) -> list[tuple[int, T]]:
        """All that is held, at the end."""
        for key in list(self._holding):
            self._release(key)
        due, self._due = self._due, []
        return due

    def _refill(self, bucket: Bucket[T], now: float) -> None:
        bucket.tokens = min(float(self.burst), bucket.tokens + max(0.0, now - bucket.at) / self.every_s)
        bucket.at = now

    def _release(self, key: Hashable) -> None:
        bucket = self._buckets[key]
        if bucket.held and bucket.newest is not None:
            self._due.append((bucket.held, bucket.newest))
        bucket.held, bucket.newest = 0, None
        self._holding.pop(key, None)


class Flood(Generic[T]):
    """Both measures. What `held_by` names is to be held there, under the key that it gives."""

    def __init__(self) -> None:
        self.same: Repeats[T] = Repeats(*SAME)
        self.alike: Repeats[T] = Repeats(*ALIKE)

    def held_by(self, message: Hashable, detail: Hashable, now: float) -> tuple[Repeats[T], Hashable] | None:
        """None: it is to be told now, after what is due."""
        if not self.same.passes((message, detail), now):
            return self.same, (message, detail)
        return None if self.alike.passes(message, now) else (self.alike, message)

    def due(self, now: float) -> list[tuple[int, T]]:
        return self.same.due(now) + self.alike.due(now)

    def rest(self) -> list[tuple[int, T]]:
        return self.same.rest() + self.alike.rest()
