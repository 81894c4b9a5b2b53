"""Jobs and nodes of a cluster as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from ..cluster.jobs import JobView, NodeView
from ..text.ansi import printable
from ..text.console import duration, names
from ..text.job_views import gigabytes
from ..text.job_words import bounds, sentence, state
from ..web.bodies import ENDS
from .known import numbered
from .table import Column

STYLES = {
    "QUEUED": "dim",
    "RUNNING": "green",
    "SUCCEEDED": "green",
    "FAILED": "bold red",
    "TIMED_OUT": "bold red",
    "CANCELLED": "yellow",
    "PAUSED": "yellow",
}
# As people look for them: what runs, what is about to, what waits, what is over.
ORDER = ("RUNNING", "DRAINING", "STARTING", "PAUSED", "QUEUED")


def lasted(job: JobView, now: float) -> float:
    """Seconds that it has run, or has waited."""
    return max(0.0, (job.ended_at or now) - (job.began_at or job.submitted_at))


def _has(job: JobView, _width: int) -> str:
    return f"{job.workers} of {bounds(job)}" if job.state not in ENDS else bounds(job)


def columns(now: float) -> list[Column[JobView]]:
    return [
        Column("state", 9, 2, lambda r, w: Text(state(r.state), style=STYLES.get(r.state, "")),
               lambda r: (f"{ORDER.index(r.state):02}" if r.state in ORDER else r.state, *numbered(r.id)[1:])),
        Column("job", 6, 0, lambda r, w: r.id, lambda r: numbered(r.id)),
        Column("name", 10, 3, lambda r, w: r.name, lambda r: r.name, most=24),
        Column("user", 7, 4, lambda r, w: r.user, lambda r: r.user),
        Column("workers", 9, 1, _has, lambda r: r.workers, right=True),
        Column("time", 7, 5, lambda r, w: duration(lasted(r, now)), lambda r: lasted(r, now), right=True),
        Column("nodes", 16, 8, lambda r, w: names(list(r.nodes), 3)),
        Column("because", 14, 6, lambda r, w: Text(printable(sentence(r)), style="dim"), most=90),
    ]  # fmt: skip


NODES: list[Column[NodeView]] = [
    Column("node", 12, 0, lambda r, w: r.id, lambda r: numbered(r.id), most=24),
    Column("state", 8, 1, lambda r, w: state(r.state), lambda r: r.state),
    Column("gpus", 9, 2, lambda r, w: f"{r.gpus_free}/{r.gpus}", lambda r: r.gpus_free, right=True,
           title="gpus free"),
    Column("cpus", 9, 3, lambda r, w: f"{r.cpus_free}/{r.cpus}", lambda r: r.cpus_free, right=True,
           title="cpus free"),
    Column("memory", 11, 4, lambda r, w: f"{gigabytes(r.memory_mb_free)}/{gigabytes(r.memory_mb)}",
           lambda r: r.memory_mb_free, right=True, title="GB free"),
    Column("heard", 6, 6, lambda r, w: duration(r.heard_s), lambda r: r.heard_s, right=True),
    Column("rack", 8, 7, lambda r, w: r.rack, lambda r: r.rack),
    Column("jobs", 12, 5, lambda r, w: names(list(r.jobs), 6), most=80),
]  # fmt: skip


def kept_jobs(jobs: Sequence[JobView], needle: str) -> list[JobView]:
    return [job for job in jobs if needle.lower() in
            " ".join((job.id, job.name, job.user, state(job.state), *job.nodes, sentence(job))).lower()]  # fmt: skip


def kept_nodes(nodes: Sequence[NodeView], needle: str) -> list[NodeView]:
    return [node for node in nodes if needle.lower() in
            " ".join((node.id, node.rack, state(node.state), *node.jobs)).lower()]  # fmt: skip


def summary(jobs: Sequence[JobView], nodes: Sequence[NodeView]) -> str:
    """12 jobs: 3 running, 9 queued · 4 nodes, 3 of 8 GPUs free"""
    counts: dict[str, int] = {}
    for job in sorted(jobs, key=lambda each: ORDER.index(each.state) if each.state in ORDER else len(ORDER)):
        counts[state(job.state)] = counts.get(state(job.state), 0) + 1
    many = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    gpus = f", {sum(n.gpus_free for n in nodes)} of {sum(n.gpus for n in nodes)} GPUs free"
    cpus = f", {sum(n.cpus_free for n in nodes)} of {sum(n.cpus for n in nodes)} CPUs free"
    free = gpus if any(n.gpus for n in nodes) else cpus
    machines = f"{len(nodes):,} node{'' if len(nodes) == 1 else 's'}{free if nodes else ''}"
    return f"{len(jobs):,} job{'' if len(jobs) == 1 else 's'}{f': {many}' if many else ''} · {machines}"
