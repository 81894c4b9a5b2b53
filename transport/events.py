"""What can happen in a session, in the past tense; `Handle` alone is an order."""

from typing import NamedTuple

from msgspec import Struct

from .frames import RingOffer


class Handle(NamedTuple):
    """Give this to the handler, then `reply` or `refuse` with the same number and id. A notice has id 0."""

    number: int
    id: int
    message: Struct
    payload: memoryview | None


class Answered(NamedTuple):
    id: int
    message: Struct
    payload: memoryview | None


class RefusedBy(NamedTuple):
    id: int
    code: str
    because: str


class Expired(NamedTuple):
    """The deadline has passed. `sent` False: it never left, so it was not applied."""

    id: int
    sent: bool


class Aborted(NamedTuple):
    """The session that carried this request is over: it may have been applied."""

    id: int
    because: str


class Opened(NamedTuple):
    """The other side has answered the hello. `resumed`: what was under way goes on. `mapped`: our ring can be used;
    `ring` is the peer's."""

    resumed: bool
    mapped: bool
    ring: RingOffer | None


class Silent(NamedTuple):
    """Nothing was heard for too long. A side that dialled dials again; the other waits for that for a while."""

    because: str


class Returned(NamedTuple):
    """A silent peer was heard again, before it was forgotten."""


class Gone(NamedTuple):
    """A silent peer has not come back. The session is over."""

    because: str


class Renewed(NamedTuple):
    """The other side does not know the session (any more); a new hello with a new number is under way."""

    because: str


class Left(NamedTuple):
    """The peer has said goodbye."""

    because: str


class Mapped(NamedTuple):
    """The peer has mapped our ring."""


class FreedSlots(NamedTuple):
    slots: list[int]


Event = (
    Handle
    | Answered
    | RefusedBy
    | Expired
    | Aborted
    | Opened
    | Silent
    | Returned
    | Gone
    | Renewed
    | Left
    | Mapped
    | FreedSlots
)
