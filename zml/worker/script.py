"""The script's side of zml: the same calls alone and in a cluster.

Alone they do what a reader of the script would expect and nothing else, so that `python train.py` is plain PyTorch.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..agent.seat import Seat
from ..errors import NOT_A_NUMBER, NOT_JOINED, ZmlError

if TYPE_CHECKING:
    import torch


EXACT, BEST_EFFORT = "exact", "best effort"  # what zml.join promises about the data


class Script(Protocol):
    """What `zml.join` and the other calls stand for."""

    def join(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        data: str = EXACT,
        batches: int | None = None,
    ) -> Any: ...
    def epochs(self, count: int) -> Iterator[int]: ...
    def evaluate(self, fn: Callable[[Any], Mapping[str, Any]], loader: Any) -> dict[str, float]: ...
    def log(self, values: dict[str, Any]) -> None: ...
    def published(self) -> AbstractContextManager[None]: ...
    def save(self, path: str | PathLike[str]) -> None: ...


class Standalone:
    """No zml around the script."""

    def __init__(self, print_every_s: float = 5.0) -> None:
        self.print_every_s = print_every_s
        self.model: torch.nn.Module | None = None
        self.step = 0
        self.printed_at = time.monotonic()
        self.printed_step = 0

    def join(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        data: str = EXACT,
        batches: int | None = None,
    ) -> Any:
        self.model = model
        return loader

    def epochs(self, count: int) -> Iterator[int]:
        return iter(range(count))

    def evaluate(self, fn: Callable[[Any], Mapping[str, Any]], loader: Any) -> dict[str, float]:
        from .evaluation import alone

        return alone(fn, loader)

    def log(self, values: dict[str, Any]) -> None:
        self.step += 1
        now = time.monotonic()
        since_s = now - self.printed_at
        if since_s < self.print_every_s:
            return
        numbers = "  ".join(f"{name} {number(name, value):.4g}" for name, value in values.items())
        rate = (self.step - self.printed_step) / since_s
        print(f"step {self.step}  {numbers}  ({rate:.3g} steps/s)", file=sys.stderr, flush=True)
        self.printed_at, self.printed_step = now, self.step

    def published(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, path: str | PathLike[str]) -> None:
        if self.model is None:
            raise ZmlError(
                NOT_JOINED, "zml.save has no model yet", "Call zml.join(model, optimizer, loader) first."
            )
        write_model(self.model, path)


def number(name: str, value: Any) -> float:
    """What `zml.log` was given, as a float. Raises ZmlError for what is none."""
    if hasattr(value, "detach"):  # a tensor may still hang on to its graph
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise ZmlError(
            NOT_A_NUMBER, f"zml.log({name}=...) got a {kind}", "Log floats or tensors with one element."
        ) from None


def write_model(model: torch.nn.Module, path: str | PathLike[str]) -> None:
    """The model's state dict as safetensors: synced to disk beside its place, then renamed into it.

    Tied weights are stored once; the other names of a tied weight are kept as metadata, as
    `safetensors.torch.save_model` does, so that `load_model` brings all of them back.
    """
    from safetensors.torch import save_model

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_model(model, scratch)
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)


_current: Script | None = None


def current() -> Script:
    """The one script of this process."""
    global _current
    if _current is None:
        seat = Seat.from_environment()
        if seat is None:
            _current = Standalone()
        else:
            from .member import Member

            _current = Member(seat)
    return _current
