"""The ways that are zml: its endpoints over tcp, over ipc, and through shared memory.

Both ends are as the runtime has them: a bulk endpoint in the event loop of its own thread, real messages (`Push` with
every field), the payload cut in messages of at most 4 MB, several under way, each acknowledged by an `Ok` once the
handler has had it.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from routes import LoopThread, in_flight, one_by_one

from zml.messages import AnyMessage, Ok, Push
from zml.transport import BULK, CONTROL, Limits
from zml.transport.endpoint import ZmqEndpoint

MB = 1 << 20
CUT = 4 * MB
WINDOW_BYTES = 16 * MB  # under way, as four tensors of the raw socket are
WINDOW_MOST = 16
OK = Ok()
NO_MEMORY = replace(BULK, slots=0)
# name, scheme of the address, limits of both ends
WAYS: tuple[tuple[str, str, Limits], ...] = (
    ("zml, tcp", "tcp", NO_MEMORY),
    ("zml, ipc", "ipc", NO_MEMORY),
    ("zml, one machine", "ipc", BULK),
)


class Taker:
    """A shard's handler, with or without what makes it expensive: adding the payload to a slab."""

    def __init__(self, apply: bool) -> None:
        self.apply = apply
        self._slab: Any = None

    def __call__(self, peer: str, message: msgspec.Struct, payload: memoryview | None) -> Ok:
        if self.apply and payload is not None:
            self._add(payload)
        return OK

    def _add(self, payload: memoryview) -> None:
        import numpy as np

        gradient = np.frombuffer(payload, dtype=np.float32)
        if self._slab is None:
            self._slab = np.zeros(CUT // 4, dtype=np.float32)
        np.add(self._slab[: gradient.size], gradient, out=self._slab[: gradient.size])


def serve(thread: LoopThread, folder: str) -> dict[str, Any]:
    """An endpoint for each way, one that applies what it takes, and one for control in a loop of its own."""

    async def start(name: str, bind: Sequence[str], limits: Limits, apply: bool = False) -> list[str]:
        endpoint = ZmqEndpoint(name, vocabulary=AnyMessage, handler=Taker(apply), bind=bind, limits=limits)
        await endpoint.start()
        return list(endpoint.addresses)

    def bind(scheme: str, number: int) -> str:
        return "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{folder}/{number}"

    addresses = {}
    for number, (name, scheme, limits) in enumerate(WAYS):
        addresses[name] = thread.run(start(f"p{number}", [bind(scheme, number)], limits))
    control = LoopThread()
    addresses["control"] = control.run(start("control", ["tcp://127.0.0.1:0"], CONTROL))
    addresses["bulk"] = thread.run(start("bulk", ["tcp://127.0.0.1:0"], NO_MEMORY, apply=True))
    return addresses


class Zml:
    """The pushing end of one way."""

    def __init__(
        self, name: str, peer: str, addresses: Sequence[str], limits: Limits, thread: LoopThread
    ) -> None:
        self.name = name
        self.peer = peer
        self.thread = thread
        thread.run(self._connect(addresses, limits))

    async def _connect(self, addresses: Sequence[str], limits: Limits) -> None:
        self.endpoint = ZmqEndpoint(
            f"to-{self.peer}", vocabulary=AnyMessage, handler=Taker(False), limits=limits
        )
        await self.endpoint.start()
        await self.endpoint.connect(self.peer, addresses)

    def push(self, tensor: memoryview, count: int) -> None:
        self.thread.run(self.push_async(tensor, count))

    async def push_async(self, tensor: memoryview, count: int) -> None:
        messages = [tensor[start : start + CUT] for start in range(0, tensor.nbytes, CUT)]
        window = max(4, min(WINDOW_MOST, WINDOW_BYTES // messages[0].nbytes))
        number = 0

        def call() -> Any:
            nonlocal number
            payload = messages[number % len(messages)]
            push = Push("demo", "w0", 1, clock=number // len(messages), bucket=number % len(messages))
            number += 1
            return self.endpoint.request(self.peer, push, payload, timeout_s=60)

        await in_flight(call, count * len(messages), window)

    def round_trips(self, count: int) -> list[float]:
        push = Push("demo", "w0", 1, clock=7, bucket=3)
        return list(
            self.thread.run(one_by_one(lambda: self.endpoint.request(self.peer, push, timeout_s=60), count))
        )

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        push = Push("demo", "w0", 1, clock=7, bucket=3)
        start = time.perf_counter()
        self.thread.run(
            in_flight(lambda: self.endpoint.request(self.peer, push, timeout_s=60), count, at_once)
        )
        return time.perf_counter() - start

    @property
    def shares_memory(self) -> bool:
        return self.endpoint.peers()[self.peer].shared_memory

    def close(self) -> None:
        self.thread.run(self.endpoint.close())


async def beats(way: Zml, every_s: float, seconds: float) -> list[float]:
    """Seconds from request to reply of small messages at a steady rate; they do not wait for each other."""
    loop = asyncio.get_running_loop()
    replies: list[float] = []
    push = Push("demo", "w0", 1, clock=7, bucket=3)

    async def beat() -> None:
        start = time.perf_counter()
        await way.endpoint.request(way.peer, push, timeout_s=60)
        replies.append(time.perf_counter() - start)

    end, due = loop.time() + seconds, loop.time()
    async with asyncio.TaskGroup() as group:
        while loop.time() < end:
            group.create_task(beat())
            due += every_s
            await asyncio.sleep(max(0.0, due - loop.time()))
    return replies
