"""A loader over an IterableDataset, by best effort: the number of batches in an epoch is exact, which samples is not.

A stream that cannot say where it stands (those that can are in `exact_streams`) has no order that workers could share
and no place that another worker could go on from. So each worker reads its own part of it (`zml_shard`), and the
ledger counts batches without knowing what is in them: an epoch is so many of them, each trained once, whoever comes
and goes. What a lost worker had read and not trained is lost, and the batches that it owed are made up for with what
the others read next. Whoever starts again begins its part from the front: where it was is kept nowhere.

The protocol: `dataset.zml_shard(index, count)` is called once, before the first batch, and from then on the data set
yields only part `index` of `count`. Worker processes of the loader divide that among themselves as ever, by
`torch.utils.data.get_worker_info()`. Reading goes on from one epoch to the next, and begins again at the stream's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import structlog
from torch.utils.data import DataLoader, IterableDataset

from ..errors import LOADER, ZmlError
from .data import DividedLoader, Ledger

log = structlog.get_logger()


class OverStream(DividedLoader):
    """What both kinds of streams have in common: an epoch is so many batches, and samples have no indices."""

    def __init__(self, loader: DataLoader[Any], ledger: Ledger, batches: int | None) -> None:
        super().__init__(loader, ledger, checked=True)
        self.batches = length(loader) if batches is None else batches
        if self.batches < 1:
            what = f"an epoch of {self.batches} batches"
            raise ZmlError(LOADER, what, "Give zml.join at least batches=1 of a stream.")

    def __len__(self) -> int:
        return self.batches

    def samples_of(self, batch: int) -> list[int]:
        return []


class StreamLoader(OverStream):
    """Yields what its own loader yields, as often as the ledger leases it a batch."""

    def __init__(
        self, loader: DataLoader[Any], ledger: Ledger, index: int, count: int, batches: int | None = None
    ) -> None:
        super().__init__(check(loader), ledger, batches)
        loader.dataset.zml_shard(index, count)  # type: ignore[attr-defined]
        self.stream: Iterator[Any] | None = None

    def _divided(self) -> Iterator[Any]:
        self.ledger.open_epoch(self.batches, b"", 0, 0)
        while self.look_again():
            yield from self._again()

    def _again(self) -> Iterator[Any]:
        while self.more():
            self.begin()
            item = self._read()
            self.handed.append((self.leased.popleft(), self.loader.batch_size or 1))
            yield item

    def _read(self) -> Any:
        """The next batch of the stream, from its front where it has ended."""
        for _ in range(2):
            if self.stream is None:
                self.stream = iter(self.loader)
            try:
                return next(self.stream)
            except StopIteration:
                self.stream = None
                log.info("the stream begins again")
        raise ZmlError(
            LOADER,
            f"{type(self.loader.dataset).__name__} yields nothing in this worker's part of it",
            "Make every part that zml_shard(index, count) leaves hold at least one batch.",
        )


def check(loader: Any) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise ZmlError(
            LOADER,
            f'zml.join got data="best effort" and a {kind}',
            "Leave data= out: a DataLoader over a map-style data set is divided exactly.",
        )
    if not callable(getattr(loader.dataset, "zml_shard", None)):
        kind = type(loader.dataset).__name__
        raise ZmlError(
            LOADER,
            f"{kind} has no method zml_shard, and so every worker would read the same",
            "Give it zml_shard(self, index, count), after which it yields only part `index` of `count`.",
        )
    return loader


def length(loader: DataLoader[Any]) -> int:
    try:
        return len(loader)
    except TypeError:
        kind = type(loader.dataset).__name__
        raise ZmlError(
            LOADER, f"{kind} has no length", "Say how many batches an epoch has: zml.join(..., batches=1000)."
        ) from None
