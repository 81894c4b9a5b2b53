"""Reads one batch of a stream where it is told to: in the process of the script, or in those of its loader.

To torch's loader it is a map-style data set whose indices are places in a stream. It keeps open what it reads on in. A
place that lies ahead is reached by reading up to it; one that lies behind, or far ahead, from a state of the data set
that somebody has kept, or else from the front. A state saves time and must not decide what is read: so another copy
goes on from each before it is told, and where that reads another batch than the first one reads next, no other state
is told any more. (Once is not enough: a state of Hugging Face's is right until a chunk of its source has been passed.)

The protocol is that of torchdata's StatefulDataLoader for a data set: `state_dict()` between two items says where its
iteration stands, and after `load_state_dict` of that, `iter` goes on with the next item.
(https://meta-pytorch.org/data/main/torchdata.stateful_dataloader.html)
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..messages import MOST_PARTS
from . import stream_state

FRONT = b'{"zml":["front"]}'  # the state before the first item, which no data set can say
KEEP = 8  # parts that stay open in a process, or more where workers are few
PASSES = 3  # the rest of one, which may be nothing, and a whole one, which may be only a tail
DIFFERS = "behind it comes something else than without it, as where it lacks the content of a shuffle buffer"
TRIES = 3  # that fail in a row, before none is made any more: a file may be opened twice the next time
REST = 20  # times as long as it took to try a state, before another is told


class Wanted(NamedTuple):
    """One batch: the `position`th of this of so many parts. `state`, if any, is that before the `known`th."""

    parts: int
    part: int
    position: int
    known: int = 0
    state: bytes | None = None
    tell: bool = False  # the state behind this batch, too: with the next one of the part
    keep: int = KEEP  # parts that stay open, those that were read last


class Read(NamedTuple):
    """The batch, and a state before the `at`th of its part, where one was asked for. For pages that are pinned torch
    makes this anew, field by field."""

    batch: Any
    at: int = 0
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
        self.open: dict[int, _Part] = {}  # the one that was read last at the end
        self.untold = ""  # why no state of this data set can be kept
        self.rests_until = 0.0  # before that none is tried
        self.failures = 0  # to try one, in a row

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
        part, refused = self._part(wanted)
        try:
            items = part.read_at(wanted.position)
        except Exception as error:
            if not part.doubtful:
                raise
            refused = told(error)
            part = _Part(self, wanted.part, wanted.parts)
            items = part.read_at(wanted.position)
        self.open.pop(wanted.part, None)
        self.open[wanted.part] = part
        while len(self.open) > max(wanted.keep, 1):
            del self.open[next(iter(self.open))]
        at, state = part.proved or (0, None)
        part.proved = None
        if wanted.tell and not self.untold and time.monotonic() >= self.rests_until:
            part.try_state()
        return Read(self.collate(items), at, state, self.untold, refused)

    def _part(self, wanted: Wanted) -> tuple[_Part, str]:
        """One that stands at that place or before it, and why not where the state is, if that was of no use."""
        refused = ""
        part = self.open.get(wanted.part)
        if part is not None and part.position > wanted.position:
            part = None
        if wanted.state is not None and (part is None or part.position < wanted.known):
            other = _Part(self, wanted.part, wanted.parts)
            if not (refused := other.begin_at(wanted.known, wanted.state)):
                part = other
        return part or _Part(self, wanted.part, wanted.parts), refused

    def tried(self, took_s: float, failed: str) -> None:
        """A state was, which cost so long; `failed`: why it could not be."""
        self.rests_until = time.monotonic() + REST * took_s
        self.failures = self.failures + 1 if failed else 0
        if self.failures == TRIES:
            self.untold = failed

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


class _Trial(NamedTuple):
    """Another copy that goes on from a state, to read what the first one reads next."""

    state: bytes
    other: _Part
    took_s: float


class _Part:
    """One part, read up to before the `position`th batch."""

    def __init__(self, reader: Reader, index: int, count: int) -> None:
        self.reader = reader
        self.index, self.count = index, count
        self.position = 0
        self.doubtful = False  # nothing was read yet from the state it began at
        self.trial: _Trial | None = None
        self.proved: tuple[int, bytes] | None = None  # a state that was tried, and is not told yet
        self._begin()

    def _begin(self) -> None:
        """At the front."""
        self.items: Iterator[Any] | None = None
        self.dataset = part_of(copy.deepcopy(self.reader.dataset), self.index, self.count)

    def begin_at(self, position: int, state: bytes) -> str:
        """Go on from there. Where that cannot be, the answer says why."""
        if state != FRONT:
            try:
                self.dataset.load_state_dict(stream_state.read(state))
            except Exception as error:
                return told(error)
            self.doubtful = True
        self.position = position
        return ""

    def read_at(self, position: int) -> Any:
        """This batch, which lies no further back; not collated. Raises Empty."""
        while self.position < position:
            self._read()
        return self._read()

    def _read(self) -> Any:
        if self.trial is None:
            batch = self._next()
        else:
            # What is drawn at random meanwhile is drawn twice alike, and once as far as others can see.
            before = generators()
            batch = self._next()
            after = generators()
            set_generators(before)
            try:
                self._judge(self.trial, batch)
            finally:
                set_generators(after)
        self.position += 1
        self.doubtful = False
        return batch

    def try_state(self) -> None:
        """Whether the state behind what was read last leads to the next batch is seen when that is read."""
        began = time.monotonic()
        try:
            state = FRONT if self.items is None else stream_state.write(self.dataset.state_dict())
            other = _Part(self.reader, self.index, self.count)
            refused = other.begin_at(self.position, state)
        except Exception as error:
            self.reader.untold = told(error)
            return
        took_s = time.monotonic() - began
        if refused:
            self.reader.tried(took_s, failed=refused)
        else:
            self.trial = _Trial(state, other, took_s)

    def _judge(self, trial: _Trial, batch: Any) -> None:
        self.trial, failed = None, ""
        began = time.monotonic()
        try:
            as_well = same(batch, trial.other._read())
        except Unlike as odd:
            self.reader.untold = str(odd)
        except Exception as error:
            failed = told(error)
        else:
            if as_well:
                self.proved = self.position, trial.state
            else:
                self.reader.untold = DIFFERS
        self.reader.tried(trial.took_s + time.monotonic() - began, failed)

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


class Unlike(Exception):
    """Two items of which it cannot be said whether they are the same."""


def same(one: Any, other: Any) -> bool:
    """Are these two the same items? Raises Unlike where that cannot be said."""
    if type(one) is not type(other):
        return False
    match one:
        case torch.Tensor() if one.layout is torch.strided:
            if one.shape != other.shape or one.dtype is not other.dtype:
                return False
            return bool(((one == other) | ((one != one) & (other != other))).all())
        case np.ndarray() if one.dtype.kind == "O":
            return same(one.tolist(), other.tolist())
        case np.ndarray():
            alike = one.shape == other.shape and one.dtype == other.dtype
            return bool(alike and one.tobytes() == other.tobytes())
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case Mapping():
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        case str() | bytes() | int() | float() | complex() | np.generic() | set() | frozenset() | None:
            return bool(one == other) or bool(one != one)
    if not is_dataclass(one) and "__eq__" in {name for kind in type(one).__mro__[:-1] for name in vars(kind)}:
        return bool(one == other)
    if not hasattr(one, "__dict__"):
        raise Unlike(f"whether a {type(one).__name__} is the same as another cannot be said")
    return same(vars(one), vars(other))


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


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
