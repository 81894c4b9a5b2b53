"""What a shard holds of one chunk, and memory for some of them.

    w        the parameters, exact, fp32             p        what workers hold at the published version
    version  updates applied to w                    log      deltas that lead from older versions of p to p

Chunks that come together lie together, each behind room for the header of its dense frame, which so needs no copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codec import UNKNOWN, Header, Kind
from ..codec.frame import HEADER, write_header
from ..hyper import OptimizerSpec
from ..layout import Chunk, Layout
from .optim import UpdateRule

ALIGNMENT = 64  # bytes: a cache line, and torch's own


@dataclass(slots=True, eq=False)
class Held:
    """One chunk. `dense` is a whole frame in memory: header, then p. With a lossless codec p is w."""

    chunk: Chunk
    parameters: frozenset[int]
    w: Tensor
    p: Tensor
    dense: memoryview
    rule: UpdateRule | None  # None: frozen
    version: int = UNKNOWN
    published: int = UNKNOWN
    log: deque[tuple[int, bytes]] = field(
        default_factory=deque
    )  # (base, frame); the last leads to `published`
    log_bytes: int = 0
    budget: int = 0  # elements that the next delta may have

    @property
    def trained(self) -> UpdateRule:
        assert self.rule is not None, "frozen chunks take no gradients"
        return self.rule

    def fill(self, version: tuple[int, int, int], part: Mapping[str, Tensor]) -> None:
        """Become what a snapshot has of this chunk. ValueError if it does not fit."""
        w = part["w"]
        p = part.get("p", w)
        if not self.w.shape == w.shape == p.shape or w.dtype != torch.float32:
            raise ValueError(f"chunk {self.chunk.index} has {self.chunk.size} elements, not {tuple(w.shape)}")
        if self.rule is not None:
            self.rule.load_state({name: value for name, value in part.items() if name not in ("w", "p")})
        self.w.copy_(w)
        if self.p is not self.w:
            self.p.copy_(p)
        self.version, self.published, self.budget = version
        self.log.clear()
        self.log_bytes = 0
        if self.version != UNKNOWN:
            self.head()

    def head(self) -> None:
        """Say in the dense frame which version its parameters are."""
        header = Header(0, Kind.PARAMETERS, self.chunk.index, self.published, 4 * self.chunk.size)
        write_header(self.dense, header)


def room(layout: Layout, spec: OptimizerSpec, chunks: Iterable[int], *, lossless: bool) -> dict[int, Held]:
    """Memory for these chunks, with nothing in it. With a lossless codec p is w."""
    cut = [layout.chunks[index] for index in sorted(chunks)]
    slab = _aligned(sum(map(stride, cut)))
    exact = slab if lossless else _aligned(len(slab))  # w, at the places of p
    found: dict[int, Held] = {}
    at = 0
    for chunk in cut:
        body = at + ALIGNMENT  # the header ends where the aligned body begins
        p = slab[body : body + 4 * chunk.size].view(torch.float32)
        w = p if lossless else exact[body : body + 4 * chunk.size].view(torch.float32)
        dense = slab[body - HEADER.size : body + 4 * chunk.size].numpy().data.cast("B")
        rule = None if layout.frozen(chunk.index) else UpdateRule(spec, chunk, w)
        parameters = frozenset(segment.parameter for segment in chunk.segments)
        found[chunk.index] = Held(chunk, parameters, w, p, dense, rule)
        at += stride(chunk)
    return found


def by_chunk(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """A snapshot's tensors, by chunk and name. ValueError for another name."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        chunk, _, what = name.partition("/")
        parts.setdefault(int(chunk), {})[what] = tensor
    return parts


def stride(chunk: Chunk) -> int:
    """Bytes of one chunk in its slab: room for the header, then the body, to the next aligned address."""
    return ALIGNMENT + -(-4 * chunk.size // ALIGNMENT) * ALIGNMENT


def _aligned(size: int) -> Tensor:
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + size]
