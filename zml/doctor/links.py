"""How long a message takes to another member, and how fast many are: over what training itself uses.

A worker's link to a shard is measured over a connection like that of its script: the same sockets, keys and limits, to
the shard's own thread, behind whatever gradients wait there. What it costs is bounded: a few small messages, then as
much as goes over in SAMPLE_S, `most_bytes` at most, there and back; and no step is held up for longer than one of the
messages takes (1 MB: what a bucket has).
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from urllib.parse import urlsplit

import msgspec

from ..messages import Probe, Probed
from ..transport import Endpoint, TransportError
from .findings import Link
from .means import MEANS, Means
from .network import route_mtu

KB, MB = 1 << 10, 1 << 20
PIECE = MB  # of one message
FIRST = 64 * KB  # larger than any packet, and little for any link
SAMPLE_S = 0.5
ROUND_TRIPS = 5
LEAST_S = 1e-9  # between two looks at a clock that jumps


@cache
def filling() -> bytes:
    """What is sent: nothing on the way compresses."""
    return bytes(PIECE)


def probed(question: Probe) -> tuple[Probed, bytes | memoryview | None]:
    """The answer of whoever is asked."""
    back = min(max(question.back, 0), PIECE)
    return Probed(time.time()), memoryview(filling())[:back] if back else None


class Ruler:
    """Measures one link, within a deadline. `endpoint` is connected to `peer`."""

    def __init__(self, endpoint: Endpoint, peer: str, job: str, until: float, means: Means) -> None:
        self.endpoint = endpoint
        self.peer = peer
        self.job = job
        self.until = until  # by the loop's time
        self.means = means

    async def round_trips(self) -> tuple[float, float]:
        """The median of several, and how far the other's clock is ahead: by the fastest, as NTP does. Raises as
        `Endpoint.request`."""
        seen = []
        for _ in range(ROUND_TRIPS):
            asked_at, began = self.means.wall(), self.means.clock()
            answer = await self.endpoint.request(self.peer, Probe(self.job), timeout_s=self._left())
            took = self.means.clock() - began
            assert isinstance(answer.message, Probed), answer.message
            seen.append((took, answer.message.at - (asked_at + took / 2)))
        return median(took for took, _ in seen), min(seen)[1]

    async def rate(self, most_bytes: int, *, up: bool) -> float:
        """Bytes per second: of one message first, and then of as many at once as SAMPLE_S will do for. Raises as
        `Endpoint.request`."""
        first = min(FIRST, most_bytes)
        began = self.means.clock()
        await self._send(first, up=up)
        took = max(self.means.clock() - began, LEAST_S)
        sizes = pieces(first / took, most_bytes)
        if not sizes:
            return first / took
        began = self.means.clock()
        await asyncio.gather(*(self._send(size, up=up) for size in sizes))
        return sum(sizes) / max(self.means.clock() - began, LEAST_S)

    async def _send(self, size: int, *, up: bool) -> None:
        question = Probe(self.job) if up else Probe(self.job, back=size)
        payload = memoryview(filling())[:size] if up else None
        await self.endpoint.request(self.peer, question, payload, timeout_s=self._left())

    def _left(self) -> float:
        return max(self.until - asyncio.get_running_loop().time(), 0.01)


async def to_coordinator(
    endpoint: Endpoint, peer: str, job: str, within_s: float, means: Means = MEANS
) -> Link:
    """Over the connection that is there."""
    ruler = Ruler(endpoint, peer, job, asyncio.get_running_loop().time() + within_s, means)
    try:
        rtt_s, skew_s = await ruler.round_trips()
    except TransportError as error:
        return Link(trouble=str(error))
    return Link(rtt_s=rtt_s, skew_s=skew_s)


async def to_shard(
    dial: Callable[[str], Endpoint],
    shard: str,
    addresses: Sequence[str],
    job: str,
    within_s: float,
    most_bytes: int,
    means: Means = MEANS,
) -> Link:
    """Over a connection of its own, which is closed again. `dial` makes one as scripts do."""
    until = asyncio.get_running_loop().time() + within_s
    endpoint = dial(f"probe-{socket.gethostname()[:40]}-{secrets.token_hex(6)}")
    ruler = Ruler(endpoint, shard, job, until, means)
    await endpoint.start()
    try:
        try:
            await endpoint.connect(shard, addresses, timeout_s=within_s / 2)
            rtt_s, skew_s = await ruler.round_trips()
        except TransportError as error:
            knocked = await asyncio.gather(*map(means.knock, addresses))
            return Link(trouble="; ".join([str(error), *knocked]))
        mtu = min(filter(None, map(_mtu, addresses)), default=0)
        link = Link(rtt_s=rtt_s, skew_s=skew_s, mtu=mtu)
        if most_bytes <= 0:
            return link
        up_bps = down_bps = -1.0
        trouble = ""
        try:
            up_bps = await ruler.rate(most_bytes, up=True)
            down_bps = await ruler.rate(most_bytes, up=False)
        except TransportError as error:
            way = "there" if up_bps < 0 else "back"
            trouble = f"small messages arrive, but {FIRST // KB} KB on the way {way} do not: {error}"
        info = endpoint.peers().get(shard)
        by = "shared memory" if info is not None and info.shared_memory else "socket"
        return msgspec.structs.replace(link, up_bps=up_bps, down_bps=down_bps, by=by, trouble=trouble)
    finally:
        await endpoint.close()


def pieces(guess_bps: float, most_bytes: int) -> list[int]:
    """The messages that a link of about this rate takes within SAMPLE_S; none where that is no more than one."""
    whole = int(min(guess_bps * SAMPLE_S, most_bytes))
    if whole <= FIRST:
        return []
    return [PIECE] * (whole // PIECE) + ([whole % PIECE] if whole % PIECE else [])


def _mtu(address: str) -> int:
    parts = urlsplit(address)
    return (
        route_mtu(parts.hostname, parts.port)
        if parts.scheme == "tcp" and parts.port and parts.hostname
        else 0
    )
