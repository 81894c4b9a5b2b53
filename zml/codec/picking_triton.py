"""`picking` on CUDA: two kernels and one copy to the host, where torch's operations are launched thirty times.

count    how many elements of each block reach the floor of their slice, and whether all are finite
place    writes positions and values of those, in order, behind those of the blocks before

So nothing depends on the order in which blocks run, and the host waits once. `python bench/gpu.py` shows both ways.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .picking import Entries

BLOCK, WARPS = 1024, 4  # of 1,024 to 4,096 elements and 4 or 8 warps, as fast as any
FACTS = 2  # words before the positions: how many entries, and whether one element is not finite


@triton.jit
def _count(total, slice_of, floors, counts, facts, elements, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.abs(tl.load(total + at, mask=inside, other=0.0))
    floor = tl.load(floors + tl.load(slice_of + at, mask=inside, other=0))
    tl.store(counts + block, tl.sum(((value >= floor) & inside).to(tl.int32), 0))
    infinite = tl.max((~(value < float("inf"))).to(tl.int32), 0)  # what is not a number compares false
    if infinite:
        tl.store(facts + 1, 1)


@triton.jit
def _place(
    total,
    slice_of,
    floors,
    counts,
    ends,
    facts,
    positions,
    values,
    room,
    elements,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(total + at, mask=inside, other=0.0)
    floor = tl.load(floors + tl.load(slice_of + at, mask=inside, other=0))
    chosen = (tl.abs(value) >= floor) & inside
    end = tl.load(ends + block)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1 + end - tl.load(counts + block)
    chosen = chosen & (place < room)
    tl.store(positions + place, at, mask=chosen)
    tl.store(values + place, value, mask=chosen)
    if block == tl.num_programs(0) - 1:
        tl.store(facts, tl.minimum(end, room))


class TritonPicker:
    """As `picking.TorchPicker`, to the bit. What it returns is good until it is called again."""

    def __init__(self, slice_of: Tensor, vectors: Tensor) -> None:
        self.device = slice_of.device
        self._slice_of = slice_of
        self._vectors = vectors
        self._elements = slice_of.numel()
        self._blocks = triton.cdiv(self._elements, BLOCK)
        self._counts = torch.empty(self._blocks, dtype=torch.int32, device=self.device)
        self._make(0)

    def _make(self, room: int) -> None:
        """Memory for so many entries: words are facts, positions, values, vectors."""
        self._room = room
        size = FACTS + 2 * room + self._vectors.numel()
        self._words = torch.empty(size, dtype=torch.int32, device=self.device)
        self._host = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self._facts = self._words[:FACTS]
        self._places = self._words[FACTS : FACTS + room]
        self._values = self._words[FACTS + room :].view(torch.float32)

    def __call__(self, total: Tensor, floors: Tensor, room: int) -> Entries:
        if room != self._room:
            self._make(room)
        with torch.cuda.device(self.device):
            self._launch(total, floors)
        if self._vectors.numel():
            torch.index_select(total, 0, self._vectors, out=self._values[room:])
        self._host.copy_(self._words)  # and waits for it
        host = self._host.numpy()
        found, before = int(host[0]), self._values[: host[0]]
        floats = host[FACTS + room :].view(np.float32)
        return Entries(
            finite=not host[1],
            index=self._places[:found],
            before=torch.cat([before, self._values[room:]]) if self._vectors.numel() else before,
            positions=host[FACTS : FACTS + found].astype(np.int64),
            values=floats[:found],
            vectors=floats[room:],
        )

    def _launch(self, total: Tensor, floors: Tensor) -> None:
        here, count = (self._blocks,), self._elements
        self._facts.zero_()
        _count[here](
            total, self._slice_of, floors, self._counts, self._facts, count, BLOCK, num_warps=WARPS
        )  # fmt: skip
        ends = torch.cumsum(self._counts, 0, dtype=torch.int32)
        _place[here](
            total, self._slice_of, floors, self._counts, ends, self._facts, self._places, self._values,
            self._room, count, BLOCK, num_warps=WARPS,
        )  # fmt: skip
