"""Processes in one event loop that can be stopped, continued and killed, as SIGSTOP, SIGCONT and SIGKILL would.

Everything that a process does runs in a context (`contextvars`) that names it, for tasks and timers inherit the context
of whoever made them. The loop asks of each callback whose it is: that of a frozen process is kept until it thaws, that
of a dead one until the simulation is taken down. Messages are kept in the same queue: a frozen process finds its timers
overdue and its sockets full, in the order in which things happened.

Rule: what a process does between two callbacks cannot be torn apart; what it has sent before it died is on its way.
"""

import asyncio
import heapq
import warnings
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from tests.simulation import VirtualTimeLoop
from zml.transport.memory import Line, MemoryEndpoint, MemoryNetwork

from .faults import Boundary

T = TypeVar("T")


class Process:
    """One process. `frozen` and `dead` are read by the loop before each of its callbacks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False
        self.kept: deque[asyncio.Handle] = deque()
        self.endpoints: list[Endpoint] = []
        self.at_death: Callable[[], None] = lambda: None
        self.context = copy_context()
        self.context.run(WHOSE.set, self)

    def __repr__(self) -> str:
        return f"Process({self.name!r})"

    @property
    def stands_still(self) -> bool:
        return self.frozen or self.dead

    def run(self, main: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        return asyncio.get_running_loop().create_task(main, context=self.context)

    def kill(self) -> None:
        """From within one of its own callbacks it goes on to the end of that one, and nobody hears of it."""
        if self.dead:
            return
        self.dead = True
        for endpoint in self.endpoints:
            endpoint.die()
        self.at_death()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        if not self.dead:
            self._go_on()

    def bury(self) -> None:
        """At the end of a simulation: its tasks are cancelled like all others, which needs callbacks."""
        self.frozen = self.dead = False
        self._go_on()

    def _go_on(self) -> None:
        for handle in self.kept:
            if not handle.cancelled():
                handle._loop._ready.append(handle)  # type: ignore[attr-defined]
        self.kept.clear()


WHOSE: ContextVar[Process | None] = ContextVar("whose", default=None)
NOBODY = Context()  # of what belongs to no process: the network


class _Handle(asyncio.Handle):
    def _run(self) -> None:
        whose = self._context.get(WHOSE)  # type: ignore[attr-defined]
        if whose is not None and whose.stands_still:
            whose.kept.append(self)
        else:
            super()._run()


class _TimerHandle(asyncio.TimerHandle):
    def _run(self) -> None:
        whose = self._context.get(WHOSE)  # type: ignore[attr-defined]
        if whose is not None and whose.stands_still:
            whose.kept.append(self)
        else:
            super()._run()


class ProcessLoop(VirtualTimeLoop):
    """A virtual clock, and callbacks that belong to processes."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s=limit_s)
        self._jumps.select = self._select  # type: ignore[method-assign]

    def _select(self, timeout: float | None = None) -> list[Any]:
        # Nothing comes from outside: there are no threads here, and no signals worth a system call each time.
        if timeout != 0:
            self._jump(timeout)
        return []

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer


class Network(MemoryNetwork):
    """The in-memory network between such processes. `passing` is told of each message, at the sender and then at the
    receiver, and may kill the one or the other."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed, **options)
        self.passing: Callable[[Boundary, Process, bytes], None] | None = None
        self.recorder: Any = None
        self.spared = ""  # an endpoint on whose connections nothing is lost

    def endpoint(self, name: str, *, handler: Any, **options: Any) -> "Endpoint":
        if self.recorder is not None:
            handler = self.recorder.between(name, handler)
        return Endpoint(self, name, handler=handler, **options)

    def send(
        self, sender: MemoryEndpoint, line: Line, header: bytes, payload: memoryview | None, *, out: bool
    ) -> None:
        assert isinstance(sender, Endpoint)
        whose = sender.process
        if self.passing is not None and whose is not None:
            self.passing("sent", whose, header)
            if whose.dead:
                return
        loss = self.loss
        if line.dialler.name == self.spared:
            self.loss = 0.0
        # What is on its way does not wait for its sender.
        NOBODY.run(super().send, sender, line, header, payload, out=out)
        self.loss = loss


class Endpoint(MemoryEndpoint):
    """It belongs to the process that starts it."""

    process: Process | None = None

    async def start(self) -> None:
        self.process = WHOSE.get()
        if self.process is not None:
            self.process.endpoints.append(self)
        await super().start()

    def take(self, route: Any, header: bytes, payload: memoryview | None, key: str | None) -> None:
        whose = self.process
        if whose is None:
            super().take(route, header, payload, key)
        elif whose.stands_still:
            handle = _Handle(super().take, (route, header, payload, key), self.loop, whose.context)
            whose.kept.append(handle)
        else:
            whose.context.run(self._take, whose, route, header, payload, key)

    def _take(
        self, whose: Process, route: Any, header: bytes, payload: memoryview | None, key: str | None
    ) -> None:
        passing = self._network.passing  # type: ignore[attr-defined]
        if passing is not None:
            passing("arrives", whose, header)
        if not whose.dead:
            super().take(route, header, payload, key)
            if passing is not None:
                passing("handled", whose, header)

    async def request(self, peer: str, message: Any, payload: Any = None, *, timeout_s: float) -> Any:
        answer = await super().request(peer, message, payload, timeout_s=timeout_s)
        recorder = self._network.recorder  # type: ignore[attr-defined]
        if recorder is not None:
            recorder.heard(self.name, peer, message, answer.message)
        return answer


def live(main: Coroutine[Any, Any, T], processes: list[Process], *, limit_s: float) -> T:
    """As `simulation.simulate`, for a world of processes. `processes` may grow meanwhile."""
    loop = ProcessLoop(limit_s=limit_s)
    runner = asyncio.Runner(loop_factory=lambda: loop)
    try:
        result = runner.run(main)
        loop.raise_unseen()
        return result
    finally:
        # Whatever the dead say when they are woken to be cancelled is of no account.
        loop.set_exception_handler(lambda loop, context: None)
        for process in processes:
            process.bury()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that a task never came to its first step
            runner.close()
