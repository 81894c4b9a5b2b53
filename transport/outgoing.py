"""The requests that we have sent one peer, or are to: in the order in which they were made, as many as it takes.

Rule: every one ends exactly once. Those that have left and not ended are never more than the peer said it takes, and
their payloads never more than the credit that it granted last. `floor` is the lowest id that has not ended; what is
sent is never a window beyond it, for the peer remembers all ids from there on.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from .events import Aborted, Event, Expired
from .incoming import WINDOW
from .peers import Limits

NEVER: Final = float("inf")
BEHIND_S: Final = 0.5  # between two looks, at least, while what came lies unread


class Pending:
    """A request that has not ended."""

    __slots__ = ("attempts", "deadline", "message", "payload", "resend_at", "size")

    def __init__(self, message: Struct, payload: memoryview | None, deadline: float) -> None:
        self.message = message
        self.payload = payload
        self.size = 0 if payload is None else payload.nbytes
        self.deadline = deadline
        self.attempts = 0  # 0: it has never left
        self.resend_at = NEVER


class Outgoing:
    """See the module. `requests` and `credit` are what the peer takes; they may change."""

    def __init__(self, limits: Limits, requests: int, credit: int) -> None:
        self.requests = requests
        self.credit = credit
        self.next = self.floor = 1
        self.outstanding = 0  # requests that have left and not ended
        self.outstanding_bytes = 0  # and their payloads: never above `credit`
        self.alarm = NEVER  # not later than any deadline or resend
        self._limits = limits
        self._pending: dict[int, Pending] = {}
        self._waiting: deque[int] = deque()  # those that have not left, oldest first; may hold ended ids

    def __contains__(self, number: int) -> bool:
        return number in self._pending

    @property
    def waiting(self) -> int:
        """Requests that have not left."""
        return len(self._pending) - self.outstanding

    def has_left(self, number: int) -> bool:
        """One that has not ended."""
        return (pending := self._pending.get(number)) is not None and pending.attempts > 0

    def take(self, message: Struct, payload: memoryview | None, deadline: float) -> int:
        number, self.next = self.next, self.next + 1
        self._pending[number] = Pending(message, payload, deadline)
        self._waiting.append(number)
        self.alarm = min(self.alarm, deadline)
        return number

    def ready(self) -> Iterator[tuple[int, Pending]]:
        """Those that may leave now, as long as the peer takes more; each of them has left then."""
        waiting = self._waiting
        while waiting:
            number = waiting[0]
            pending = self._pending.get(number)
            if pending is not None and not self._may_leave(number, pending.size):
                return
            waiting.popleft()
            if pending is not None:
                self.outstanding += 1
                self.outstanding_bytes += pending.size
                yield number, pending

    def _may_leave(self, number: int, size: int) -> bool:
        return (
            self.outstanding < self.requests
            and self.outstanding_bytes + size <= self.credit
            and number < self.floor + WINDOW
        )

    def left(self) -> list[tuple[int, Pending]]:
        """All that have left and not ended."""
        return [(number, pending) for number, pending in self._pending.items() if pending.attempts]

    def leaves(self, pending: Pending, now: float, rtt_s: float) -> bool:
        """It is sent at this moment; whether it was before."""
        wait_s = min(self._limits.resend_s * 2.0 ** min(pending.attempts, 16), self._limits.resend_most_s)
        # A link on which a reply takes long has no use for the same bytes twice.
        pending.resend_at = now + max(wait_s, 4 * rtt_s)
        pending.attempts += 1
        self.alarm = min(self.alarm, pending.resend_at)
        return pending.attempts > 1

    def settle(self, number: int) -> None:
        """It has ended."""
        pending = self._pending.pop(number)
        if pending.attempts:
            self.outstanding -= 1
            self.outstanding_bytes -= pending.size
        while self.floor < self.next and self.floor not in self._pending:
            self.floor += 1
        if not self._pending:
            self.alarm = NEVER

    def look(
        self, now: float, unread_s: float, *, resends: bool
    ) -> tuple[list[Event], list[tuple[int, Pending]]]:
        """Those whose time is over have ended; and those that are to be sent again, if anything may be now.

        What may lie unread, for up to `unread_s`, is no missing answer: the peer would do its work twice, or in vain.
        """
        expired: list[Event] = []
        again: list[tuple[int, Pending]] = []
        self.alarm = NEVER
        for number, pending in list(self._pending.items()):
            if now >= pending.deadline + unread_s:
                self.settle(number)
                expired.append(Expired(number, pending.attempts > 0))
                continue
            self.alarm = min(self.alarm, pending.deadline + unread_s)
            if not pending.attempts or now < pending.resend_at + unread_s:
                self.alarm = min(self.alarm, pending.resend_at + unread_s)
            elif resends:
                again.append((number, pending))
            else:
                pending.resend_at = NEVER  # all of them are sent again once the session is open
        if unread_s > 0.0:  # which grows as time does
            self.alarm = max(self.alarm, now + BEHIND_S)
        return expired, again

    def abort(self, because: str, *, only_left: bool = False) -> list[Event]:
        """All of them have ended, or those that have left; the others may still leave."""
        ended = [number for number, pending in self._pending.items() if pending.attempts or not only_left]
        for number in ended:
            self.settle(number)
        if not only_left:
            self._waiting.clear()
            self.alarm = NEVER
        return [Aborted(number, because) for number in ended]
