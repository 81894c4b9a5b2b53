"""One thread beside the training thread, for what needs neither Python's lock nor its order: packing.

A daemon, and not an executor of the standard library: those take no work once the main thread has ended, and a script
may train in another thread, or save its model in an exit handler.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Helper(Generic[T]):
    """Calls functions one after another. The thread starts with the first call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, function))
        return future

    def close(self) -> None:
        """End the thread behind what it has been told. Twice is the same as once."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del call, future, function  # they hold a step's memory until the next comes
