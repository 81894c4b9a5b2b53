"""What was said between the roles, written down by somebody who is none of them.

It sits between the network and the handlers of the coordinator and the shards, and behind the requests of the workers.
What it keeps is what `invariants` compares with the push logs on disk; it never asks a role what it believes.
"""

import asyncio
from collections.abc import Callable
from inspect import isawaitable
from typing import Any, NamedTuple

import msgspec

from zml.lease import COORDINATOR
from zml.messages import (
    Commit,
    Delta,
    Enter,
    Entered,
    Ok,
    Pull,
    Push,
    Settle,
    Stands,
    Take,
    Taken,
)
from zml.transport import Refusal


class Who(NamedTuple):
    """One life of one worker."""

    worker: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.worker}#{self.incarnation}"


class Said(NamedTuple):
    """A worker's commit or push, and how a shard has answered it."""

    shard: str
    who: Who
    clock: int
    bucket: int  # -1: the commit


class Let(NamedTuple):
    """A shard has given parameters to a worker that is about to compute `clock`, when the history of its log had
    `records` records."""

    shard: str
    who: Who
    clock: int
    log: str
    records: int


class Recorder:
    """`position(shard)` is the log of the shard that speaks, and how many records its history has now."""

    def __init__(self, position: Callable[[str], tuple[str, int] | None]) -> None:
        self.position = position
        self.acknowledged: set[Said] = set()  # the worker has heard the Ok
        self.accepted: set[Said] = set()  # the shard has said Ok
        self.refused: set[Said] = set()
        self.entered: list[tuple[str, Who, int]] = []  # shard, who, clock
        self.let: list[Let] = []
        self.versions: dict[tuple[Who, int], list[list[int]]] = {}  # by worker and bucket, as they came
        self.given: dict[tuple[Who, int], list[int]] = {}  # by epoch, in the order in which it got them
        self.claimed: dict[
            tuple[Who, int], set[int]
        ] = {}  # by epoch, what it told the coordinator to be applied
        self.settled: dict[Who, tuple[int, int, int]] = {}  # the furthest clock, its epoch, its batches

    # -- before the handlers of the coordinator and the shards -------------------------------------------------

    def between(self, name: str, handler: Any) -> Any:
        shard = name.startswith("p")
        if not shard and name != COORDINATOR:
            return handler
        note = self._order if "-" in name else self._shard if shard else lambda *heard: None

        def handle(peer: str, message: Any, payload: memoryview | None) -> Any:
            if isinstance(message, Take) and payload is not None:
                self._claim(message, payload)
            try:
                answer = handler(peer, message, payload)
            except Refusal:
                self._refuse(name, message)
                raise
            if not isinstance(answer, (msgspec.Struct, tuple)) and isawaitable(answer):
                answer = asyncio.ensure_future(answer)
                answer.add_done_callback(lambda ended: self._later(note, name, message, payload, ended))
            elif answer is not None:
                note(name, message, payload, answer[0] if isinstance(answer, tuple) else answer)
            return answer

        return handle

    def _later(self, note: Any, name: str, message: Any, payload: Any, ended: "asyncio.Future[Any]") -> None:
        if not ended.cancelled() and ended.exception() is None:
            answer = ended.result()
            note(name, message, payload, answer[0] if isinstance(answer, tuple) else answer)

    def _refuse(self, name: str, message: Any) -> None:
        if isinstance(message, Commit):
            who = Who(message.worker, message.incarnation)
            self.refused.add(Said(name, who, message.clock, -1))

    def _claim(self, message: Take, payload: memoryview) -> None:
        # As it comes: what is refused in the end, because its sender is gone meanwhile, may be in the ledger.
        done = self.claimed.setdefault((Who(message.worker, message.incarnation), message.epoch), set())
        for first, last in msgspec.msgpack.decode(payload, type=list[tuple[int, int]]):
            done.update(range(first, last + 1))

    def _order(self, name: str, message: Any, payload: Any, answer: Any) -> None:
        if isinstance(message, Settle) and isinstance(answer, Stands) and answer.clock >= 0:
            who = Who(message.worker, message.incarnation)
            here = (answer.clock, answer.epoch, answer.done)
            self.settled[who] = max(here, self.settled.get(who, here))

    def _shard(self, name: str, message: Any, payload: Any, answer: Any) -> None:
        match message, answer:
            case ((Commit() | Push()), Ok()):
                self.accepted.add(said(name, message))
            case Enter(known=False), Entered():
                self.entered.append((name, Who(message.worker, message.incarnation), answer.clock))
            case Pull(), Delta():
                who = Who(message.worker, message.incarnation)
                if (here := self.position(name)) is not None:  # it lives, and has read its log
                    self.let.append(Let(name, who, message.clock, *here))

    # -- behind the requests of the workers ----------------------------------------------------------------------

    def heard(self, name: str, peer: str, message: Any, answer: Any) -> None:
        """A request of this endpoint was answered."""
        match message, answer:
            case ((Commit() | Push()), Ok()):
                self.acknowledged.add(said(peer, message))
            case Take(), Taken():
                who = Who(message.worker, message.incarnation)
                self.given.setdefault((who, answer.epoch), []).extend(answer.batches)
            case Pull(), Delta():
                who = Who(message.worker, message.incarnation)
                self.versions.setdefault((who, message.bucket), []).append(answer.versions)


def said(shard: str, message: Commit | Push) -> Said:
    bucket = message.bucket if isinstance(message, Push) else -1
    return Said(shard, Who(message.worker, message.incarnation), message.clock, bucket)
