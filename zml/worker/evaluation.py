"""`zml.evaluate(fn, loader)`: every sample once, whatever the number of workers, and exact sums.

The batches are those of a sequential pass over the data set. In a cluster they are leased one after another, as those
of an epoch are, and what a lost worker held is computed by another; every worker waits until all results are in, and
gets the same totals. The order in which they come changes no bit of a sum (`scheduler.evaluation`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from ..errors import EVALUATION, ZmlError
from ..scheduler.evaluation import Sums
from .data import DividedLoader, like

Result = tuple[int, dict[str, float]]


def numbers(returned: Any) -> dict[str, float]:
    """What `fn` returned for one batch, as floats. Raises ZmlError."""
    if not isinstance(returned, Mapping):
        kind = type(returned).__name__
        raise ZmlError(
            EVALUATION, f"the function given to zml.evaluate returned a {kind}", "Return a dict of sums."
        )
    found = {}
    for name, value in returned.items():
        if hasattr(value, "detach"):  # a tensor may still hang on to its graph
            value = value.detach()
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise ZmlError(
                EVALUATION,
                f"the function given to zml.evaluate returned a {kind} for {name!r}",
                "Return floats or tensors with one element.",
            ) from None
    if because := Sums().why_not(found):
        raise ZmlError(EVALUATION, f"the function given to zml.evaluate: {because}")
    return found


def alone(fn: Callable[[Any], Mapping[str, Any]], loader: Any) -> dict[str, float]:
    """Without a cluster: a loop."""
    sums = Sums()
    for batch in loader:
        sums.add(numbers(fn(batch)))
    return sums.totals


@dataclass(frozen=True, slots=True)
class Anew:
    """The coordinator has begun anew, and knows of no result: neither do we."""


class Desk(Protocol):
    """The coordinator's account of one evaluation, as one worker sees it."""

    def ask(
        self, batches: int, results: list[Result], holds: list[int], *, wait: bool
    ) -> list[int] | dict[str, float] | Anew:
        """Hand in results, and say which batches are still to be computed; get more, [] when there are none for now
        (only with `wait` false), or the totals."""
        ...


class Evaluator:
    """One loader, divided. Invariant: `leased` are not asked of the inner loader yet, `handed` are and come out of it
    in this order, `results` are computed and not told yet."""

    def __init__(self, loader: Any) -> None:
        self.loader = check(loader)
        self.batches = len(self.loader)
        self.inner = like(self.loader, batch_sampler=weakref.proxy(self))  # as `data.Share`
        self.leased: deque[int] = deque()
        self.handed: deque[int] = deque()
        self.results: list[Result] = []
        self.desk: Desk | None = None
        self.answer: dict[str, float] | Anew | None = None  # that ends a pass

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[range]:
        """As the inner loader's batch sampler: the samples of each batch that is leased, in order."""
        size = cast(BatchSampler, self.loader.batch_sampler).batch_size
        total = len(cast(Any, self.loader.dataset))
        # Never wait here: a loader with worker processes asks ahead, while its own batches are still computed.
        while self.leased or self._more(wait=False):
            batch = self.leased.popleft()
            self.handed.append(batch)
            yield range(batch * size, min(total, (batch + 1) * size))

    def _more(self, *, wait: bool) -> bool:
        """Get more batches. False when there are none for now, or when `answer` says that this pass has ended."""
        assert self.desk is not None
        if self.answer is not None:
            return False
        results, self.results = self.results, []
        answer = self.desk.ask(self.batches, results, [*self.handed, *self.leased], wait=wait)
        if isinstance(answer, list):
            self.leased.extend(answer)
            return bool(answer)
        self.answer = answer
        return False

    def run(self, fn: Callable[[Any], Mapping[str, Any]], desk: Desk) -> dict[str, float]:
        self.desk = desk
        self._begin()
        source = iter(self.inner)
        while True:
            for item in source:
                batch = self.handed.popleft()
                self.results.append((batch, numbers(fn(item))))
                if self.answer is not None:
                    break
            if not self._more(wait=True) and self.answer is not None:
                if not isinstance(self.answer, Anew):
                    return self.answer
                self._begin()
            state = torch.get_rng_state()  # only the first pass is part of the generators' plain sequence
            source = iter(self.inner)
            torch.set_rng_state(state)

    def _begin(self) -> None:
        self.leased.clear()
        self.handed.clear()
        self.results.clear()
        self.answer = None


def check(loader: Any) -> DataLoader[Any]:
    """The loader, if its batches mean the same on every worker; else a ZmlError that says what to change."""
    if isinstance(loader, DividedLoader):
        loader = loader.loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise ZmlError(
            EVALUATION, f"zml.evaluate got a {kind}", "Give it a DataLoader over a map-style data set."
        )
    if type(loader.batch_sampler) is not BatchSampler or type(loader.sampler) is not SequentialSampler:
        kind = type(
            loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
        ).__name__
        raise ZmlError(
            EVALUATION,
            f"the loader given to zml.evaluate has a {kind}",
            "Give it a DataLoader with a batch_size and without shuffle or sampler: sums have no order.",
        )
    return loader
