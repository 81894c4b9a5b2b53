"""The pages of workers and shards, out of a status and the rows of members.jsonl. Pure: no file, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from ..figures import PHASES, ShardFigures, WorkerFigures
from ..status import JobStatus, since_the_first
from ..stragglers import ratio, stragglers, usual_of_others
from .findings import imbalance
from .rates import Lately, Trim, WorkerRate, middle, shard_rate, worker_rate
from .thinning import rounded
from .views import ShardLine, Shards, WorkerLine, Workers, tone_of

POINTS = 120  # of a curve here; there is one for each worker
MOST_POINTS = 6000  # of all of them
FEWEST = 40
MOST_MEMBERS = 512
NONE_YET, NO_SHARD = WorkerFigures(), ShardFigures()


def against(usual: Mapping[str, float], worker: str, busy_s: float) -> float | None:
    """Its work against the usual of the others, as findings tell it; None where there is nothing to measure against."""
    if worker not in usual or not (usual[worker] or busy_s):
        return None
    return ratio(busy_s, usual[worker])


def workers(status: JobStatus, lately: Lately, rows: Sequence[Trim]) -> Workers:
    slow = stragglers(lately.phases)
    usual = usual_of_others({name: rate.busy_s for name, rate in lately.workers.items()})
    lines = []
    for each in since_the_first(status).of("worker")[:MOST_MEMBERS]:
        figures, rate = each.figures or NONE_YET, lately.workers.get(each.member)
        gpu = figures.gpu
        lines.append(
            WorkerLine(
                member=each.member,
                state=each.state,
                tone=tone_of(each.state) if each.member not in slow else slow[each.member].level,
                because=each.because,
                node=each.node,
                device=each.device,
                incarnation=each.incarnation,
                steps=each.steps,
                samples=each.samples,
                staleness=each.staleness,
                heard_s=round(each.heard_s, 1),
                step_s=rounded(rate.step_s) if rate else None,
                busy_s=rounded(rate.busy_s) if rate else None,
                ratio=rounded(against(usual, each.member, rate.busy_s), 3) if rate else None,
                straggler=each.member in slow,
                why_slow=slow[each.member].phase if each.member in slow else "",
                phases=short(rate.phases) if rate else {},
                beside=short(rate.beside) if rate else {},
                samples_per_s=rounded(rate.samples_per_s, 4) if rate else None,
                sent_bytes=figures.sent_bytes,
                received_bytes=figures.received_bytes,
                dense_bytes=figures.dense_sent_bytes + figures.dense_received_bytes,
                left_out=figures.left_out,
                memory_bytes=figures.memory_bytes,
                learning_rate=figures.learning_rate,
                gpu_utilization=gpu.utilization if gpu else None,
                gpu_memory_used=gpu.memory_used_bytes if gpu else None,
                gpu_memory=gpu.memory_bytes if gpu else None,
                gpu_power_w=gpu.power_w if gpu else None,
            )
        )
    points = max(FEWEST, min(POINTS, MOST_POINTS // max(1, len(lines))))
    stretches = evenly(rows, points)
    rates = [rates_between(before, after) for before, after in stretches]
    return Workers(
        window_s=round(lately.window_s, 1),
        whole=lately.whole,
        workers=lines,
        median_step_s=rounded(middle([rate.step_s for rate in lately.workers.values()])),
        median_busy_s=rounded(middle([rate.busy_s for rate in lately.workers.values()])),
        at=[round(after.at, 1) for _, after in stretches],
        step_s={
            line.member: [
                rounded(one[line.member].step_s, 4) if line.member in one else None for one in rates
            ]
            for line in lines
        },
        phases={
            phase: [
                rounded(fmean(r.phases[phase] for r in one.values()), 4) if one else None for one in rates
            ]
            for phase in PHASES
        },
    )


def short(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: rounded(value) or 0.0 for phase, value in seconds.items()}


def rates_between(before: Trim, after: Trim) -> dict[str, WorkerRate]:
    return {
        name: rate
        for name, figures in after.workers.items()
        if (rate := worker_rate(before.workers.get(name), figures, after.at - before.at)) is not None
    }


def evenly(rows: Sequence[Trim], most: int) -> list[tuple[Trim, Trim]]:
    """Neighbouring rows, of which there are at most so many, spread over the run; the newest is one. Figures are
    cumulative: what lies between two of them is exact."""
    count = len(rows)
    if count < 2:
        return []
    kept = sorted(
        {round(place * (count - 1) / min(most, count - 1)) for place in range(min(most, count - 1) + 1)}
    )
    return [(rows[before], rows[after]) for before, after in pairwise(kept)]


def shards(status: JobStatus, lately: Lately, rows: Sequence[Trim]) -> Shards:
    lines = []
    for each in status.of("shard")[:MOST_MEMBERS]:
        figures, rate = each.shard or NO_SHARD, lately.shards.get(each.member)
        lines.append(
            ShardLine(
                member=each.member,
                state=each.state,
                tone=tone_of(each.state),
                because=each.because,
                node=each.node,
                incarnation=each.incarnation,
                heard_s=round(each.heard_s, 1),
                version=figures.version,
                updates=figures.updates,
                updates_per_s=rounded(rate.updates_per_s, 4) if rate and rate.seconds else None,
                apply_s=rounded(rate.apply_s, 4) if rate else None,
                chunks=figures.chunks,
                parameter_bytes=figures.parameter_bytes,
                optimizer_bytes=figures.optimizer_bytes,
                log_bytes=figures.log_bytes,
                memory_bytes=figures.memory_bytes,
                pushes=figures.pushes,
                duplicates=figures.duplicates,
                refused=figures.refused,
                pulls=figures.pulls,
                parked=figures.parked,
                staged=figures.staged,
                received_bytes=figures.received_bytes,
                sent_bytes=figures.sent_bytes,
                dense_received_bytes=figures.dense_received_bytes,
                dense_sent_bytes=figures.dense_sent_bytes,
            )
        )
    told = {line.member: line.parameter_bytes for line in lines if line.parameter_bytes}
    stretches = evenly(rows, POINTS)
    rates = [
        [
            shard_rate(before.shards.get(name), figures, after.at - before.at)
            for name, figures in after.shards.items()
        ]
        for before, after in stretches
    ]
    return Shards(
        window_s=round(lately.window_s, 1),
        whole=lately.whole,
        shards=lines,
        imbalance=rounded(imbalance(told)[0], 3) if told else None,
        at=[round(after.at, 1) for _, after in stretches],
        received_per_s=[rounded(sum(r.received_per_s for r in one)) if one else None for one in rates],
        sent_per_s=[rounded(sum(r.sent_per_s for r in one)) if one else None for one in rates],
        queue=[float(sum(r.queue for r in one)) if one else None for one in rates],
    )
