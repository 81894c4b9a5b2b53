"""A job as Prometheus sees it, and what goes wrong with it: series for promtool, one dictionary each.

Healthy is a job of four workers and two shards, in sight of Prometheus for half an hour; a situation changes some of
its series from some moment on. Time is counted in scrapes, two a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from zml.figures import PHASES
from zml.metrics import catalog as c
from zml.metrics.catalog import Metric

EVERY_S = 30
LONG = 30 * 60 // EVERY_S  # scrapes
Values = Callable[[int], float | None]  # of a scrape, counted from 0; None: there is no sample
WORKERS = ("w0", "w1", "w2", "w3")
SHARDS = ("p0", "p1")
SHARE = dict(zip(PHASES, (0.1, 0.5, 0.05, 0.3, 0.05), strict=True))  # of a worker's second


def series(name: str, /, **labels: str) -> str:
    """As promtool and Prometheus write one."""
    inside = ", ".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inside}}}"


def steady(value: float) -> Values:
    return lambda _at: value


def nothing(_at: int) -> None:
    """No sample."""


def growing(per_s: float, from_: float = 0.0) -> Values:
    """A counter."""
    return lambda at: from_ + per_s * EVERY_S * at


def then(at: int, before: Values, after: Values) -> Values:
    """Another course from one scrape on."""
    return lambda now: before(now) if now < at else after(now)


def stops(at: int, course: Values) -> Values:
    """It keeps the value that it has."""
    return lambda now: course(min(now, at))


def gone(at: int, course: Values) -> Values:
    return lambda now: course(now) if now < at else None


def target(role: str, member: str, job_id: str = "mnist") -> dict[str, str]:
    """What the scrape adds to the series of a process."""
    return {
        "job": "zml",
        "instance": f"{member}:9000",
        "job_id": job_id,
        "role": role,
        "member": member,
        "node": f"gpu0{member[1]}" if role == "worker" else "head",
    }


@dataclass(slots=True)
class Job:
    """All that there is to see of one."""

    job_id: str = "mnist"
    all: dict[str, Values] = field(default_factory=dict)

    def put(
        self, metric: Metric | str, values: Values, role: str, member: str, suffix: str = "", **labels: str
    ) -> Job:
        name = metric if isinstance(metric, str) else metric.name
        self.all[series(name + suffix, **target(role, member, self.job_id), **labels)] = values
        return self

    def of_job(self, metric: Metric, values: Values, **labels: str) -> Job:
        return self.put(metric, values, "coordinator", "coordinator", **labels)

    def of_worker(self, metric: Metric, values: Values, worker: str, **labels: str) -> Job:
        return self.put(metric, values, "worker", worker, worker=worker, **labels)

    def of_shard(self, metric: Metric, values: Values, shard: str, **labels: str) -> Job:
        return self.put(metric, values, "shard", shard, shard=shard, **labels)

    def phases(self, worker: str, **seconds: float) -> None:
        """Where each second of a worker goes."""
        for phase, share in {**SHARE, **seconds}.items():
            self.of_worker(c.PHASE, growing(share), worker, phase=phase)

    def lag(self, role: str, member: str, late: float) -> None:
        """Ten wakes a second, a share of which are between a tenth and a quarter of a second late."""
        for bound in (*c.LAG.bounds, float("inf")):
            share = 1.0 if bound > 0.1 else 1.0 - late
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            self.put(c.LAG, growing(10 * share), role, member, "_bucket", le=le)

    def members(self, role: str, here: int, lost: int, wanted: int) -> None:
        self.of_job(c.MEMBERS, steady(here), member_role=role, state="active")
        self.of_job(c.MEMBERS, steady(lost), member_role=role, state="lost")
        self.of_job(c.WANTED, steady(wanted), member_role=role)

    def everywhere(self, change: Callable[[str, Values], Values]) -> None:
        self.all = {name: change(name, values) for name, values in self.all.items()}

    def input(self) -> list[dict[str, str]]:
        """For promtool."""
        return [
            {"series": name, "values": " ".join(number(values(at)) for at in range(LONG + 1))}
            for name, values in self.all.items()
        ]


def number(value: float | None) -> str:
    if value is None:
        return "_"
    return {float("inf"): "+Inf", float("-inf"): "-Inf"}.get(value, f"{value:.6f}".rstrip("0").rstrip("."))


def healthy(job_id: str = "mnist") -> Job:
    job = Job(job_id)
    for state in ("FORMING", "RUNNING", "DRAINING", "FINISHING", "SUCCEEDED", "FAILED", "CANCELLED"):
        job.of_job(c.STATE, steady(float(state == "RUNNING")), state=state)
    job.of_job(c.JOB_STEPS, growing(1))
    job.of_job(c.SPREAD, steady(1))
    job.of_job(c.BOUND, steady(4))
    job.of_job(c.FINITE, steady(1), name="loss")
    job.of_job(c.REISSUED, steady(2))
    job.of_job(c.BOOTS, steady(1))
    job.of_job(c.CHECKPOINT_AT, lambda at: at * EVERY_S // 300 * 300)  # every five minutes
    for result, values in (("taken", growing(1 / 300)), ("failed", steady(0))):
        job.of_job(c.CHECKPOINTS, values, result=result)
    job.members("worker", len(WORKERS), 0, len(WORKERS))
    job.members("shard", len(SHARDS), 0, len(SHARDS))
    for role, names in (("worker", WORKERS), ("shard", SHARDS)):
        for member in names:
            job.of_job(c.HEARD, steady(0.1), member_role=role, id=member)
            job.of_job(c.LIVES, steady(1), member_role=role, id=member)
    for role, member in [
        ("coordinator", "coordinator"),
        *(("worker", w) for w in WORKERS),
        *(("shard", s) for s in SHARDS),
    ]:
        job.put("up", steady(1), role, member)
        job.lag(role, member, late=0.001)
        job.put(c.LINES, growing(0.1), role, member, level="info")
        job.put(c.LINES, steady(1), role, member, level="error")
        job.put(c.DISK, steady(1e12), role, member)
        job.put(c.DISK_FREE, growing(-1e6, from_=5e11), role, member)
    for worker in WORKERS:
        job.of_worker(c.STEPS, growing(1), worker)
        job.of_worker(c.LEFT_OUT, steady(1), worker)
        job.phases(worker)
    for shard in SHARDS:
        job.of_shard(c.CHUNKS, steady(8), shard)
        job.of_shard(c.SHARD_SENT, growing(4e6), shard)
        job.of_shard(c.SHARD_RECEIVED, growing(4e6), shard)
    return job


def freeze(job: Job, at: int) -> None:
    """Nothing trains any more, while everybody answers."""
    still = tuple(metric.name for metric in (c.JOB_STEPS, c.STEPS, c.PHASE, c.SHARD_SENT, c.SHARD_RECEIVED))
    job.everywhere(lambda name, values: stops(at, values) if name.startswith(still) else values)
