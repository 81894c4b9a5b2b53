"""Where every parameter lives: slabs, chunks, segments, buckets.

A slab holds the parameters of one optimizer group one after another, in the order of the model; tied weights
are there once. A chunk is 65,536 consecutive elements of one slab (the last of a slab may be shorter), a
segment is the part of one parameter that lies in one chunk. Frozen parameters have a slab of their own, the
last, which is broadcast and never updated.

The rule: everything follows from names, shapes and groups. Only these travel, so no peer can describe
segments that overlap or leave a gap. This module does not import torch; `worker.binding` holds a model against its
layout.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import msgpack
import msgspec

from .hyper import MOST_GROUPS, Hyper, OptimizerSpec, unpack

if TYPE_CHECKING:
    import torch

CHUNK = 65_536  # elements
BUCKET_CHUNKS = 8  # 2 MiB of fp32: large enough for the network, small enough to overlap with backward

MATRICES, VECTORS = range(2)  # groups where the optimizer runs on the workers
MOST_PARAMETERS = 65_536
MOST_ELEMENTS = 1 << 34  # 64 GiB of fp32
MOST_CHUNKS = 1 << 18
MOST_DIMENSIONS = 64  # as torch
MOST_NAME = 512  # bytes
MOST_BYTES = 4 << 20  # of a registration


class BadLayout(ValueError):
    """This description of a model is not usable. Nothing was allocated for it."""


class Segment(NamedTuple):
    """The elements of one parameter that lie in one chunk."""

    parameter: int  # index into Layout.parameters
    start: int  # first element, counted inside the flattened parameter
    offset: int  # first element, counted inside the chunk
    size: int
    ndim: int  # of the whole parameter: a codec may treat vectors and matrices differently


@dataclass(frozen=True, slots=True)
class Chunk:
    """`segments` are in the order of their offsets and fill the chunk without gap or overlap."""

    index: int  # counted over all slabs
    group: int
    size: int  # elements
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """`start` is its first element inside the slab of its group. Flattened it is in row-major order."""

    name: str
    shape: tuple[int, ...]
    group: int
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """One slab: a param_group of the optimizer, or (the last) the frozen parameters."""

    index: int
    size: int  # elements
    chunks: range  # indices of its chunks, which are consecutive
    frozen: bool


class Place(NamedTuple):
    """Where one segment of a parameter lies."""

    chunk: int
    segment: Segment


@dataclass(frozen=True)
class Layout:
    """All parameters of a model in their places. Build one with `of` (from a model) or `build` (from shapes).

    `parameters` are in the order of the model, in which the forward pass mostly uses them and backward, from
    the last to the first, completes their gradients. `groups` end with the frozen one, which may be empty.
    """

    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]
    chunks: tuple[Chunk, ...]
    chunk_elements: int

    @staticmethod
    def of(
        model: "torch.nn.Module",
        optimizer: "torch.optim.Optimizer",
        chunk_elements: int = CHUNK,
        *,
        any_optimizer: bool = False,
    ) -> "Layout":
        """The layout of a model under its optimizer. Raises ZmlError where zml could not train them.

        `any_optimizer`: it runs in the script, so that the shards need not know its class. They have two groups then,
        MATRICES and VECTORS, which are merged in two ways (see `plan.Plan.gain`).
        """
        from .worker.binding import describe

        described = describe(model, optimizer, any_optimizer=any_optimizer)
        groups = len(optimizer.param_groups)
        if any_optimizer:
            described = [
                (name, shape, 2 if group == groups else MATRICES if len(shape) > 1 else VECTORS)
                for name, shape, group in described
            ]
            groups = 2
        return Layout.build(described, groups, chunk_elements)

    @staticmethod
    def build(
        described: Iterable[tuple[str, Sequence[int], int]], groups: int, chunk_elements: int = CHUNK
    ) -> "Layout":
        """From (name, shape, group) of each, in order; group `groups` is the frozen one. Raises BadLayout."""
        if not 1 <= chunk_elements <= CHUNK:
            raise BadLayout(f"chunks of {chunk_elements} elements, not 1 to {CHUNK}")
        if not 1 <= groups <= MOST_GROUPS:
            raise BadLayout(f"{groups} groups, not 1 to {MOST_GROUPS}")
        parameters = _parameters(described, groups)
        if sum(parameter.size for parameter in parameters) > MOST_CHUNKS * chunk_elements:
            raise BadLayout(f"more than {MOST_CHUNKS} chunks of {chunk_elements} elements")
        chunks: list[Chunk] = []
        slabs: list[Group] = []
        for group in range(groups + 1):
            first = len(chunks)
            chunks += _cut(parameters, group, first, chunk_elements)
            size = sum(chunk.size for chunk in chunks[first:])
            slabs.append(Group(group, size, range(first, len(chunks)), frozen=group == groups))
        if not chunks:
            raise BadLayout("there is no parameter with any element")
        return Layout(parameters, tuple(slabs), tuple(chunks), chunk_elements)

    @cached_property
    def places(self) -> tuple[tuple[Place, ...], ...]:
        """Per parameter, where its segments lie, from its first element to its last."""
        found: list[list[Place]] = [[] for _ in self.parameters]
        for chunk in self.chunks:
            for segment in chunk.segments:
                found[segment.parameter].append(Place(chunk.index, segment))
        return tuple(tuple(places) for places in found)

    @property
    def size(self) -> int:
        """Elements of all slabs."""
        return sum(group.size for group in self.groups)

    def frozen(self, chunk: int) -> bool:
        return self.chunks[chunk].group == len(self.groups) - 1


def _parameters(described: Iterable[tuple[str, Sequence[int], int]], groups: int) -> tuple[Parameter, ...]:
    parameters: list[Parameter] = []
    names: set[str] = set()
    starts = [0] * (groups + 1)
    total = 0
    for name, shape, group in described:
        if len(parameters) == MOST_PARAMETERS:
            raise BadLayout(f"more than {MOST_PARAMETERS} parameters")
        if not name or len(name.encode(errors="replace")) > MOST_NAME or name in names:
            raise BadLayout(f"the name {name[:60]!r} is empty, too long or there twice")
        if len(shape) > MOST_DIMENSIONS or any(not 0 <= extent <= MOST_ELEMENTS for extent in shape):
            raise BadLayout(f"{name[:60]} has an impossible shape")
        if not 0 <= group <= groups:
            raise BadLayout(f"{name[:60]} is in group {group} of {groups}")
        parameter = Parameter(name, tuple(shape), group, starts[group])
        names.add(name)
        starts[group] += parameter.size
        total += parameter.size
        if total > MOST_ELEMENTS:
            raise BadLayout(f"more than {MOST_ELEMENTS} elements")
        parameters.append(parameter)
    return tuple(parameters)


def _cut(parameters: Sequence[Parameter], group: int, first: int, chunk_elements: int) -> list[Chunk]:
    """The chunks of one slab."""
    chunks: list[Chunk] = []
    segments: list[Segment] = []
    filled = 0
    for index, parameter in enumerate(parameters):
        if parameter.group != group:
            continue
        start, size, ndim = 0, parameter.size, len(parameter.shape)
        while start < size:
            taken = min(size - start, chunk_elements - filled)
            segments.append(Segment(index, start, filled, taken, ndim))
            start += taken
            filled += taken
            if filled == chunk_elements:
                chunks.append(Chunk(first + len(chunks), group, filled, tuple(segments)))
                segments, filled = [], 0
    if segments:
        chunks.append(Chunk(first + len(chunks), group, filled, tuple(segments)))
    return chunks


# -- buckets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """Chunks of one shard that travel in one message. It may leave when all its `parameters` have their
    gradient.

    A bucket is wholly frozen (loaded and pulled once, never pushed) or not at all.
    """

    index: int
    shard: int
    chunks: tuple[int, ...]
    parameters: frozenset[int]
    frozen: bool


def buckets(
    layout: Layout, placement: Sequence[int], bucket_chunks: int = BUCKET_CHUNKS
) -> tuple[Bucket, ...]:
    """Every chunk in exactly one bucket, the same on every member; those that are ready first in backward
    come first.

    `placement[chunk]` is the index of the shard that holds the chunk. Raises BadLayout if it does not fit the
    layout.
    """
    if len(placement) != len(layout.chunks) or any(shard < 0 for shard in placement):
        raise BadLayout(f"a placement of {len(placement)} chunks, not {len(layout.chunks)}")
    if bucket_chunks < 1:
        raise BadLayout(f"buckets of {bucket_chunks} chunks")

    # A chunk is ready with its earliest parameter, because backward completes that one last.
    def lateness(chunk: Chunk) -> tuple[bool, int, int]:
        return layout.frozen(chunk.index), -chunk.segments[0].parameter, -chunk.index

    filling: dict[tuple[int, bool], list[int]] = {}
    full: list[tuple[int, bool, list[int]]] = []
    for chunk in sorted(layout.chunks, key=lateness):
        key = placement[chunk.index], layout.frozen(chunk.index)
        held = filling.setdefault(key, [])
        if not held:
            full.append((*key, held))
        held.append(chunk.index)
        if len(held) == bucket_chunks:
            del filling[key]
    return tuple(
        Bucket(index, shard, tuple(held), _touching(layout, held), frozen)
        for index, (shard, frozen, held) in enumerate(full)
    )


def _touching(layout: Layout, chunks: Iterable[int]) -> frozenset[int]:
    return frozenset(segment.parameter for chunk in chunks for segment in layout.chunks[chunk].segments)


# -- registration -----------------------------------------------------------------------------------------


class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    zml: int  # version of this format
    chunk: int
    bucket: int
    optimizer: str
    groups: list[Hyper]
    parameters: list[tuple[str, list[int], int]]


@dataclass(frozen=True)
class Registration:
    """What a script tells of its model: layout, optimizer, chunks per bucket. Equal bytes, equal models."""

    layout: Layout
    optimizer: OptimizerSpec
    bucket_chunks: int = BUCKET_CHUNKS

    @staticmethod
    def of(
        model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", bucket_chunks: int = BUCKET_CHUNKS
    ) -> "Registration":
        """Raises ZmlError as `Layout.of` does."""
        return Registration(Layout.of(model, optimizer), OptimizerSpec.of(optimizer), bucket_chunks)

    def to_bytes(self) -> bytes:
        parameters = [(p.name, list(p.shape), p.group) for p in self.layout.parameters]
        wire = _Wire(
            zml=1,
            chunk=self.layout.chunk_elements,
            bucket=self.bucket_chunks,
            optimizer=self.optimizer.name,
            groups=list(self.optimizer.fixed),
            parameters=parameters,
        )
        packed: bytes = msgpack.packb(msgspec.to_builtins(wire))
        if len(packed) > MOST_BYTES:
            raise BadLayout(f"a description of {len(packed)} bytes, more than {MOST_BYTES}")
        return packed

    @cached_property
    def digest(self) -> str:
        """BLAKE2b of the bytes, 32 hexadecimal digits."""
        return hashlib.blake2b(self.to_bytes(), digest_size=16).hexdigest()

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> "Registration":
        """What a peer registered. Raises BadLayout, before anything of the model's size is allocated."""
        if len(data) > MOST_BYTES:
            raise BadLayout(f"{len(data)} bytes, more than {MOST_BYTES}")
        try:
            wire = msgspec.convert(unpack(data, array=MOST_PARAMETERS, text=MOST_NAME), _Wire)
            optimizer = OptimizerSpec(wire.optimizer, tuple(wire.groups))
        except (ValueError, msgspec.ValidationError) as bad:
            raise BadLayout(f"the registration cannot be read: {bad}") from bad
        if wire.zml != 1:
            raise BadLayout(f"registration format {wire.zml}, this is zml's format 1")
        if not 1 <= wire.bucket <= 1_024:
            raise BadLayout(f"buckets of {wire.bucket} chunks")
        return Registration(
            Layout.build(wire.parameters, len(wire.groups), wire.chunk), optimizer, wire.bucket
        )
