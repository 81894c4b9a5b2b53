"""What is shown of a worker, a shard, a job and a cluster: pure functions from what they count to points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from ..figures import BESIDE, PHASES, ShardFigures, WorkerFigures
from ..scheduler.state import State
from ..status import JobStatus
from . import catalog as c
from .points import Classes, Point

STATES = tuple(state.name for state in State)
IN_ORDER = ("done", "left", "stopped")  # who ended so is missed by nobody


def of_worker(worker: str, told: WorkerFigures, restarts: int) -> Iterator[Point]:
    """`restarts`: how often its agent has started a script again."""
    one = (worker,)
    yield Point(c.STEPS, one, told.steps)
    yield Point(c.SAMPLES, one, told.samples)
    yield Point(c.LEFT_OUT, one, told.left_out)
    yield Point(c.STEP_TIME, one, Classes(told.step_s, told.step_sum_s))
    for phase in (*PHASES, *BESIDE):
        yield Point(c.PHASE, (worker, phase), told.phases.get(phase, 0.0))
    yield Point(c.STALENESS, one, Classes(told.staleness, told.staleness_sum))
    yield Point(c.WORKER_SENT, one, told.sent_bytes)
    yield Point(c.WORKER_RECEIVED, one, told.received_bytes)
    yield Point(c.WORKER_DENSE_SENT, one, told.dense_sent_bytes)
    yield Point(c.WORKER_DENSE_RECEIVED, one, told.dense_received_bytes)
    yield Point(c.RESTARTS, one, restarts)
    if told.learning_rate is not None:
        yield Point(c.LEARNING_RATE, one, told.learning_rate)
    gpu = told.gpu
    if gpu is None:
        return
    for metric, value in (
        (c.GPU_USED, gpu.utilization),
        (c.GPU_MEMORY_USED, gpu.memory_used_bytes),
        (c.GPU_MEMORY, gpu.memory_bytes),
        (c.GPU_POWER, gpu.power_w),
    ):
        if value is not None:
            yield Point(metric, one, value)


def of_shard(shard: str, told: ShardFigures) -> Iterator[Point]:
    one = (shard,)
    yield Point(c.UPDATES, one, told.updates)
    yield Point(c.VERSION, one, told.version)
    yield Point(c.CHUNKS, one, told.chunks)
    yield Point(c.PARAMETERS, one, told.parameter_bytes)
    yield Point(c.OPTIMIZER, one, told.optimizer_bytes)
    yield Point(c.PUSH_LOG, one, told.log_bytes)
    yield Point(c.PUSHES, (shard, "taken"), told.pushes)
    yield Point(c.PUSHES, (shard, "duplicate"), told.duplicates)
    yield Point(c.PUSHES, (shard, "refused"), told.refused)
    yield Point(c.PULLS, one, told.pulls)
    yield Point(c.QUEUE, (shard, "parked"), told.parked)
    yield Point(c.QUEUE, (shard, "staged"), told.staged)
    yield Point(c.APPLY, one, Classes(told.apply_s, told.apply_sum_s))
    yield Point(c.SHARD_SENT, one, told.sent_bytes)
    yield Point(c.SHARD_RECEIVED, one, told.received_bytes)
    yield Point(c.SHARD_DENSE_SENT, one, told.dense_sent_bytes)
    yield Point(c.SHARD_DENSE_RECEIVED, one, told.dense_received_bytes)


def of_job(status: JobStatus) -> Iterator[Point]:
    """Of the whole job, as its coordinator sees it."""
    job = status.job
    one = (job,)
    for state in STATES:
        yield Point(c.STATE, (job, state), float(state == status.state))
    for name, value in status.values.items():
        yield Point(c.VALUE, (job, name), math.nan if value is None else value)
        yield Point(c.FINITE, (job, name), float(value is not None))
    yield Point(c.JOB_STEPS, one, status.steps)
    yield Point(c.JOB_SAMPLES, one, status.samples)
    yield Point(c.JOB_RATE, one, status.samples_per_s)
    if status.progress is not None:
        yield Point(c.PROGRESS, one, status.progress)
    if status.eta_s is not None:
        yield Point(c.ETA, one, status.eta_s)
    yield Point(c.SPREAD, one, status.staleness)
    yield Point(c.BOUND, one, bound(status.mode))
    yield Point(c.RATE_FACTOR, one, status.rate.factor if status.rate is not None else 1.0)
    yield Point(c.BOOTS, one, status.boots)
    yield from of_data(status)
    yield from of_members(status)
    yield from of_checkpoints(status)


def of_data(status: JobStatus) -> Iterator[Point]:
    one, data = (status.job,), status.data
    yield Point(c.EPOCH, one, status.epoch)
    yield Point(c.EPOCH_PROGRESS, one, status.epoch_progress)
    yield Point(c.LEASED, one, data.leased)
    yield Point(c.COMMITTED, one, data.committed)
    yield Point(c.SKIPPED, one, data.skipped)
    yield Point(c.REISSUED, one, data.reissued)


def of_members(status: JobStatus) -> Iterator[Point]:
    job = status.job
    for (role, state), count in Counter((each.role, each.state) for each in status.members).items():
        yield Point(c.MEMBERS, (job, role, state), count)
    yield Point(c.WANTED, (job, "worker"), status.workers)
    yield Point(c.WANTED, (job, "shard"), status.shards)
    for each in status.members:
        if each.heard_s >= 0 and each.state not in IN_ORDER:
            yield Point(c.HEARD, (job, each.role, each.member), each.heard_s)
        yield Point(c.LIVES, (job, each.role, each.member), each.incarnation)


def of_checkpoints(status: JobStatus) -> Iterator[Point]:
    one, newest = (status.job,), status.checkpoint
    if newest.path:
        yield Point(c.CHECKPOINT_AT, one, newest.at)
        yield Point(c.CHECKPOINT_STEP, one, newest.step)
        yield Point(c.CHECKPOINT_SIZE, one, newest.bytes)
        yield Point(c.CHECKPOINT_TIME, (status.job, "held"), newest.held_s)
        yield Point(c.CHECKPOINT_TIME, (status.job, "whole"), newest.took_s)
    yield Point(c.CHECKPOINTS, (status.job, "complete"), newest.taken)
    yield Point(c.CHECKPOINTS, (status.job, "failed"), newest.failed)


def of_cluster(
    jobs: Mapping[str, int], nodes: Mapping[str, int], gpus: tuple[int, int], cpus: tuple[int, int]
) -> Iterator[Point]:
    """Counts by state; of GPUs and processors, how many there are and how many of them are used."""
    for state, count in jobs.items():
        yield Point(c.JOBS, (state,), count)
    for state, count in nodes.items():
        yield Point(c.NODES, (state,), count)
    for metric, (there, used) in ((c.GPUS, gpus), (c.CPUS, cpus)):
        yield Point(metric, ("used",), used)
        yield Point(metric, ("free",), there - used)


def bound(mode: str) -> float:
    """What staleness may be, of a job in this mode (`JobSpec.mode`)."""
    if mode == "async":
        return math.inf
    return float(mode.removeprefix("staleness ")) if mode.startswith("staleness ") else 0.0
