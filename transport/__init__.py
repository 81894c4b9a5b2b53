"""Moves messages between peers that may die. It knows nothing of jobs or gradients.

errors          what can go wrong, as a tree
peers           what a process sees: Endpoint, Limits, PeerInfo
frames          one envelope <-> its frames, with limits
liveness        how long a silence may be
incoming        the requests of one peer, each handled at most once
outgoing        those that it was asked, each of which ends once
session         one peer: requests, credit, hello, silence; no I/O, no clock; what happens is in `events`
calls           calling the handler
door            who comes in, under which name
peer, exchange  the peers of one process: handlers, futures, timers; no sockets
endpoint        the exchange over ZeroMQ, at `addresses`
memory          the exchange over a seeded network in memory
shm, lane       large payloads between processes of one machine
keys, auth      CURVE keys on disk, and which of them are let in
thread          an event loop of its own in a thread, for bulk
violations      what peers did wrong: counted always, logged rarely
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
from .thread import Handover, LoopThread

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
    "Handover",
    "Keys",
    "Kind",
    "Limits",
    "LocalProtocolError",
    "LoopThread",
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
