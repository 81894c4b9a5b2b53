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
    workers: int = 1
    outer_lr: float | None = None  # None: as `gain` finds it
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
            workers=spec.workers,
            outer_lr=spec.outer_lr or None,
            outer_momentum=spec.outer_momentum,
            warm_up_steps=spec.warm_up_steps if sparse else 0,
            overlap=asynchronous,
        )

    def gain(self, normalised: bool) -> float:
        """What the shards multiply a mean update, or with a staleness bound each update, with, unless told.

        The mean of W updates of one length and independent noise is shorter by up to sqrt(W): for optimizers that
        normalise their updates this is made good (a norm-preserving merge). Updates that are applied one by one at
        their full length go further the more workers there are; with local steps they would go too far.
        """
        if self.outer_lr is not None:
            return self.outer_lr
        if self.overlap:
            return 1.0 / self.workers if self.local_steps > 1 else 1.0
        return (
            math.sqrt(self.workers)
            if normalised and self.local_steps == 1 and self.compression.sparse
            else 1.0
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
