"""One model's traffic with the shards: buckets leave, a step is counted, parameters arrive.

The training thread packs, or has a helper do it, and applies; the I/O thread waits for others. With a staleness bound
of at least 1 one exchange stays in flight while the next step is computed: what it brings is applied after that step,
and it asks for parameters one clock newer, so that nobody ever computes beyond the bound.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol, cast

import structlog
import torch

from ..codec import UNKNOWN, Codec
from ..errors import LOST, ZmlError
from ..hyper import NO_WISH, Hyper, write_hyper
from ..iothread import IoThread
from ..layout import Bucket
from ..messages import Delta
from ..pages import Pages
from ..plan import Plan
from .auto import Auto, measure
from .binding import Binding
from .client import REPLY_S, Client, Progress
from .outbox import Outbox
from .replica import Replica
from .timeline import Phases, Timeline

if TYPE_CHECKING:
    from ..codec.sparse import TopK


class Watch(Protocol):
    """Who wants to know which steps count."""

    def leaving(self) -> Progress:
        """What was computed up to now is on its way; how far in which epoch that is."""
        ...

    def counted(self) -> None:
        """The oldest of what was on its way counts, and is applied."""
        ...

    @property
    def leaves_out(self) -> bool:
        """Are steps that cannot count left out, and their batches skipped?"""
        ...

    def left_out(self, because: str) -> bool:
        """The step that was about to be made is not made. False if that is not wanted, or no longer."""
        ...


log = structlog.get_logger()
Arrived = tuple[Bucket, Delta, memoryview | None]


def _nothing(_: int) -> None:
    pass


class Traffic:
    """Belongs to the training thread. `clock` is the step (with local steps: the round) that is being computed.

    Invariant: at most one exchange is in flight, and `due` counts its buckets that were not applied yet.
    """

    def __init__(
        self,
        binding: Binding,
        cut: Sequence[Bucket],
        codec: Codec,
        client: Client,
        io: IoThread,
        plan: Plan,
        watch: Watch,
        timeline: Timeline | None = None,
    ) -> None:
        self.binding = binding
        self.layout = layout = binding.layout
        self.client = client
        self.io = io
        self.plan = plan
        self.watch = watch
        self.timeline = timeline or Timeline()
        self.all_buckets = tuple(cut)
        self.buckets = tuple(bucket for bucket in cut if not bucket.frozen)
        # What each bucket takes whole, in the type that its parameters have.
        self.dense = {bucket.index: binding.bytes_of(bucket.chunks) for bucket in cut}
        self.replica = Replica(binding, codec, keep=plan.optimizer_on == "worker")
        self.outboxes = {
            bucket.index: Outbox(bucket, layout, codec, binding.device(bucket.parameters))
            for bucket in self.buckets
        }
        self.values = {
            chunk: values for outbox in self.outboxes.values() for chunk, values in outbox.values.items()
        }
        # Autograd has a thread for each device, and the codec serves one at a time. Where the optimizer is the
        # script's, nothing leaves during the backward pass, and one thread alone packs.
        self.packing = threading.Lock()
        # What is in flight must stay as it is while the same buckets are packed again.
        self.pages = Pages(8 * sum(len(values) for values in self.values.values()))
        self.clock = 0
        self.exchanges = 0  # begun before; clocks are not, for they jump from epoch to epoch
        self.warm_up = 0  # exchanges over which the density falls
        self.everything = False  # nothing shall wait in a residual after this exchange
        self.workers = plan.workers  # in the job, as the shards told last
        self.setting = NO_WISH  # likewise, of all workers together
        self.coder = cast("TopK", codec) if plan.auto else None
        self.auto: Auto | None = None
        if plan.auto:
            self.auto = Auto(layout.size, hidden=plan.overlap, together=plan.together)
        self.staleness = 0
        self.due = 0
        self.landed: Callable[[int], None] = _nothing  # is told which bucket's parameters have been taken
        self.arrived: queue.SimpleQueue[Arrived | BaseException] = queue.SimpleQueue()

    @property
    def density(self) -> float | None:
        """The part of the elements that leaves with this exchange; None for codecs that send all."""
        if self.everything and self.plan.compression.sparse:
            return 1.0
        return self.usual_density

    @property
    def usual_density(self) -> float | None:
        """The same where nothing special leaves: what the other workers send, too."""
        if self.auto is not None:
            return self.auto.setting.density
        return self.plan.density(self.exchanges, self.warm_up)

    # -- a step ------------------------------------------------------------------------------------------

    def leave(self, outbox: Outbox) -> None:
        """Pack what was gathered in one bucket and send it, as part of this clock. Raises NonFinite."""
        self.timeline.trace.at(self.clock)
        with self.packing, self.timeline.measure("encode"):  # one thread at a time, as both need it
            self.send(outbox, self.packed(outbox))

    def packed(self, outbox: Outbox) -> memoryview:
        """What was gathered in one bucket, good until this clock counts. Raises NonFinite."""
        outbox.take_back()
        payload = outbox.pack(self.density, self.plan.decay)
        # It may be packed again while it leaves: for the next step, or once the script has changed the gradients,
        # and then a sparse one has another size.
        if self.plan.overlap or self.plan.compression.sparse:
            copy = self.pages.lend(len(payload))
            copy[:] = payload
            payload = copy
        return payload

    def send(self, outbox: Outbox, payload: memoryview) -> None:
        """Let a packed bucket leave, as part of this clock."""
        self.timeline.sent(len(payload), self.dense[outbox.bucket.index])
        outbox.clock = self.clock
        # What is in flight is not written into the model yet: with these versions the gradient was computed.
        seen = (
            max(map(self.replica.versions.__getitem__, outbox.bucket.chunks))
            if self.plan.damping
            else UNKNOWN
        )
        self.io.post(self.client.push, outbox.bucket, self.clock, payload, sorted(outbox.absent), seen)

    def begin(self, hyper: Sequence[Hyper]) -> None:
        """Every bucket has left: count the step, and ask for the parameters of a later clock."""
        if self.plan.overlap:
            self.drain()  # the versions held are known only then
        progress = self.watch.leaving()
        self.due = len(self.buckets)
        ahead = 2 if self.plan.overlap else 1
        commit = (self.clock, self._written(hyper), self.buckets, progress)
        exchange = self._exchange(
            commit, self._wanted(self.buckets), self.clock + ahead, self.timeline.open()
        )
        self.io.post_task(exchange, self._exchange_ended)

    def end(self, then: Callable[[], None] | None = None) -> None:
        """The model holds what the next clock is entitled to, once `then` has written it, and that clock begins."""
        if not self.plan.overlap:
            self.drain()
        if then is not None:
            with self.timeline.measure("apply"):
                then()
        for outbox in self.outboxes.values():
            outbox.next_step()
        computed_s = self.timeline.close(self.clock)
        if self.auto is not None and computed_s is not None and self.auto.step(computed_s, self.workers):
            self._compress()
        self.clock += 1
        self.exchanges += 1

    def _compress(self) -> None:
        """With what `auto` says now."""
        assert self.auto is not None and self.coder is not None
        self.coder.write_as(self.auto.setting.values)
        log.info("compress", as_=str(self.auto.setting), clock=self.clock, because=self.auto.because)

    def part(self, hyper: Sequence[Hyper]) -> None:
        """Instead of `begin` and `end`, for a worker's very last exchange: it counts, and nothing is asked for."""
        self.drain()
        self.io.call(self._count(self.clock, self._written(hyper), self.watch.leaving()))
        self.watch.counted()
        for outbox in self.outboxes.values():
            outbox.next_step()
        self.clock += 1
        self.exchanges += 1

    def _written(self, hyper: Sequence[Hyper]) -> bytes:
        return write_hyper(hyper, self.auto.told if self.auto is not None else NO_WISH)

    async def _count(self, clock: int, hyper: bytes, progress: Progress) -> None:
        # Called in the I/O thread, behind the pushes.
        await self.client.commit(clock, hyper, self.buckets, progress)

    def drain(self) -> None:
        """Apply what is in flight. Afterwards every step that was begun counts."""
        if not self.due:
            return
        self._receive()
        self.watch.counted()

    async def _exchange(
        self,
        step: tuple[int, bytes, Sequence[Bucket], Progress],
        wanted: Sequence[tuple[Bucket, list[int]]],
        until: int,
        phases: Phases,
    ) -> None:
        """In the I/O thread: commit, then ask for the parameters of `until`, first layers first."""
        began = time.perf_counter()
        commit = asyncio.ensure_future(self.client.commit(*step))
        pull = asyncio.ensure_future(self._pull_behind(commit, wanted, until, step[0]))
        try:
            await commit
            phases.send_s = time.perf_counter() - began
            await pull
            phases.pull_s = time.perf_counter() - began - phases.send_s
        finally:
            self.timeline.ended(phases)
            commit.cancel()
            pull.cancel()

    async def _pull_behind(
        self, commit: asyncio.Task[None], wanted: Sequence[tuple[Bucket, list[int]]], until: int, clock: int
    ) -> None:
        # In BSP a shard holds the pull until it has the commit anyway: no need to wait for its answer. Where nobody
        # waits, the pull would be answered without this very step.
        if self.plan.overlap:
            await asyncio.wait([commit])
        await self.client.pull_all(wanted, until, self._deliver, clock)

    def _wanted(self, wanted: Sequence[Bucket]) -> list[tuple[Bucket, list[int]]]:
        return [
            (bucket, [self.replica.versions[chunk] for chunk in bucket.chunks]) for bucket in reversed(wanted)
        ]

    def _deliver(self, bucket: Bucket, delta: Delta, payload: memoryview | None) -> None:
        self.arrived.put((bucket, delta, payload))

    def _exchange_ended(self, error: BaseException | None) -> None:
        if error is not None:
            self.arrived.put(error)

    def _receive(self) -> None:
        """Apply what arrives until nothing is due. Raises what ended the exchange."""
        self.staleness = 0
        # The client's own deadlines come first, and name who.
        limit_s = self.client.seat.patience_s + 2 * REPLY_S
        former, spared = self.timeline.turn("wait"), self.client.spared
        try:
            while self.due:
                try:
                    item = self.arrived.get(timeout=limit_s)
                except queue.Empty:
                    if self.client.spared != spared:
                        spared = self.client.spared
                        continue
                    raise ZmlError(LOST, f"no parameters came within {limit_s:g} s") from None
                if isinstance(item, BaseException):
                    self.due = 0
                    raise item
                self.timeline.turn("apply")
                self._apply(*item)
                self.timeline.turn("wait")
        finally:
            self.timeline.turn(former)
        if self.auto is not None and self.auto.adopt(self.setting):
            self._compress()

    def _apply(self, bucket: Bucket, delta: Delta, payload: memoryview | None) -> None:
        self.replica.take(bucket.chunks, delta.versions, delta.frames, payload or b"")
        if payload is not None:
            self.timeline.came(len(payload), self.dense[bucket.index])
        self.staleness = max(self.staleness, delta.staleness)
        self.workers = max(1, delta.workers)
        self.setting = delta.setting
        self.due -= 1
        self.landed(bucket.index)

    # -- outside of steps --------------------------------------------------------------------------------

    def pull(self, clock: int, *, everything: bool = False) -> None:
        """Bring the model to what the shards hold once `clock` may start; `everything`: the frozen chunks too."""
        self.drain()
        self.ask(clock, everything=everything)
        self.receive(everything=everything)

    def ask(self, clock: int, *, everything: bool) -> None:
        """Begin to pull; nothing is in flight."""
        wanted = self.all_buckets if everything else self.buckets
        self.due = len(wanted)
        self.io.post_task(
            self.client.pull_all(self._wanted(wanted), clock, self._deliver), self._exchange_ended
        )

    def receive(self, *, everything: bool) -> None:
        """What was asked for is in the model."""
        self._receive()
        self.replica.restore(frozen=everything)
        self.timeline.pause()

    def measure_link(self) -> None:
        """For `auto`, while nothing is on its way: pull ever more parameters once more, and see how long that takes."""
        if self.auto is None or not self.buckets:
            return
        with self.timeline.measure("wait"):
            link = measure(partial(self._pull_again, self._turns()))
            self.auto.link, self.auto.link_at = link, time.monotonic()
        self.timeline.pause()

    def look_at_link(self) -> None:
        """Measure it again, if that is long ago."""
        if self.auto is not None and self.auto.is_due(time.monotonic()):
            self.measure_link()

    def _turns(self) -> list[list[int]]:
        """One chunk of each shard after another, the longest first."""
        held: dict[int, list[int]] = {}
        for bucket in self.buckets:
            held.setdefault(bucket.shard, []).extend(bucket.chunks)
        turns = zip_longest(*(sorted(chunks, key=self._size, reverse=True) for chunks in held.values()))
        return [[chunk for chunk in turn if chunk is not None] for turn in turns]

    def _pull_again(self, turns: Sequence[Sequence[int]], size: int) -> tuple[float, int]:
        """Ask every shard for what is new, and for chunks with so many bytes once more; how long that took and how many
        came."""
        again: set[int] = set()
        for turn in turns:
            if sum(map(self._size, again)) >= size:
                break
            again.update(turn)
        held = self.replica.versions
        first = {bucket.shard: bucket for bucket in reversed(self.buckets)}
        wanted = [
            (bucket, [UNKNOWN if chunk in again else held[chunk] for chunk in bucket.chunks])
            for bucket in self.buckets
            if bucket is first[bucket.shard] or not again.isdisjoint(bucket.chunks)
        ]
        came: list[int] = []
        began = time.perf_counter()
        self.io.call(
            self.client.pull_all(
                wanted, self.clock, lambda bucket, delta, payload: came.append(len(payload or b""))
            )
        )
        return time.perf_counter() - began, sum(came)

    def _size(self, chunk: int) -> int:
        return 4 * self.layout.chunks[chunk].size

    def load_shards(self) -> None:
        """Bring this worker's parameters to the shards as version 0."""
        for bucket in self.all_buckets:
            sizes = [self.layout.chunks[chunk].size for chunk in bucket.chunks]
            values = torch.empty(sum(sizes), dtype=torch.float32)
            at = 0
            for chunk, size in zip(bucket.chunks, sizes, strict=True):
                self.binding.read(chunk, values[at : at + size])
                at += size
            self.io.call(self.client.load(bucket, values.numpy().data.cast("B")))
