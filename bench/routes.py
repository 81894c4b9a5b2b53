"""The ways that bytes can go from one process to another, those that are not zml: each has two ends.

The accepting ends run in threads of the peer process (`serve_*` return the address), the pushing ends in the
measuring process. All do the same work: a tensor of N bytes leaves from a buffer that is used again and again, is
received into memory that is used again where the way allows it, and is acknowledged; at most `WINDOW` tensors
are under way.
"""

import asyncio
import ctypes
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

WINDOW = 4
HEADER = struct.Struct("<Q")
PING_BYTES = 60


class Route(Protocol):
    """The pushing end. `push` returns when every one of `count` tensors is acknowledged."""

    name: str

    def push(self, tensor: memoryview, count: int) -> None: ...

    def round_trips(self, count: int) -> list[float]:
        """Seconds of each of `count` exchanges of 60 bytes, one after the other. Empty: this way has none."""

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        """Seconds for all of them, so many under way at a time. 0: this way can only do one after the other."""

    def close(self) -> None: ...


class LoopThread:
    """An asyncio loop in a thread, for the ways that need one, on both sides."""

    def __init__(self) -> None:
        import uvloop

        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine: Any, timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)


# -- memcpy ----------------------------------------------------------------------------------------------------


class Memcpy:
    """No other process at all: one copy into memory that is used again. The ceiling."""

    name = "memcpy"

    def __init__(self, largest: int) -> None:
        self._target = bytearray(largest)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._target))

    def push(self, tensor: memoryview, count: int) -> None:
        source = ctypes.addressof(ctypes.c_char.from_buffer(tensor))
        for _ in range(count):
            ctypes.memmove(self._address, source, tensor.nbytes)

    def round_trips(self, count: int) -> list[float]:
        return []

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        return 0.0

    def close(self) -> None:
        pass


# -- raw sockets -------------------------------------------------------------------------------------------------


def serve_tcp(largest: int) -> tuple[str, int]:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept_tcp, args=(listener, largest), daemon=True).start()
    host, port = listener.getsockname()
    return host, port


def _accept_tcp(listener: socket.socket, largest: int) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_receive_tcp, args=(connection, largest), daemon=True).start()


def _receive_tcp(connection: socket.socket, largest: int) -> None:
    buffer = memoryview(bytearray(largest))
    header = memoryview(bytearray(HEADER.size))
    while _fill(connection, header):
        length = HEADER.unpack(header)[0]
        _fill(connection, buffer[:length])
        if length == PING_BYTES:
            connection.sendall(buffer[:length])
        else:
            connection.sendall(b"k")


def _fill(connection: socket.socket, view: memoryview) -> bool:
    """Receive exactly this much; False at the end of the stream."""
    while view.nbytes:
        received = connection.recv_into(view)
        if not received:
            return False
        view = view[received:]
    return True


class RawTcp:
    """`sendall` and `recv_into` a buffer used again, one byte back per tensor: what the others are compared with.

    `tuned` does what zml does, too: it cuts a tensor in messages of 4 MB, each acknowledged, so that its receiver's
    buffer fits the cache, and keeps the kernel's send buffer small.
    """

    def __init__(self, address: Sequence[Any], *, tuned: bool = False) -> None:
        self.name = "raw TCP, tuned" if tuned else "raw TCP"
        self._cut = (4 << 20) if tuned else None
        self._socket = socket.socket()
        if tuned:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 512 << 10)
        self._socket.connect((address[0], address[1]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def push(self, tensor: memoryview, count: int) -> None:
        cut = self._cut or tensor.nbytes
        outstanding = 0
        for _ in range(count):
            for start in range(0, tensor.nbytes, cut):
                message = tensor[start : start + cut]
                if outstanding >= WINDOW:
                    outstanding -= len(self._socket.recv(outstanding))
                self._socket.sendall(HEADER.pack(message.nbytes))
                self._socket.sendall(message)
                outstanding += 1
        while outstanding:
            outstanding -= len(self._socket.recv(outstanding))

    def round_trips(self, count: int) -> list[float]:
        message, reply = HEADER.pack(PING_BYTES) + bytes(PING_BYTES), memoryview(bytearray(PING_BYTES))
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._socket.sendall(message)
            _fill(self._socket, reply)
            seconds.append(time.perf_counter() - start)
        return seconds

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        return 0.0

    def close(self) -> None:
        self._socket.close()


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


async def in_flight(call: Callable[[], Any], count: int, window: int) -> None:
    """Await `call()` `count` times, `window` of them at once."""
    left = count

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await call()

    await asyncio.gather(*(caller() for _ in range(min(window, count))))


async def one_by_one(call: Callable[[], Any], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - start)
    return seconds


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
