"""ZAP: ZeroMQ asks this handler whether a CURVE key may come in (RFC 27). One per context.

Only keys of the authorized list are let in; everybody else is counted and logged with the address and the key,
which is public. The name of the key becomes the User-Id of every message that comes over the connection.

Who does not even speak CURVE never gets as far as ZAP: `Lookout` sees those fail at the handshake.
"""

import asyncio
import struct
from typing import Final

import zmq
import zmq.utils.z85

from .errors import BadKeys
from .keys import Authorized
from .violations import Violations

DOMAIN: Final = "zml"
EVENT: Final = struct.Struct("=HI")  # zmq_socket_monitor(3): which event, and its value
MECHANISM: Final = {zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH}


def new_pair() -> tuple[str, str]:
    """A new public and secret key, in Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def public_of(secret: str) -> str:
    public: bytes = zmq.curve_public(secret.encode("ascii"))
    return public.decode("ascii")


class Authenticator:
    """Answers ZAP requests in the running event loop until closed."""

    def __init__(
        self, context: "zmq.Context[zmq.SyncSocket]", authorized: Authorized, violations: Violations
    ) -> None:
        self._authorized = authorized
        self._violations = violations
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._socket.close()

    def refresh(self) -> bool:
        """Look at the list again; True if it has changed. A list that cannot be read any more changes nothing."""
        try:
            return self._authorized.refresh()
        except BadKeys as error:
            self._violations.note("keys", str(self._authorized.path), str(error), self._loop.time())
            return False

    def _drain(self) -> None:
        while True:
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._judge(request))

    def _judge(self, request: list[bytes]) -> list[bytes]:
        if len(request) < 6 or request[0] != b"1.0":
            return [b"1.0", b"", b"500", b"not ZAP 1.0", b"", b""]
        _, number, domain, address, _, mechanism, *credentials = request
        name = None
        if domain.decode("ascii", "replace") == DOMAIN and mechanism == b"CURVE" and len(credentials) == 1:
            self.refresh()
            key = zmq.utils.z85.encode(credentials[0]).decode("ascii")
            name = self._authorized.name_of(key)
            what = f"the key {key} is not authorized"
        else:
            what = f"mechanism {mechanism.decode('ascii', 'replace')[:20]}"
        if name is None:
            who = address.decode("ascii", "replace")[:64]
            self._violations.note("key", who, what, self._loop.time())
            return [b"1.0", number, b"400", b"not authorized", b"", b""]
        return [b"1.0", number, b"200", b"OK", name.encode("ascii"), b""]


class Lookout:
    """Counts and logs who fails at the handshake of one listening socket: no key at all, another protocol.

    A monitor of ZeroMQ 4.3.5 may crash with the connections it watches (libzmq #4524), so it watches listeners for
    failed handshakes alone, which a member never causes.
    """

    # Whoever sees first that the mechanisms differ hangs up: if that is the client, we learn no detail.
    EVENTS: Final = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

    def __init__(self, listener: "zmq.Socket[bytes]", violations: Violations) -> None:
        self._listener = listener
        self._violations = violations
        self._loop = asyncio.get_running_loop()
        self._monitor = listener.get_monitor_socket(self.EVENTS)
        self._descriptor = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)
        self._drain()  # ZeroMQ signals to those only who have looked and found nothing

    def close(self) -> None:
        """Before the listener is closed."""
        self._loop.remove_reader(self._descriptor)
        self._listener.disable_monitor()
        self._monitor.close(linger=0)

    def _drain(self) -> None:
        while True:
            try:
                event, address = self._monitor.recv_multipart(zmq.NOBLOCK)
            except (zmq.Again, ValueError):
                return
            _, code = EVENT.unpack(event)
            what = "no key" if code in MECHANISM else f"a key that does not fit, or none ({code:#x})"
            who = address.decode("ascii", "replace")[:64]
            self._violations.note("handshake", who, f"came with {what}", self._loop.time())
