"""How late an event loop wakes up: the first sign that something blocks it."""

from __future__ import annotations

import asyncio

from ..figures import count, none_yet
from .catalog import LAG

EVERY_S = 0.5


class Lag:
    """One loop's, from `start` to `stop`."""

    def __init__(self) -> None:
        self.counts = none_yet(LAG.bounds)
        self.sum_s = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + EVERY_S
        self.timer = loop.call_at(due, self._tick, loop, due)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        late_s = max(0.0, loop.time() - due)
        self.sum_s += late_s
        count(self.counts, LAG.bounds, late_s)
        self.start()
