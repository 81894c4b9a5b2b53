"""How a job's gradients travel, settled: codec, density, who runs the optimizer, local steps, overlap.

Everything follows from the JobSpec that all members have, so that workers and shards agree without a word. It imports
no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .compression import Compression, parse
from .messages import JobSpec

FIRST_DENSITY = 0.25  # of the warm-up; Lin et al., "Deep Gradient Compression", ICLR 2018, section 3.3
SPARSE_BUCKET_CHUNKS = 15  # the most whose first parameters, 32 bits each, fit into one message


@dataclass(frozen=True, slots=True)
class Plan:
    compression: Compression
    optimizer_on: Literal["shard", "worker"]
    local_steps: int = 1
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    warm_up_steps: int = 0
    decay: float = 1.0  # of the residual, from one exchange to the next
    overlap: bool = False
    masking: bool = True  # momentum factor masking, where momentum is on the worker

    @staticmethod
    def of(spec: JobSpec) -> Plan:
        """Raises ValueError for a `compress` that is none."""
        compression = parse(spec.compress)
        sparse = compression.sparse
        local = spec.local_steps > 1
        where = spec.optimizer_on
        if where == "auto":
            where = "worker" if sparse or local else "shard"
        asynchronous = spec.staleness != 0
        return Plan(
            compression=compression,
            optimizer_on=where,
            local_steps=spec.local_steps,
            # Pushes that are applied one by one, each at its full length, would go further the more workers there are.
            outer_lr=spec.outer_lr / (spec.workers if local and asynchronous else 1),
            outer_momentum=spec.outer_momentum,
            warm_up_steps=spec.warm_up_steps if sparse else 0,
            overlap=asynchronous,
        )

    def density(self, clock: int) -> float | None:
        """The part of the elements that leaves at a clock; None for codecs that send all.

        From FIRST_DENSITY to the wanted one geometrically over the warm-up, so that a young model, whose gradients
        still change fast, is not held back by what waits in residuals.
        """
        if not self.compression.sparse:
            return None
        wanted = self.compression.density
        if clock >= self.warm_up_steps or wanted >= FIRST_DENSITY:
            return wanted
        return FIRST_DENSITY * math.pow(wanted / FIRST_DENSITY, clock / self.warm_up_steps)

    def bucket_chunks(self, wanted: int) -> int:
        """Small frames travel in large buckets."""
        return max(wanted, SPARSE_BUCKET_CHUNKS) if self.compression.sparse else wanted
