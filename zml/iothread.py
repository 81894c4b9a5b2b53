"""An event loop in a thread of its own, for what must not wait behind computing: a script's traffic, a shard's bulk."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

CLOSE_S = 5.0

T = TypeVar("T")


class IoThread:
    """Started by its constructor, ended by `close`. All methods may be called from any other thread."""

    def __init__(self, name: str) -> None:
        self.loop = uvloop.new_event_loop()
        self.tasks: set[asyncio.Task[Any]] = set()
        # A daemon: a script that ends without `close` (os._exit, a crash in native code) must not hang on it.
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine; its result as a future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end. Its own deadlines bound the wait; Ctrl-C ends it."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the loop, soon; what it raises goes to the loop's handler."""
        self.loop.call_soon_threadsafe(function, *args)

    def post_task(
        self, work: Coroutine[Any, Any, None], ended: Callable[[BaseException | None], None]
    ) -> None:
        """Start a coroutine behind what was posted before; `ended` gets None or what it raised, in the loop."""
        self.loop.call_soon_threadsafe(self._start, work, ended)

    def _start(self, work: Coroutine[Any, Any, None], ended: Callable[[BaseException | None], None]) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            ended(asyncio.CancelledError() if task.cancelled() else task.exception())

        task.add_done_callback(done)

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Cancel what runs, run `last`, end the thread. Twice is the same as once."""
        if self.loop.is_closed():
            if last is not None:
                last.close()
            return
        future = self.submit(self._wind_up(last))
        try:
            future.result(CLOSE_S)
        except (TimeoutError, concurrent.futures.TimeoutError):
            future.cancel()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(CLOSE_S)
            if not self.thread.is_alive():
                self.loop.close()

    async def _wind_up(self, last: Coroutine[Any, Any, None] | None) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=1.0)
        if last is not None:
            await last
