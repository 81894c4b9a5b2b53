"""The optimizer runs on the shards: gradients leave, parameters arrive, the script's own optimizer makes no step.

Only public hooks are used, so that learning rate schedulers, gradient clipping and GradScaler work as ever. A bucket
leaves during `backward()`, as soon as its last gradient is complete. Whether the script changes gradients afterwards
(clipping, unscaling, accumulation over several backward passes) is seen when the step begins, by the gradients' version
counters and by a comparison with what was sent: such a bucket is sent again before the commit, and from then on buckets
leave with the step. Nothing counts before the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..codec import NonFinite
from ..errors import CLOSURE, NOT_FINITE, NOT_HELD, ZmlError
from ..hyper import hyper_of
from .outbox import Outbox
from .traffic import Traffic

# A gradient as it was when it was copied: itself, held so that no other takes its place in memory, and its version.
Seen = tuple[torch.Tensor, int]


class Hooks:
    """For the optimizer that runs on the shards. Belongs to the training thread."""

    def __init__(
        self, traffic: Traffic, optimizer: torch.optim.Optimizer, stepped: Callable[[], None]
    ) -> None:
        self.traffic = traffic
        self.optimizer = optimizer
        self.binding = traffic.binding
        self.stepped = stepped
        self.early = (
            True  # buckets leave during backward; until a script is seen to change gradients after it
        )
        self.touching: list[list[Outbox]] = [[] for _ in traffic.layout.parameters]
        for outbox in traffic.outboxes.values():
            for parameter in outbox.bucket.parameters:
                self.touching[parameter].append(outbox)
        self.copied: dict[int, Seen | None] = {}  # parameter -> its gradient when it was copied in this step
        self.kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self.gone = False  # the worker has left the job: what the script still computes is no step of it
        self.dropped = False  # this step is not to be made: a GradScaler has found so, or it is left out

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
        present = self.binding.gather(index, self.traffic.values)
        for outbox in self.touching[index]:
            outbox.set_absent(index, not present)

    def _leave_early(self, outbox: Outbox) -> None:
        try:
            self.traffic.leave(outbox)
        except NonFinite:
            pass  # GradScaler may yet drop this step; `_before_step` decides

    # -- around the optimizer's step -----------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise ZmlError(
                CLOSURE,
                "optimizer.step was called with a closure",
                "Call loss.backward() and then optimizer.step().",
            )
        self._as_scaler_says(optimizer)
        if self.dropped or self.gone:
            self._put_aside()
            return
        for index, boxes in enumerate(self.touching):
            gradient = self.binding.parameters[index].grad
            if not boxes:
                if gradient is not None and gradient.numel():
                    raise thawed(self.traffic, index)
                continue
            if (
                index in self.copied
                and unchanged(self.copied[index], gradient)
                and (gradient is None or self.binding.holds(index, self.traffic.values))
            ):
                continue
            if index in self.copied and any(outbox.sent for outbox in boxes):
                self.early = False  # changed after it left: clipping, or unscaling
            for outbox in boxes:
                outbox.take_back()
            self._copy(index)
        for outbox in self.traffic.outboxes.values():
            if (
                not outbox.sent or outbox.clock != self.traffic.clock
            ):  # the worker rested between backward and step
                try:
                    self.traffic.leave(outbox)
                except NonFinite as bad:
                    self._leave_out(not_finite(self.traffic, bad))
                    return
        self.traffic.begin(hyper_of(self.optimizer))
        self._put_aside()

    def _leave_out(self, error: ZmlError) -> None:
        """This step is not made, if the user wants that. Nothing of it was committed; residuals are as before it."""
        if not self.traffic.watch.left_out(error.what):
            raise error from None
        for outbox in self.traffic.outboxes.values():
            outbox.take_back()
            outbox.missing = set(outbox.bucket.parameters)
        self.copied.clear()
        self.dropped = True
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
        for parameter, gradient in self.kept:
            parameter.grad = gradient
        self.kept = []
        if self.dropped or self.gone:
            return
        self.copied.clear()
        self.traffic.end()
        self.stepped()

    def finish(self) -> None:
        """The script has made its last step."""
        self.flush()

    def depart(self) -> None:
        """The same, where the other workers go on."""
        self.flush()
        self.early, self.gone = False, True

    @property
    def owes(self) -> bool:
        """Is there something that has not left yet, though its step was made?"""
        return False

    def published(self) -> AbstractContextManager[None]:
        """The model holds nothing else."""
        return nullcontext()

    def close(self) -> None:
        """At the end of the process."""

    def flush(self) -> None:
        """Every step that the script has made counts, and the model holds what followed from it."""
        self.traffic.drain()


def thawed(traffic: Traffic, parameter: int) -> ZmlError:
    name = traffic.layout.parameters[parameter].name
    return ZmlError(
        NOT_HELD,
        f"{name} has a gradient, but it was frozen or held by no optimizer when the script joined",
        f"Let {name} require a gradient, and the optimizer hold it, before zml.join; freeze it afterwards.",
    )


def not_finite(traffic: Traffic, bad: NonFinite, what: str = "gradient") -> ZmlError:
    name = traffic.layout.parameters[bad.parameter].name
    return ZmlError(
        NOT_FINITE,
        f"the {what} of {name} is not finite at step {traffic.clock} of {traffic.client.seat.worker}",
        "Lower the learning rate, clip gradients, or look at the batch of this step.",
    )


def unchanged(seen: Seen | None, gradient: torch.Tensor | None) -> bool:
    """Is this still the gradient that was copied?"""
    if seen is None or gradient is None:
        return seen is None and gradient is None
    return seen[0] is gradient and seen[1] == gradient._version
