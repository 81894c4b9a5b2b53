"""Who comes in, and under which name.

A name belongs to the key that said hello under it first, for as long as this process remembers it. Whoever has not
said a valid hello keeps nothing here but a counter, and those counters are bounded too.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from .errors import RemoteProtocolError
from .frames import Hello, check_name
from .peers import Admit
from .session import LINKS

if TYPE_CHECKING:
    from .peer import Peer

REMEMBERED_NAMES: Final = 16_384
STRANGERS: Final = 4096


class Link:
    """One way along which messages come and go: a routing id, or a connection of ours."""

    __slots__ = ("key", "muted", "peer", "route", "violations")

    def __init__(self, route: Hashable) -> None:
        self.route = route
        self.peer: Peer | None = None
        self.key: str | None = None  # the name of the key that the hello was under
        self.violations = 0
        self.muted = False  # what still comes is dropped unread


class Door:
    """The door of the process `name`."""

    def __init__(self, name: str, most_peers: int, admit: Admit | None) -> None:
        self._name = name
        self._most_peers = most_peers
        self._admit = admit
        self._strangers: OrderedDict[Hashable, Link] = OrderedDict()  # links without a peer, oldest first
        self._known: OrderedDict[str, tuple[str | None, int]] = OrderedDict()  # name -> key, newest session

    def stranger(self, route: Hashable) -> Link:
        link = self._strangers.get(route)
        if link is None:
            link = Link(route)
            self.turn_away(link)
        return link

    def turn_away(self, link: Link) -> None:
        """Remember this link, without a peer; also whether it is muted."""
        self._strangers[link.route] = link
        if len(self._strangers) > STRANGERS:
            self._strangers.popitem(last=False)

    def let_in(self, link: Link, name: str, key: str | None, session: int) -> None:
        """This link has a peer now."""
        self._strangers.pop(link.route, None)
        self._known[name] = (key, session)
        self._known.move_to_end(name)
        if len(self._known) > REMEMBERED_NAMES:
            self._known.popitem(last=False)

    def check_identity(self, link: Link, hello: Hello, key: str | None, peer: "Peer | None") -> None:
        """Raises RemoteProtocolError for a name that cannot be, or that belongs to somebody else. `peer` has it now."""
        wrong = check_name(hello.name)
        if wrong:
            raise RemoteProtocolError("identity", wrong)
        if link.peer is not None and link.peer.name != hello.name:
            raise RemoteProtocolError("identity", f"{link.peer.name} says hello as {hello.name}")
        known_key, _ = self._known.get(hello.name, (key, -1))
        if peer is not None and not peer.session.dialled:
            known_key = peer.link.key  # even if so many names have come since that this one is forgotten
        if known_key != key:
            raise RemoteProtocolError(
                "identity", f"key {key} says hello as {hello.name}, which belongs to key {known_key}"
            )

    def why_not(
        self, hello: Hello, session: int, key: str | None, peer: "Peer | None", peers: int
    ) -> str | None:
        """Why this hello is refused, although its name is its own; None: it is not. `peer` has that name now."""
        if hello.to != self._name:
            return f"this is {self._name}, not {hello.to}"
        if hello.name == self._name or (peer is not None and peer.session.dialled):
            return f"the name {hello.name} is taken"
        if peer is not None and peer.session.number == session:
            return None
        if hello.resume:
            return "this session is not known here"
        _, newest = self._known.get(hello.name, (key, -1))
        if session // LINKS == newest // LINKS and session <= newest:
            return "this session is over"
        if peer is None and peers >= self._most_peers:
            return f"{peers} peers are connected already"
        return self._admit(hello.name, key) if self._admit is not None else None
