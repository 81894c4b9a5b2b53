"""What one shard counts of itself, as `figures.ShardFigures` tells it.

Rule: what comes from the log of a former life, or from the shard whose backup this is, was counted when it came, and is
not counted again. Everything here costs some additions a message.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..figures import APPLY_BOUNDS_S, MOST_WORDS, ShardFigures, count, none_yet
from .pushlog import PushLog

if TYPE_CHECKING:
    from ..layout import Bucket, Layout
    from .shard import Shard

FP32 = 4


@dataclass(slots=True)
class Counts:
    """In the shard's thread."""

    taken: int = 0  # pushes and commits
    duplicates: int = 0
    refused: int = 0
    pulls: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    dense_received_bytes: int = 0
    dense_sent_bytes: int = 0
    apply_s: list[int] = field(default_factory=lambda: none_yet(APPLY_BOUNDS_S))
    apply_sum_s: float = 0.0
    dense: dict[int, int] = field(default_factory=dict)  # bytes of each bucket, whole

    def begin(self, layout: Layout, buckets: dict[int, Bucket]) -> None:
        self.dense.clear()
        for index, bucket in buckets.items():
            self.dense[index] = FP32 * sum(layout.chunks[chunk].size for chunk in bucket.chunks)

    def pushed(self, bucket: int, payload: memoryview | None) -> None:
        self.taken += 1
        self.received_bytes += len(payload or b"")
        self.dense_received_bytes += self.dense[bucket]

    def pulled(self, bucket: int, payload: memoryview) -> None:
        self.pulls += 1
        if payload:
            self.sent_bytes += len(payload)
            self.dense_sent_bytes += self.dense[bucket]

    @contextmanager
    def applying(self) -> Iterator[None]:
        """An update is made."""
        began = time.perf_counter()
        yield
        took_s = time.perf_counter() - began
        self.apply_sum_s += took_s
        count(self.apply_s, APPLY_BOUNDS_S, took_s)


def figures(shard: Shard, memory_bytes: int) -> ShardFigures:
    """Of now; in the shard's thread. `memory_bytes` is what its process takes."""
    counts, store = shard.counts, shard.store
    staged = [step.pushes for steps in shard.staged.values() for step in steps.values()]
    waiting = [step.pushes for steps in shard.committed.values() for step in steps.values()]
    return ShardFigures(
        updates=shard.steps,
        version=max(0, store.newest) if store is not None else 0,
        chunks=len(store.chunks) if store is not None else 0,
        parameter_bytes=sum(counts.dense.values()),
        optimizer_bytes=store.optimizer_bytes if store is not None else 0,
        log_bytes=shard.log.bytes if isinstance(shard.log, PushLog) else 0,
        pushes=counts.taken,
        duplicates=counts.duplicates,
        refused=counts.refused,
        pulls=counts.pulls,
        parked=len(shard.pulls),
        staged=sum(map(len, staged)) + sum(map(len, waiting)),
        received_bytes=counts.received_bytes,
        sent_bytes=counts.sent_bytes,
        dense_received_bytes=counts.dense_received_bytes,
        dense_sent_bytes=counts.dense_sent_bytes,
        apply_s=list(counts.apply_s),
        apply_sum_s=counts.apply_sum_s,
        memory_bytes=memory_bytes,
        no_room=shard.no_room[:MOST_WORDS],
    )
