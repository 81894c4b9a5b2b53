"""Reads one batch of a stream where it is told to: in the process of the script, or in those of its loader.

To torch's loader it is a map-style data set whose indices are places in a stream. It keeps open what it reads on in. A
place that lies ahead is reached by reading up to it; one that lies behind, or far ahead, from a state of the data set
that somebody has kept, or else from the front. A state saves time and must not decide what is read: so each one is
tried before it is told, and where something else comes behind it than came without it, no other is told any more. (Once
is not enough: a state of Hugging Face's is right until a chunk of its source has been passed.)

The protocol is that of torchdata's StatefulDataLoader for a data set: `state_dict()` between two items says where its
iteration stands, and after `load_state_dict` of that, `iter` goes on with the next item.
(https://meta-pytorch.org/data/main/torchdata.stateful_dataloader.html)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..messages import MOST_PARTS
from . import stream_state

FRONT = b"[]"  # the state before the first item, whatever the data set would say of it
PASSES = 3  # the rest of one, which may be nothing, and a whole one, which may be only a tail


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
    untold: str = ""  # why no state can be kept
    refused: str = ""  # why the state that was given was of no use
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
        self.untold = ""  # why no state of this data set can be kept

    def __getitem__(self, wanted: Wanted) -> Read:
        whole_parts()
        try:
            return self._read(wanted)
        except Empty:
            return Read(None, failed=f"part {wanted.part} of {wanted.parts} yields nothing")
        except BaseException as error:
            # What has failed may have lost items, and may not go on behind them.
            self.open.pop(wanted.part, None)
            error.add_note(
                f"read for batch {wanted.position} of part {wanted.part} of {wanted.parts} of a stream"
            )
            raise

    def _read(self, wanted: Wanted) -> Read:
        part = self.open.get(wanted.part)
        ahead = wanted.state is not None and part is not None and wanted.known > part.position
        refused = ""
        if part is None or part.position > wanted.position or ahead:
            part = self.open[wanted.part] = _Part(self, wanted.part, wanted.parts)
            if wanted.state is not None:
                refused = part.begin_at(wanted.known, wanted.state)
        while part.position < wanted.position:
            part.read()
        items = part.read()
        state = self._state(part) if wanted.tell and not self.untold else None
        return Read(self.collate(items), state, self.untold, refused)

    def _state(self, part: _Part) -> bytes | None:
        """Behind what was read last; None where no state can be told, and `untold` says why."""
        try:
            state = part.state()
            if state != FRONT:
                self._try(part, state)
            return state
        except stream_state.NotPlain as odd:
            self.untold = str(odd)
            return None

    def _try(self, part: _Part, state: bytes) -> None:
        """Does the same come behind it as without it? Raises NotPlain."""
        other = _Part(self, part.index, part.count)
        if refused := other.begin_at(part.position, state):
            raise stream_state.NotPlain(refused)
        try:
            # What is drawn at random meanwhile is no matter of the state.
            before = generators()
            expected = part.look_ahead()
            after = generators()
            set_generators(before)
            found = other.read()
            set_generators(after)
        except Exception as error:
            self.open.pop(part.index, None)  # it is read again, and fails in its place
            raise stream_state.NotPlain(f"{type(error).__name__} behind it: {error}"[:300]) from None
        if not same(expected, found):
            what = "behind it comes something else than without it, as where it lacks the content of a shuffle buffer"
            raise stream_state.NotPlain(what)

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


class _Part:
    """One part, read up to before the `position`th batch."""

    def __init__(self, reader: Reader, index: int, count: int) -> None:
        self.reader = reader
        self.index, self.count = index, count
        self.position = 0
        self.ahead: list[Any] = []  # the next batch, where it was read already
        self._begin()

    def _begin(self) -> None:
        """At the front."""
        self.items: Iterator[Any] | None = None
        self.dataset = part_of(copy.deepcopy(self.reader.dataset), self.index, self.count)

    def begin_at(self, position: int, state: bytes) -> str:
        """Go on from there. Where that cannot be it is the front still, and the answer says why."""
        if state != FRONT:
            try:
                self.dataset.load_state_dict(stream_state.read(state))
            except Exception as error:
                self._begin()
                return f"load_state_dict: {type(error).__name__}: {error}"[:300]
        self.position = position
        return ""

    def state(self) -> bytes:
        """Behind what was read last. Raises NotPlain."""
        if self.items is None:
            return FRONT
        try:
            said = self.dataset.state_dict()
        except Exception as error:
            raise stream_state.NotPlain(f"state_dict: {type(error).__name__}: {error}"[:300]) from None
        return stream_state.write(said)

    def look_ahead(self) -> Any:
        """The next batch, which stays the next."""
        if not self.ahead:
            self.ahead = [self._next()]
        return self.ahead[0]

    def read(self) -> Any:
        """The next batch, not collated. Raises Empty."""
        batch = self.ahead.pop() if self.ahead else self._next()
        self.position += 1
        return batch

    def _next(self) -> Any:
        size = self.reader.batch_size
        for _ in range(PASSES):
            if self.items is None:
                self.items = iter(self.dataset)
            items = list(islice(self.items, size or 1))
            whole = len(items) == (size or 1)
            if not whole:
                self._begin()
            if whole or (items and not self.reader.drop_last):
                return items if size else items[0]
        raise Empty


def same(one: Any, other: Any) -> bool:
    """Are these two the same items?"""
    if type(one) is not type(other):
        return False
    match one:
        case torch.Tensor():
            if one.shape != other.shape or one.dtype is not other.dtype:
                return False
            one, other = (each.nan_to_num() if each.is_floating_point() else each for each in (one, other))
            return torch.equal(one, other)
        case np.ndarray():
            return bool(one.shape == other.shape and one.tobytes() == other.tobytes())
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case dict():
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        case str() | bytes() | int() | float() | None:
            return bool(one == other) or one != one
    return True  # of what may be anything it cannot be said


def generators() -> tuple[Any, ...]:
    """The states of those that everybody draws from."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_generators(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def most_parts(dataset: Any) -> int:
    """Into how many parts it can be divided without reading all of it in each."""
    if callable(getattr(dataset, "zml_shard", None)):
        return MOST_PARTS
    most = getattr(dataset, "num_shards", None)
    if not isinstance(most, int) or not callable(getattr(dataset, "shard", None)):
        return 1
    return max(1, min(most, MOST_PARTS))


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
