"""Reads one batch of a stream where it is told to: in the process of the script, or in those of its loader.

To torch's loader it is a map-style data set whose indices are places in a stream. It keeps open what it reads on in. A
place that lies ahead is reached by reading up to it; one that lies behind, or far ahead, from a state of the data set
that somebody has kept, or else from the front. So a state saves time, and what is read does not depend on it.

The protocol is that of torchdata's StatefulDataLoader for a data set: `state_dict()` between two items says where its
iteration stands, and after `load_state_dict` of that, `iter` goes on with the next item.
(https://meta-pytorch.org/data/main/torchdata.stateful_dataloader.html)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from . import stream_state
from .parts import MOST_PARTS


class Wanted(NamedTuple):
    """One batch: the `position`th of this of so many parts. `state`, if any, is that before the `known`th."""

    parts: int
    part: int
    position: int
    known: int = 0
    state: bytes | None = None
    tell: bool = False  # the state behind this batch, too


class Read(NamedTuple):
    """The batch, and the state behind it where that was asked for; else why there is none. For pages that are pinned
    torch makes this anew, field by field."""

    batch: Any
    state: bytes | None = None
    untold: str = ""  # why the state was not told, where it was asked for
    failed: str = ""  # why there is no batch


class Empty(Exception):
    """A part of the stream yields nothing."""


class Reader:
    """Of one data set, which stays as it is: each part is read from a copy of it.

    `batch_size` None: the stream's items are batches already.
    """

    def __init__(
        self, dataset: Any, batch_size: int | None, drop_last: bool, collate: Callable[[Any], Any]
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.collate = collate
        self.open: dict[int, _Part] = {}

    def __getitem__(self, wanted: Wanted) -> Read:
        whole_parts()
        part = self.open.get(wanted.part)
        ahead = wanted.state is not None and part is not None and wanted.known > part.position
        try:
            if part is None or part.position > wanted.position or ahead:
                self.open.pop(wanted.part, None)
                part = self.open[wanted.part] = _Part(self, wanted)
            while part.position < wanted.position:
                part.read()
            items = part.read()
        except Empty:
            return Read(None, failed=f"part {wanted.part} of {wanted.parts} yields nothing")
        batch = self.collate(items)
        if not wanted.tell:
            return Read(batch)
        try:
            return Read(batch, stream_state.write(part.state()))
        except stream_state.NotPlain as odd:
            return Read(batch, untold=str(odd))

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


class _Part:
    """One part, read up to before the `position`th batch."""

    def __init__(self, reader: Reader, wanted: Wanted) -> None:
        self.reader = reader
        self.count, self.index = wanted.parts, wanted.part
        self.position, state = 0, None
        if wanted.state is not None:
            with suppress(stream_state.NotPlain):  # then from the front
                state = stream_state.read(wanted.state)
                self.position = wanted.known
        self._begin(state)

    def _begin(self, state: Any) -> None:
        """At the front of the part, where the state is None."""
        self.items: Iterator[Any] | None = None
        self.dataset = part_of(copy.deepcopy(self.reader.dataset), self.index, self.count)
        if state is not None:
            self.dataset.load_state_dict(state)

    def state(self) -> Any:
        """Behind what was read last."""
        return self.dataset.state_dict() if self.items is not None else None

    def read(self) -> Any:
        """The next batch, not collated. Raises Empty."""
        for _ in range(
            3
        ):  # the rest of one pass, which may be nothing, and a whole one, which may be only a tail
            if self.items is None:
                self.items = iter(self.dataset)
            size = self.reader.batch_size
            items = list(islice(self.items, size or 1))
            whole = len(items) == (size or 1)
            if not whole:
                self._begin(None)
            if whole or (items and not self.reader.drop_last):
                self.position += 1
                return items if size else items[0]
        raise Empty


def most_parts(dataset: Any) -> int:
    """Into how many parts it can be divided without reading all of it in each."""
    if callable(getattr(dataset, "zml_shard", None)):
        return MOST_PARTS
    most = getattr(dataset, "num_shards", None)
    return min(most, MOST_PARTS) if isinstance(most, int) and callable(getattr(dataset, "shard", None)) else 1


def part_of(dataset: Any, index: int, count: int) -> Any:
    """By its `zml_shard`, or as Hugging Face's `datasets` do it (https://huggingface.co/docs/datasets/stream)."""
    if callable(getattr(dataset, "zml_shard", None)):
        dataset.zml_shard(index, count)
        return dataset
    return dataset.shard(num_shards=count, index=index) if count > 1 else dataset


def whole_parts() -> None:
    """In a process of the loader: data sets divide what they yield by `get_worker_info`, and a part is divided
    already. torch keeps it there and has no other way to take it back."""
    from torch.utils.data._utils import worker

    worker._worker_info = None
