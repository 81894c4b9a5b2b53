"""What a member looks and measures with. Tests in simulated time, where there are neither threads nor sockets, have
others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import machine
from .findings import Check

KNOCK_S = 2.0

T = TypeVar("T")


async def in_thread(look: Callable[[], T]) -> T:
    """As asyncio.to_thread, but that the end of the process does not wait: a driver may hang for a minute."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = look()
        except Exception as failed:
            error = failed
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop has ended meanwhile

    threading.Thread(target=run, name="zml-examine", daemon=True).start()
    return await done


async def knock(address: str) -> str:
    """Why nobody answers at an address: is anything there at all?"""
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        return f"{address} is for members on one machine"
    try:
        async with asyncio.timeout(KNOCK_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except TimeoutError:
        return f"{address} drops what is sent to it: a firewall, or no such machine"
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    writer.close()
    return f"{address} is open, but what listens there does not let this member in, or hangs"


@dataclass(frozen=True, slots=True)
class Means:
    clock: Callable[[], float] = time.perf_counter  # that of uvloop has a resolution of 1 ms
    wall: Callable[[], float] = time.time
    knock: Callable[[str], Awaitable[str]] = knock
    look: Callable[[Callable[[], Any]], Awaitable[Any]] = in_thread  # where what takes time is done
    machine: Callable[[Path], list[Check]] = machine.examine


MEANS = Means()
