"""Where spans wait to be sent. Rule: `emit` never waits and never raises; what finds no room is dropped, and counted.

A thread takes them in batches to `send`, which may take as long as it likes. The thread is a daemon: a receiver that
hangs holds no process back for longer than `close` allows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from .span import Span

SAY_AGAIN_S = 60.0
STUCK_S = 1.0  # a receiver that is well has taken a batch by then
THREAD = "zml-traces"

log = structlog.get_logger()


class Outlet:
    """One process'. Threads may emit side by side."""

    def __init__(
        self,
        send: Callable[[list[Span]], bool],
        *,
        most: int = 2048,
        batch: int = 512,
        delay_s: float = 5.0,
    ) -> None:
        """`send` returns whether they are there. `most` spans wait, and `delay_s` at most unless there are `batch`."""
        self.send = send
        self.most = most
        self.batch = max(1, min(batch, most))
        self.delay_s = delay_s
        self.waiting: deque[Span] = deque()
        self.sent = 0
        self.dropped = 0
        self.closing = False
        self.said_at: float | None = None
        self.failing = False  # the last batch did not arrive
        self.sending: list[Span] = []
        self.sending_since = 0.0
        self.lock = threading.Condition()
        # At once, and not with the first span: that may come when the interpreter ends, and starts no threads any more.
        self.thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self.thread.start()

    def emit(self, spans: Sequence[Span]) -> None:
        """All of them, or none: half a step is no picture."""
        with self.lock:
            if self.closing or len(self.waiting) + len(spans) > self.most:
                self.dropped += len(spans)
                return
            self.waiting.extend(spans)
            if len(self.waiting) >= self.batch:
                self.lock.notify()

    def _run(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.closing or len(self.waiting) >= self.batch, self.delay_s)
                spans = [self.waiting.popleft() for _ in range(min(self.batch, len(self.waiting)))]
                if not spans and self.closing:
                    return
                self.sending, self.sending_since = spans, time.monotonic()
            if spans:
                self._send(spans)

    def _send(self, spans: list[Span]) -> None:
        because = "the receiver did not take them"
        try:
            arrived = self.send(spans)
        except Exception as error:  # whatever it is, it is not worth a step
            arrived, because = False, f"{type(error).__name__}: {error}"
        with self.lock:
            self.failing = not arrived
            if not self.sending:  # given up by `close`
                return
            self.sending = []
            if arrived:
                self.sent += len(spans)
                return
            self.dropped += len(spans)
            dropped, now = self.dropped, time.monotonic()
            if self.said_at is not None and now - self.said_at < SAY_AGAIN_S:
                return
            self.said_at = now
        log.warning("spans are lost", spans=dropped, because=because)

    def close(self, within_s: float) -> bool:
        """Send what waits, if that takes no longer. A receiver that takes nothing is given a quarter of it. False:
        something is lost."""
        with self.lock:
            self.closing = True
            self.lock.notify()
            stuck = bool(self.sending) and time.monotonic() - self.sending_since > STUCK_S
            limit_s = within_s / 4 if self.failing or stuck else within_s
        self.thread.join(limit_s)
        with self.lock:
            self.dropped += len(self.waiting) + len(self.sending)
            self.waiting.clear()
            self.sending = []
        return self.dropped == 0
