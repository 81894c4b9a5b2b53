"""Whose turn is it? Priority first, always; then what the policy looks at; then who came first.

Least attained service is Tiresias' discretised 2D-LAS (Gu et al., NSDI 2019): a job's service is its workers times the
seconds it has had them, queues have limits of service, the lower queue goes first and inside a queue it is first come,
first served. Nothing needs to be known of the job, and short ones do not wait behind long ones.

Nobody starves. A job is due when it has waited for `PATIENCE_S`, and for `STARVES` times as long as it has run
(`SATISFIED` times, while it runs, so that it keeps its turn for a while). Those that are due go before all others of
their priority, in the order in which they became due, to the hour. While a job waits that time stands still, and
whoever comes later is due later: what is in front of it then is a finite number of jobs, each of which moves back as
it runs. Only jobs of higher priority can keep it waiting for ever.

Inside a queue users take turns: the next job is one of the user whose jobs before it ask for the least, for his weight.

Only what the view says is looked at, so that the order is the same after a restart of the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby
from typing import TypeAlias

from .plan import Candidate, View
from .request import Request
from .resources import Resources

LIMITS_S = (57_600.0,)
"""Of the queues, in GPU-seconds, as Pollux' authors set them for Tiresias; what is above the last is one queue more."""
PATIENCE_S = 6 * 3_600.0
STARVES = 8.0
SATISFIED = 4.0
TURN_S = 3_600.0

Rank: TypeAlias = tuple[float, ...]
"""The smaller goes first."""
RankOf: TypeAlias = Callable[[Candidate, float], Rank]


def weight(kind: Resources) -> int:
    """What one worker counts for: its GPUs, or 1."""
    return max(1, kind.gpus)


def service_s(job: Candidate) -> float:
    """GPU-seconds, or worker-seconds where there are no GPUs."""
    return job.attained_s * weight(job.request.worker)


def executed_s(job: Candidate) -> float:
    """How long it would have taken to attain its service with as many workers as it needs at least."""
    return job.attained_s / job.request.least


def due(job: Candidate) -> float:
    """When it has waited for too long."""
    executed = executed_s(job)
    factor = STARVES if job.allocation is None else SATISFIED
    return job.request.submitted + executed + max(PATIENCE_S, factor * executed)


def hunger(job: Candidate, now: float) -> float | None:
    """None: it does not starve. Else when it was due, the smaller the sooner: to the hour, so that two who are due do
    not take turns every second."""
    at = due(job)
    return at // TURN_S if now >= at else None


# -- what a policy looks at ------------------------------------------------------------------------------


def first_come(job: Candidate, now: float) -> Rank:
    return ()


def least_served(job: Candidate, now: float) -> Rank:
    """Tiresias' queues, and before them those who starve."""
    hungry = hunger(job, now)
    if hungry is not None:
        return (0.0, hungry)
    served = service_s(job)
    return (1.0, float(sum(served >= limit for limit in LIMITS_S)))


def shortest_left(job: Candidate, now: float) -> Rank:
    """Who would be done first. An oracle where `left_s` comes from one; else what the time limit leaves."""
    hungry = hunger(job, now)
    if hungry is not None:
        return (0.0, hungry)
    return (1.0, job.may_run_s if job.left_s is None else job.left_s)


# -- the order -------------------------------------------------------------------------------------------


def in_order(view: View, rank: RankOf) -> list[Candidate]:
    """All jobs of the view: by priority, then by rank, then users in turn, then who came first."""

    def key(job: Candidate) -> tuple[int, Rank]:
        return -job.request.priority, rank(job, view.now)

    keyed = sorted(((key(job), job) for job in view.jobs), key=lambda pair: (pair[0], *came(pair[1].request)))
    claims: dict[str, float] = {}
    found: list[Candidate] = []
    for _, group in groupby(keyed, key=lambda pair: pair[0]):
        found += take_turns([job for _, job in group], view, claims)
    return found


def came(request: Request) -> tuple[float, str]:
    return request.submitted, request.job


def take_turns(jobs: Sequence[Candidate], view: View, claims: dict[str, float]) -> list[Candidate]:
    """Jobs of equal rank, in the order in which they came, so that users' claims grow evenly for their weights."""
    lines: dict[str, list[Candidate]] = {}
    for job in jobs:
        lines.setdefault(job.request.user, []).append(job)
    if len(lines) == 1:
        found = list(jobs)
    else:
        found = []
        for line in lines.values():
            line.reverse()
        heap = [(claims.get(user, 0.0), *came(line[-1].request), user) for user, line in lines.items()]
        heapify(heap)
        asked = dict(claims)
        while heap:
            *_, user = heappop(heap)
            job = lines[user].pop()
            found.append(job)
            asked[user] = asked.get(user, 0.0) + claim(job, view)
            if lines[user]:
                heappush(heap, (asked[user], *came(lines[user][-1].request), user))
    for job in jobs:
        user = job.request.user
        claims[user] = claims.get(user, 0.0) + claim(job, view)
    return found


def claim(job: Candidate, view: View) -> float:
    share = max(view.shares.get(job.request.user, 1.0), 1e-9)
    return job.request.least * weight(job.request.worker) / share
