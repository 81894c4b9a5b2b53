"""A job that does not exist, with figures as a real one tells them: what is watched in tests."""

from __future__ import annotations

from typing import Any

import msgspec

from zml.figures import (
    APPLY_BOUNDS_S,
    STALENESS_BOUNDS,
    STEP_BOUNDS_S,
    GpuFigures,
    ShardFigures,
    WorkerFigures,
    count,
    none_yet,
)
from zml.status import CheckpointStatus, DataStatus, EventLine, JobStatus, MemberStatus

NOON = 1_700_000_000.0
BATCH = 64


def of_worker(steps: int, own: dict[str, float], step_s: float, **more: Any) -> WorkerFigures:
    """After `steps` steps: `own` is its part of each by phase, and it waits for the rest of `step_s`."""
    spent = {**own, "wait": max(0.0, step_s - sum(own.values()))}
    classes, late = none_yet(STEP_BOUNDS_S), none_yet(STALENESS_BOUNDS)
    for _ in range(steps):
        count(classes, STEP_BOUNDS_S, step_s)
        count(late, STALENESS_BOUNDS, 1)
    usual: dict[str, Any] = {
        "steps": steps,
        "samples": steps * BATCH,
        "phases": {
            **{name: seconds * steps for name, seconds in spent.items()},
            "push": 0.01 * steps,
            "pull": 0.004 * steps,
        },
        "step_s": classes,
        "step_sum_s": steps * step_s,
        "staleness": late,
        "staleness_sum": steps,
        "sent_bytes": steps * 10_000,
        "received_bytes": steps * 20_000,
        "dense_sent_bytes": steps * 1_000_000,
        "dense_received_bytes": steps * 1_000_000,
        "learning_rate": 0.01,
        "memory_bytes": 512_000_000,
    }
    return WorkerFigures(**(usual | more))


def of_shard(updates: int, workers: int = 4) -> ShardFigures:
    classes = none_yet(APPLY_BOUNDS_S)
    for _ in range(updates):
        count(classes, APPLY_BOUNDS_S, 0.002)
    return ShardFigures(
        updates=updates,
        version=updates,
        chunks=12,
        parameter_bytes=3_000_000,
        optimizer_bytes=6_000_000,
        log_bytes=1_000_000,
        pushes=updates * workers,
        pulls=updates * workers,
        parked=1,
        staged=2,
        received_bytes=updates * 20_000,
        sent_bytes=updates * 40_000,
        dense_received_bytes=updates * 2_000_000,
        dense_sent_bytes=updates * 2_000_000,
        apply_s=classes,
        apply_sum_s=updates * 0.002,
        memory_bytes=300_000_000,
    )


USUAL = {"data": 0.002, "compute": 0.060, "encode": 0.004, "apply": 0.006}
STEP_S = 0.2


def job(
    seconds: float = 60.0,
    workers: int = 4,
    shards: int = 2,
    odd: dict[str, dict[str, float]] | None = None,
    **changes: Any,
) -> JobStatus:
    """The job after so many seconds. `odd` has what workers spend otherwise than the usual one, by phase."""
    steps = int(seconds / STEP_S)
    members = [
        MemberStatus(
            member=f"w{index}",
            role="worker",
            state="active",
            node=f"gpu{index // 8:02}",
            device=f"cuda:{index % 8}",
            steps=steps,
            samples=steps * BATCH,
            heard_s=0.1,
            pid=1000 + index,
            epoch=0,
            staleness=index % 2,
            figures=of_worker(
                steps,
                {**USUAL, **(odd or {}).get(f"w{index}", {})},
                STEP_S,
                gpu=GpuFigures(utilization=0.9, memory_used_bytes=8_000_000_000, memory_bytes=80_000_000_000),
            ),
        )
        for index in range(workers)
    ]
    members += [
        MemberStatus(
            member=f"p{index}",
            role="shard",
            state="active",
            node="cpu01",
            heard_s=0.2,
            shard=of_shard(steps, workers),
        )
        for index in range(shards)
    ]
    usual = JobStatus(
        job="job",
        state="RUNNING",
        script="examples/train.py",
        mode="staleness 4",
        workers=workers,
        shards=shards,
        epochs=5,
        epoch=1,
        epoch_progress=0.25,
        steps=steps,
        values={"loss": 4.0 - seconds / 100, "accuracy": seconds / 200},
        samples=steps * BATCH * workers,
        samples_per_s=BATCH * workers / STEP_S,
        staleness=1,
        eta_s=70.0,
        started_at=NOON,
        at=NOON + seconds,
        members=members,
        data=DataStatus(batches=640, batch_size=BATCH, committed=160, leased=4, reissued=2),
        checkpoint=CheckpointStatus(path="checkpoints/1", step=200, at=NOON + seconds - 20),
        events=[
            EventLine(at=NOON + 1, what="joined", member="w0"),
            EventLine(at=NOON + 2, what="generation 1: 4 workers", because="all are here"),
        ],
        run_dir="/runs/one",
    )
    return msgspec.structs.replace(usual, **changes)
