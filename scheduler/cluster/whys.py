"""Why does a job stand where it stands? One answer for each job that is not over, from the state and the latest plan.

Rule: what the state itself says goes before the plan, which is older; a job that does not run always has a reason.
Where more nodes may come, what a job has no room for is looked at again: on all that there can be.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..explain import counted
from ..ids import JobId
from .plan import Verdict, Why
from .reach import Fleet
from .reasons import places
from .state import Attempt, Cluster, Job
from .view import waits_for

OF_A_PLAN = (Why.NO_ROOM, Why.BEHIND, Why.TOO_BIG, Why.QUOTA, Why.PREEMPTED)
"""Why a job that could begin does not: the others are known from the state, or are not true any more."""


def why(
    cluster: Cluster,
    job: Job,
    verdicts: Mapping[JobId, Verdict],
    now: float,
    last: str = "",
    fleet: Fleet | None = None,
) -> tuple[Why, str]:
    """`last`: how its latest attempt ended. `fleet`: where nodes come and go."""
    verdict = verdicts.get(job.id)
    if job.attempt is not None:
        return why_it_runs(job, job.attempt, verdict)
    if job.paused:
        return Why.PAUSED, job.paused
    if waits := waits_for(cluster, job):
        return Why.AFTER, f"it comes after {', '.join(waits)}"
    if job.not_before > now:
        ended = f": {last}" if last else ""
        return Why.BACKING_OFF, f"it is tried again in {job.not_before - now:.0f} s{ended}"
    if not cluster.nodes:
        return with_fleet(job, Why.NO_ROOM, "no node is here", fleet)
    if verdict is not None and verdict.why in OF_A_PLAN:
        return with_fleet(job, verdict.why, verdict.because, fleet)
    return Why.UNDECIDED, "the next round decides"


def with_fleet(job: Job, why: Why, because: str, fleet: Fleet | None) -> tuple[Why, str]:
    """Nodes that are here are not all that there can be."""
    if fleet is None or why not in (Why.NO_ROOM, Why.TOO_BIG):
        return why, because
    if fleet.reach.nodes_for(job.request) is None:
        return Why.TOO_BIG, fleet.reach.why_not(job.request)
    return Why.NO_ROOM, f"{because}; {fleet}"


def why_it_runs(job: Job, attempt: Attempt, verdict: Verdict | None) -> tuple[Why, str]:
    """It has nodes, and perhaps is on its way out of them."""
    if attempt.leaving is not None:
        return Why.DRAINING, f"{attempt.leaving.because}; then {attempt.leaving.then.value}"
    if attempt.on_its_way_out:
        return Why.DRAINING, attempt.because or "its scripts come to their end"
    if job.is_short:
        return Why.NO_ROOM, "a shard's node is gone, and no other has room for it"
    where = attempt.allocation()
    if attempt.began is None:
        return Why.STARTS, f"it begins on {places(where)}, and not everybody has come"
    if verdict is not None and verdict.allocation == where:
        return verdict.why, verdict.because
    return Why.RUNS, f"it has {counted(len(where.workers), 'worker')} on {places(where)}"
