"""All peers of one process: who they are, hello and goodbye, handlers, deadlines. It opens no socket.

A subclass moves frames: it calls `_received` for each message and implements `_transmit`, `_dial` and `_hang_up`.
What is sent and when is decided in `session`; here decisions become calls, futures and timers. Everything happens
in the one event loop that called `start`, and all time is that loop's.

The rule for strangers (see `door`): whoever has not said a valid hello is answered at most with STRANGER.
"""

import asyncio
import secrets
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

import structlog
from msgspec import Struct

from . import events
from .calls import Calls, check_payload
from .door import Door, Link
from .errors import LocalProtocolError, PeerLost, Refused, RemoteProtocolError
from .events import Event
from .frames import (
    NO_SLOT,
    Envelope,
    Hello,
    Kind,
    Stranger,
    Vocabulary,
    check_name,
    pack,
    unpack,
)
from .outgoing import BEHIND_S
from .peer import Peer
from .peers import CONTROL, Admit, Answer, Buffer, Handler, Limits, PeerInfo, idempotent_by_class
from .session import LINKS, LIVES, Session, State
from .violations import Violations

LATE_S: Final = 0.05  # a timer that fires later than this shows that we were held up ourselves

log = structlog.get_logger("zml.transport")


class Exchange(ABC):
    """An Endpoint without a wire. See `peers.Endpoint` for what the public methods promise.

    Handlers may be plain functions, which is cheapest, or coroutines, of which at most `limits.requests` run per
    peer (twice that if the peer gives up requests). They are not cancelled when their peer is lost: what they began
    they finish, and the reply is dropped. `close` cancels them.
    """

    def __init__(
        self,
        name: str,
        *,
        vocabulary: Any,
        handler: Handler,
        limits: Limits = CONTROL,
        on_found: Callable[[str], None] | None = None,
        on_lost: Callable[[str, str], None] | None = None,
        idempotent: Callable[[Struct], bool] = idempotent_by_class,
        admit: Admit | None = None,
        life: int | None = None,
    ) -> None:
        wrong = check_name(name)
        if wrong:
            raise LocalProtocolError(wrong)
        self._name = name
        self._vocabulary = Vocabulary(vocabulary)
        self._limits = limits
        self._on_found = on_found
        self._on_lost = on_lost
        self._idempotent = idempotent
        self._next_session = (secrets.randbelow(LIVES) if life is None else life % LIVES) * LINKS
        self._log = log.bind()  # once: thousands come and go at once, and most logs leave that out
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._peers: dict[str, Peer] = {}
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}  # by peer, who waits until it is found
        self._links: dict[Hashable, Link] = {}  # those with a peer
        self._door = Door(name, limits.peers, admit)
        self._grant = limits.credit_bytes
        self.violations = Violations()
        self._calls = Calls(name, handler, limits, self.violations)
        self._tasks = self._calls.tasks

    # -- the wire, which a subclass supplies -----------------------------------------------------------------

    @abstractmethod
    def _transmit(self, route: Hashable, header: bytes, payload: memoryview | None) -> bool:
        """Send, or queue within bounds, without waiting. False: dropped."""

    @abstractmethod
    def _dial(self, peer: str, address: str) -> Hashable:
        """Open a connection; returns its route at once. Raises BadAddress."""

    @abstractmethod
    def _hang_up(self, route: Hashable, *, goodbye: bool = False) -> None:
        """This route will not be used again. With `goodbye`, what was sent may still take a second to leave."""

    async def _see_off(self) -> None:  # noqa: B027 - most wires keep nothing back
        """What was transmitted and is still here may take a second to leave."""

    def catch_up(self) -> float:
        return 0.0  # most wires deliver by themselves

    def _catch_up_with(self, route: Hashable) -> float:
        """The same, of what comes along this route."""
        return self.catch_up()

    def _carries(self, route: Hashable) -> bool:
        """Is it known that somebody is at the other end of this route, who gets all that is sent along it?"""
        return False

    def _same_machine(self, addresses: Sequence[str]) -> bool:
        """May a peer behind one of these be on this machine, so that shared memory is worth offering?"""
        return False

    def _rank(self, address: str) -> int | None:
        """Lower is tried first; None: no use on this machine."""
        return 0

    # -- what users call -------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def addresses(self) -> tuple[str, ...]:
        return ()

    async def start(self) -> None:
        assert self._loop is None, "an endpoint starts once"
        self._loop = asyncio.get_running_loop()

    async def connect(self, peer: str, addresses: Sequence[str], *, timeout_s: float = 10) -> None:
        loop = self._running()
        wrong = check_name(peer)
        if wrong or peer == self._name:
            raise LocalProtocolError(wrong or f"{peer} is this process itself")
        ranked = sorted(
            ((rank, address) for address in addresses if (rank := self._rank(address)) is not None),
            key=lambda pair: pair[0],
        )
        if not ranked:
            raise PeerLost(peer, f"none of its addresses can be reached from here: {', '.join(addresses)}")
        known = self._peers.get(peer)
        if known is None:
            known = self._dial_first(peer, tuple(address for _, address in ranked))
        elif not known.session.dialled:
            raise LocalProtocolError(f"{peer} has connected to this process already")
        known.addresses = tuple(address for _, address in ranked)
        if known.session.state is State.OPEN:
            return
        opened = loop.create_future()
        known.opened.append(opened)
        try:
            async with asyncio.timeout(timeout_s):
                await opened
        except TimeoutError:
            where = ", ".join(known.addresses)
            raise PeerLost(peer, f"no answer from {where} in {timeout_s:g} s: {known.because}") from None
        finally:
            if opened in known.opened:
                known.opened.remove(opened)
            # Whom we have never met, and nobody waits for any more, we do not go on dialling.
            if not known.met and not known.opened and self._peers.get(peer) is known:
                self._remove(known, known.because, known.session.lose(known.because))

    def disconnect(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is not None:
            aborted = known.session.close("disconnected")
            known.flush()
            self._remove(known, "disconnected", aborted, tell=False, goodbye=True)

    async def request(
        self, peer: str, message: Struct, payload: Buffer | None = None, *, timeout_s: float
    ) -> Answer:
        self._running()
        known = self._peers.get(peer)
        if known is None:
            raise PeerLost(peer, "it is not connected")
        view = check_payload(payload, self._limits)
        number, future = known.ask(message, view, timeout_s)
        self._arm(known)
        try:
            return await future
        except asyncio.CancelledError:
            known.give_up(number)
            raise

    def notify(self, peer: str, message: Struct, payload: Buffer | None = None) -> bool:
        self._running()
        known = self._peers.get(peer)
        view = check_payload(payload, self._limits)
        if view is not None:
            view = memoryview(bytes(view))
        if known is None or not known.session.notify(message, view):
            return False
        return known.flush()

    def peers(self) -> Mapping[str, PeerInfo]:
        return {peer.name: peer.info() for peer in self._peers.values()}

    def pace(self, peer: str, ping_s: float) -> None:
        known = self._peers.get(peer)
        if known is not None:
            known.session.pace(ping_s, self._running().time())
            self._arm(known)

    async def found(self, peer: str, *, timeout_s: float, anew: bool = False) -> bool:
        known = self._peers.get(peer)
        if known is not None and known.found and not (anew or self._closed):
            return True
        come: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(peer, []).append(come)
        try:
            async with asyncio.timeout(timeout_s):
                await come
        except TimeoutError:
            return False
        finally:
            waiting = self._awaited[peer]
            waiting.remove(come)
            if not waiting:
                del self._awaited[peer]
        return True

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Who does not answer gets no goodbye, so there is nothing to wait for.
        for peer in [each for each in self._peers.values() if each.session.state is State.DIALLING]:
            self._remove(peer, "this process ends", peer.session.lose(f"{self._name} ends"), tell=False)
        ended = [(peer, peer.session.close(f"{self._name} ends")) for peer in self._peers.values()]
        for peer, _ in ended:
            peer.flush()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._see_off()
        finally:
            for peer, aborted in ended:
                self._remove(peer, "this process ends", aborted, tell=False, goodbye=True)

    # -- what the wire calls ---------------------------------------------------------------------------------

    def _received(
        self, route: Hashable, header: bytes, payload: memoryview | None, key: str | None = None
    ) -> None:
        """A message has come along `route`, from somebody who holds the key of that name (None without keys)."""
        link = self._links.get(route) or self._door.stranger(route)
        if link.muted or self._closed:
            return
        peer = link.peer
        try:
            envelope = unpack(header, payload, self._vocabulary, payload_bytes=self._limits.payload_bytes)
            if peer is None or peer.session.number != envelope.session:
                if envelope.kind is Kind.HELLO:
                    self._on_hello(link, envelope, key)
                elif peer is None or not peer.session.dialled:
                    self._answer_stranger(link, envelope, "this session is not known here")
                return
            if key != link.key:
                raise RemoteProtocolError(
                    "identity", f"key {key} speaks for {peer.name}, whose key is {link.key}"
                )
            if envelope.kind is Kind.HELLO:
                self._on_hello(link, envelope, key)
                return
            if envelope.slot != NO_SLOT:
                envelope = peer.from_memory(envelope)
            self._perform(peer, peer.session.receive(envelope, self._running().time()))
        except RemoteProtocolError as error:
            self._violation(link, error)
            return
        if peer.session.outbox:
            peer.flush()

    def _malformed(self, route: Hashable, rule: str, what: str) -> None:
        """Something has come along `route` that is no message at all."""
        link = self._links.get(route) or self._door.stranger(route)
        if not link.muted and not self._closed:
            self._violation(link, RemoteProtocolError(rule, what))

    # -- who comes in ----------------------------------------------------------------------------------------

    def _on_hello(self, link: Link, envelope: Envelope, key: str | None) -> None:
        hello = envelope.body
        assert isinstance(hello, Hello)
        if link.peer is not None and link.peer.session.dialled:
            raise RemoteProtocolError("kind", "a HELLO from a peer that this side dialled")
        peer = self._peers.get(hello.name)
        try:
            self._door.check_identity(link, hello, key, peer)
        except RemoteProtocolError as error:
            self._answer_stranger(link, envelope, error.what)
            raise
        because = self._door.why_not(hello, envelope.session, key, peer, len(self._peers))
        if because:
            self.violations.note("hello", hello.name, because, self._running().time())
            self._answer_stranger(link, envelope, because)
            return
        self._let_in(link, envelope, hello, key)

    def _let_in(self, link: Link, envelope: Envelope, hello: Hello, key: str | None) -> None:
        now = self._running().time()
        peer = self._peers.get(hello.name)
        if peer is not None and peer.session.number != envelope.session:
            same_life = peer.session.number // LINKS == envelope.session // LINKS
            because = "it connected anew" if same_life else "it was started anew"
            self._remove(peer, because, peer.session.lose(because))
            peer = None
        again = peer is not None
        if peer is not None and not peer.session.is_newest_hello(envelope):
            return  # overtaken: the way along which it came is not the newest
        if peer is None:
            session = Session(
                hello.name,
                envelope.session,
                limits=self._limits,
                now=now,
                dialled=False,
                name=self._name,
                idempotent=self._idempotent,
                granted=self._granted,
                peer_ping_s=min(max(hello.ping_s, 0.01), 60.0),
            )
            session.is_newest_hello(envelope)
            peer = self._peers[hello.name] = self._peer(session, link)
            self._share_budget()
        if peer.link is not link:
            self._drop_link(peer.link)
            peer.link = link
        self._door.let_in(link, hello.name, key, envelope.session)
        self._links[link.route] = link
        link.peer, link.key = peer, key
        mapped = peer.share_memory(hello.ring)
        peer.session.welcome(
            resumed=again, requests=max(hello.requests, 1), credit=envelope.credit, mapped=mapped, now=now
        )
        peer.flush()
        self._arm(peer)
        self._tell_found(peer)

    def _answer_stranger(self, link: Link, envelope: Envelope, because: str) -> None:
        if envelope.kind in (Kind.STRANGER, Kind.BYE):
            return
        body = Stranger(because[:500])
        self._transmit(
            link.route, pack(Envelope(kind=Kind.STRANGER, session=envelope.session, body=body)), None
        )

    def _violation(self, link: Link, error: RemoteProtocolError) -> None:
        peer = link.peer
        now = self._running().time()
        who = peer.name if peer is not None else repr(link.route)[:80]
        link.violations += 1
        self.violations.note(error.rule, who, error.what, now)
        if link.violations < self._limits.violations:
            return
        because = f"it broke the rules {link.violations} times, the last: {error}"
        self.violations.note("dropped", who, because, now)
        if peer is not None:
            self._drop(peer, because)
        else:
            link.muted = True

    def _drop(self, peer: Peer, because: str) -> None:
        """Have nothing more to do with this peer; one that we dial is dialled again."""
        link = peer.link
        if peer.session.dialled:
            peer.session.redial(self._running().time())
            self._lost(peer, because)
            self._redial(peer)
            self._arm(peer)
        else:
            self._remove(peer, because, peer.session.lose(because))
            link.muted = True
            self._door.turn_away(link)  # or it would come back as a stranger with a clean slate

    # -- what a session has decided --------------------------------------------------------------------------

    def _perform(self, peer: Peer, happened: list[Event]) -> None:
        for event in happened:
            match event:
                case events.Handle():
                    self._calls.handle(peer, event, self._running())
                case events.Answered(number, message, payload):
                    peer.resolve(number, Answer(message, payload))
                case events.RefusedBy(number, code, because):
                    peer.fail(number, Refused(peer.name, code, because))
                case events.Expired(number, sent):
                    peer.expire(number, sent)
                case events.Aborted(number, because):
                    peer.fail(number, PeerLost(peer.name, because))
                case events.Opened():
                    self._opened(peer, event)
                case events.Silent(because):
                    self._lost(peer, because)
                    if peer.session.dialled:
                        self._redial(peer)
                    self._arm(peer)
                case events.Returned():
                    self._arm(peer)
                    self._tell_found(peer)
                case events.Left(because):
                    if peer.session.dialled:
                        self._lost(peer, because)
                        self._redial(peer)
                        self._arm(peer)
                    else:
                        self._remove(peer, because, peer.session.lose(because))
                case events.Gone(because):
                    self._remove(peer, because, peer.session.lose(because))
                case events.Renewed(because):
                    self._lost(peer, because)
                    self._offer_memory(peer)
                    self._arm(peer)
                case events.Mapped():
                    peer.memory_mapped()
                case events.FreedSlots(slots):
                    peer.memory_freed(slots)

    def _opened(self, peer: Peer, event: events.Opened) -> None:
        if event.mapped:
            peer.memory_mapped()
        peer.map_memory(event.ring)
        peer.attempt = 0
        peer.redial_at = float("inf")
        self._arm(peer)
        for future in peer.opened:
            if not future.done():
                future.set_result(None)
        peer.opened.clear()
        self._tell_found(peer)

    # -- dialling, losing ------------------------------------------------------------------------------------

    def _dial_first(self, name: str, addresses: tuple[str, ...]) -> Peer:
        now = self._running().time()
        session = Session(
            name,
            self._take_number(),
            limits=self._limits,
            now=now,
            dialled=True,
            name=self._name,
            idempotent=self._idempotent,
            granted=self._granted,
            next_number=self._take_number,
        )
        link = Link(self._dial(name, addresses[0]))
        peer = self._peers[name] = self._peer(session, link)
        link.peer = peer
        self._links[link.route] = link
        peer.addresses = addresses
        peer.dialled(now)
        self._offer_memory(peer)
        self._share_budget()
        self._arm(peer)
        return peer

    def _peer(self, session: Session, link: Link) -> Peer:
        return Peer(session, link, loop=self._running(), limits=self._limits, transmit=self._transmit)

    def _offer_memory(self, peer: Peer) -> None:
        """The next hello offers a ring, if the peer may be on this machine."""
        if self._same_machine(peer.addresses):
            peer.offer_memory()

    def _redial(self, peer: Peer) -> None:
        """Open the next connection of a peer that does not answer."""
        self._drop_link(peer.link)
        peer.attempt += 1
        peer.dialled(self._running().time())
        address = peer.addresses[peer.attempt % len(peer.addresses)]
        link = peer.link = Link(self._dial(peer.name, address))
        link.peer = peer
        self._links[link.route] = link

    def _drop_link(self, link: Link, *, goodbye: bool = False) -> None:
        self._links.pop(link.route, None)
        link.peer = None
        self._hang_up(link.route, goodbye=goodbye)

    def _lost(self, peer: Peer, because: str) -> None:
        peer.because = because
        if peer.found:
            peer.found = False
            self._log.info("peer lost", peer=peer.name, because=because)
            self._tell(self._on_lost, peer.name, because)

    def _tell_found(self, peer: Peer) -> None:
        if not peer.found:
            peer.found = peer.met = True
            self._log.debug("peer found", peer=peer.name, session=peer.session.number)
            self._tell(self._on_found, peer.name)
            for come in self._awaited.get(peer.name, ()):
                if not come.done():
                    come.set_result(None)

    def _tell(self, callback: Callable[..., None] | None, *args: str) -> None:
        if callback is None:
            return
        try:
            callback(*args)
        except Exception as error:
            log.error("a callback failed", traceback="".join(traceback.format_exception(error)))

    def _remove(
        self, peer: Peer, because: str, aborted: list[Event], *, tell: bool = True, goodbye: bool = False
    ) -> None:
        """The end of a peer. Its requests have ended in its session already; here their futures do."""
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        self._drop_link(peer.link, goodbye=goodbye)
        peer.close_lane()
        if peer.timer is not None:
            peer.timer.cancel()
            peer.timer = None
        self._share_budget()
        for event in aborted:
            assert isinstance(event, events.Aborted)
            peer.fail(event.id, PeerLost(peer.name, event.because))
        for future in peer.opened:
            if not future.done():
                future.set_exception(PeerLost(peer.name, because))
        peer.opened.clear()
        if tell:
            self._lost(peer, because)

    # -- time and sending ------------------------------------------------------------------------------------

    def _arm(self, peer: Peer) -> None:
        at = peer.session.next_deadline()
        if peer.session.state is State.DIALLING:
            at = min(at, peer.redial_at)
        if peer.timer is not None:
            if peer.armed_at <= at:
                return  # it fires early, does nothing and is armed again: cheaper than to move it each time
            peer.timer.cancel()
            peer.timer = None
        if at != float("inf") and not self._closed:
            peer.armed_at = max(at, self._running().time())  # what is overdue already does not make us late
            peer.timer = self._running().call_at(at, self._tick, peer)

    def _tick(self, peer: Peer) -> None:
        peer.timer = None
        if self._closed:
            return
        now = self._running().time()
        session = peer.session
        late_s = now - peer.armed_at
        if late_s > LATE_S:
            session.forgive(late_s, now)
        silent, unread_s = session.is_silent(now), 0.0
        if silent or session.is_unanswered(now):
            # What has come while we were held up counts, and also what is too much to be read now.
            unread_s = self._catch_up_with(peer.link.route)
            if silent and unread_s > 0:
                session.forgive(max(unread_s, BEHIND_S), now)
            if self._peers.get(peer.name) is not peer:
                return
        session.carried = session.state is State.DIALLING and self._carries(peer.link.route)
        self._perform(peer, session.tick(now, unread_s))
        if self._peers.get(peer.name) is not peer:
            return
        if session.state is State.DIALLING and now >= peer.redial_at and not peer.is_worth_waiting_for(now):
            self._redial(peer)
            session.redial(now)
        peer.flush()
        self._arm(peer)

    def _take_number(self) -> int:
        """The number of the next session: greater than every one before in this life."""
        self._next_session += 1
        return self._next_session

    def _granted(self) -> int:
        return self._grant

    def _share_budget(self) -> None:
        share = self._limits.budget_bytes // max(len(self._peers), 1)
        self._grant = max(min(share, self._limits.credit_bytes), self._limits.payload_bytes)

    def _running(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "call start first"
        if self._closed:
            raise PeerLost(self._name, "this endpoint is closed")
        return self._loop
