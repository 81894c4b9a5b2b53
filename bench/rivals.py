"""The ways that users have today: grpc.aio, and send and recv of torch.distributed over gloo. See `routes`."""

import threading
import time
from collections import deque
from typing import Any

from routes import PING_BYTES, WINDOW, LoopThread, in_flight, one_by_one

# -- grpc.aio ------------------------------------------------------------------------------------------------------

GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def serve_grpc(thread: LoopThread) -> str:
    """One unary method on raw bytes: no protobuf in the way."""
    import grpc

    async def push(request: bytes, _: Any) -> bytes:
        return b"k" if len(request) != PING_BYTES else request

    async def start() -> str:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        method = grpc.unary_unary_rpc_method_handler(push)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench", {"Push": method})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        thread.grpc_server = server  # type: ignore[attr-defined]  # a server that is collected stops
        return f"127.0.0.1:{port}"

    return str(thread.run(start()))


class GrpcAio:
    name = "grpc.aio"

    def __init__(self, address: str, thread: LoopThread) -> None:
        import grpc

        self._thread = thread

        async def connect() -> Any:
            self._channel = grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
            await self._channel.channel_ready()
            return self._channel.unary_unary("/bench/Push")

        self._call = thread.run(connect())

    def push(self, tensor: memoryview, count: int) -> None:
        message = bytes(tensor)  # what grpc takes; made once, as the others' buffer is
        self._thread.run(in_flight(lambda: self._call(message), count, WINDOW))

    def round_trips(self, count: int) -> list[float]:
        message = bytes(PING_BYTES)
        return list(self._thread.run(one_by_one(lambda: self._call(message), count)))

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        message = bytes(PING_BYTES)
        start = time.perf_counter()
        self._thread.run(in_flight(lambda: self._call(message), count, at_once))
        return time.perf_counter() - start

    def close(self) -> None:
        self._thread.run(self._channel.close())


# -- torch.distributed, gloo -----------------------------------------------------------------------------------------


def serve_gloo(port: int, largest: int) -> None:
    threading.Thread(target=_receive_gloo, args=(port, largest), daemon=True).start()


def _join_gloo(port: int, rank: int) -> Any:
    import datetime

    import torch.distributed as dist

    timeout = datetime.timedelta(minutes=1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timeout
    )
    return dist


def _receive_gloo(port: int, largest: int) -> None:
    import torch

    dist = _join_gloo(port, 1)
    buffer = torch.empty(largest, dtype=torch.uint8)
    order, reply = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8)
    while True:
        dist.recv(order, 0)
        length, count = order.tolist()
        for _ in range(count):
            dist.recv(buffer[:length], 0)
            dist.send(buffer[:length] if length == PING_BYTES else reply, 0)
        if not count:
            return


class Gloo:
    """`send` and `recv` of torch.distributed, one byte back per tensor."""

    name = "gloo"

    def __init__(self, port: int) -> None:
        import torch

        self._torch = torch
        self._dist = _join_gloo(port, 0)
        self._ack = torch.zeros(1, dtype=torch.uint8)

    def push(self, tensor: memoryview, count: int) -> None:
        message = self._torch.frombuffer(tensor, dtype=self._torch.uint8)
        self._order(tensor.nbytes, count)
        acks: deque[Any] = deque()
        for _ in range(count):
            acks.append(
                self._dist.irecv(self._torch.zeros_like(self._ack), 1)
            )  # a send waits for its receive
            self._dist.send(message, 1)
            if len(acks) >= WINDOW:
                acks.popleft().wait()
        for ack in acks:
            ack.wait()

    def round_trips(self, count: int) -> list[float]:
        message = self._torch.zeros(PING_BYTES, dtype=self._torch.uint8)
        self._order(PING_BYTES, count)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._dist.send(message, 1)
            self._dist.recv(message, 1)
            seconds.append(time.perf_counter() - start)
        return seconds

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        return 0.0

    def close(self) -> None:
        self._order(0, 0)
        self._dist.destroy_process_group()

    def _order(self, length: int, count: int) -> None:
        self._dist.send(self._torch.tensor([length, count], dtype=self._torch.int64), 1)
