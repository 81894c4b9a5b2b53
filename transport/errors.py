"""What can go wrong between peers, as a tree.

    TransportError
      ProtocolError
        LocalProtocolError     we tried to send what must not be sent; nothing left this process
        RemoteProtocolError    a peer sent what must not be sent; it was counted and changed nothing
      PeerLost                 the peer is gone, or never answered a hello
      DeadlineExceeded         no reply in time
      Refused                  the peer's handler said no
      Congested                too much waits for this peer already
      BadAddress               an address that cannot be bound or dialled
        AddressInUse           another process listens there
        OpenBind               a bind beyond this machine without keys
      BadKeys                  a key file that is missing, damaged, or open to others

A handler says no by raising `Refusal`, which is not a TransportError: nothing went wrong.
"""


class TransportError(Exception):
    """The root of what this package raises."""


class ProtocolError(TransportError):
    """The rules of the wire were broken."""


class LocalProtocolError(ProtocolError, ValueError):
    """By us: a message or payload over the limits, a name that cannot travel. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """By a peer. `rule` is the short name under which the violation is counted."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(what)
        self.rule = rule
        self.what = what

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}"


class PeerLost(TransportError):
    """The peer is gone. A request that was under way may have been applied."""

    def __init__(self, peer: str, because: str) -> None:
        super().__init__(f"{peer} is lost: {because}")
        self.peer = peer
        self.because = because


class DeadlineExceeded(TransportError):
    """No reply in time. If `sent`, the request may still have been applied, and its payload may still be on its
    way out: do not write into the buffer that was handed over; take another."""

    def __init__(
        self, peer: str, message: str, seconds: float, because: str = "", *, sent: bool = True
    ) -> None:
        hint = f" ({because})" if because else ""
        outcome = "The request may still have been applied." if sent else "The request was never sent."
        super().__init__(f"{peer} did not answer {message} within {seconds:g} s{hint}. {outcome}")
        self.peer = peer
        self.message = message
        self.seconds = seconds
        self.because = because
        self.sent = sent


class Refused(TransportError):
    """The peer understood and said no. The request was not applied."""

    def __init__(self, peer: str, code: str, because: str) -> None:
        super().__init__(f"{peer} refused: {because} [{code}]")
        self.peer = peer
        self.code = code
        self.because = because


class Congested(TransportError):
    """Too many requests wait for this peer already. Nothing was sent."""

    def __init__(self, peer: str, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait for {peer} already")
        self.peer = peer
        self.waiting = waiting


class BadAddress(TransportError, ValueError):
    """Not an address of the form tcp://HOST:PORT or ipc://PATH, or one that this machine does not have."""

    def __init__(self, address: str, what: str) -> None:
        super().__init__(f"{address}: {what}")
        self.address = address
        self.what = what


class AddressInUse(BadAddress):
    """Another process listens there."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "the address is in use")


class OpenBind(BadAddress):
    """Whoever reaches this address could join; keys are needed."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "an address beyond this machine needs keys")


class BadKeys(TransportError, ValueError):
    """A key file that cannot be used. The message names the file and never a secret."""


class Refusal(Exception):
    """Raised by a handler: no, with a code for programs and a sentence for people. The sender gets
    `Refused`."""

    def __init__(self, code: str, because: str) -> None:
        super().__init__(f"{because} [{code}]")
        self.code = code
        self.because = because
