"""Looking at a job from outside: ask its coordinator for the status, or for a drain."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from .errors import UNREACHABLE, ZmlError
from .lease import COORDINATOR
from .link import control_endpoint
from .messages import Ask, Drain, Ended, Message
from .status import JobStatus, decode
from .transport import Answer, Endpoint, PeerLost, Refusal, TransportError

if TYPE_CHECKING:
    from .config import Settings

ANSWER_S = 5.0
T = TypeVar("T")


async def connect(settings: Settings, timeout_s: float = ANSWER_S) -> Endpoint:
    """An onlooker's connection to the coordinator. Raises ZmlError when nobody answers."""
    name = f"onlooker-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    endpoint = control_endpoint(settings, name, _say_no)
    await endpoint.start()
    try:
        await endpoint.connect(COORDINATOR, settings.coordinator, timeout_s=timeout_s)
    except asyncio.CancelledError:
        await endpoint.close()
        raise
    except TransportError as error:
        await endpoint.close()
        # Of one that is lost the transport says where and for how long, which is said here.
        why = error.because.partition(" s: ")[2] if isinstance(error, PeerLost) else str(error)
        raise ZmlError(
            UNREACHABLE,
            f"no coordinator answers at {', '.join(settings.coordinator)} within {timeout_s:g} s"
            + (f": {why}" if why else ""),
            "Give its address with --coordinator, or start one.",
        ) from None
    return endpoint


async def status(endpoint: Endpoint, job: str = "") -> JobStatus:
    """Ask over an open connection; a coordinator of many jobs needs to know about which. Raises ZmlError."""
    answer = await _ask(endpoint, Ask(job))
    try:
        return decode(bytes(answer.payload or b""))
    except msgspec.MsgspecError as error:
        raise ZmlError(UNREACHABLE, f"the coordinator's status cannot be read: {error}") from None


async def drain(endpoint: Endpoint, because: str) -> None:
    """Ask the job to finish its step, save and end."""
    await _ask(endpoint, Drain("", because))


async def ended(endpoint: Endpoint, job: str, member: str, pid: int, because: str) -> None:
    """Say that a process of this machine has ended, which was this member. Twice is the same as once."""
    await _ask(endpoint, Ended(job, member, socket.gethostname(), pid, because))


async def hang_up(endpoint: Endpoint, *, dead: bool) -> None:
    """Say goodbye, for which a slow coordinator has a second; to one that is known to be dead, nothing."""
    if dead:
        endpoint.disconnect(COORDINATOR)
    await endpoint.close()


async def _ask(endpoint: Endpoint, message: Message) -> Answer:
    try:
        return await endpoint.request(COORDINATOR, message, timeout_s=ANSWER_S)
    except TransportError as error:
        raise ZmlError(UNREACHABLE, f"the coordinator does not answer: {error}") from None


def fetch_status(settings: Settings) -> JobStatus:
    """Connect, ask, leave. Raises ZmlError."""
    return asyncio.run(_with(settings, lambda endpoint: status(endpoint, settings.job)))


async def _with(settings: Settings, do: Callable[[Endpoint], Awaitable[T]]) -> T:
    endpoint = await connect(settings)
    try:
        return await do(endpoint)
    finally:
        await endpoint.close()


def _say_no(peer: str, message: msgspec.Struct, payload: memoryview | None) -> Message:
    raise Refusal("unexpected", "an onlooker takes nothing")
