"""Where the roles meet ZeroMQ: which endpoints each process has, and whose keys they show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BAD_KEYS, OPEN_BIND, PORT_IN_USE, USAGE, ZmlError
from .lease import ping_s
from .messages import AnyMessage
from .transport import BULK, CONTROL, AddressInUse, BadAddress, BadKeys, Endpoint, Handler, Limits, OpenBind
from .transport.endpoint import ZmqEndpoint
from .transport.keys import Keys

if TYPE_CHECKING:
    from .agent.seat import Seat
    from .config import Settings

MB = 1 << 20
JOB_CHARS = 40  # of a job's name, in that of an endpoint
# A layout of many parameters is the one large control message: `layout.MOST_BYTES`, and its envelope.
CONTROL_LIMITS = replace(CONTROL, payload_bytes=5 * MB, credit_bytes=10 * MB)


LISTENER, WORKER = "coordinator", "worker"  # the keys that `zml keys` makes without names


def keys_of(folder: str, *names: str) -> Keys | None:
    """The key of the first of `names` that is in the folder, else the only one there. Raises ZmlError."""
    if not folder:
        return None
    there = [name for name in names if Path(folder, name + ".key").exists()]
    try:
        return Keys.load(folder, *there)
    except BadKeys as bad:
        raise ZmlError(BAD_KEYS, str(bad), "`zml keys FOLDER` makes a set of keys.") from None


def paced(heartbeat_s: float) -> Limits:
    """For connections on which heartbeats go, or to a coordinator that hears so many of them."""
    every_s = ping_s(heartbeat_s)
    return replace(
        CONTROL_LIMITS,
        ping_s=every_s,
        silence_s=max(CONTROL_LIMITS.silence_s, 4 * every_s),
        silence_most_s=max(CONTROL_LIMITS.silence_most_s, 4 * every_s),
    )


def control_endpoint(
    settings: Settings,
    name: str,
    handler: Handler,
    *,
    keys: Sequence[str] = (),
    bind: Sequence[str] = (),
    vocabulary: Any = AnyMessage,
    peers: int = CONTROL_LIMITS.peers,
) -> Endpoint:
    """For orders and questions. `keys`: whose key to show, where the folder holds several. `peers`: how many may be
    connected at once."""
    shown = keys_of(settings.keys, *(keys or (WORKER, LISTENER)))
    limits = replace(paced(settings.heartbeat_s), peers=peers)
    return _endpoint(name, handler, shown, limits, bind, vocabulary)


def bulk_endpoint(
    settings: Settings, name: str, handler: Handler, *, keys: Sequence[str] = (), listens: bool = True
) -> Endpoint:
    """A shard's, for gradients and parameters; listens where the settings say."""
    shown = keys_of(settings.keys, *(keys or (name, LISTENER)))
    return _endpoint(name, handler, shown, BULK, settings.bind if listens else ())


def script_endpoints(seat: Seat, handler: Handler) -> tuple[Endpoint, Endpoint]:
    """A script's connections: control to the coordinator, bulk to the shards."""
    name = f"{seat.worker}.{seat.incarnation}"
    # The coordinator may have many jobs, and in each of them a w0; a shard has one.
    here = f"{name}-{re.sub('[^!-.0-~]', '_', seat.job)[:JOB_CHARS]}"
    keys = keys_of(seat.keys, WORKER)
    control = paced(seat.heartbeat_s)
    return _endpoint(here, handler, keys, control), _endpoint(name, handler, keys, BULK)


def _endpoint(
    name: str,
    handler: Handler,
    keys: Keys | None,
    limits: Limits,
    bind: Sequence[str] = (),
    vocabulary: Any = AnyMessage,
) -> Endpoint:
    return ZmqEndpoint(name, vocabulary=vocabulary, handler=handler, keys=keys, limits=limits, bind=bind)


def beside_each(bind: Sequence[str], name: str) -> tuple[str, ...]:
    """Addresses for one more listener of the same process: the same hosts and folders, other ports and names."""
    found = []
    for address in bind:
        transport, _, rest = address.partition("://")
        found.append(f"ipc://{rest}-{name}" if transport == "ipc" else f"tcp://{rest.rpartition(':')[0]}:0")
    return tuple(found)


async def listen(endpoint: Endpoint) -> None:
    """Start an endpoint. Raises ZmlError where it cannot listen."""
    try:
        await endpoint.start()
    except AddressInUse as error:
        raise ZmlError(PORT_IN_USE, str(error), "Choose another address with --bind, or port 0.") from None
    except OpenBind as error:
        raise ZmlError(OPEN_BIND, str(error), "Make keys with `zml keys`, and give --keys FOLDER.") from None
    except BadAddress as error:
        raise ZmlError(
            USAGE, f"cannot listen there: {error}", "Addresses look like tcp://10.0.0.1:7077."
        ) from None
