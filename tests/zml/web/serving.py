"""The API over a fake desk, in a thread with a loop of its own: for clients that block, as commands do."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from tests.zml.web.desk import FakeDesk
from zml.web.server import Limits, Server, serve

T = TypeVar("T")


class Served:
    """`do` runs something where the desk lives, as the coordinator's loop would."""

    def __init__(self, desk: FakeDesk, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.desk = desk
        self.server = server
        self.loop = loop

    @property
    def url(self) -> str:
        return self.server.url

    def do(self, call: Callable[[], T]) -> T:
        async def there() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(30)

    def later(self, call: Callable[[], Any]) -> None:
        self.loop.call_soon_threadsafe(call)


@contextmanager
def served(folder: Path, bind: str = "127.0.0.1:0", **rest: Any) -> Iterator[Served]:
    """Raises what `serve` raises."""
    begun: concurrent.futures.Future[Served] = concurrent.futures.Future()
    over = threading.Event()

    async def main() -> None:
        desk = FakeDesk(folder)
        try:
            server = await serve(desk, bind, **rest)
        except BaseException as error:
            begun.set_exception(error)
            return
        begun.set_result(Served(desk, server, asyncio.get_running_loop()))
        await asyncio.to_thread(over.wait)
        await server.stop()

    thread = threading.Thread(target=lambda: uvloop.run(main()))
    thread.start()
    try:
        yield begun.result(30)
    finally:
        over.set()
        thread.join(30)
    assert not thread.is_alive()


__all__ = ["Limits", "Served", "served"]
