"""The ways that bytes can go from one process to another, those that are not zml: each has two ends.

The accepting ends run in threads of the peer process (`serve_*` return the address), the pushing ends in the
measuring process. All do the same work: a tensor of N bytes leaves from a buffer that is used again and again, is
received into memory that is used again where the way allows it, and is acknowledged; at most `WINDOW` tensors
are under way.
"""

import asyncio
import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

WINDOW = 4
HEADER = struct.Struct("<Q")
PING_BYTES = 60
APART = (1 << 64) - 1  # instead of a length: the receiving thread is to keep to the last core


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
        if length == APART:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            continue
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
    buffer fits the cache, and keeps the kernel's send buffer small. `apart` keeps the two ends on different cores,
    as on different machines: on one core a round trip has nobody to wake, and takes a quarter of the time.
    """

    def __init__(self, address: Sequence[Any], *, tuned: bool = False, apart: bool = False) -> None:
        self.name = "raw TCP, tuned" if tuned else "raw TCP, two cores" if apart else "raw TCP"
        self._apart = apart
        self._cut = (4 << 20) if tuned else None
        self._socket = socket.socket()
        if tuned:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 512 << 10)
        self._socket.connect((address[0], address[1]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if apart:
            self._socket.sendall(HEADER.pack(APART))

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
        cores = os.sched_getaffinity(0)
        if self._apart:
            os.sched_setaffinity(0, {min(cores)})
        for _ in range(count):
            start = time.perf_counter()
            self._socket.sendall(message)
            _fill(self._socket, reply)
            seconds.append(time.perf_counter() - start)
        os.sched_setaffinity(0, cores)
        return seconds

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        return 0.0

    def close(self) -> None:
        self._socket.close()


# -- ZeroMQ alone ----------------------------------------------------------------------------------------------


def serve_zmq(thread: LoopThread) -> str:
    """An echo in as few lines as a correct one has."""
    import zmq

    async def start() -> str:
        listener = zmq.Context().socket(zmq.ROUTER)
        listener.bind("tcp://127.0.0.1:*")

        def drain() -> None:
            while int(listener.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                listener.send_multipart(listener.recv_multipart())

        asyncio.get_running_loop().add_reader(int(listener.getsockopt(zmq.FD)), drain)
        address = listener.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(address, bytes)
        return address.rstrip(b"\0").decode()

    return str(thread.run(start()))


class ZmqAlone:
    """Its sockets on an event loop, without a protocol: what a round trip costs before zml adds anything."""

    name = "ZeroMQ alone"

    def __init__(self, address: str, thread: LoopThread) -> None:
        import zmq

        self._zmq = zmq
        self._thread = thread
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)

    def push(self, tensor: memoryview, count: int) -> None:
        raise NotImplementedError("its bulk is that of zml")

    def round_trips(self, count: int) -> list[float]:
        return list(self._thread.run(self._round_trips(count)))

    async def _round_trips(self, count: int) -> list[float]:
        zmq, connection, loop = self._zmq, self._socket, asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()

        def drain() -> None:
            while int(connection.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                connection.recv()
                waiting.set_result(None)

        loop.add_reader(int(connection.getsockopt(zmq.FD)), drain)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            waiting = loop.create_future()
            connection.send(bytes(PING_BYTES))
            drain()  # to send may have swallowed the edge
            await waiting
            seconds.append(time.perf_counter() - start)
        loop.remove_reader(int(connection.getsockopt(zmq.FD)))
        return seconds

    def round_trips_at_once(self, count: int, at_once: int) -> float:
        return 0.0

    def close(self) -> None:
        self._context.destroy(linger=0)


# -- for all -----------------------------------------------------------------------------------------------


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
