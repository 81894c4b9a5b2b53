"""What a simulated run comes to: completion times, machine-hours, fairness, and how long the scheduler thought.

Allocated machine-hours are those of the GPUs that jobs held, provisioned ones those of all nodes that were there until
the last job ended: the difference is what stood idle and was paid for. Fairness is Themis' finish-time fairness (NSDI
2020): rho = the job's completion time / what it would have been alone on an equal share of the cluster, its share
being one of the mean number of jobs that were there beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO

from .engine import Simulation


@dataclass(frozen=True, slots=True)
class Ended:
    """One job's fate; times in seconds since the workload began. `ended` is None where the run was cut off."""

    job: str
    application: str
    submitted: float
    began: float | None
    ended: float | None
    worker_s: float
    restarts: int
    rho: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One workload under one policy."""

    workload: str
    policy: str
    seed: int
    nodes: int
    jobs: list[Ended]
    unfinished: int
    mean_s: float
    median_s: float
    p99_s: float
    makespan_s: float
    utilization: float
    allocated_h: float
    provisioned_h: float
    rho_median: float
    rho_worst: float
    unfair: float
    """Share of jobs with rho > 1."""
    restarts: float
    """Per job."""
    round_p50_s: float
    round_p99_s: float
    round_max_s: float
    fleet: list[tuple[float, int, float]]
    """When, nodes, machines' worth of GPUs held."""


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def sum_up(simulation: Simulation, workload: str, policy: str, seed: int, nodes: int) -> Outcome:
    gpus = simulation.rules.gpus_per_node
    most = max((count for _, count, _ in simulation.tally.nodes), default=nodes)
    ended = []
    for job in simulation.jobs:
        rho = None
        if job.ended is not None:
            spent = job.ended - job.request.submitted
            rounds = simulation.rules.round_s
            beside = max(1.0, job.beside / max(rounds, spent + rounds / 2))
            share = max(1.0, gpus * most / beside)
            alone = job.work.alone_s() * max(1.0, job.work.asked / share)
            rho = spent / alone if alone > 0 else math.nan
        ended.append(
            Ended(
                job.request.job,
                job.application,
                job.request.submitted,
                job.began,
                job.ended,
                job.attained_s,
                job.changes,
                rho,
            )
        )
    times = [job.ended - job.submitted for job in ended if job.ended is not None]
    rhos = [job.rho for job in ended if job.rho is not None]
    tally = simulation.tally
    return Outcome(
        workload=workload,
        policy=policy,
        seed=seed,
        nodes=most,
        jobs=ended,
        unfinished=len(ended) - len(times),
        mean_s=mean(times),
        median_s=percentile(times, 0.5),
        p99_s=percentile(times, 0.99),
        makespan_s=max((job.ended for job in ended if job.ended is not None), default=math.nan),
        utilization=tally.allocated_s / tally.provisioned_s if tally.provisioned_s else math.nan,
        allocated_h=tally.allocated_s / 3600,
        provisioned_h=tally.provisioned_s / 3600,
        rho_median=percentile(rhos, 0.5),
        rho_worst=max(rhos, default=math.nan),
        unfair=mean([float(rho > 1) for rho in rhos]),
        restarts=mean([float(job.restarts) for job in ended]),
        round_p50_s=percentile(tally.rounds_s, 0.5),
        round_p99_s=percentile(tally.rounds_s, 0.99),
        round_max_s=max(tally.rounds_s, default=math.nan),
        fleet=tally.nodes,
    )


COLUMNS = (
    ("policy", "policy"),
    ("workload", "workload"),
    ("nodes", "nodes"),
    ("mean_s", "mean s"),
    ("median_s", "median"),
    ("p99_s", "p99"),
    ("makespan_s", "makespan"),
    ("utilization", "used"),
    ("allocated_h", "alloc. h"),
    ("provisioned_h", "prov. h"),
    ("rho_median", "rho"),
    ("rho_worst", "worst"),
    ("restarts", "restarts"),
    ("round_p50_s", "round p50"),
    ("round_p99_s", "p99 ms"),
    ("round_max_s", "max"),
)
MEANS = [name for name, _ in COLUMNS[3:]]


def cell(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if name == "utilization":
        return f"{value:.0%}"
    if name.startswith("round_"):
        return f"{value * 1000:.1f}"
    if name in ("rho_median", "rho_worst", "restarts"):
        return f"{value:.2f}"
    return f"{value:,.0f}"


def averages(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The mean over workloads of each number, and the most of those that are a most."""
    found: dict[str, object] = {
        "policy": outcomes[0].policy,
        "workload": f"mean of {len(outcomes)}",
        "nodes": max(outcome.nodes for outcome in outcomes),
    }
    for name in MEANS:
        values = [float(getattr(outcome, name)) for outcome in outcomes]
        found[name] = max(values) if name in ("round_max_s", "rho_worst") else mean(values)
    return found


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A head, a line for each run, and for each policy with several a line of means."""
    lines = [[title for _, title in COLUMNS]]
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.policy == policy]
        lines += [[cell(name, getattr(outcome, name)) for name, _ in COLUMNS] for outcome in own]
        if len(own) > 1:
            means = averages(own)
            lines.append([cell(name, means[name]) for name, _ in COLUMNS])
    return lines


def text(outcomes: Sequence[Outcome]) -> str:
    lines = table(outcomes)
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_json(outcomes: Sequence[Outcome], given: dict[str, object], file: IO[str]) -> None:
    """Everything, with what was given, so that the file says by itself what it is. NaN becomes null."""

    def plain(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    json.dump(
        plain({"given": given, "runs": [asdict(outcome) for outcome in outcomes]}),
        file,
        indent=1,
        allow_nan=False,
    )
    file.write("\n")
