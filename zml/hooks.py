"""Between autograd and the client: gradients leave, parameters arrive, and the script's optimizer makes no step itself.

Only public hooks are used, so that learning rate schedulers, gradient clipping and GradScaler work as ever. A bucket
leaves during `backward()`, as soon as its last gradient is complete. Whether the script changes gradients afterwards
(clipping, unscaling, accumulation over several backward passes) is seen when the step begins, by the gradients' version
counters and by a comparison with what was sent: such a bucket is sent again before the commit, and from then on buckets
leave with the step. Nothing counts before the commit.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .binding import Binding
from .client import REPLY_S, Client
from .codec import Codec, NonFinite
from .errors import CLOSURE, LOST, NOT_FINITE, NOT_HELD, ZmlError
from .hyper import hyper_of, write_hyper
from .iothread import IoThread
from .layout import Bucket
from .messages import Delta
from .outbox import Outbox
from .replica import Replica

# A gradient as it was when it was copied: itself, held so that no other takes its place in memory, and its version.
Seen = tuple[torch.Tensor, int]


class Hooks:
    """One model's traffic. Belongs to the training thread; `clock` is the step that is being computed."""

    def __init__(
        self,
        binding: Binding,
        optimizer: torch.optim.Optimizer,
        cut: Sequence[Bucket],
        codec: Codec,
        client: Client,
        io: IoThread,
        stepped: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.layout = layout = binding.layout
        self.all_buckets = tuple(cut)
        self.buckets = tuple(bucket for bucket in cut if not bucket.frozen)
        self.binding = binding
        self.codec = codec
        self.replica = Replica(binding, codec)
        self.client = client
        self.io = io
        self.stepped = stepped
        self.clock = 0
        self.early = (
            True  # buckets leave during backward; until a script is seen to change gradients after it
        )
        self.outboxes = {bucket.index: Outbox(bucket, layout, codec) for bucket in self.buckets}
        self.values = {
            chunk: values for outbox in self.outboxes.values() for chunk, values in outbox.values.items()
        }
        self.touching: list[list[Outbox]] = [[] for _ in layout.parameters]
        for outbox in self.outboxes.values():
            for parameter in outbox.bucket.parameters:
                self.touching[parameter].append(outbox)
        self.copied: dict[int, Seen | None] = {}  # parameter -> its gradient when it was copied in this step
        self.arrived: queue.SimpleQueue[tuple[Bucket, Delta, memoryview | None] | BaseException] = (
            queue.SimpleQueue()
        )
        self.kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self.dropped = False  # a GradScaler has found that this step is not to be made
        self.staleness = 0

    def install(self) -> None:
        """From now on every backward pass and every optimizer step of the script goes through here."""
        for index, parameter in enumerate(self.binding.parameters):
            if self.touching[index]:
                parameter.register_post_accumulate_grad_hook(self._ready_hook(index))  # type: ignore[no-untyped-call]
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)

    # -- during backward ---------------------------------------------------------------------------------

    def _ready_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def ready(_: torch.Tensor) -> None:
            if not self.early:
                return
            if index in self.copied:
                self.early = False  # a second backward pass before the step: gradients accumulate
                return
            self._copy(index)
            for outbox in self.touching[index]:
                outbox.missing.discard(index)
                if not outbox.missing:
                    self._leave_early(outbox)

        return ready

    def _copy(self, index: int) -> None:
        gradient = self.binding.parameters[index].grad
        self.copied[index] = None if gradient is None else (gradient, gradient._version)
        present = self.binding.gather(index, self.values)
        for outbox in self.touching[index]:
            outbox.set_absent(index, not present)

    def _leave_early(self, outbox: Outbox) -> None:
        try:
            self._leave(outbox)
        except NonFinite:
            pass  # GradScaler may yet drop this step; `_before_step` decides

    def _leave(self, outbox: Outbox) -> None:
        outbox.take_back()
        payload = outbox.pack()
        outbox.clock = self.clock
        self.io.post(self.client.push, outbox.bucket, self.clock, payload, sorted(outbox.absent))

    # -- around the optimizer's step -----------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise ZmlError(
                CLOSURE,
                "optimizer.step was called with a closure",
                "Call loss.backward() and then optimizer.step().",
            )
        self._as_scaler_says(optimizer)
        if self.dropped:
            self._put_aside()
            return
        for index, boxes in enumerate(self.touching):
            gradient = self.binding.parameters[index].grad
            if not boxes:
                if gradient is not None and gradient.numel():
                    raise self._thawed(index)
                continue
            if (
                index in self.copied
                and unchanged(self.copied[index], gradient)
                and (gradient is None or self.binding.holds(index, self.values))
            ):
                continue
            if index in self.copied and any(outbox.sent for outbox in boxes):
                self.early = False  # changed after it left: clipping, or unscaling
            for outbox in boxes:
                outbox.take_back()
            self._copy(index)
        for outbox in self.outboxes.values():
            if not outbox.sent or outbox.clock != self.clock:  # the worker rested between backward and step
                try:
                    self._leave(outbox)
                except NonFinite as bad:
                    raise self._not_finite(bad) from None
        hyper = write_hyper(hyper_of(self.optimizer))
        self.io.post_task(self._exchange(self.clock, hyper), self._exchange_ended)
        self._put_aside()

    def _as_scaler_says(self, optimizer: torch.optim.Optimizer) -> None:
        """A fused optimizer unscales by itself, and skips a step that is not finite: GradScaler tells it."""
        found = getattr(optimizer, "found_inf", None)
        self.dropped = found is not None and bool(found)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is None or self.dropped:
            return
        for parameter in self.binding.parameters:
            if parameter.grad is not None:
                parameter.grad.detach().div_(scale.to(parameter.grad.device))

    def _put_aside(self) -> None:
        """Without gradients the script's own optimizer passes over every parameter."""
        self.kept = [(p, p.grad) for p in self.binding.parameters if p.grad is not None]
        for parameter, _ in self.kept:
            parameter.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.dropped:
            self._receive(len(self.buckets))
        for parameter, gradient in self.kept:
            parameter.grad = gradient
        self.kept = []
        if self.dropped:
            return
        self.copied.clear()
        for outbox in self.outboxes.values():
            outbox.next_step()
        self.clock += 1
        self.stepped()

    async def _exchange(self, clock: int, hyper: bytes) -> None:
        """In the I/O thread: commit, then ask for the parameters of the next clock, first layers first."""
        await self.client.commit(clock, hyper, self.buckets)
        await self.client.pull_all(self._wanted(self.buckets), clock + 1, self._deliver)

    def _wanted(self, wanted: Sequence[Bucket]) -> list[tuple[Bucket, list[int]]]:
        return [
            (bucket, [self.replica.versions[chunk] for chunk in bucket.chunks]) for bucket in reversed(wanted)
        ]

    def _deliver(self, bucket: Bucket, delta: Delta, payload: memoryview | None) -> None:
        self.arrived.put((bucket, delta, payload))

    def _exchange_ended(self, error: BaseException | None) -> None:
        if error is not None:
            self.arrived.put(error)

    def _receive(self, count: int) -> None:
        """Apply what arrives until `count` buckets are there. Raises what ended the exchange."""
        self.staleness = 0
        limit_s = (
            self.client.seat.patience_s + 2 * REPLY_S
        )  # the client's own deadlines come first, and name who
        for _ in range(count):
            try:
                item = self.arrived.get(timeout=limit_s)
            except queue.Empty:
                raise ZmlError(LOST, f"no parameters came within {limit_s:g} s") from None
            if isinstance(item, BaseException):
                raise item
            bucket, delta, payload = item
            self.replica.take(bucket.chunks, delta.versions, delta.frames, payload or b"")
            self.staleness = max(self.staleness, delta.staleness)

    # -- outside of steps --------------------------------------------------------------------------------------

    def pull(self, clock: int, *, everything: bool = False) -> None:
        """Bring the model to what the shards hold once `clock` may start; `everything`: the frozen chunks too."""
        wanted = self.all_buckets if everything else self.buckets
        self.io.post_task(
            self.client.pull_all(self._wanted(wanted), clock, self._deliver), self._exchange_ended
        )
        self._receive(len(wanted))

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

    def _thawed(self, index: int) -> ZmlError:
        name = self.layout.parameters[index].name
        return ZmlError(
            NOT_HELD,
            f"{name} has a gradient, but it was frozen or held by no optimizer when the script joined",
            f"Let {name} require a gradient, and the optimizer hold it, before zml.join; freeze it afterwards.",
        )

    def _not_finite(self, bad: NonFinite) -> ZmlError:
        name = self.layout.parameters[bad.parameter].name
        return ZmlError(
            NOT_FINITE,
            f"the gradient of {name} is not finite at step {self.clock} of {self.client.seat.worker}",
            "Lower the learning rate, clip gradients, or look at the batch of this step.",
        )


def unchanged(seen: Seen | None, gradient: torch.Tensor | None) -> bool:
    """Is this still the gradient that was copied?"""
    if seen is None or gradient is None:
        return seen is None and gradient is None
    return seen[0] is gradient and seen[1] == gradient._version
