"""All peers of one process: who they are, hello and goodbye, handlers, deadlines. It opens no socket.

A subclass moves frames: it calls `_received` for each message and implements `_transmit`, `_dial` and `_hang_up`.
What is sent and when is decided in `session`; here decisions become calls, futures and timers. Everything happens
in the one event loop that called `start`, and all time is that loop's.

The rule for strangers: whoever has not said a valid hello is answered at most with STRANGER, and keeps nothing here
but a counter. A name belongs to the key that said hello under it first.
"""

import asyncio
import secrets
import traceback
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Final

import structlog
from msgspec import Struct

from . import session as events
from .errors import DeadlineExceeded, LocalProtocolError, PeerLost, Refusal, Refused, RemoteProtocolError
from .frames import Envelope, Hello, Kind, Stranger, Vocabulary, as_bytes, check_name, pack, unpack
from .peers import CONTROL, Admit, Answer, Buffer, Handler, Limits, PeerInfo, Reply, idempotent_by_class
from .session import LINKS, LIVES, Event, Session, State
from .violations import Violations

REMEMBERED_NAMES: Final = 16_384  # names whose key and last session are kept after they have gone
STRANGERS: Final = 4096  # routes without a session about which something is remembered
PATIENCE_S: Final = 1.0  # for the first address before the next is tried; longer each time
PATIENCE_MOST_S: Final = 5.0
LATE_S: Final = 0.05  # a timer that fires later than this shows that we were held up ourselves

log = structlog.get_logger("zml.transport")


class Link:
    """One way along which messages come and go: a routing id, or a connection of ours."""

    __slots__ = ("key", "muted", "peer", "route", "violations")

    def __init__(self, route: Hashable) -> None:
        self.route = route
        self.peer: Peer | None = None
        self.key: str | None = None
        self.violations = 0
        self.muted = False  # what still comes is dropped unread


class Peer:
    """A session, and what the event loop holds for it."""

    def __init__(self, name: str, session: Session, link: Link) -> None:
        self.name = name
        self.session = session
        self.link = link
        self.futures: dict[
            int, tuple[asyncio.Future[Answer], str, float]
        ] = {}  # exactly the pending requests
        self.timer: asyncio.TimerHandle | None = None
        self.armed_at = 0.0
        self.notices_running = 0
        self.found = False  # on_found was called, and on_lost not since
        # Of a peer that we dial:
        self.addresses: tuple[str, ...] = ()
        self.attempt = 0
        self.redial_at = float("inf")
        self.because = "it has not answered yet"  # why it is not connected
        self.opened: list[asyncio.Future[None]] = []


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
        self._handler = handler
        self._limits = limits
        self._on_found = on_found
        self._on_lost = on_lost
        self._idempotent = idempotent
        self._admit = admit
        self._next_session = (secrets.randbelow(LIVES) if life is None else life % LIVES) * LINKS
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._peers: dict[str, Peer] = {}
        self._links: dict[Hashable, Link] = {}  # those with a peer
        self._strangers: OrderedDict[Hashable, Link] = OrderedDict()  # those without, oldest first
        self._known: OrderedDict[str, tuple[str | None, int]] = OrderedDict()  # name -> key, newest session
        self._tasks: set[asyncio.Task[None]] = set()
        self._grant = limits.credit_bytes
        self.violations = Violations()

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

    def _poll(self) -> None:
        """Take in what has arrived and was not read yet: before anybody is called silent."""

    def _rank(self, address: str) -> int | None:
        """Lower is tried first; None: no use on this machine."""
        return 0

    # -- what users call ----------------------------------------------------------------------------------------

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
            because = known.because
            if self._peers.get(peer) is known:
                self._remove(known, because, known.session.lose(because))
            raise PeerLost(
                peer, f"no answer from {', '.join(known.addresses)} in {timeout_s:g} s: {because}"
            ) from None
        finally:
            if opened in known.opened:
                known.opened.remove(opened)

    def disconnect(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is not None:
            aborted = known.session.close("disconnected")
            self._flush(known)
            self._remove(known, "disconnected", aborted, tell=False, goodbye=True)

    async def request(
        self, peer: str, message: Struct, payload: Buffer | None = None, *, timeout_s: float
    ) -> Answer:
        loop = self._running()
        known = self._peers.get(peer)
        if known is None:
            raise PeerLost(peer, "it is not connected")
        view = self._check(payload)
        now = loop.time()
        future: asyncio.Future[Answer] = loop.create_future()
        number = known.session.request(message, view, deadline=now + timeout_s, now=now)
        known.futures[number] = (future, type(message).__name__, timeout_s)
        self._flush(known)
        self._arm(known)
        try:
            return await future
        except asyncio.CancelledError:
            if known.futures.pop(number, None):
                known.session.give_up(number, loop.time())
                self._flush(known)
            raise

    def notify(self, peer: str, message: Struct, payload: Buffer | None = None) -> bool:
        self._running()
        known = self._peers.get(peer)
        view = self._check(payload)
        if view is not None:
            view = memoryview(bytes(view))
        if known is None or not known.session.notify(message, view):
            return False
        return self._flush(known)

    def peers(self) -> Mapping[str, PeerInfo]:
        return {peer.name: _info(peer) for peer in self._peers.values()}

    async def close(self) -> None:
        if self._closed:
            return
        for peer in list(self._peers.values()):
            aborted = peer.session.close(f"{self._name} ends")
            self._flush(peer)
            self._remove(peer, "this process ends", aborted, tell=False, goodbye=True)
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what the wire calls ----------------------------------------------------------------------------------------

    def _received(
        self, route: Hashable, header: bytes, payload: memoryview | None, key: str | None = None
    ) -> None:
        """A message has come along `route`, from somebody who holds the key of that name (None without keys)."""
        link = self._links.get(route) or self._stranger(route)
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
            self._perform(peer, peer.session.receive(envelope, self._running().time()))
        except RemoteProtocolError as error:
            self._violation(link, error)
            return
        if peer.session.outbox:
            self._flush(peer)

    def _malformed(self, route: Hashable, rule: str, what: str) -> None:
        """Something has come along `route` that is no message at all."""
        link = self._links.get(route) or self._stranger(route)
        if not link.muted and not self._closed:
            self._violation(link, RemoteProtocolError(rule, what))

    # -- who comes in --------------------------------------------------------------------------------------------------

    def _stranger(self, route: Hashable) -> Link:
        link = self._strangers.get(route)
        if link is None:
            link = self._strangers[route] = Link(route)
            if len(self._strangers) > STRANGERS:
                self._strangers.popitem(last=False)
        return link

    def _on_hello(self, link: Link, envelope: Envelope, key: str | None) -> None:
        hello = envelope.body
        assert isinstance(hello, Hello)
        if link.peer is not None and link.peer.session.dialled:
            raise RemoteProtocolError("kind", "a HELLO from a peer that this side dialled")
        wrong = check_name(hello.name)
        if wrong:
            raise RemoteProtocolError("identity", wrong)
        if link.peer is not None and link.peer.name != hello.name:
            raise RemoteProtocolError("identity", f"{link.peer.name} says hello as {hello.name}")
        known_key, newest = self._known.get(hello.name, (key, -1))
        if known_key != key:
            self._answer_stranger(link, envelope, f"the name {hello.name} belongs to another key")
            raise RemoteProtocolError(
                "identity", f"key {key} says hello as {hello.name}, which belongs to key {known_key}"
            )
        because = self._why_not(hello, envelope.session, newest, key)
        if because:
            log.info("hello refused", peer=hello.name, because=because)
            self._answer_stranger(link, envelope, because)
            return
        self._let_in(link, envelope, hello, key)

    def _why_not(self, hello: Hello, number: int, newest: int, key: str | None) -> str | None:
        """Why this hello is refused; None: it is not. It is well formed, and comes from the holder of the name."""
        peer = self._peers.get(hello.name)
        if hello.to != self._name:
            return f"this is {self._name}, not {hello.to}"
        if hello.name == self._name or (peer is not None and peer.session.dialled):
            return f"the name {hello.name} is taken"
        if peer is not None and peer.session.number == number:
            return None
        if hello.resume:
            return "this session is not known here"
        if number // LINKS == newest // LINKS and number <= newest:
            return "this session is over"
        if peer is None and len(self._peers) >= self._limits.peers:
            return f"{len(self._peers)} peers are connected already"
        return self._admit(hello.name, key) if self._admit is not None else None

    def _let_in(self, link: Link, envelope: Envelope, hello: Hello, key: str | None) -> None:
        now = self._running().time()
        peer = self._peers.get(hello.name)
        if peer is not None and peer.session.number != envelope.session:
            same_life = peer.session.number // LINKS == envelope.session // LINKS
            because = "it connected anew" if same_life else "it was started anew"
            self._remove(peer, because, peer.session.lose(because))
            peer = None
        again = peer is not None
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
            peer = self._peers[hello.name] = Peer(hello.name, session, link)
            self._known[hello.name] = (key, envelope.session)
            self._known.move_to_end(hello.name)
            if len(self._known) > REMEMBERED_NAMES:
                self._known.popitem(last=False)
            self._share_budget()
        if peer.link is not link:
            self._drop_link(peer.link)
            peer.link = link
        self._strangers.pop(link.route, None)
        self._links[link.route] = link
        link.peer, link.key = peer, key
        peer.session.welcome(
            resumed=again, requests=max(hello.requests, 1), credit=envelope.credit, mapped=False, now=now
        )
        self._flush(peer)
        self._arm(peer)
        if not again:
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
        who = peer.name if peer is not None else _printable(link.route)
        link.violations += 1
        self.violations.note(error.rule, who, error.what, now)
        if link.violations < self._limits.violations:
            return
        because = f"it broke the rules {link.violations} times, the last: {error}"
        log.warning("peer dropped", peer=who, because=because)
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
            self._strangers[link.route] = link  # or it would be a stranger with a clean slate

    # -- what a session has decided -------------------------------------------------------------------------------------

    def _perform(self, peer: Peer, happened: list[Event]) -> None:
        for event in happened:
            match event:
                case events.Handle():
                    self._call_handler(peer, event)
                case events.Answered(number, message, payload):
                    self._resolve(peer, number, Answer(message, payload))
                case events.RefusedBy(number, code, because):
                    self._fail(peer, number, Refused(peer.name, code, because))
                case events.Expired(number, sent):
                    self._expire(peer, number, sent)
                case events.Aborted(number, because):
                    self._fail(peer, number, PeerLost(peer.name, because))
                case events.Opened():
                    self._opened(peer)
                case events.Silent(because) | events.Left(because):
                    if peer.session.dialled:
                        self._lost(peer, because)
                        self._redial(peer)
                        self._arm(peer)
                    else:
                        self._remove(peer, because, peer.session.lose(because))
                case events.Renewed(because):
                    self._lost(peer, because)
                    self._arm(peer)
                case _:
                    self._on_memory(peer, event)

    def _on_memory(self, peer: Peer, event: Event) -> None:
        pass

    def _call_handler(self, peer: Peer, call: events.Handle) -> None:
        if not call.id and peer.notices_running >= self._limits.requests:
            self.violations.counts["notice dropped"] += 1
            return
        try:
            result = self._handler(peer.name, call.message, call.payload)
        except Exception as error:
            self._answer_error(peer, call, error)
            return
        if isawaitable(result):
            task = self._running().create_task(self._finish(peer, call, result))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._answer(peer, call, result)

    async def _finish(self, peer: Peer, call: events.Handle, result: Awaitable[Reply]) -> None:
        notice = not call.id
        peer.notices_running += notice
        try:
            self._answer(peer, call, await result)
        except Exception as error:
            self._answer_error(peer, call, error)
        finally:
            peer.notices_running -= notice
        self._flush(peer)

    def _answer(self, peer: Peer, call: events.Handle, result: Any) -> None:
        if not call.id:
            return
        message, payload = result if isinstance(result, tuple) else (result, None)
        try:
            if not isinstance(message, Struct):
                raise LocalProtocolError(f"a request is answered by a message, not by {message!r}"[:200])
            peer.session.reply(call.number, call.id, message, self._check(payload))
        except LocalProtocolError as error:
            self._answer_error(peer, call, error)

    def _answer_error(self, peer: Peer, call: events.Handle, error: Exception) -> None:
        if isinstance(error, Refusal):
            code, because = error.code, error.because
        else:
            code, because = "internal", f"internal error in {self._name}; its log says more"
            log.error(
                "a handler failed",
                peer=peer.name,
                message=type(call.message).__name__,
                traceback="".join(traceback.format_exception(error)),
            )
        if call.id:
            peer.session.refuse(call.number, call.id, code, because)

    def _resolve(self, peer: Peer, number: int, answer: Answer) -> None:
        future, _, _ = peer.futures.pop(number)
        if not future.done():
            future.set_result(answer)

    def _fail(self, peer: Peer, number: int, error: Exception) -> None:
        found = peer.futures.pop(number, None)
        if found is not None and not found[0].done():
            found[0].set_exception(error)

    def _expire(self, peer: Peer, number: int, sent: bool) -> None:
        _, message, timeout_s = peer.futures[number]
        because = ""
        if peer.session.state is not State.OPEN:
            because = f"not connected: {peer.because}"
        elif not sent:
            because = "it waited for credit"
        self._fail(peer, number, DeadlineExceeded(peer.name, message, timeout_s, because, sent=sent))

    def _opened(self, peer: Peer) -> None:
        peer.attempt = 0
        peer.redial_at = float("inf")
        self._arm(peer)
        for future in peer.opened:
            if not future.done():
                future.set_result(None)
        peer.opened.clear()
        self._tell_found(peer)

    # -- dialling, losing ------------------------------------------------------------------------------------------------

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
        )
        self._next_session += (
            1 << 12
        )  # each peer may have 4,096 sessions before it meets the numbers of the next
        link = Link(self._dial(name, addresses[0]))
        peer = self._peers[name] = Peer(name, session, link)
        link.peer = peer
        self._links[link.route] = link
        peer.addresses = addresses
        peer.redial_at = now + PATIENCE_S
        self._share_budget()
        self._arm(peer)
        return peer

    def _redial(self, peer: Peer) -> None:
        """Open the next connection of a peer that does not answer."""
        self._drop_link(peer.link)
        peer.attempt += 1
        patience_s = min(PATIENCE_S * 1.5 ** min(peer.attempt, 10), PATIENCE_MOST_S)
        peer.redial_at = self._running().time() + patience_s
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
            log.info("peer lost", peer=peer.name, because=because)
            self._tell(self._on_lost, peer.name, because)

    def _tell_found(self, peer: Peer) -> None:
        if not peer.found:
            peer.found = True
            log.debug("peer found", peer=peer.name, session=peer.session.number)
            self._tell(self._on_found, peer.name)

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
        if peer.timer is not None:
            peer.timer.cancel()
            peer.timer = None
        self._share_budget()
        for event in aborted:
            assert isinstance(event, events.Aborted)
            self._fail(peer, event.id, PeerLost(peer.name, event.because))
        for future in peer.opened:
            if not future.done():
                future.set_exception(PeerLost(peer.name, because))
        peer.opened.clear()
        if tell:
            self._lost(peer, because)

    # -- time and sending -----------------------------------------------------------------------------------------------

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
            peer.armed_at = at
            peer.timer = self._running().call_at(at, self._tick, peer)

    def _tick(self, peer: Peer) -> None:
        peer.timer = None
        now = self._running().time()
        session = peer.session
        late_s = now - peer.armed_at
        if late_s > LATE_S:
            session.forgive(late_s)
        if session.state is State.OPEN and now >= session.next_deadline():
            self._poll()  # what has come while we were held up counts
            if self._peers.get(peer.name) is not peer:
                return
        self._perform(peer, session.tick(now))
        if self._peers.get(peer.name) is not peer:
            return
        if session.state is State.DIALLING and now >= peer.redial_at:
            self._redial(peer)
            session.redial(now)
        self._flush(peer)
        self._arm(peer)

    def _flush(self, peer: Peer) -> bool:
        """Hand what the session wants to say to the wire; False if the last of it was dropped."""
        outbox = peer.session.outbox
        sent = True
        while outbox:
            envelope = outbox.popleft()
            try:
                header = pack(envelope)
            except LocalProtocolError as error:
                self._unsendable(peer, envelope, error)
                continue
            sent = self._transmit(peer.link.route, header, envelope.payload)
        return sent

    def _unsendable(self, peer: Peer, envelope: Envelope, error: LocalProtocolError) -> None:
        """A message of ours does not fit: whoever made it must hear of it."""
        if envelope.kind is Kind.REQUEST:
            peer.session.give_up(envelope.id, self._running().time())
            self._fail(peer, envelope.id, error)
        elif envelope.kind is Kind.REPLY:
            log.error("a reply cannot be sent", peer=peer.name, because=str(error))
            peer.session.replace_reply(envelope.id, "internal", f"the reply of {self._name} is too long")
        else:
            raise error

    def _check(self, payload: Buffer | None) -> memoryview | None:
        if payload is None:
            return None
        view = as_bytes(payload)
        if view.nbytes > self._limits.payload_bytes:
            raise LocalProtocolError(
                f"a payload of {view.nbytes} bytes; {self._limits.payload_bytes} are allowed"
            )
        return view

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


def _info(peer: Peer) -> PeerInfo:
    session = peer.session
    return PeerInfo(
        name=peer.name,
        session=session.number,
        key=peer.link.key,
        last_heard=session.last_heard,
        connected=session.state is State.OPEN,
        outstanding=session.outstanding,
        outstanding_bytes=session.outstanding_bytes,
        shared_memory=False,
    )


def _printable(route: Hashable) -> str:
    return repr(route)[:80]
