"""What the tests over real sockets share: a small vocabulary, parties that remember, and both event loops."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import structlog
import uvloop

from zml.transport import BULK, Admit, Keys, Limits, Refusal, Reply, ZmqEndpoint

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
# Short enough for tests that wait for a loss, long enough for two busy cores.
QUICK = replace(BULK, ping_s=0.1, silence_s=1.0, silence_most_s=5.0, resend_s=0.5, forget_s=5.0)
PATIENCE_S = 60.0  # no test waits so long; where one does, something hangs


class Echo(msgspec.Struct, frozen=True, tag=True):
    idempotent: ClassVar[bool] = True
    number: int


class Add(msgspec.Struct, frozen=True, tag=True):
    """Not idempotent: counted by whoever handles it."""

    number: int


class Fail(msgspec.Struct, frozen=True, tag=True):
    how: str


class Done(msgspec.Struct, frozen=True, tag=True):
    number: int


Vocabulary = Echo | Add | Fail | Done


class Party:
    """An endpoint, and all that it was told."""

    def __init__(
        self,
        name: str,
        bind: Sequence[str] = (),
        *,
        keys: Keys | None = None,
        limits: Limits = QUICK,
        admit: Admit | None = None,
    ) -> None:
        self.told: list[str] = []
        self.handled: list[int] = []
        self.held: list[memoryview | None] = []
        self.gate: asyncio.Event | None = None  # handlers of Add wait for it, where there is one
        self.changed = asyncio.Event()
        self.endpoint = ZmqEndpoint(
            name,
            vocabulary=Vocabulary,
            handler=self.handle,
            bind=bind,
            keys=keys,
            limits=limits,
            on_found=lambda peer: self.tell(f"found {peer}"),
            on_lost=lambda peer, because: self.tell(f"lost {peer}: {because}"),
            admit=admit,
        )

    def tell(self, what: str) -> None:
        self.told.append(what)
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until this holds; looks again whenever something has happened here, and often enough otherwise."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                try:
                    async with asyncio.timeout(0.02):
                        await self.changed.wait()
                except TimeoutError:
                    pass

    def handle(
        self, peer: str, message: msgspec.Struct, payload: memoryview | None
    ) -> Reply | Awaitable[Reply]:
        self.changed.set()
        match message:
            case Echo(number):
                return Done(number), payload
            case Add(number):
                self.handled.append(number)
                self.held.append(payload)
                return self.wait(number) if self.gate is not None else Done(number)
            case Fail("refuse"):
                raise Refusal("full", "no room")
            case Fail("raise"):
                secret = "a patient's name"
                raise RuntimeError(f"broken, and {len(secret)} characters stay here")
            case Fail("later"):
                return self.fail_later()
            case Fail("nothing"):
                return None
            case Fail("long"):
                return Fail("x" * 5000)
        raise AssertionError(message)

    async def wait(self, number: int) -> Reply:
        assert self.gate is not None
        await self.gate.wait()
        return Done(number)

    async def fail_later(self) -> Reply:
        await asyncio.sleep(0)
        raise Refusal("later", "on second thoughts")

    def lost(self) -> list[str]:
        return [what for what in self.told if what.startswith("lost")]


@asynccontextmanager
async def running(*parties: Party) -> AsyncIterator[None]:
    """Start them, and close them in the end, the last one first."""
    async with asyncio.timeout(PATIENCE_S):
        for party in parties:
            await party.endpoint.start()
        try:
            yield
        finally:
            for party in reversed(parties):
                await party.endpoint.close()


def run(main: Coroutine[Any, Any, None], loop: str = "uvloop") -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main)


def quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
