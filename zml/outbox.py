"""One bucket of the step that is being computed: gradients are gathered in it, packed, and sent.

The buffer belongs to the step until its commit is acknowledged; the next step writes into the same warm memory.
"""

from __future__ import annotations

import torch

from .codec import Codec
from .layout import Bucket, Layout


class Outbox:
    """Invariants: `missing` are the parameters whose gradient has not been gathered in this step; `sent` says that
    what was gathered last has left."""

    def __init__(self, bucket: Bucket, layout: Layout, codec: Codec) -> None:
        self.bucket = bucket
        self.codec = codec
        self.chunks = [layout.chunks[chunk] for chunk in bucket.chunks]
        self.missing = set(bucket.parameters)
        self.absent: set[int] = set()
        self.sent = False
        self.clock = -1  # at which it left last
        self.buffer = memoryview(bytearray(sum(codec.bound(chunk) for chunk in self.chunks)))
        self.values: dict[int, torch.Tensor] = {}
        at = 0
        for chunk in self.chunks:
            inside = codec.place(chunk, self.buffer[at:])
            self.values[chunk.index] = torch.zeros(chunk.size) if inside is None else inside
            at += codec.bound(chunk)
        # Error feedback, twice: what a step leaves behind is only true once the step counts.
        wanted = [] if codec.lossless else self.chunks
        self.residual = {chunk.index: torch.zeros(chunk.size) for chunk in wanted}
        self.residual_after = {chunk.index: torch.zeros(chunk.size) for chunk in wanted}

    def set_absent(self, parameter: int, absent: bool) -> None:
        if absent:
            self.absent.add(parameter)
        else:
            self.absent.discard(parameter)

    def pack(self) -> memoryview:
        """Encode what was gathered; the payload of its push. Raises NonFinite, and then nothing was packed."""
        at = 0
        for chunk in self.chunks:
            after = self.residual_after.get(chunk.index)
            if after is not None:
                after.copy_(self.residual[chunk.index])
            at += self.codec.encode(chunk, self.values[chunk.index], after, self.buffer[at:], self.absent)
        self.sent = True
        return self.buffer[:at]

    def next_step(self) -> None:
        """The step counts at the shard."""
        self.residual, self.residual_after = self.residual_after, self.residual
        self.missing = set(self.bucket.parameters)
        self.sent = False
