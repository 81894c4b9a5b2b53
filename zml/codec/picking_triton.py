"""`picking` on CUDA: two kernels and one copy to the host, where torch's operations are launched one by one.

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

from .picking import Entries, Ints, TorchPicker

BLOCK, WARPS = 1024, 4  # of 1,024 to 4,096 elements and 4 or 8 warps, as fast as any
ALIGNED = 16  # words: addresses that Triton is told of are multiples of this, so that it compiles once
FACTS = ALIGNED  # words before the positions; the first two: how many entries, and whether one element is not finite


@triton.jit(do_not_specialize=["elements"])
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


@triton.jit(do_not_specialize=["room", "elements"])
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
        tl.store(facts, end)


class TritonPicker:
    """As `picking.TorchPicker`, to the bit. What it returns is good until it is called again.

    Compiles its kernels when it is made, if no process on this machine has: no step does.
    """

    def __init__(self, slice_of: Tensor, vectors: Tensor) -> None:
        self.device = slice_of.device
        self._slice_of = slice_of
        self._vectors = vectors
        self._elements = slice_of.numel()
        self._blocks = triton.cdiv(self._elements, BLOCK)
        self._slowly = TorchPicker(slice_of, vectors)
        self._counts = torch.empty(self._blocks, dtype=torch.int32, device=self.device)
        self._words, self._host = (torch.empty(0, dtype=torch.int32) for _ in range(2))
        nothing = torch.zeros(self._elements, device=self.device)
        self(nothing, torch.ones(int(slice_of.max()) + 1, device=self.device), np.zeros(1, np.int64))

    def __call__(self, total: Tensor, floors: Tensor, rooms: Ints) -> Entries:
        room, most = int(rooms.sum()), self._vectors.numel()
        first = FACTS + -(-room // ALIGNED) * ALIGNED  # words are facts, positions, values, vectors
        last = first + room
        if last + most > len(self._words):  # the warm-up of a run begins with the most
            self._words = torch.empty(last + most, dtype=torch.int32, device=self.device)
            self._host = torch.empty(last + most, dtype=torch.int32, pin_memory=True)
        words, places = self._words[: last + most], self._words[FACTS:first]
        values = words[first:].view(torch.float32)
        with torch.cuda.device(self.device):
            self._launch(total, floors, words, places, values, room)
        if most:
            torch.index_select(total, 0, self._vectors, out=values[room:])
        host = self._host[: last + most].copy_(words).numpy()  # and waits for it
        found = int(host[0])
        if found > room:
            return self._slowly(total, floors, rooms)
        return Entries(
            finite=not host[1],
            index=places[:found],
            before=torch.cat([values[:found], values[room:]]) if most else values[:found],
            positions=host[FACTS : FACTS + found].astype(np.int64),
            values=host[first : first + found].view(np.float32),
            vectors=host[last:].view(np.float32),
        )

    def _launch(
        self, total: Tensor, floors: Tensor, facts: Tensor, places: Tensor, values: Tensor, room: int
    ) -> None:
        here, count = (self._blocks,), self._elements
        facts[:2].zero_()
        _count[here](total, self._slice_of, floors, self._counts, facts, count, BLOCK, num_warps=WARPS)
        ends = torch.cumsum(self._counts, 0, dtype=torch.int32)
        _place[here](
            total, self._slice_of, floors, self._counts, ends, facts, places, values, room, count, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
