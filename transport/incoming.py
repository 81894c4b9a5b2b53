"""The requests that one peer has sent us: each is handled at most once, whatever is resent.

The sender says below which id (its `floor`) all its requests have ended. Every id from there on that ever came is
remembered here, with its reply where that is small, so nothing is forgotten that could come again.
"""

from collections import OrderedDict
from enum import Enum, auto
from typing import Final

from .frames import Envelope
from .peers import Limits

WINDOW: Final = 16_384  # a sender has no request this far beyond its floor


class Verdict(Enum):
    NEW = auto()  # handle it; it counts as running from now on
    RUNNING = auto()  # it is being handled: its reply will come
    FORGOTTEN = auto()  # it was handled; the reply is not kept and must not be made again


class Incoming:
    def __init__(self, limits: Limits) -> None:
        self.floor = 1
        self._limits = limits
        self._running: dict[int, tuple[int, bool]] = {}  # id -> bytes of the payload, idempotent
        self._running_bytes = 0  # the sum of those bytes
        self._done: set[int] = set()  # ids from `floor` on, none of them in `_running`
        self._kept: OrderedDict[int, Envelope] = OrderedDict()  # answers to ids in `_done`, oldest first
        self._kept_bytes = 0  # of their payloads

    @property
    def running(self) -> int:
        return len(self._running)

    def judge(self, number: int, size: int, idempotent: bool) -> Verdict | Envelope | str:
        """What to do with a request that has come: an answer that was given before, or why it is refused unhandled."""
        assert number >= self.floor
        if number in self._running:
            return Verdict.RUNNING
        if number in self._done:
            kept = self._kept.get(number)
            if kept is not None:
                return kept
            if not idempotent:
                return Verdict.FORGOTTEN
        because = self._overload(size)
        if because:
            return because
        self._done.discard(number)
        self._running[number] = (size, idempotent)
        self._running_bytes += size
        return Verdict.NEW

    def finish(self, number: int, answer: Envelope) -> bool:
        """A request has been handled. False: its sender does not wait for the answer any more."""
        running = self._running.pop(number, None)
        if running is None:
            return False
        size, idempotent = running
        self._running_bytes -= size
        if number < self.floor:
            return False
        # The reply to an idempotent request can be made again; others are kept, unless they are long.
        self._done.add(number)
        if answer.payload is None or (not idempotent and answer.size <= self._limits.kept_bytes):
            self._keep(number, answer)
        return True

    def end(self, number: int, answer: Envelope) -> None:
        """This is the answer, in place of any other."""
        if number >= self.floor:
            self._drop_kept(number)
            self._done.add(number)
            self._keep(number, answer)

    def forget_below(self, floor: int) -> None:
        if floor <= self.floor:
            return
        # Walk over whichever is shorter: a peer may raise its floor by any amount.
        if floor - self.floor > len(self._done):
            ended = [number for number in self._done if number < floor]
        else:
            ended = [number for number in range(self.floor, floor) if number in self._done]
        for number in ended:
            self._done.remove(number)
            self._drop_kept(number)
        self.floor = floor

    def _overload(self, size: int) -> str:
        """Why this much more is too much; empty if it is not. An honest peer gets here only after it has given up
        requests that still run here: it keeps to what it was granted, and at twice that patience ends."""
        if len(self._running) >= 2 * self._limits.requests:
            return f"{len(self._running)} requests of this peer are running"
        if self._running_bytes + size > 2 * self._limits.credit_bytes:
            return f"{self._running_bytes} bytes of this peer are unanswered"
        return ""

    def _keep(self, number: int, answer: Envelope) -> None:
        self._kept[number] = answer
        self._kept_bytes += max(answer.size, 0)
        while len(self._kept) > self._limits.kept_replies or self._kept_bytes > self._limits.kept_bytes:
            self._drop_kept(next(iter(self._kept)))

    def _drop_kept(self, number: int) -> None:
        kept = self._kept.pop(number, None)
        if kept is not None:
            self._kept_bytes -= max(kept.size, 0)
