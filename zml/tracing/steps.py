"""A worker's steps: what is measured anyway becomes spans when the step is over, and only if it is kept.

    zml.step > zml.data, zml.compute, zml.encode, zml.push {shard}, zml.wait, zml.pull {shard}, zml.apply

Kept is one step in N (`sampling`), and whatever was slow or failed; of every other step a handful of numbers is
forgotten. A phase comes in pieces (encode, bucket by bucket): those with less than a tenth of the step between them are
one span, which says how much of it was so. With a staleness bound a push and a pull outlast their step: they go on
beside the next.

The shards hear of a step by the header of its messages, sampled or not; that a step was slow is known only when it is
over, and is told with the next message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import structlog

from .sampling import Slow, sampled, trace_of
from .span import MOST_KEPT, Context, Span, Value, write_header

PHASES = ("data", "encode", "wait", "apply")  # computing is what is left
BLOCKS = (
    "data",
    "wait",
    "apply",
)  # what the thread does instead of computing; buckets are encoded in between
PIECES = 1000  # of a phase; what comes after them is part of the last
NEAR = 0.1  # of the step: pieces with less between them are one span
SHORT = 0.01  # of the step: what is shorter between two other things is no computing worth a span
BEHIND = 2  # steps that may be over while their exchange is not
UNTOLD = 8  # slow steps that a shard has still to be told of: it remembers no more, either
NAMED = 8  # of those who were waited for

Emit = Callable[[Sequence[Span]], None]
Interval = tuple[float, float]  # of one phase in order, and without overlap


class Origin(NamedTuple):
    """Whose steps. `alone`: without a staleness bound nobody waits for anybody, and each worker's step is a trace."""

    run: str
    job: str
    worker: str
    incarnation: int
    alone: bool = False


@dataclass(slots=True)
class Leg:
    """What goes on with one shard."""

    span_id: int
    began: float
    ended: float | None = None  # None: no answer yet
    open: int = 0  # pulls that are not answered
    buckets: int = 0
    bytes: int = 0
    header: str = ""  # of its messages
    waited_for: dict[str, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Step:
    """The training thread's and the I/O thread's part of a step: each writes its own, and copies what is the other's
    before it looks through it."""

    clock: int
    context: Context
    pushes: dict[str, Leg] = field(default_factory=dict)
    pulls: dict[str, Leg] = field(default_factory=dict)
    epoch: int = -1
    began: float = 0.0
    ended: float = 0.0
    phases: dict[str, list[Interval]] = field(default_factory=dict)
    sent: int = 0
    received: int = 0
    slow: bool = False
    usual_s: float = 0.0

    @property
    def complete(self) -> bool:
        legs = (*self.pushes.values(), *self.pulls.values())
        return bool(self.pulls) and all(leg.ended is not None and not leg.open for leg in legs)


class Untraced:
    """Tracing is off: the hooks of the client and of the timeline, which do nothing."""

    def at(self, clock: int) -> None:
        """The training thread works on this clock."""

    def phase(self, name: str, began: float, ended: float) -> None:
        """It did this."""

    def close(self, clock: int, sent: int, received: int) -> None:
        """The step of this clock is over; so many bytes left and came."""

    def pause(self) -> None:
        """What was measured since the last step belongs to none."""

    def fail(self, clock: int, error: str) -> None:
        """The step of this clock is not made, or the script ends in the middle of it."""

    def end(self) -> None:
        """There is no further step."""

    def pushing(self, clock: int, shard: str, size: int) -> None:
        """A bucket leaves. This and what follows: in the I/O thread."""

    def committing(self, clock: int, shard: str, epoch: int) -> str:
        """The header of a Commit."""
        return ""

    def counted(self, clock: int, shard: str) -> None:
        """The shard has counted the step."""

    def pulling(self, clock: int | None, shard: str) -> str:
        """The header of a Pull. None: it belongs to no step."""
        return ""

    def waiting(self, clock: int | None, shard: str, names: Sequence[str]) -> None:
        """The shard waits for others."""

    def pulled(self, clock: int | None, shard: str, size: int) -> None:
        """A bucket is here."""


UNTRACED = Untraced()


class StepTrace(Untraced):
    """One worker's."""

    def __init__(
        self,
        origin: Origin,
        every: int,
        emit: Emit,
        now: Callable[[], float] = time.perf_counter,
        random: Random | None = None,
    ) -> None:
        self.origin = origin
        self.every = every
        self.emit = emit
        self.now = now
        self.random = random or Random()  # seeded by the system: a script's seed makes no ids
        self.slow = Slow()
        self.steps: dict[int, Step] = {}  # by clock: under way, or over and not yet decided
        self.over: deque[Step] = deque()
        self.began: float | None = None  # None: before the first step, nobody knows since when
        self.clock: int | None = None  # that the training thread works on
        self.phases: dict[str, list[Interval]] = {}
        self.untold: dict[str, deque[Context]] = {}  # by shard

    # -- the training thread -------------------------------------------------------------------------------

    def at(self, clock: int) -> None:
        if clock == self.clock:
            return
        self.clock = clock
        context = self._step(clock).context
        structlog.contextvars.bind_contextvars(
            trace_id=f"{context.trace_id:032x}", span_id=f"{context.span_id:016x}"
        )

    def phase(self, name: str, began: float, ended: float) -> None:
        pieces = self.phases.setdefault(name, [])
        if len(pieces) < PIECES:
            pieces.append((began, ended))
        else:
            pieces[-1] = pieces[-1][0], ended

    def close(self, clock: int, sent: int, received: int) -> None:
        now = self.now()
        step = self._step(clock)
        if self.began is not None:
            self._finish(step, now, self.began)
            step.sent, step.received = sent, received
            step.usual_s = self.slow.usual_s
            step.slow = self.slow.look(now - self.began)
            self.over.append(step)
        self.began, self.phases = now, {}
        self._decide(BEHIND)
        for other in list(self.steps.values()):
            if other.clock <= clock and other not in self.over:  # pushed, and never to be committed
                del self.steps[other.clock]
        self.at(clock + 1)

    def _finish(self, step: Step, now: float, began: float) -> None:
        step.began, step.ended, step.phases = began, now, self.phases

    def pause(self) -> None:
        self.began, self.phases = self.now(), {}
        self.clock = None
        structlog.contextvars.unbind_contextvars("trace_id", "span_id")

    def fail(self, clock: int, error: str) -> None:
        self._decide(0)
        now, step = self.now(), self._step(clock)
        self._finish(step, now, now if self.began is None else self.began)
        self.emit(spans_of(self.origin, step, "failed", self._draw, error))
        self.steps.pop(clock, None)
        self.pause()

    def end(self) -> None:
        self._decide(0)
        self.pause()

    def _decide(self, behind: int) -> None:
        """Let go of the steps whose exchange is over; of all but the newest `behind` in any case."""
        while self.over and (len(self.over) > behind or self.over[0].complete):
            step = self.over.popleft()
            self.steps.pop(step.clock, None)
            if step.context.sampled:
                self.emit(spans_of(self.origin, step, "sampled", self._draw))
            elif step.slow:
                self.emit(spans_of(self.origin, step, "slow", self._draw))
                for shard in list(step.pushes):
                    told = step.context._replace(sampled=True)
                    self.untold.setdefault(shard, deque(maxlen=UNTOLD)).append(told)

    # -- the I/O thread ------------------------------------------------------------------------------------

    def pushing(self, clock: int, shard: str, size: int) -> None:
        pushes = self._step(clock).pushes
        leg = pushes.get(shard)
        if leg is None:
            leg = pushes[shard] = Leg(self._draw(), self.now())
        leg.buckets += 1
        leg.bytes += size

    def committing(self, clock: int, shard: str, epoch: int) -> str:
        step = self._step(clock)
        step.epoch = epoch
        leg = step.pushes.get(shard)
        if leg is None:
            leg = step.pushes[shard] = Leg(self._draw(), self.now())
        return self._header(step, leg, shard)

    def counted(self, clock: int, shard: str) -> None:
        step = self.steps.get(clock)
        if step is not None and shard in step.pushes:
            step.pushes[shard].ended = self.now()

    def pulling(self, clock: int | None, shard: str) -> str:
        step = self.steps.get(clock) if clock is not None else None
        if step is None:
            return ""
        leg = step.pulls.get(shard)
        if leg is None:
            leg = step.pulls[shard] = Leg(self._draw(), self.now())
        leg.open += 1
        leg.buckets += 1
        return self._header(step, leg, shard)

    def waiting(self, clock: int | None, shard: str, names: Sequence[str]) -> None:
        if (leg := self._pull(clock, shard)) is not None:
            leg.waited_for.update(dict.fromkeys(names[:NAMED]))

    def pulled(self, clock: int | None, shard: str, size: int) -> None:
        if (leg := self._pull(clock, shard)) is not None:
            leg.open -= 1
            leg.bytes += size
            if not leg.open:
                leg.ended = self.now()

    def _pull(self, clock: int | None, shard: str) -> Leg | None:
        step = self.steps.get(clock) if clock is not None else None
        return step.pulls.get(shard) if step is not None else None

    def _header(self, step: Step, leg: Leg, shard: str) -> str:
        if not leg.header:
            leg.header = write_header(step.context._replace(span_id=leg.span_id))
        untold = self.untold.get(shard)
        if not untold:
            return leg.header
        kept = [untold.popleft() for _ in range(min(MOST_KEPT, len(untold)))]
        return write_header(step.context._replace(span_id=leg.span_id), kept)

    # -- either ----------------------------------------------------------------------------------------------

    def _step(self, clock: int) -> Step:
        step = self.steps.get(clock)
        if step is None:
            run, job, worker, _, alone = self.origin
            trace_id = trace_of(run, job, clock, worker if alone else "")
            context = Context(trace_id, self._draw(), sampled(run, job, clock, self.every))
            step = self.steps.setdefault(clock, Step(clock, context))  # the other thread may have been faster
        return step

    def _draw(self) -> int:
        return self.random.getrandbits(64) or 1


def spans_of(origin: Origin, step: Step, kept: str, draw: Callable[[], int], error: str = "") -> list[Span]:
    """A step that is over, as spans; the step itself comes first."""
    trace_id = step.context.trace_id

    def span(
        name: str, span_id: int, began: float, ended: float, error: str = "", **attributes: Value
    ) -> Span:
        told = {f"zml.{key}": value for key, value in attributes.items()}
        kind = "client" if "shard" in attributes else "internal"
        parent = None if span_id == step.context.span_id else step.context.span_id
        context = Context(trace_id, span_id, True)
        return Span(name, context, parent, began, ended, kind, told, error)  # type: ignore[arg-type]

    attributes: dict[str, Value] = {
        "job": origin.job,
        "worker": origin.worker,
        "incarnation": origin.incarnation,
        "clock": step.clock,
        "kept": kept,
        "sent_bytes": step.sent,
        "received_bytes": step.received,
    }
    if step.epoch >= 0:
        attributes["epoch"] = step.epoch
    if kept == "slow":
        attributes["usual_s"] = round(step.usual_s, 6)
    whole = span("zml.step", step.context.span_id, step.began, step.ended, error, **attributes)
    found = [whole]
    near, phases = NEAR * (step.ended - step.began), {name: step.phases.get(name, []) for name in PHASES}
    for name, pieces in {"compute": computed(step), **phases}.items():
        for began, ended, busy in joined(pieces, near):
            if name == "compute":
                busy -= common((began, ended), phases["encode"])
            found.append(span(f"zml.{name}", draw(), began, ended, busy_s=round(busy, 6)))
    for name, legs in (("zml.push", step.pushes), ("zml.pull", step.pulls)):
        for shard, leg in list(legs.items()):
            told: dict[str, Value] = {"shard": shard, "buckets": leg.buckets, "bytes": leg.bytes}
            if leg.waited_for:
                told["waited_for"] = ", ".join(list(leg.waited_for)[:NAMED])
            ended, missing = (step.ended, "no answer") if leg.ended is None else (leg.ended, "")
            found.append(span(name, leg.span_id, leg.began, max(leg.began, ended), missing, **told))
    return found


def computed(step: Step) -> list[Interval]:
    """When the thread was not blocked by anything."""
    blocked = sorted(piece for name in BLOCKS for piece in step.phases.get(name, ()))
    short, free, at = SHORT * (step.ended - step.began), [], step.began
    for began, ended in [*blocked, (step.ended, step.ended)]:
        if began - at > short:
            free.append((at, began))
        at = max(at, ended)
    return free


def joined(pieces: Iterable[Interval], near: float) -> list[tuple[float, float, float]]:
    """From when to when, and for how long of that; what is near to each other is one."""
    found: list[tuple[float, float, float]] = []
    for began, ended in pieces:
        if found and began - found[-1][1] <= near:
            first, _, busy = found[-1]
            found[-1] = first, ended, busy + ended - began
        else:
            found.append((began, ended, ended - began))
    return found


def common(whole: Interval, pieces: Iterable[Interval]) -> float:
    """How long of `whole` the pieces take."""
    return sum(max(0.0, min(whole[1], ended) - max(whole[0], began)) for began, ended in pieces)
