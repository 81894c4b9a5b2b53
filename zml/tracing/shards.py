"""A shard's part of workers' steps: when their pushes came, when they were applied, how long their pulls were parked.

    zml.push > zml.ps.push, zml.ps.apply        zml.pull > zml.ps.pull {parked_s}

Of each worker's newest steps the timings are remembered, for a step may turn out slow only when it is over: the next
message says so. In BSP one update is made of all workers' steps, and is one span: below the push whose commit completed
the clock, with links to the others. If that worker does not keep its step, it stands below the pull of one that does,
which waited for it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import structlog

from .span import Context, Span, Value, read_header
from .steps import NAMED, Emit

REMEMBERED = 8  # steps of each worker


@dataclass(slots=True)
class Came:
    """The pushes of a step whose commit has not come."""

    clock: int
    first: float
    last: float
    buckets: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Update:
    """One update of the parameters, of these workers' steps."""

    began: float
    ended: float
    by: str  # whose commit led to it; empty: somebody left
    workers: int
    links: tuple[Context, ...]
    told: bool = False


@dataclass(slots=True)
class Seen:
    """What a shard knows of one worker's step."""

    worker: str
    sampled: bool  # or found to be slow
    push: Context | None = None  # the worker's spans, below which ours are
    pull: Context | None = None
    clock: int = -1
    came: Came | None = None
    counted: float = 0.0
    update: Update | None = None
    asked: float = 0.0
    answered: float = 0.0
    answers: int = 0
    expected: int = 0
    sent: int = 0
    parked: set[int] = field(default_factory=set)  # buckets, now
    parked_since: float = 0.0
    parked_until: float = 0.0
    waited_for: dict[str, None] = field(default_factory=dict)
    told_push: bool = False
    told_pull: bool = False


class Untraced:
    """Tracing is off: the hooks of a shard, which do nothing."""

    def pushed(self, worker: str, clock: int, size: int) -> None:
        """A push is staged."""

    @contextmanager
    def counting(self, worker: str, clock: int, header: str, buckets: int) -> Iterator[None]:
        """A commit counts, and what follows from that at once; `buckets` are pulled afterwards."""
        yield

    @contextmanager
    def applying(self, clock: int, workers: Iterable[str]) -> Iterator[None]:
        """An update of the parameters."""
        yield

    def pulling(self, worker: str, header: str, bucket: int, *, parked: bool) -> None:
        """A pull is here."""

    def waiting(self, worker: str, header: str, names: Sequence[str]) -> None:
        """It was parked for so long that the worker is told whom it waits for."""

    def pulled(self, worker: str, header: str, bucket: int, size: int) -> None:
        """It is answered."""

    def forget(self, worker: str) -> None:
        """This worker has left."""


UNTRACED = Untraced()


class ShardTrace(Untraced):
    """One shard's. In its thread."""

    def __init__(
        self,
        shard: str,
        emit: Emit,
        now: Callable[[], float] = time.perf_counter,
        random: Random | None = None,
    ) -> None:
        self.shard = shard
        self.emit = emit
        self.now = now
        self.random = random or Random()
        self.came: dict[str, Came] = {}  # by worker: one step of each is staged at a time
        self.seen: dict[str, OrderedDict[int, Seen]] = {}  # by worker, and by trace
        self.newest: dict[str, tuple[str, Context, Seen]] = {}  # by worker: a header, as it was read
        self.by = ""  # whose commit is being counted

    def pushed(self, worker: str, clock: int, size: int) -> None:
        now, came = self.now(), self.came.get(worker)
        if came is None or came.clock != clock:
            came = self.came[worker] = Came(clock, now, now)
        came.last = now
        came.buckets += 1
        came.bytes += size

    @contextmanager
    def counting(self, worker: str, clock: int, header: str, buckets: int) -> Iterator[None]:
        context, seen = self._read(worker, header)
        if context is None or seen is None:
            yield
            return
        seen.push, seen.clock, seen.counted, seen.expected = context, clock, self.now(), buckets
        came = self.came.pop(worker, None)
        seen.came = came if came is not None and came.clock == clock else None
        self.by = worker
        try:
            with structlog.contextvars.bound_contextvars(
                trace_id=f"{context.trace_id:032x}", span_id=f"{context.span_id:016x}"
            ):
                yield
        finally:
            self.by = ""
            self._tell(seen)

    @contextmanager
    def applying(self, clock: int, workers: Iterable[str]) -> Iterator[None]:
        names = list(workers)
        steps: list[Seen] = [seen for name in names if (seen := self._at(name, clock)) is not None]
        began = self.now()
        yield
        others = tuple(seen.push for seen in steps if seen.worker != self.by and seen.push is not None)
        update = Update(began, self.now(), self.by, len(names), others)
        for seen in steps:
            seen.update = update
        for seen in sorted(
            steps, key=lambda seen: seen.worker != self.by
        ):  # the one who led to it goes first
            self._tell(seen)

    def pulling(self, worker: str, header: str, bucket: int, *, parked: bool) -> None:
        context, seen = self._read(worker, header)
        if seen is None:
            return
        now = self.now()
        if seen.pull is None:
            seen.pull, seen.asked = context, now
        if parked:
            seen.parked_since = seen.parked_since or now
            seen.parked.add(bucket)

    def waiting(self, worker: str, header: str, names: Sequence[str]) -> None:
        _, seen = self._read(worker, header)
        if seen is not None:
            seen.waited_for.update(dict.fromkeys(names[:NAMED]))

    def pulled(self, worker: str, header: str, bucket: int, size: int) -> None:
        _, seen = self._read(worker, header)
        if seen is None:
            return
        seen.answered = self.now()
        seen.answers += 1
        seen.sent += size
        if bucket in seen.parked:
            seen.parked.discard(bucket)
            seen.parked_until = seen.answered
        self._tell(seen)

    def forget(self, worker: str) -> None:
        for seen in self.seen.pop(worker, {}).values():
            self._tell(seen, last=True)
        self.came.pop(worker, None)
        self.newest.pop(worker, None)

    def _read(self, worker: str, header: str) -> tuple[Context | None, Seen | None]:
        """The step of a message; and earlier ones that are to be kept are told of."""
        before = self.newest.get(worker)
        if before is not None and before[0] == header:  # a step's pulls have one
            return before[1], before[2]
        own, kept = read_header(header)
        known = self.seen.get(worker)
        for context in kept:
            if known is not None and (slow := known.get(context.trace_id)) is not None:
                slow.sampled = True
                self._tell(slow, last=True)
        if own is None:
            return None, None
        if known is None:
            known = self.seen[worker] = OrderedDict()
        seen = known.get(own.trace_id)
        if seen is None:
            seen = known[own.trace_id] = Seen(worker, own.sampled)
            while len(known) > REMEMBERED:
                _, oldest = known.popitem(last=False)
                self._tell(oldest, last=True)
        self.newest[worker] = header, own, seen
        return own, seen

    def _at(self, worker: str, clock: int) -> Seen | None:
        steps = [seen for seen in self.seen.get(worker, {}).values() if seen.clock == clock]
        return steps[-1] if steps else None

    # -- telling -------------------------------------------------------------------------------------------

    def _tell(self, seen: Seen, *, last: bool = False) -> None:
        """Let out what is complete of a step that is kept; `last`: what is not complete, too."""
        if not seen.sampled:
            return
        spans = []
        if seen.push is not None and not seen.told_push:
            seen.told_push = True
            spans.append(self._push(seen, seen.push))
        update = seen.update
        if update is not None and not update.told:
            update.told = True
            led = seen.worker == update.by or seen.pull is None
            below = seen.push if led else seen.pull
            assert below is not None, "an update follows from commits"
            spans.append(self._update(update, below, seen.clock))
        if seen.pull is not None and seen.answers and not seen.told_pull:
            if last or (seen.answers == seen.expected and not seen.parked):
                seen.told_pull = True
                spans.append(self._pull(seen, seen.pull))
        if spans:
            self.emit(spans)

    def _push(self, seen: Seen, below: Context) -> Span:
        came = seen.came
        told: dict[str, Value] = {"zml.worker": seen.worker}
        began = seen.counted
        if came is not None:
            began = came.first
            told |= {"zml.buckets": came.buckets, "zml.bytes": came.bytes}
        return self._span("zml.ps.push", below, began, seen.counted, told)

    def _update(self, update: Update, below: Context, clock: int) -> Span:
        told: dict[str, Value] = {"zml.clock": clock, "zml.workers": update.workers}
        if update.by:
            told["zml.completed_by"] = update.by
        links = tuple(link for link in update.links if link.span_id != below.span_id)
        return self._span("zml.ps.apply", below, update.began, update.ended, told, links)

    def _pull(self, seen: Seen, below: Context) -> Span:
        parked_s = max(0.0, seen.parked_until - seen.parked_since) if seen.parked_since else 0.0
        told: dict[str, Value] = {
            "zml.worker": seen.worker,
            "zml.buckets": seen.answers,
            "zml.bytes": seen.sent,
            "zml.parked_s": round(parked_s, 6),
        }
        if seen.waited_for:
            told["zml.waited_for"] = ", ".join(list(seen.waited_for)[:NAMED])
        return self._span("zml.ps.pull", below, seen.asked, seen.answered, told)

    def _span(
        self,
        name: str,
        below: Context,
        began: float,
        ended: float,
        told: dict[str, Value],
        links: tuple[Context, ...] = (),
    ) -> Span:
        context = Context(below.trace_id, self.random.getrandbits(64) or 1, True)
        told = {"zml.shard": self.shard, **told}
        return Span(name, context, below.span_id, began, ended, "server", told, "", links)
