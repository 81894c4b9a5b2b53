"""Calling the handler, and what becomes of what it returns or raises.

A plain function answers before anything else happens, without a task, which is what makes small messages cheap. Of
coroutines each peer has a bounded number running: its session bounds the requests, this its notices.
"""

import asyncio
import traceback
from functools import partial
from inspect import isawaitable
from types import NoneType
from typing import Any

import structlog
from msgspec import Struct

from .errors import LocalProtocolError, Refusal
from .events import Handle
from .frames import as_bytes
from .peer import Peer
from .peers import Buffer, Handler, Limits, Reply
from .violations import Violations

log = structlog.get_logger("zml.transport")


class Calls:
    """The calls of one process's handler."""

    def __init__(self, name: str, handler: Handler, limits: Limits, violations: Violations) -> None:
        self.tasks: set[asyncio.Future[Reply]] = set()  # the handlers that run
        self._name = name
        self._handler = handler
        self._limits = limits
        self._violations = violations

    def handle(self, peer: Peer, call: Handle, loop: asyncio.AbstractEventLoop) -> None:
        if not call.id and peer.notices_running >= self._limits.requests:
            self._violations.note("notices", peer.name, "more notices than can be handled", loop.time())
            return
        try:
            result = self._handler(peer.name, call.message, call.payload)
        except Exception as error:
            self._answer_error(peer, call, error)
            return
        if not isinstance(result, (Struct, tuple, NoneType)) and isawaitable(result):
            peer.notices_running += not call.id
            task = asyncio.ensure_future(result, loop=loop)
            self.tasks.add(task)
            task.add_done_callback(partial(self._finished, peer, call))
        else:
            self._answer(peer, call, result)

    def _finished(self, peer: Peer, call: Handle, task: "asyncio.Future[Reply]") -> None:
        self.tasks.discard(task)
        peer.notices_running -= not call.id
        if task.cancelled():
            # At the end of this process its peers are gone already; otherwise somebody waits for an answer.
            self._answer_error(peer, call, Refusal("cancelled", f"{self._name} has cancelled the handler"))
        elif error := task.exception():
            self._answer_error(peer, call, error)
        else:
            self._answer(peer, call, task.result())
        peer.flush()

    def _answer(self, peer: Peer, call: Handle, result: Any) -> None:
        if not call.id:
            return
        message, payload = result if isinstance(result, tuple) else (result, None)
        try:
            if not isinstance(message, Struct):
                raise LocalProtocolError(f"a request is answered by a message, not by {message!r}"[:200])
            peer.session.reply(call.number, call.id, message, check_payload(payload, self._limits))
        except LocalProtocolError as error:
            self._answer_error(peer, call, error)

    def _answer_error(self, peer: Peer, call: Handle, error: BaseException) -> None:
        if isinstance(error, Refusal):
            code, because = error.code, error.because
        else:
            code, because = "internal", f"internal error in {self._name}; its log says more"
            # The text alone: a log that shows the variables of frames shows what must stay where it is.
            log.error(
                "a handler failed",
                peer=peer.name,
                message=type(call.message).__name__,
                traceback="".join(traceback.format_exception(error)),
            )
        if call.id:
            peer.session.refuse(call.number, call.id, code, because)


def check_payload(payload: Buffer | None, limits: Limits) -> memoryview | None:
    """A payload as bytes. Raises LocalProtocolError for one that is too long, or none."""
    if payload is None:
        return None
    view = as_bytes(payload)
    if view.nbytes > limits.payload_bytes:
        raise LocalProtocolError(f"a payload of {view.nbytes} bytes; {limits.payload_bytes} are allowed")
    return view
