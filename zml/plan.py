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
NEARLY_ALL = 0.5
WARM_UP = 0.05  # of all exchanges
SPARSE_BUCKET_CHUNKS = 15  # the most whose first parameters, 32 bits each, fit into one message


@dataclass(frozen=True, slots=True)
class Plan:
    compression: Compression
    optimizer_on: Literal["shard", "worker"]
    local_steps: int = 1
    workers: int = 1
    outer_lr: float | None = None  # None: as `gain` finds it
    outer_momentum: float = 0.0
    warm_up_steps: int | None = None  # None: WARM_UP of all exchanges
    decay: float = 1.0  # of the residual, from one exchange to the next
    overlap: bool = False
    damping: bool = False  # pushes say with which versions they were computed
    auto: bool = False  # the density is found by measuring, without a warm-up

    @staticmethod
    def of(spec: JobSpec) -> Plan:
        """Raises ValueError for a `compress` that is none."""
        asked = parse(spec.compress)
        compression = asked.coded
        where = runs_on(spec.optimizer_on, asked, spec.local_steps)
        asynchronous = spec.staleness != 0
        return Plan(
            compression=compression,
            optimizer_on=where,
            local_steps=spec.local_steps,
            workers=spec.workers,
            outer_lr=spec.outer_lr or None,
            outer_momentum=spec.outer_momentum,
            warm_up_steps=None if spec.warm_up_steps < 0 else spec.warm_up_steps,
            decay=spec.residual_decay,
            auto=asked.kind == "auto",
            damping=spec.staleness_damping,
            overlap=asynchronous,
        )

    @property
    def together(self) -> bool:
        """Are all workers' updates of a clock merged into one, and so to be alike?"""
        return not self.overlap

    @property
    def shows_noise(self) -> bool:
        """Do shards see whole gradients of several workers at once?"""
        return self.optimizer_on == "shard" and not self.compression.sparse and not self.overlap

    def masks(self, density: float | None) -> bool:
        """Is the momentum of what leaves to begin anew? Where nearly everything leaves at once nothing is late."""
        return density is not None and density < NEARLY_ALL

    def gain(self, density: float | None, workers: int, *, short: bool) -> float:
        """What the shards multiply a mean update of W workers with, or with a staleness bound each update.

        `short`: the mean moves less than one optimizer would that saw all the gradients, by about sqrt(W), which is
        made good (a norm-preserving merge; README has it with and without). So it is for sparse updates whose momentum
        begins anew each time they leave, and for updates that were normalised one by one, as Adam's are. Updates that
        are applied one by one at their full length go further the more workers there are; with local steps they would
        go too far.
        """
        if self.outer_lr is not None:
            return self.outer_lr
        if self.overlap and self.local_steps == 1:
            return 1.0
        merged = math.sqrt(workers) if short and self.masks(density) else 1.0
        return merged / workers if self.overlap else merged

    def warm_up(self, exchanges: int) -> int:
        """Over how many of all exchanges the density falls."""
        if not self.compression.sparse or self.auto:
            return 0
        if self.warm_up_steps is None:
            return round(WARM_UP * exchanges)
        return math.ceil(self.warm_up_steps / self.local_steps)

    def density(self, exchange: int, warm_up: int) -> float | None:
        """The part of the elements that leaves with a worker's exchange; None for codecs that send all.

        From FIRST_DENSITY to the wanted one geometrically over the warm-up, so that a young model, whose gradients
        still change fast, is not held back by what waits in residuals.
        """
        if not self.compression.sparse:
            return None
        wanted = self.compression.density
        if exchange >= warm_up or wanted >= FIRST_DENSITY:
            return wanted
        return FIRST_DENSITY * math.pow(wanted / FIRST_DENSITY, exchange / warm_up)

    def bucket_chunks(self, wanted: int) -> int:
        """Small frames travel in large buckets."""
        return max(wanted, SPARSE_BUCKET_CHUNKS) if self.compression.sparse else wanted


def runs_on(
    wanted: Literal["auto", "shard", "worker"], compression: Compression, local_steps: int
) -> Literal["shard", "worker"]:
    """Who runs the optimizer."""
    if wanted == "auto":
        return "worker" if compression.sparse or local_steps > 1 else "shard"
    return wanted
