"""`zml ps` as a process: its loop, the thread in which its shards live, sockets and signals. What it does is `ps`."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable
from dataclasses import replace
from inspect import isawaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..checkpoint.folder import is_seen
from ..compiled import compile_kernels
from ..compression import parse
from ..iothread import IoThread
from ..link import LISTENER, beside_each, bulk_endpoint, control_endpoint, listen
from ..metrics.endpoint import opened
from ..metrics.roles import ShardSource
from ..runs.rundir import shard_state
from ..tracing import process as tracing
from ..transport import Endpoint, Handler, Refusal
from .ps import Ps

if TYPE_CHECKING:
    from ..config import Settings


def serve(settings: Settings, shard: int) -> int:
    """Run a shard until its job is over. Raises ZmlError for a person to read."""
    import torch
    import uvloop

    gc.freeze()  # what torch has brought is never garbage, and much to look through at each collection
    torch.set_num_threads(1)  # chunks are small; the other cores belong to workers and other shards
    if parse(settings.compress).sparse:
        compile_kernels()
    tracing.begin(settings.trace, "shard", f"p{shard}", settings.job, Path(settings.run_dir).name)
    try:
        return uvloop.run(_serve(settings, shard))
    finally:
        tracing.end()


async def _serve(settings: Settings, shard: int) -> int:
    loop = asyncio.get_running_loop()
    with_http = opened(settings, reached_from=settings.coordinator)
    thread = IoThread("zml-bulk")
    try:

        async def in_bulk(function: Callable[[], Any]) -> Any:
            return await asyncio.wrap_future(thread.submit(_called(function)))

        def state(run_dir: str) -> Path | None:
            if settings.push_log == "off":
                return None
            return shard_state(settings.run_dir or run_dir, shard)

        def control(name: str, handler: Handler) -> Endpoint:
            return control_endpoint(settings, name, handler, keys=(f"p{shard}", LISTENER))

        async def another(name: str, handler: Handler) -> Endpoint:
            beside = replace(settings, bind=beside_each(settings.bind, name))
            return await asyncio.wrap_future(thread.submit(_listen(beside, name, handler)))

        def dial(name: str) -> Endpoint:
            return bulk_endpoint(settings, name, nobody, keys=(f"p{shard}", LISTENER), listens=False)

        def sees(folder: Path) -> bool:
            return settings.shared_folder == "auto" and is_seen(folder)

        ps = Ps(shard, settings, control, in_bulk, state, another, dial, sees)
        ps.metrics = with_http.url
        with_http.serve(ShardSource(ps, with_http.lag))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.add_signal_handler(number, ps.leave, signal.Signals(number).name)
        listener = await asyncio.wrap_future(thread.submit(_listen(settings, ps.name, ps.bulk)))
        try:
            return await ps.run(list(listener.addresses))
        finally:
            await asyncio.wrap_future(thread.submit(listener.close()))
    finally:
        await with_http.close()
        thread.close()


async def _listen(settings: Settings, name: str, handler: Handler) -> Endpoint:
    listener = bulk_endpoint(settings, name, handler)
    await listen(listener)
    return listener


def nobody(peer: str, message: Struct, payload: memoryview | None) -> None:
    raise Refusal("unexpected", "nobody asks here")


async def _called(function: Callable[[], Any]) -> Any:
    result = function()
    return await result if isawaitable(result) else result
