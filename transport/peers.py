"""What a process sees of its peers: the Endpoint, whatever moves the frames underneath.

Every role is written against `Endpoint` alone, so that whole clusters also run on the in-memory network. The
rule: a request is sent at least once, handled at most once, and always ends: with an answer, or with an error
that names the peer.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer
else:
    Buffer = object  # anything contiguous with a buffer: bytes, memoryview, numpy arrays

HEADER_BYTES = 4096  # a header frame is never longer
KB, MB = 1 << 10, 1 << 20


class Answer(NamedTuple):
    """The reply to a request. The payload is valid and unchanging as long as it is referred to."""

    message: Struct
    payload: memoryview | None


# A notice is answered by None, a request by anything else. The payload of a reply must never change again
# once it is returned: it is read when the socket gets to it, and perhaps once more if the reply is lost.
Reply = Struct | tuple[Struct, Buffer | None] | None
Handler = Callable[[str, Struct, memoryview | None], Reply | Awaitable[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one endpoint allows: bytes, counts and seconds. All that waits is bounded by one of these."""

    payload_bytes: int
    """The longest payload that is sent or taken."""
    kind: str = "control"
    """Under which name of `TRAFFIC` its bytes are counted."""
    credit_bytes: int
    """Payload bytes of requests that one peer may have unanswered here, at most."""
    budget_bytes: int
    """The same over all peers: with many of them each is granted less, but always one payload."""
    requests: int = 256
    """Requests that one peer may have unanswered here: the number of its handlers that run at once."""
    waiting: int = 4096
    """Requests to one peer that may wait for credit."""
    queue_frames: int = 4096
    queue_bytes: int = 64 * MB
    """What waits, per peer, for a socket that takes no more. Beyond it frames are dropped; requests are
    resent."""
    kept_replies: int = 1024
    kept_bytes: int = 4 * MB
    """Replies kept per peer until it has seen them: their number, and the bytes of their payloads."""
    send_hwm: int = 1000
    receive_hwm: int = 1000
    """ZeroMQ's own queues, in messages per connection."""
    ping_s: float = 0.5
    """How often the side that connected pings. The other side answers, and so hears as often."""
    silence_s: float = 3.0
    silence_most_s: float = 30.0
    """A peer is lost after this much silence; up to the second figure where its jitter asks for more."""
    forget_s: float = 30.0
    """A lost peer that comes back within this time finds its requests remembered: none is handled twice."""
    resend_s: float = 2.0
    resend_most_s: float = 15.0
    """A request is resent after the first, then after ever longer, up to the second. Connections rarely lose
    anything, so the first is long."""
    violations: int = 16
    """A peer that broke the rules this often is dropped."""
    peers: int = 8192
    """Peers that may be connected at once."""
    slots: int = 0
    """Payloads that may lie in shared memory, per peer on this machine and direction. 0: none is used."""

    def __post_init__(self) -> None:
        if not 0 < self.payload_bytes <= self.credit_bytes:
            raise ValueError(
                f"credit_bytes must be at least payload_bytes, {self.payload_bytes}, not {self.credit_bytes}"
            )
        if not 0 < self.ping_s < self.silence_s <= self.silence_most_s:
            raise ValueError("ping_s must be shorter than silence_s, and that no longer than silence_most_s")
        if not 0 < self.resend_s <= self.resend_most_s:
            raise ValueError("resend_s must be positive and no longer than resend_most_s")
        for name in (
            "requests",
            "waiting",
            "queue_frames",
            "queue_bytes",
            "kept_replies",
            "violations",
            "peers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


CONTROL = Limits(payload_bytes=MB, credit_bytes=8 * MB, budget_bytes=256 * MB)
BULK = Limits(
    kind="bulk",
    payload_bytes=4 * MB + 64 * KB,
    credit_bytes=64 * MB,
    budget_bytes=512 * MB,
    send_hwm=32,
    receive_hwm=16,
    silence_s=5.0,
    slots=32,
)


@dataclass(slots=True)
class Traffic:
    """What sockets have sent and received; what goes through shared memory is not in it."""

    sent_bytes: int = 0
    received_bytes: int = 0


# Of all endpoints of this process, also of those that are closed. Each kind belongs to one thread.
TRAFFIC = {"control": Traffic(), "bulk": Traffic()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A peer, seen from here. Times are those of the running loop."""

    name: str
    session: int
    key: str | None  # the name of the key that its hello was under; None without keys
    last_heard: float
    connected: bool  # False: we dialled it, it is lost, and we go on dialling
    outstanding: int  # requests to it that are not answered
    outstanding_bytes: int  # and the bytes of their payloads
    shared_memory: bool  # large payloads to it go through memory


class Endpoint(Protocol):
    """One process among its peers. Not thread-safe: it belongs to the event loop that started it."""

    @property
    def name(self) -> str:
        """What its peers call it; unique among them."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it can be reached, real ports filled in. Empty before `start`, and without a bind."""

    async def start(self) -> None:
        """Bind. Raises AddressInUse, OpenBind or BadAddress."""

    async def connect(self, peer: str, addresses: Sequence[str], *, timeout_s: float = 10) -> None:
        """Returns when `peer` has answered our hello; raises PeerLost if it has not in time.

        Addresses are tried in turn, those of this machine (ipc) first. Once connected, the endpoint dials
        again by itself whenever the peer is lost, until `disconnect`.
        """

    def disconnect(self, peer: str) -> None:
        """Say goodbye and forget the peer; requests to it end with PeerLost. Twice is the same as once."""

    async def request(
        self, peer: str, message: Struct, payload: Buffer | None = None, *, timeout_s: float
    ) -> Answer:
        """Ask, and wait for the answer. The payload is not copied: leave it unchanged until this returns.

        Requests to one peer leave in the order in which they were made; they wait for credit and for a lost
        connection within their deadline. Raises DeadlineExceeded (may still have been applied), Refused (was
        not applied), PeerLost (may have been applied, or no such peer), Congested and LocalProtocolError
        (nothing was sent). No answer is called missing that may lie here unread: a process that cannot keep up
        with what comes along this connection waits for so much longer, 30 s at most.
        """

    def notify(self, peer: str, message: Struct, payload: Buffer | None = None) -> bool:
        """Tell, at most once, without waiting. The payload is copied. False: dropped, for there is no such
        peer, or too much waits for it."""

    def peers(self) -> Mapping[str, PeerInfo]:
        """Those that have said hello, and those we dial."""

    async def found(self, peer: str, *, timeout_s: float, anew: bool = False) -> bool:
        """Returns when this peer is connected, whoever dialled; false if it is not in time, as on an endpoint that is
        closed. `anew`: when it is found the next time, after it was lost or started again."""

    def pace(self, peer: str, ping_s: float) -> None:
        """Whoever dialled pings so often from now on, where nothing else is said; both sides are to be told. No peer
        of that name: nothing happens."""

    def catch_up(self) -> float:
        """Read what has come, as far as one turn allows; the seconds since all was read, but 30 at most, or a peer that
        never stops talking would keep others from being missed. To be asked before anybody is called silent: what he
        has said since may lie unread."""

    async def close(self) -> None:
        """Say goodbye to who is here, stop handlers, free everything. Requests under way end with PeerLost."""


# May this key (None without keys) come in under this name? None: yes. A sentence: no, and why.
Admit = Callable[[str, str | None], str | None]


def idempotent_by_class(message: Struct) -> bool:
    """A request class that says `idempotent: ClassVar[bool] = True` may be handled twice."""
    return bool(getattr(type(message), "idempotent", False))
