"""How long a message takes to another member, and how fast many are: over what training itself uses.

A worker's link to a shard is measured over a connection like that of its script: the same sockets, keys and limits, to
the shard's own thread, behind whatever gradients wait there. What it costs is bounded: a few small messages, then as
much as goes over in SAMPLE_S, `bulk_bytes` at most, there and back; and no step is held up for longer than one of the
messages takes (1 MB: what a bucket has).
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from urllib.parse import urlsplit

import msgspec

from ..messages import Probe, Probed
from ..transport import Endpoint, TransportError
from .findings import Link
from .network import route_mtu

KB, MB = 1 << 10, 1 << 20
PIECE = MB  # of one message
FIRST = 64 * KB  # larger than any packet, and little for any link
SAMPLE_S = 0.5
ROUND_TRIPS = 5
KNOCK_S = 2.0


@cache
def filling() -> bytes:
    """What is sent: nothing on the way compresses."""
    return bytes(PIECE)


def probed(question: Probe) -> tuple[Probed, bytes | memoryview | None]:
    """The answer of whoever is asked."""
    back = min(max(question.back, 0), PIECE)
    return Probed(time.time()), memoryview(filling())[:back] if back else None


async def to_coordinator(endpoint: Endpoint, peer: str, job: str, within_s: float) -> Link:
    """Over the connection that is there."""
    until = asyncio.get_running_loop().time() + within_s
    try:
        rtt_s, skew_s = await _round_trips(endpoint, peer, job, until)
    except TransportError as error:
        return Link(trouble=str(error))
    return Link(rtt_s=rtt_s, skew_s=skew_s)


async def to_shard(
    dial: Callable[[str], Endpoint],
    shard: str,
    addresses: Sequence[str],
    job: str,
    within_s: float,
    bulk_bytes: int,
) -> Link:
    """Over a connection of its own, which is closed again. `dial` makes one as scripts do."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    endpoint = dial(f"probe-{socket.gethostname()[:40]}-{secrets.token_hex(6)}")
    await endpoint.start()
    try:
        try:
            await endpoint.connect(shard, addresses, timeout_s=within_s / 2)
            rtt_s, skew_s = await _round_trips(endpoint, shard, job, until)
        except TransportError as error:
            knocked = await asyncio.gather(*(knock(address) for address in addresses))
            return Link(trouble="; ".join([str(error), *knocked]))
        mtu = min(filter(None, map(_mtu, addresses)), default=0)
        found = Link(rtt_s=rtt_s, skew_s=skew_s, mtu=mtu)
        if bulk_bytes <= 0:
            return found
        rates = []
        for up in (True, False):
            try:
                rates.append(await _rate(endpoint, shard, job, until, bulk_bytes, up=up))
            except TransportError as error:
                way = "there" if up else "back"
                trouble = f"small messages arrive, and {FIRST // KB} KB on the way {way} do not: {error}"
                return _with(found, rates, trouble)
        return _with(found, rates, "", "shared memory" if _shares(endpoint, shard) else "socket")
    finally:
        await endpoint.close()


def _with(link: Link, rates: list[float], trouble: str, by: str = "") -> Link:
    up_bps, down_bps = [*rates, -1.0, -1.0][:2]
    return msgspec.structs.replace(link, up_bps=up_bps, down_bps=down_bps, by=by, trouble=trouble)


def _shares(endpoint: Endpoint, peer: str) -> bool:
    info = endpoint.peers().get(peer)
    return info is not None and info.shared_memory


async def _round_trips(endpoint: Endpoint, peer: str, job: str, until: float) -> tuple[float, float]:
    """The median of several, and how far the other's clock is ahead: by the fastest, as NTP does."""
    seen = []
    for _ in range(ROUND_TRIPS):
        asked_at, began = time.time(), time.perf_counter()
        answer = await endpoint.request(peer, Probe(job), timeout_s=_left(until))
        took = time.perf_counter() - began
        if isinstance(answer.message, Probed):
            seen.append((took, answer.message.at - (asked_at + took / 2)))
    return statistics.median(took for took, _ in seen), min(seen)[1]


async def _rate(endpoint: Endpoint, peer: str, job: str, until: float, most_bytes: int, *, up: bool) -> float:
    """Bytes per second: of one message first, and then of as many at once as SAMPLE_S will do for."""
    first = min(FIRST, most_bytes)
    began = time.perf_counter()
    await _send(endpoint, peer, job, until, first, up=up)
    took = time.perf_counter() - began
    sizes = pieces(first / took, most_bytes)
    if not sizes:
        return first / took
    began = time.perf_counter()
    await asyncio.gather(*(_send(endpoint, peer, job, until, size, up=up) for size in sizes))
    return sum(sizes) / (time.perf_counter() - began)


def pieces(guess_bps: float, most_bytes: int) -> list[int]:
    """The messages that a link of about this rate takes within SAMPLE_S; none where that is no more than one."""
    whole = int(min(guess_bps * SAMPLE_S, most_bytes))
    if whole <= FIRST:
        return []
    return [PIECE] * (whole // PIECE) + ([whole % PIECE] if whole % PIECE else [])


async def _send(endpoint: Endpoint, peer: str, job: str, until: float, size: int, *, up: bool) -> None:
    question = Probe(job) if up else Probe(job, back=size)
    payload = memoryview(filling())[:size] if up else None
    await endpoint.request(peer, question, payload, timeout_s=_left(until))


def _left(until: float) -> float:
    return max(until - asyncio.get_running_loop().time(), 0.01)


def _mtu(address: str) -> int:
    parts = urlsplit(address)
    return (
        route_mtu(parts.hostname, parts.port)
        if parts.scheme == "tcp" and parts.port and parts.hostname
        else 0
    )


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
