"""The shared memory between this process and one peer: our ring for what goes, the peer's for what comes.

Each side offers its ring with hello or welcome; a ring is used once the other side has said that it is mapped.
Whatever does not work, the socket does. A slot that is announced in a message which is lost is not used again
until a new session begins; connections lose messages only when they break.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from .errors import RemoteProtocolError
from .frames import RingOffer
from .peers import KB
from .shm import BadSlot, NoRing, Ring, RingReader

FROM_BYTES: Final = 64 * KB  # smaller payloads gain nothing
NOTICE_S: Final = 0.002  # slots that are free again are told of together

log = structlog.get_logger("zml.transport")


class Lane:
    """`tell_free` sends slot numbers to the peer. All methods belong to the event loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        slots: int,
        slot_bytes: int,
        tell_free: Callable[[list[int]], None],
    ) -> None:
        self._loop = loop
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._tell_free = tell_free
        self._out: Ring | None = None
        self._out_mapped = False
        self._in: RingReader | None = None
        self._in_nonce = b""
        self._freed: deque[int] = deque()  # never longer than the peer's ring has slots
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Large payloads to the peer go through memory."""
        return self._out_mapped

    def offer(self) -> RingOffer | None:
        """Our ring, made when first asked for."""
        if self._out is None:
            try:
                self._out = Ring.create(self._slots, self._slot_bytes)
            except (NoRing, ValueError) as error:
                log.info("no shared memory", because=str(error))
                return None
        return RingOffer(self._out.path, self._out.nonce)

    def accept(self, offer: RingOffer | None) -> bool:
        """Map the peer's ring. The same offer twice is mapped once."""
        if offer is None:
            return False
        if self._in is not None and offer.nonce == self._in_nonce:
            return True
        try:
            reader = Ring.open(offer.path, offer.nonce, self._on_free)
        except NoRing as error:
            log.debug("shared memory of a peer cannot be used", because=str(error))
            return False
        if self._in is not None:
            self._in.close()
        self._in, self._in_nonce = reader, offer.nonce
        return True

    def mapped(self) -> None:
        """The peer has mapped our ring."""
        self._out_mapped = self._out is not None

    def put(self, payload: memoryview) -> int | None:
        """Copy a payload into a slot. None: it has to go over the socket."""
        if not self._out_mapped or self._out is None or payload.nbytes < FROM_BYTES:
            return None
        return self._out.put(payload)

    def view(self, slot: int, size: int) -> memoryview:
        """What the peer has put into a slot of its ring."""
        if self._in is None:
            raise RemoteProtocolError("slot", "a payload in shared memory that was never shared")
        try:
            return self._in.view(slot, size)
        except BadSlot as error:
            raise RemoteProtocolError("slot", str(error)) from None

    def release(self, slots: list[int]) -> None:
        """The peer needs these slots of ours no longer."""
        try:
            for slot in slots:
                if self._out is not None:
                    self._out.release(slot)
        except BadSlot as error:
            raise RemoteProtocolError("slot", str(error)) from None

    def close(self) -> None:
        """Twice is the same as once. Payloads that are still referred to stay readable."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._out_mapped = False
        if self._out is not None:
            self._out.close()
            self._out = None
        if self._in is not None:
            self._in.close()
            self._in = None
        self._freed.clear()

    def _on_free(self, slot: int) -> None:
        # Called by whichever thread drops the last reference, perhaps from within the garbage collector.
        self._freed.append(slot)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                pass  # the loop is closed: so is the connection

    def _wake(self) -> None:
        if self._in is None:
            self._woken = False
        elif len(self._freed) * 4 >= self._in.slots:
            self._tell()
        else:
            self._timer = self._loop.call_later(NOTICE_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._woken = False
        slots = []
        while self._freed:
            slots.append(self._freed.popleft())
        if slots and self._in is not None:
            self._tell_free(slots)
