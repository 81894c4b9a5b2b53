"""The exchange over a network in memory: it delays, loses, doubles and reorders, all from one seed.

It keeps the contract of the real one: the same sessions, headers packed and unpacked, bytes copied at the moment
they arrive, so that a sender which changes a payload too early is found out. Nothing waits for real time: under
an event loop whose clock jumps, a cluster lives through an hour in a second, and the same seed gives the same hour.

    network = MemoryNetwork(seed, delay_s=(0.001, 0.01), loss=0.01)
    shard = network.endpoint("p0", vocabulary=AnyMessage, handler=handle, bind=["tcp://127.0.0.1:0"])
    network.partition({"p0"}, {"w0", "w1"})
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, nextafter
from typing import Any, Final

import msgpack
from msgspec import Struct

from .errors import AddressInUse, BadAddress
from .exchange import Exchange
from .frames import Kind
from .peers import CONTROL, Admit, Handler, Limits, idempotent_by_class
from .session import LIVES

FIRST_PORT: Final = 40_000
REMEMBERED: Final = 100_000  # messages in the trace


@dataclass(frozen=True, slots=True)
class Passage:
    """What became of one message. It is readable as a line: `1000.002510 w0 -> p0 REQUEST 3 (1024 bytes) arrived`."""

    at_s: float
    sender: str
    receiver: str
    header: bytes
    payload_bytes: int
    fate: str  # arrived, lost, cut off, nobody there

    def __str__(self) -> str:
        kind, _, number = msgpack.unpackb(self.header[4:])[:3]
        size = f" ({self.payload_bytes} bytes)" if self.payload_bytes else ""
        return (
            f"{self.at_s:.6f} {self.sender} -> {self.receiver} {Kind(kind).name} {number}{size} {self.fate}"
        )


class Line:
    """A connection, from the one who dialled to whoever is bound at `address` when a message arrives."""

    __slots__ = ("address", "dialler", "number", "open")

    def __init__(self, number: int, dialler: "MemoryEndpoint", address: str) -> None:
        self.number = number
        self.dialler = dialler
        self.address = address
        self.open = True


class MemoryNetwork:
    """The network and whoever is on it. `delay_s` is drawn per message, so later ones overtake earlier ones unless the
    network is `ordered`; `loss` and `duplication` are probabilities per message.

    The attributes may be changed at any time.
    """

    def __init__(
        self,
        seed: int,
        *,
        delay_s: tuple[float, float] = (0.0005, 0.002),
        loss: float = 0.0,
        duplication: float = 0.0,
        ordered: bool = False,
    ) -> None:
        self.seed = seed
        self.delay_s = delay_s
        self.loss = loss
        self.duplication = duplication
        self.ordered = ordered
        self.random = random.Random(seed)
        self.trace: deque[Passage] = deque(maxlen=REMEMBERED)
        self.counts: Counter[str] = Counter()  # messages by fate, and "doubled"
        self._bound: dict[str, MemoryEndpoint] = {}
        self._alive: dict[str, list[MemoryEndpoint]] = {}
        self._lines: dict[int, Line] = {}  # the open ones
        self._cut: set[tuple[str, str]] = set()  # sender, receiver
        self._last_arrival: dict[tuple[int, bool], float] = {}
        self._next_line = 1
        self._next_port = FIRST_PORT

    def __repr__(self) -> str:
        return f"MemoryNetwork({self.seed})"

    def endpoint(
        self,
        name: str,
        *,
        vocabulary: Any,
        handler: Handler,
        bind: Sequence[str] = (),
        key: str | None = None,
        limits: Limits = CONTROL,
        on_found: Callable[[str], None] | None = None,
        on_lost: Callable[[str, str], None] | None = None,
        idempotent: Callable[[Struct], bool] = idempotent_by_class,
        admit: Admit | None = None,
    ) -> "MemoryEndpoint":
        """As `ZmqEndpoint`. `key` is the name of the key that this process holds; nothing is encrypted."""
        return MemoryEndpoint(
            self,
            name,
            vocabulary=vocabulary,
            handler=handler,
            bind=bind,
            key=key,
            limits=limits,
            on_found=on_found,
            on_lost=on_lost,
            idempotent=idempotent,
            admit=admit,
        )

    # -- what happens to a network ---------------------------------------------------------------------------

    def partition(self, one: Iterable[str], other: Iterable[str], *, both_ways: bool = True) -> None:
        """From now on nothing passes from `one` to `other`, nor back; what is on its way is lost."""
        for a in one:
            for b in other:
                self._cut.add((a, b))
                if both_ways:
                    self._cut.add((b, a))

    def heal(self) -> None:
        """All partitions end."""
        self._cut.clear()

    def crash(self, name: str) -> None:
        """As kill -9: the endpoints of this name say nothing any more, and what waits in them is cancelled."""
        for endpoint in self._alive.pop(name, []):
            endpoint.die()

    def history(self) -> str:
        """The trace as lines."""
        return "\n".join(map(str, self.trace))

    # -- for its endpoints -------------------------------------------------------------------------------------

    def join(self, endpoint: "MemoryEndpoint", addresses: Sequence[str]) -> tuple[str, ...]:
        bound = tuple(self._number(address) for address in addresses)
        for address in bound:
            if address in self._bound:
                raise AddressInUse(address)
        self._bound.update(dict.fromkeys(bound, endpoint))
        self._alive.setdefault(endpoint.name, []).append(endpoint)
        return bound

    def leave(self, endpoint: "MemoryEndpoint") -> None:
        for address in endpoint.addresses:
            if self._bound.get(address) is endpoint:
                del self._bound[address]
        for line in [line for line in self._lines.values() if line.dialler is endpoint]:
            self.hang_up(line)
        alive = self._alive.get(endpoint.name, [])
        if endpoint in alive:
            alive.remove(endpoint)

    def dial(self, endpoint: "MemoryEndpoint", address: str) -> Line:
        if "://" not in address:
            raise BadAddress(address, "an address is tcp://HOST:PORT or ipc://PATH")
        line = Line(self._next_line, endpoint, address)
        self._lines[line.number] = line
        self._next_line += 1
        return line

    def hang_up(self, line: Line) -> None:
        line.open = False
        self._lines.pop(line.number, None)
        self._last_arrival.pop((line.number, True), None)
        self._last_arrival.pop((line.number, False), None)

    def line(self, number: int) -> Line | None:
        return self._lines.get(number)

    def send(
        self, sender: "MemoryEndpoint", line: Line, header: bytes, payload: memoryview | None, *, out: bool
    ) -> None:
        """`out`: from the dialler to whoever is bound; otherwise back."""
        size = 0 if payload is None else payload.nbytes
        copies = 1
        if self.random.random() < self.loss:
            copies = 0
        elif self.random.random() < self.duplication:
            copies = 2
            self.counts["doubled"] += 1
        if not copies:
            self._note(sender, line, header, size, "lost", out=out)
        loop = sender.loop
        for _ in range(copies):
            at = loop.time() + self.random.uniform(*self.delay_s)
            if self.ordered:
                at = max(at, nextafter(self._last_arrival.get((line.number, out), 0.0), inf))
                self._last_arrival[line.number, out] = at
            loop.call_at(at, self._arrive, sender, line, header, payload, out)

    def _arrive(
        self, sender: "MemoryEndpoint", line: Line, header: bytes, payload: memoryview | None, out: bool
    ) -> None:
        size = 0 if payload is None else payload.nbytes
        receiver = self._receiver(line, out)
        if receiver is None:
            self._note(sender, line, header, size, "nobody there", out=out)
        elif (sender.name, receiver.name) in self._cut:
            self._note(sender, line, header, size, "cut off", out=out)
        else:
            self._note(sender, line, header, size, "arrived", out=out)
            # Read now and not when it was sent: until the request has ended, its payload must not change.
            copy = None if payload is None else memoryview(bytearray(payload))
            receiver.take(line.number if out else line, header, copy, sender.key)

    def _receiver(self, line: Line, out: bool) -> "MemoryEndpoint | None":
        if out:
            return self._bound.get(line.address)
        return line.dialler if line.open else None

    def _note(
        self, sender: "MemoryEndpoint", line: Line, header: bytes, size: int, fate: str, *, out: bool
    ) -> None:
        receiver = self._receiver(line, out)
        name = receiver.name if receiver is not None else line.address
        self.counts[fate] += 1
        self.trace.append(Passage(sender.loop.time(), sender.name, name, header, size, fate))

    def _number(self, address: str) -> str:
        if "://" not in address:
            raise BadAddress(address, "an address is tcp://HOST:PORT or ipc://PATH")
        if address.startswith("tcp://") and address.endswith(":0"):
            self._next_port += 1
            return f"{address[:-2]}:{self._next_port}"
        return address


class MemoryEndpoint(Exchange):
    """An Endpoint on a MemoryNetwork, which makes it."""

    def __init__(
        self,
        network: MemoryNetwork,
        name: str,
        *,
        vocabulary: Any,
        handler: Handler,
        bind: Sequence[str] = (),
        key: str | None = None,
        limits: Limits = CONTROL,
        on_found: Callable[[str], None] | None = None,
        on_lost: Callable[[str, str], None] | None = None,
        idempotent: Callable[[Struct], bool] = idempotent_by_class,
        admit: Admit | None = None,
    ) -> None:
        super().__init__(
            name,
            vocabulary=vocabulary,
            handler=handler,
            limits=limits,
            on_found=on_found,
            on_lost=on_lost,
            idempotent=idempotent,
            admit=admit,
            life=network.random.randrange(LIVES),
        )
        self.key = key
        self._network = network
        self._bind = tuple(bind)
        self._addresses: tuple[str, ...] = ()
        self._dead = False

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "call start first"
        return self._loop

    async def start(self) -> None:
        self._addresses = self._network.join(self, self._bind)
        await super().start()

    async def close(self) -> None:
        if not self._dead:
            await super().close()
            self._network.leave(self)

    def die(self) -> None:
        """End without a word; whoever waits in here is cancelled, as it would be by the end of its process."""
        self._dead = self._closed = True
        for peer in self._peers.values():
            if peer.timer is not None:
                peer.timer.cancel()
            for future, *_ in peer.futures.values():
                future.cancel()
            for opened in peer.opened:
                opened.cancel()
        for task in self._tasks:
            task.cancel()
        self._network.leave(self)

    def take(self, route: Hashable, header: bytes, payload: memoryview | None, key: str | None) -> None:
        """A message has arrived."""
        self._received(route, header, payload, key)

    def _transmit(self, route: Hashable, header: bytes, payload: memoryview | None) -> bool:
        line = (
            route
            if isinstance(route, Line)
            else self._network.line(route)
            if isinstance(route, int)
            else None
        )
        if line is None or not line.open or self._dead:
            return False
        self._network.send(self, line, header, payload, out=line is route)
        return True

    def _dial(self, peer: str, address: str) -> Hashable:
        return self._network.dial(self, address)

    def _hang_up(self, route: Hashable, *, goodbye: bool = False) -> None:
        if isinstance(route, Line):
            self._network.hang_up(route)
