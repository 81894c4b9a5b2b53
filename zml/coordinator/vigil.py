"""When time is looked at that passes without anybody's word: leases that end, patience that is over.

Rule: before anybody is called silent what has come is read, and while more has come than can be read it is looked again
a little later. A look that is due sooner stays: whoever is called often would put it off for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

TICK_S = 0.001  # rounded, a deadline could be a little too early, and that again and again
BEHIND_S = 0.5  # until it is looked again who is silent, where more has come than was read


class Vigil:
    """One timer. `catch_up` is the endpoint's; `look` is told for how many seconds something may lie unread."""

    def __init__(self, catch_up: Callable[[], float], look: Callable[[float], None]) -> None:
        self._catch_up = catch_up
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self._at = inf  # when it is due
        self._quiet_until = 0.0
        self._over = False

    @property
    def is_set(self) -> bool:
        return self._timer is not None

    def look_at(self, at: float) -> None:
        """Look at this time, in the loop's, at the latest; inf: there is nothing to look for."""
        if self._over:
            return
        loop = asyncio.get_running_loop()
        at = max(at, loop.time() + TICK_S, self._quiet_until)
        if self._timer is not None:
            if self._at <= at:
                return
            self._timer.cancel()
            self._timer = None
        if at < inf:
            self._at, self._timer = at, loop.call_at(at, self._tick)

    def end(self) -> None:
        """Look no more. Twice is the same as once."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        unread_s = self._catch_up()
        if unread_s > 0:
            self._quiet_until = asyncio.get_running_loop().time() + BEHIND_S
        self._look(unread_s)
