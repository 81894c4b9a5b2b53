"""One envelope <-> its two frames: a header of at most 4 KB, and a payload that is never copied.

A message on the wire is exactly `[routing id] [header] [payload?]`; the header is four bytes, b"ZML" and the
version, and one msgpack array. This module checks everything that can be checked without knowing the peer,
cheapest first, and each check stands before the allocation that it bounds: length, magic, msgpack with its
limits, types and ranges, the length of the payload, and only then the message. Whatever fails raises
RemoteProtocolError and nothing else.

`msgpack.unpackb` is used because it has limits; a reused Unpacker is not safe after an error
(CVE-2026-57585).
"""

from enum import IntEnum
from typing import Any, Final

import msgpack
import msgspec
from msgspec import Struct

from .errors import LocalProtocolError, RemoteProtocolError
from .peers import HEADER_BYTES, Buffer

MAGIC: Final = b"ZML"
VERSION: Final = 1
NAME_CHARS: Final = 64
NO_PAYLOAD: Final = -1
NO_SLOT: Final = -1

_HEAD: Final = MAGIC + bytes([VERSION])
_MOST: Final = 2**63 - 1
_FIELDS: Final = 8
# A header has at most 4 KB, so it holds at most 4,096 objects, whatever they claim to be.
_LIMITS: Final[dict[str, Any]] = {
    "strict_map_key": True,
    "max_array_len": 2048,
    "max_map_len": 64,
    "max_str_len": HEADER_BYTES,
    "max_bin_len": HEADER_BYTES,
    "max_ext_len": 0,
}
# The same bytes as msgpack's own, in a fifth of the time. What comes in is another matter: there limits count.
_encode: Final = msgspec.msgpack.Encoder().encode
_BYTES: Final = (bytes, bytearray, memoryview)


class Kind(IntEnum):
    """What an envelope is for; the body that belongs to it stands beside it."""

    HELLO = 1  # Hello: the side that dialled opens a session
    WELCOME = 2  # Welcome: and the other accepts it
    STRANGER = 3  # Stranger: this session is not known here
    REQUEST = 4  # one of the vocabulary
    REPLY = 5  # one of the vocabulary
    REFUSAL = 6  # No
    NOTICE = 7  # one of the vocabulary
    PING = 8  # None: are you there?
    PONG = 9  # None: yes; `id` is the ping's
    MAPPED = 10  # None: your ring of shared memory is mapped; use it
    FREED = 11  # Freed: these slots of your ring can be used again
    BYE = 12  # Bye: an orderly end


class RingOffer(Struct, frozen=True):
    """Shared memory for what the sender of this will send: where it is, and what stands in it."""

    path: str
    nonce: bytes


class Hello(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str  # of the sender
    to: str  # the peer that it means to reach
    resume: bool  # this session was open before: answer STRANGER rather than begin it anew
    requests: int  # that may be unanswered at the sender
    ping_s: float  # how often the sender will ping
    ring: RingOffer | None = None


class Welcome(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    resumed: bool
    requests: int
    mapped: bool = False  # the ring of the hello can be used
    ring: RingOffer | None = None


class Stranger(Struct, frozen=True, forbid_unknown_fields=True):
    because: str


class No(Struct, frozen=True, forbid_unknown_fields=True):
    code: str
    because: str


class Freed(Struct, frozen=True, forbid_unknown_fields=True):
    slots: list[int]


class Bye(Struct, frozen=True, forbid_unknown_fields=True):
    because: str


class Envelope(Struct, frozen=True, kw_only=True):
    """One message and what the transport says about it. `session` names the connection, by a number that the
    side that dialled has chosen."""

    kind: Kind
    session: int
    id: int = 0  # of the request; of notice, hello and ping, each counted for itself
    floor: int = 0  # every request of the sender below this id has ended for it
    credit: int = 0  # bytes of request payloads that the receiver of this may have unanswered at its sender
    body: Struct | None = None
    payload: memoryview | None = None
    size: int = NO_PAYLOAD  # bytes of the payload, wherever it is
    slot: int = NO_SLOT  # of the sender's ring, where the payload is in shared memory
    again: bool = False  # not on the wire: sent before, so it had better not go through shared memory


class Vocabulary:
    """The messages that may travel: a union of tagged structs, prepared once. (To convert to a bare union
    prepares it anew for every message, at a hundred times the cost.)"""

    def __init__(self, union: Any) -> None:
        # The union in a field of a struct is what msgspec keeps prepared.
        self._box: Any = msgspec.defstruct("Box", [("body", union)], array_like=True)

    def read(self, raw: Any) -> Struct:
        """The message in these builtins. Raises msgspec.ValidationError."""
        body: Struct = msgspec.convert((raw,), type=self._box, strict=True, builtin_types=_BYTES).body
        return body


_BODIES: Final[dict[Kind, type[Struct] | None]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.STRANGER: Stranger,
    Kind.REFUSAL: No,
    Kind.PING: None,
    Kind.PONG: None,
    Kind.MAPPED: None,
    Kind.FREED: Freed,
    Kind.BYE: Bye,
}
_WITH_PAYLOAD: Final = frozenset({Kind.REQUEST, Kind.REPLY, Kind.NOTICE})
_KINDS: Final = {int(kind): kind for kind in Kind}


def as_bytes(buffer: Buffer) -> memoryview:
    """Look at a contiguous buffer as bytes, without copying it. Raises LocalProtocolError if it is none."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise LocalProtocolError(
            f"a payload is a buffer, not a {type(buffer).__name__}; of a tensor hand over "
            "tensor.detach().contiguous().view(torch.uint8).numpy()"
        ) from None
    if view.nbytes == 0:
        return memoryview(b"")
    if not view.c_contiguous:
        raise LocalProtocolError("a payload must be contiguous")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def check_name(name: str) -> str | None:
    """None for a name that can travel, otherwise what is wrong with it."""
    if not 1 <= len(name) <= NAME_CHARS:
        return f"a name has 1 to {NAME_CHARS} characters, not {len(name)}"
    if not name.isascii() or not name.isprintable() or " " in name or "/" in name:
        return f"{name!r}: a name is printable ASCII without spaces and slashes"
    return None


def pack(envelope: Envelope) -> bytes:
    """The header frame. Raises LocalProtocolError if the message does not fit into it."""
    e = envelope
    try:
        header: bytes = _HEAD + _encode(
            (int(e.kind), e.session, e.id, e.floor, e.credit, e.size, e.slot, e.body)
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"{type(e.body).__name__} cannot be packed: {error}") from error
    if len(header) > HEADER_BYTES:
        raise LocalProtocolError(
            f"{type(e.body).__name__} takes {len(header)} bytes as a header; {HEADER_BYTES} are allowed: "
            "what is long belongs into the payload"
        )
    return header


def unpack(
    header: bytes, payload: memoryview | None, vocabulary: "Vocabulary", *, payload_bytes: int
) -> Envelope:
    """An envelope from what a peer sent; `payload_bytes` is the longest payload that is taken.

    Raises RemoteProtocolError. The payload is only measured here, never read.
    """
    if len(header) > HEADER_BYTES:
        raise RemoteProtocolError(
            "header-size", f"a header of {len(header)} bytes; {HEADER_BYTES} are allowed"
        )
    if header[:3] != MAGIC:
        raise RemoteProtocolError("magic", f"begins with {header[:4]!r}")
    if header[3:4] != _HEAD[3:]:
        theirs = header[3] if len(header) > 3 else "none"
        raise RemoteProtocolError("version", f"speaks version {theirs} of the protocol, this side {VERSION}")
    try:
        fields = msgpack.unpackb(memoryview(header)[4:], **_LIMITS)
    except (ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError("msgpack", f"{type(error).__name__}: {error}"[:200]) from None
    if type(fields) is not list or len(fields) != _FIELDS:
        raise RemoteProtocolError("fields", f"a header has {_FIELDS} fields")
    kind_number, session, number, floor, credit, size, slot, raw_body = fields
    for value in (kind_number, session, number, floor, credit):
        if type(value) is not int or not 0 <= value <= _MOST:
            raise RemoteProtocolError("fields", "a number is not one, or out of range")
    for value in (size, slot):
        if type(value) is not int or not -1 <= value <= _MOST:
            raise RemoteProtocolError("fields", "a size or slot is not a number, or out of range")
    kind = _KINDS.get(kind_number)
    if kind is None:
        raise RemoteProtocolError("kind", f"there is no kind {kind_number}")
    _check_payload(kind, payload, size, slot, payload_bytes)
    return Envelope(
        kind=kind,
        session=session,
        id=number,
        floor=floor,
        credit=credit,
        body=_body(kind, raw_body, vocabulary),
        payload=payload,
        size=size,
        slot=slot,
    )


def _check_payload(kind: Kind, payload: memoryview | None, size: int, slot: int, payload_bytes: int) -> None:
    if size > payload_bytes:
        raise RemoteProtocolError("payload-size", f"a payload of {size} bytes; {payload_bytes} are allowed")
    if kind not in _WITH_PAYLOAD and (payload is not None or size != NO_PAYLOAD or slot != NO_SLOT):
        raise RemoteProtocolError("payload", f"a {kind.name} has no payload")
    if slot != NO_SLOT:
        if payload is not None or size == NO_PAYLOAD:
            raise RemoteProtocolError(
                "payload", "a payload is in a frame or in shared memory, not in both or neither"
            )
    elif (NO_PAYLOAD if payload is None else payload.nbytes) != size:
        sent = "none" if payload is None else f"{payload.nbytes} bytes"
        raise RemoteProtocolError("payload-size", f"{size} bytes were announced, {sent} came")


def _body(kind: Kind, raw: Any, vocabulary: "Vocabulary") -> Struct | None:
    try:
        if kind in _WITH_PAYLOAD:
            return vocabulary.read(raw)
        expected = _BODIES[kind]
        if expected is not None:
            return msgspec.convert(raw, type=expected, strict=True, builtin_types=_BYTES)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RemoteProtocolError("body", f"{kind.name}: {error}"[:200]) from None
    if raw is not None:
        raise RemoteProtocolError("body", f"a {kind.name} has no body")
    return None
