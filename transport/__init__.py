"""Moves messages between peers that may die. It knows nothing of jobs or gradients.

errors     what can go wrong, as a tree
peers      what a process sees: Endpoint, Limits, PeerInfo
frames     one envelope <-> its frames, with limits
liveness   how long a silence may be
session    one peer: requests, duplicates, credit; no I/O, no clock
exchange   all peers of one process: handlers, deadlines, hello and goodbye; no sockets
endpoint   the exchange over ZeroMQ
memory     the exchange over a seeded network in memory
shm        large payloads between processes of one machine
keys, auth who may come in
thread     an event loop of its own in a thread, for bulk
"""

from .endpoint import ZmqEndpoint
from .errors import (
    AddressInUse,
    BadAddress,
    BadKeys,
    Congested,
    DeadlineExceeded,
    LocalProtocolError,
    OpenBind,
    PeerLost,
    ProtocolError,
    Refusal,
    Refused,
    RemoteProtocolError,
    TransportError,
)
from .exchange import Exchange
from .frames import Envelope, Kind
from .keys import Keys, make_keys
from .peers import BULK, CONTROL, Admit, Answer, Buffer, Endpoint, Handler, Limits, PeerInfo, Reply

__all__ = [
    "BULK",
    "CONTROL",
    "AddressInUse",
    "Admit",
    "Answer",
    "BadAddress",
    "BadKeys",
    "Buffer",
    "Congested",
    "DeadlineExceeded",
    "Endpoint",
    "Envelope",
    "Exchange",
    "Handler",
    "Keys",
    "Kind",
    "Limits",
    "LocalProtocolError",
    "OpenBind",
    "PeerInfo",
    "PeerLost",
    "ProtocolError",
    "Refusal",
    "Refused",
    "RemoteProtocolError",
    "Reply",
    "TransportError",
    "ZmqEndpoint",
    "make_keys",
]
