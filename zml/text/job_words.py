"""What is said of a job in a few words. It loads nothing, so that `zml submit` answers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cluster.jobs import JobView

STATES = {
    "QUEUED": "waits",
    "STARTING": "starts",
    "RUNNING": "runs",
    "DRAINING": "leaves its nodes",
    "PAUSED": "is paused",
    "SUCCEEDED": "has succeeded",
    "FAILED": "has failed",
    "CANCELLED": "was cancelled",
    "TIMED_OUT": "ran out of time",
}


def state(name: str) -> str:
    return name.lower().replace("_", " ")


def bounds(job: JobView) -> str:
    return (
        str(job.workers_min)
        if job.workers_min == job.workers_max
        else f"{job.workers_min}..{job.workers_max}"
    )


def wanted(job: JobView) -> str:
    """1..4 workers, 2 shards"""
    workers = "worker" if job.workers_max == 1 else "workers"
    return f"{bounds(job)} {workers}, {job.shards:,} {'shard' if job.shards == 1 else 'shards'}"


def why(job: JobView) -> str:
    """The reason that its state has, in general; may be empty."""
    from ..scheduler.cluster.plan import Why

    return Why[job.why].value if job.why in Why.__members__ else ""


def sentence(job: JobView) -> str:
    """Why it has what it has: the desk's own words where it has some."""
    return job.because or why(job)
