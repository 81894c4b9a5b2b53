"""An event loop of its own in a thread, and calls from one thread into the event loop of another.

Bulk has its own thread, so that heartbeats do not wait behind tensors; a script's training has no event loop at all.
The rule: every hand-over is bounded, in number and in time, in both directions, and says who did not take it.
"""

import asyncio
import concurrent.futures
import threading
import traceback
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog
import uvloop

from .errors import Congested, DeadlineExceeded, PeerLost

START_S: Final = 10.0

log = structlog.get_logger("zml.transport")

T = TypeVar("T")


class Handover:
    """Calls into one event loop from other threads, at most `most` of them under way. Its methods are thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, *, most: int = 1024) -> None:
        self.name = name
        self._loop = loop
        self._most = most
        self._lock = threading.Lock()
        self._under_way = 0

    @property
    def under_way(self) -> int:
        return self._under_way

    def post(self, function: Callable[..., object], *args: object) -> bool:
        """Have a function called there, soon, without waiting for it. False: too much waits, or the loop has ended."""
        if not self._take():
            return False
        try:
            self._loop.call_soon_threadsafe(self._run, function, args)
        except RuntimeError:  # the loop is closed
            self._give_back()
            return False
        return True

    def call(self, make: Callable[[], Awaitable[T]], *, timeout_s: float, what: str = "a call") -> T:
        """Run a coroutine there and block this thread until it has ended; `make` is called in the other thread.

        Raises what the coroutine raises; Congested; PeerLost if the loop has ended; DeadlineExceeded, and then the
        coroutine is cancelled.
        """
        future = self._begin(make)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise  # the coroutine's own
            raise DeadlineExceeded(self.name, what, timeout_s) from None
        except concurrent.futures.CancelledError:
            raise PeerLost(self.name, "it ended meanwhile") from None
        finally:
            future.cancel()  # after a deadline, or Ctrl-C in this thread; otherwise it has ended

    async def ask(self, make: Callable[[], Awaitable[T]], *, timeout_s: float, what: str = "a call") -> T:
        """As `call`, from another event loop, which goes on meanwhile. To cancel this cancels the coroutine."""
        future = self._begin(make)
        waiting = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait([waiting], timeout=timeout_s)
        finally:
            future.cancel()  # after a deadline, or if we are cancelled; otherwise it has ended
        if not done:
            raise DeadlineExceeded(self.name, what, timeout_s)
        if waiting.cancelled():
            raise PeerLost(self.name, "it ended meanwhile")
        return waiting.result()

    def _begin(self, make: Callable[[], Awaitable[T]]) -> "concurrent.futures.Future[T]":
        async def run() -> T:
            return await make()

        if not self._take():
            raise Congested(self.name, self._under_way)
        coroutine = run()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            self._give_back()
            raise PeerLost(self.name, "its event loop has ended") from None
        future.add_done_callback(lambda _: self._give_back())
        return future

    def _take(self) -> bool:
        with self._lock:
            if self._under_way >= self._most:
                return False
            self._under_way += 1
            return True

    def _give_back(self) -> None:
        with self._lock:
            self._under_way -= 1

    def _run(self, function: Callable[..., object], args: tuple[object, ...]) -> None:
        self._give_back()
        try:
            function(*args)
        except Exception as error:
            log.error(
                "a posted call failed", thread=self.name, traceback="".join(traceback.format_exception(error))
            )


class LoopThread:
    """A daemon thread with an event loop (uvloop) of its own. Objects made there belong there."""

    def __init__(self, name: str, *, most: int = 1024) -> None:
        self.name = name
        self._most = most
        self._handover: Handover | None = None
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> Handover:
        """Returns when the loop runs: the way into it."""
        self._thread.start()
        if not self._started.wait(START_S):
            raise DeadlineExceeded(self.name, "its start", START_S, sent=False)
        assert self._handover is not None
        return self._handover

    def stop(self, timeout_s: float = 10) -> None:
        """Cancel what runs there, end the loop, wait for the thread. Twice is the same as once.

        From within an event loop call it in an executor: it blocks. Raises DeadlineExceeded if the thread hangs.
        """
        if self._handover is None or not self._thread.is_alive():
            return
        assert self._stop is not None
        self._handover.post(self._stop.set)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineExceeded(self.name, "its end", timeout_s)

    def _main(self) -> None:
        async def until_stopped() -> None:
            self._stop = asyncio.Event()
            self._handover = Handover(asyncio.get_running_loop(), self.name, most=self._most)
            self._started.set()
            await self._stop.wait()

        # The runner cancels what is left and closes the loop.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(until_stopped())
