"""An event loop whose clock jumps: hours of timeouts in milliseconds, in one thread, the same every time.

When nothing is ready the clock moves to the next timer. When there is no timer either, nothing will ever
happen again: that is an error which names the tasks that wait, not a test that hangs. Work for another thread
is done on the spot, for a thread would finish when it likes. Sockets and pipes have no place here.

    result = simulate(main())
"""

import asyncio
import gc
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


class NothingWillHappen(AssertionError):
    """All tasks wait for each other, or the simulated time is over."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` starts at `start_s` and moves only when nothing is ready; it may move on for `limit_s`."""

    def __init__(self, start_s: float = 1000.0, limit_s: float = 24 * 3600.0) -> None:
        self._now_s = start_s
        self._end_s = start_s + limit_s
        self.unseen: dict[str, Any] | None = None  # the first error that no task has seen
        self._jumps = _Jumps(self)
        super().__init__(self._jumps)
        self.set_exception_handler(_keep_the_first)

    def time(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """The clock moves although something may be ready: a process that was stopped, a loop that lags."""
        self._now_s += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def raise_unseen(self) -> None:
        if self.unseen is not None:
            unseen, self.unseen = self.unseen, None
            raise AssertionError(f"{unseen['message']}: {unseen}") from unseen.get("exception")

    def _jump(self, timeout_s: float | None) -> None:
        self.raise_unseen()  # at once: what comes after a callback has failed means nothing
        if timeout_s is None:
            raise NothingWillHappen(
                f"nothing is ready and no timer is set at {self._now_s:g} s;{_waiting(self)}"
            )
        if self._now_s + timeout_s > self._end_s:
            raise NothingWillHappen(f"the simulated time is over at {self._now_s:g} s;{_waiting(self)}")
        self._now_s += timeout_s


class _Jumps(selectors.SelectSelector):
    """Where asyncio would sleep until something happens, time passes."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)  # the loop's own pipe, by which call_soon_threadsafe wakes it
        if not ready and timeout != 0:
            self._loop._jump(timeout)
        return ready


def _waiting(loop: asyncio.AbstractEventLoop) -> str:
    """One line per task: its name and the innermost line of it that waits."""
    lines = []
    for task in asyncio.all_tasks(loop):
        frames = task.get_stack()
        where = f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "not started"
        lines.append(
            f"\n  {task.get_name()} ({getattr(task.get_coro(), '__qualname__', '?')}) waits at {where}"
        )
    return " these wait:" + "".join(sorted(lines))


def _keep_the_first(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualTimeLoop)
    loop.unseen = loop.unseen or context


def simulate(main: Coroutine[Any, Any, T], *, limit_s: float = 24 * 3600.0) -> T:
    """Run `main` to its end in virtual time, then cancel what is left. Raises an error that nobody saw."""
    loop = VirtualTimeLoop(limit_s=limit_s)
    gc.freeze()  # what was there before is no garbage of this run: to look through it takes longer than most runs
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            result = runner.run(main)
        gc.collect()  # a task that failed unseen says so when it is collected
    finally:
        gc.unfreeze()
    loop.raise_unseen()
    return result
