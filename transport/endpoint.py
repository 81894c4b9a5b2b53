"""The exchange over ZeroMQ: one ROUTER for all addresses bound, one DEALER per peer dialled.

This file and `auth` alone know ZeroMQ. Plain sockets, never zmq.asyncio, whose futures cost three times the CPU and
which loses messages when a recv is cancelled. What the measurements behind it demand:

- ZeroMQ's descriptor signals an edge: a socket is drained until it has no more, in bounded batches, and looked at
  again after every send; one message per signal hangs for ever.
- A ROUTER's send never waits: it would wait for the slowest peer. What a peer does not take waits in its own bounded
  queue, and what does not fit there is dropped; requests are resent.
- Frames under 8 KB are copied out of ZeroMQ's shared receive buffer, larger ones kept by reference; payloads from
  64 KB on are sent by reference, and come last.
- HANDOVER gives a name to whoever states it, so routing ids end in a number that cannot be guessed.
"""

import asyncio
import errno
import itertools
import os
import re
import resource
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog
import zmq
from msgspec import Struct

from .addresses import check_bind, is_here, unlink
from .auth import DOMAIN, Authenticator, Lookout
from .errors import AddressInUse, BadAddress
from .exchange import Exchange
from .heap import keep_freed_memory
from .keys import Keys
from .peers import CONTROL, HEADER_BYTES, KB, MB, TRAFFIC, Admit, Handler, Limits, idempotent_by_class

COPY_BELOW: Final = (
    64 * KB
)  # sent by reference from here on: pyzmq's bookkeeping costs more than a small copy
KEEP_FROM: Final = 8 * KB  # smaller frames lie in a receive buffer that they would pin, at any alignment
# Messages taken in before others have a turn; and more for so long, or for as long as the others took since the last
# turn, up to the most: where all are late, what lies unread is not to wait longer than they do.
BATCH: Final = 64
READ_S: Final = 0.02
READ_MOST_S: Final = 1.0
UNREAD_MOST_S: Final = 30.0  # peers are read in turn: what one of them has said does not lie here for longer
BATCH_BYTES: Final = 8 * MB
RETRY_S: Final = 0.005  # for what a full socket did not take, should its signal be missed
LINGER_MS: Final = 1000  # for goodbyes
REDIAL_MS: Final = 100  # a connection that broke is made again after this long, then after ever longer, up to
REDIAL_HERE_MS: Final = 250  # on this machine, where nobody minds, and
# elsewhere: thousands dial whoever is started again, and should not all come at once
REDIAL_MOST_MS: Final = 1000
# Our own pings decide who is lost. Connections to machines that are gone are cleared away by the kernel, and those to
# processes that hang by ZMTP's heartbeats. Those are seldom: the answer to one looks for its timer among those of all
# connections (libzmq 4.3.5, poller_base.cpp, `cancel_timer`), which took most of a core with 7,000 peers and 5 s. A
# frame that is on its way for longer than the timeout is cut off, so the timeout is long.
HALF_OPEN: Final[dict[int, int]] = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 60_000,  # for what was sent and nobody acknowledges, or takes
    zmq.HEARTBEAT_IVL: 300_000,
    zmq.HEARTBEAT_TIMEOUT: 120_000,
    zmq.HEARTBEAT_TTL: 600_000,
}
LARGE: Final = MB  # payloads for which memory is worth keeping
LOOPBACK_SEND_BYTES: Final = 512 * KB  # small enough that what was sent is received out of the cache
REVOKE_S: Final = 2.0  # how often the list of authorized keys is looked at
SPARE_FILES: Final = 128  # descriptors that are not for peers

_ROUTE: Final = re.compile(rb"[!-.0-~]{1,64}/[0-9a-f]{32}", re.ASCII)

log = structlog.get_logger("zml.transport")

Socket = zmq.SyncSocket

# As plain numbers: an operation on pyzmq's enums costs as much as a system call.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.SNDMORE) | _NOBLOCK
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)


class _Channel:
    """One ZeroMQ socket in the event loop."""

    def __init__(
        self,
        socket: Socket,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        take: Callable[["_Channel", list[Any]], int],
    ) -> None:
        self.socket = socket
        self._loop = loop
        self._limits = limits
        self._traffic = TRAFFIC[limits.kind]
        self._take = take
        self._router = socket.type == zmq.ROUTER
        self._queues: dict[bytes, deque[tuple[bytes, memoryview | None]]] = {}  # never an empty one
        self._queued_bytes: dict[bytes, int] = {}
        self._draining = False
        self._look_again = False  # a look is due in this turn of the loop
        # All that had come until then was read. Not in the loop's time, which stands still while it turns.
        self._read_at = time.monotonic()
        self._drained_at = self._read_at
        self._unread = False  # more has come than was read in one turn
        self._retry: asyncio.TimerHandle | None = None
        self._closed = False
        self._descriptor = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._descriptor, self.drain)

    def close(self, linger_ms: int) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        if self._retry is not None:
            self._retry.cancel()
        self._queues.clear()
        self._queued_bytes.clear()
        self.socket.close(linger=linger_ms)

    def forget(self, route: bytes) -> None:
        self._queues.pop(route, None)
        self._queued_bytes.pop(route, None)

    @property
    def queued(self) -> int:
        return sum(map(len, self._queues.values()))

    # -- receiving -------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take in what has come, in bounded batches, until there is no more."""
        if self._draining or self._closed:
            return
        self._draining = True
        more = True
        try:
            now = time.monotonic()
            budget, until = BATCH_BYTES, now + min(max(READ_S, now - self._drained_at), READ_MOST_S)
            for count in itertools.count(1):
                frames = self._receive()
                if frames is not None:
                    size = self._take(self, frames)
                    budget -= size
                    self._traffic.received_bytes += size
                if frames is None or not self._has_input():
                    more = False
                    break
                if budget < 0 or (count >= BATCH and time.monotonic() >= until):
                    break
            self._unread = more
            if not more:
                self._read_at = time.monotonic()
            if self._queues:
                self.retry()
                more = True
        finally:
            self._draining = False
            self._drained_at = time.monotonic()
            # An edge that nobody waits for is never signalled again, and to send may have swallowed one.
            if more:
                self._look()

    def connected(self) -> bool:
        """Of one that dials: whatever was sent has found a connection (IMMEDIATE), and so would more."""
        if self._queues or self._closed:
            return False
        events = int(self.socket.getsockopt(_EVENTS))
        self._look()
        return bool(events & _POLLOUT)

    @property
    def unread_s(self) -> float:
        """How old what has come and was not read may be."""
        if not (self._unread or self._draining):
            return 0.0
        return min(time.monotonic() - self._read_at, UNREAD_MOST_S)

    def _has_input(self) -> bool:
        """Also makes the descriptor signal the next input: it shows edges, and every call may swallow one."""
        return not self._closed and bool(int(self.socket.getsockopt(_EVENTS)) & _POLLIN)

    def _receive(self) -> list[Any] | None:
        """One message: [routing id,] header[, payload]; a fourth element stands for any number of further frames."""
        receive = self.socket.recv
        frames: list[Any] = []
        try:
            if self._router:
                frames.append(receive(_NOBLOCK))
            frame = receive(_NOBLOCK, copy=False)
        except zmq.Again:
            return None
        frames.append(frame)
        if frame.more:
            frame = receive(_NOBLOCK, copy=False)
            frames.append(frame)
            if frame.more:
                while frame.more:
                    frame = receive(_NOBLOCK, copy=False)
                frames.append(None)
        return frames

    def _look(self) -> None:
        """To be called after whatever may have swallowed an edge."""
        if not self._look_again and self._has_input():
            self._look_again = True
            self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._look_again = False
        self.drain()

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, route: bytes, header: bytes, payload: memoryview | None) -> bool:
        """Never waits. False: dropped, because the peer is gone or too much waits for it."""
        if self._closed:
            return False
        queue = self._queues.get(route)
        if queue is None:
            sent = self._try(route, header, payload)
            if not self._draining:
                self._look()
            if sent is not None:
                return sent
            queue = self._queues[route] = deque()
            self._queued_bytes[route] = 0
            self._retry_later()
        size = len(header) + (0 if payload is None else payload.nbytes)
        if (
            len(queue) >= self._limits.queue_frames
            or self._queued_bytes[route] + size > self._limits.queue_bytes
        ):
            return False
        queue.append((header, payload))
        self._queued_bytes[route] += size
        return True

    def _try(self, route: bytes, header: bytes, payload: memoryview | None) -> bool | None:
        """True: ZeroMQ has it. False: there is no such peer. None: not now."""
        send = self.socket.send
        try:
            if self._router:
                send(route, _MORE)
            if payload is None:
                send(header, _NOBLOCK)
                self._traffic.sent_bytes += len(header)
            else:
                send(header, _MORE)
                send(payload, _NOBLOCK, copy=payload.nbytes < COPY_BELOW)
                self._traffic.sent_bytes += len(header) + payload.nbytes
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def retry(self) -> None:
        """Offer to the socket what it did not take before."""
        for route, queue in list(self._queues.items()):
            while queue:
                sent = self._try(route, *queue[0])
                if sent is None:
                    break
                header, payload = queue.popleft()
                self._queued_bytes[route] -= len(header) + (0 if payload is None else payload.nbytes)
                if sent is False:
                    queue.clear()
            if not queue:
                self.forget(route)
        if self._queues:
            self._retry_later()

    def _retry_later(self) -> None:
        if self._retry is None and not self._closed:
            self._retry = self._loop.call_later(RETRY_S, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        if not self._closed:
            self.retry()
            self._look()


class ZmqEndpoint(Exchange):
    """An Endpoint over tcp and ipc. See `peers.Endpoint` for what its methods promise, `Exchange` for handlers.

    `bind` takes tcp://HOST:PORT (port 0: the system chooses; see `addresses`) and ipc://PATH. With `keys` every
    connection is encrypted and authenticated (CURVE), and only authorized keys come in; without, only addresses of
    this machine can be bound.
    """

    def __init__(
        self,
        name: str,
        *,
        vocabulary: Any,
        handler: Handler,
        bind: Sequence[str] = (),
        keys: Keys | None = None,
        limits: Limits = CONTROL,
        on_found: Callable[[str], None] | None = None,
        on_lost: Callable[[str, str], None] | None = None,
        idempotent: Callable[[Struct], bool] = idempotent_by_class,
        admit: Admit | None = None,
        io_threads: int = 1,
    ) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # With no descriptors left a ROUTER spins at full speed and says nothing (pyzmq #1642).
        limits = replace(limits, peers=max(1, min(limits.peers, files - SPARE_FILES)))
        super().__init__(
            name,
            vocabulary=vocabulary,
            handler=handler,
            limits=limits,
            on_found=on_found,
            on_lost=on_lost,
            idempotent=idempotent,
            admit=admit,
        )
        self._bind = tuple(bind)
        self._keys = keys
        self._io_threads = io_threads
        self._context: zmq.Context[Socket] | None = None
        self._listener: _Channel | None = None
        self._dialled: set[_Channel] = set()
        self._authenticator: Authenticator | None = None
        self._lookout: Lookout | None = None
        self._revoke_timer: asyncio.TimerHandle | None = None
        self._addresses: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def start(self) -> None:
        for address in self._bind:
            check_bind(address, self._keys is not None)
        if self._limits.payload_bytes > LARGE:
            keep_freed_memory()
        await super().start()
        loop = self._running()
        context = self._context = zmq.Context(self._io_threads)
        context.set(zmq.MAX_SOCKETS, min(16_384, context.get(zmq.SOCKET_LIMIT)))
        try:
            if self._bind:
                if self._keys is not None:
                    self._authenticator = Authenticator(context, self._keys.authorized, self.violations)
                    self._revoke_timer = loop.call_later(REVOKE_S, self._revoke)
                listener = self._socket(zmq.ROUTER, self._bind)
                if self._keys is not None:
                    self._lookout = Lookout(listener, self.violations)
                self._listener = _Channel(listener, loop, self._limits, self._take_routed)
                self._addresses = tuple(_bind(listener, address) for address in self._bind)
        except BaseException:
            await self._free()
            raise

    async def close(self) -> None:
        if self._closed or self._loop is None:
            return
        await super().close()
        await self._free()

    async def _free(self) -> None:
        if self._revoke_timer is not None:
            self._revoke_timer.cancel()
        if self._lookout is not None:
            self._lookout.close()
            self._lookout = None
        for channel in [*self._dialled, *filter(None, [self._listener])]:
            channel.close(LINGER_MS)
        self._dialled.clear()
        self._listener = None
        if self._authenticator is not None:
            self._authenticator.close()
        context, self._context = self._context, None
        if context is not None:
            await _terminate(context)
        for address in self._addresses:
            if address.startswith("ipc://"):
                unlink(address.removeprefix("ipc://"))

    # -- the wire of the exchange ----------------------------------------------------------------------------

    def _transmit(self, route: Hashable, header: bytes, payload: memoryview | None) -> bool:
        if isinstance(route, _Channel):
            return route.send(b"", header, payload)
        assert isinstance(route, bytes)
        return self._listener is not None and self._listener.send(route, header, payload)

    def _dial(self, peer: str, address: str) -> Hashable:
        socket = self._socket(zmq.DEALER, [address])
        try:
            # A new number each time: nobody who saw an old one can take this connection over.
            socket.setsockopt(zmq.ROUTING_ID, f"{self.name}/{secrets.token_hex(16)}".encode("ascii"))
            if self._keys is not None:
                socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.key_of(peer).encode("ascii"))
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise BadAddress(address, f"cannot be dialled: {error.strerror}") from None
        channel = _Channel(socket, self._running(), self._limits, self._take_dialled)
        self._dialled.add(channel)
        return channel

    def _hang_up(self, route: Hashable, *, goodbye: bool = False) -> None:
        if isinstance(route, _Channel):
            self._dialled.discard(route)
            route.close(LINGER_MS if goodbye else 0)
        elif self._listener is not None:
            assert isinstance(route, bytes)
            self._listener.forget(route)

    def _same_machine(self, addresses: Sequence[str]) -> bool:
        return any(map(is_here, addresses))

    async def _see_off(self) -> None:
        """Goodbyes stand behind what slow peers have not taken yet."""
        channels = [*self._dialled, *filter(None, [self._listener])]
        until = asyncio.get_running_loop().time() + LINGER_MS / 1000
        while any(channel.queued for channel in channels) and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(RETRY_S)  # each channel retries by itself

    def catch_up(self) -> float:
        channels = [*self._dialled, *filter(None, [self._listener])]
        for channel in channels:
            if not channel.unread_s:  # else it is about to go on anyway, and others have their turn before
                channel.drain()
        return max((channel.unread_s for channel in channels), default=0.0)

    def _carries(self, route: Hashable) -> bool:
        return isinstance(route, _Channel) and route.connected()

    def _catch_up_with(self, route: Hashable) -> float:
        self.catch_up()
        channel = route if isinstance(route, _Channel) else self._listener
        return channel.unread_s if channel is not None else 0.0

    def _rank(self, address: str) -> int | None:
        if address.startswith("ipc://"):
            return 0 if os.path.exists(address.removeprefix("ipc://")) else None
        return 1

    # -- what comes in ---------------------------------------------------------------------------------------

    def _take_routed(self, channel: _Channel, frames: list[Any]) -> int:
        route = frames[0]
        if route not in self._links and not _ROUTE.fullmatch(route):
            self._malformed(route, "identity", f"routing id {route[:16]!r}")
            return len(frames[1])
        key = None
        if self._keys is not None:
            key = frames[1].get("User-Id")
        return self._take(route, frames[1:], key)

    def _take_dialled(self, channel: _Channel, frames: list[Any]) -> int:
        return self._take(channel, frames, None)

    def _take(self, route: Hashable, frames: list[Any], key: str | None) -> int:
        header = frames[0]
        if len(frames) > 2:
            self._malformed(route, "frames", "more frames than a message has")
            return len(header) + len(frames[1])
        if len(header) > HEADER_BYTES:
            self._malformed(
                route, "header-size", f"a header of {len(header)} bytes; {HEADER_BYTES} are allowed"
            )
            return len(header)
        payload = None
        if len(frames) == 2:
            frame = frames[1]
            payload = frame.buffer if len(frame) >= KEEP_FROM else memoryview(frame.bytes)
        self._received(route, header.bytes, payload, key)
        return len(header) + (0 if payload is None else payload.nbytes)

    def _revoke(self) -> None:
        """Drop those whose key has been taken off the list."""
        assert self._authenticator is not None and self._keys is not None
        self._revoke_timer = self._running().call_later(REVOKE_S, self._revoke)
        if self._authenticator.refresh():
            names = self._keys.authorized.names
            for peer in list(self._peers.values()):
                if not peer.session.dialled and peer.link.key not in names:
                    self._drop(peer, f"the key {peer.link.key} is not authorized any more")

    # -- sockets ---------------------------------------------------------------------------------------------

    def _socket(self, kind: int, addresses: Sequence[str]) -> Socket:
        assert self._context is not None
        limits, keys = self._limits, self._keys
        socket = self._context.socket(kind)
        options: dict[int, Any] = {
            zmq.LINGER: 0,
            zmq.SNDHWM: limits.send_hwm,
            zmq.RCVHWM: limits.receive_hwm,
            zmq.MAXMSGSIZE: max(limits.payload_bytes, HEADER_BYTES),
            zmq.HANDSHAKE_IVL: 3000,
            zmq.RECONNECT_IVL: REDIAL_MS,
            zmq.RECONNECT_IVL_MAX: REDIAL_MOST_MS,
            **HALF_OPEN,
        }
        if kind == zmq.ROUTER:
            options |= {zmq.ROUTER_MANDATORY: 1, zmq.ROUTER_HANDOVER: 1, zmq.BACKLOG: 4096}
        else:
            options |= {zmq.IMMEDIATE: 1}
        if all(map(is_here, addresses)):
            # Between machines the kernel fits it to the distance; within one it lets it outgrow the cache.
            options[zmq.SNDBUF] = LOOPBACK_SEND_BYTES
            options[zmq.RECONNECT_IVL_MAX] = REDIAL_HERE_MS
        if keys is not None:
            options |= {
                zmq.CURVE_PUBLICKEY: keys.public.encode("ascii"),
                zmq.CURVE_SECRETKEY: keys.secret.encode("ascii"),
            }
            if kind == zmq.ROUTER:
                options |= {zmq.CURVE_SERVER: 1, zmq.ZAP_DOMAIN: DOMAIN.encode("ascii")}
        try:
            for option, value in options.items():
                socket.setsockopt(option, value)
        except BaseException:
            socket.close(linger=0)  # an open socket would keep its context from ending
            raise
        return socket


def _bind(socket: Socket, address: str) -> str:
    """Bind; returns the address with its real port."""
    wanted = address.replace("tcp://localhost:", "tcp://127.0.0.1:")
    if wanted.startswith("tcp://") and wanted.endswith(":0"):
        wanted = wanted[:-1] + "*"
    try:
        socket.setsockopt(zmq.IPV6, int("[" in address))
        socket.bind(wanted)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(address) from None
        raise BadAddress(address, f"cannot be bound: {error.strerror}") from None
    if address.startswith("ipc://"):
        os.chmod(address.removeprefix("ipc://"), 0o600)
        return address
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return bound.rstrip(b"\0").decode("ascii")


async def _terminate(context: "zmq.Context[Socket]") -> None:
    """End a context without stopping the event loop; what lingers has LINGER_MS at most."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def terminate() -> None:
        context.term()
        loop.call_soon_threadsafe(done.set_result, None)

    thread = threading.Thread(target=terminate, name="zml-zmq-term", daemon=True)
    thread.start()
    await asyncio.shield(done)
    thread.join()
