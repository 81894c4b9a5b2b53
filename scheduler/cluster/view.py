"""From the state to what a policy is shown, and from its plan to decisions. Plain functions that change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Set
from dataclasses import replace

from ..explain import counted
from ..ids import JobId
from .events import Decision, Grew, Preempted, Shrank, Started
from .placement import Room, seat
from .plan import Allocation, Candidate, Plan, Profile, Quota, Verdict, View
from .request import Request
from .resources import NOTHING, NodeId, Resources, Sums
from .state import Attempt, Cluster, Job, Standing, number_of, shard_names

NOBODY: Set[NodeId] = frozenset()
CHANGE_S = 2.0  # workers come and go beside those that train


def view_of(
    cluster: Cluster,
    now: float,
    quotas: Mapping[str, Quota],
    shares: Mapping[str, float],
    profiles: Mapping[JobId, Profile],
    *,
    of_nodes: bool = False,
) -> View:
    """The picture at this moment. What is on its way out, of jobs that go on, is not on offer. `of_nodes`: how many are
    needed is asked, and not who gets what: all jobs that nobody has told to go need what they have, also those about
    which nothing is decided, for they lack a shard or come to their end."""
    leaving: Sums[NodeId] = Sums()
    held: Sums[str] = Sums()
    held_workers: Counter[str] = Counter()
    candidates = []
    for job in cluster.jobs.values():
        attempt = job.attempt
        draining, allocation = False, None
        if attempt is not None:
            stays = of_nodes and attempt.is_to_go_on
            draining = attempt.on_its_way_out and not stays
            hidden = not draining and not stays and job.is_short
            for name, slot in attempt.slots.items():
                if hidden or (slot.leaving and not draining):
                    leaving.add(slot.node, job.takes(name))
                    held.add(job.request.user, job.takes(name))
                    held_workers[job.request.user] += name[0] == "w"
            if hidden:
                continue
            allocation = attempt.allocation(all_of_it=draining)
        candidates.append(
            Candidate(
                request=job.request,
                allocation=allocation,
                since=job.since,
                attained_s=job.attained(now),
                ran_s=job.ran(now),
                changes=job.changes,
                runnable=attempt is not None or is_runnable(cluster, job, now),
                draining=draining,
                ending=attempt is not None and attempt.finishing and not draining,
                profile=profiles.get(job.id),
            )
        )
    nodes = tuple(
        replace(present.node, offers=present.node.offers - leaving[name]) if name in leaving else present.node
        for name, present in cluster.nodes.items()
    )
    return View(
        now=now,
        nodes=nodes,
        jobs=tuple(candidates),
        quotas=quotas,
        shares=shares,
        held=held.all(),
        held_workers=held_workers,
        change_s=CHANGE_S,
    )


def is_runnable(cluster: Cluster, job: Job, now: float) -> bool:
    return not job.paused and job.not_before <= now and not waits_for(cluster, job)


def waits_for(cluster: Cluster, job: Job) -> list[JobId]:
    """The jobs that it comes after and that are not over."""
    return [name for name in job.request.after if name in cluster.jobs]


def view_of_new(
    cluster: Cluster,
    fresh: Iterable[JobId],
    now: float,
    quotas: Mapping[str, Quota],
    unheard: Set[NodeId] = NOBODY,
) -> View | None:
    """The picture for jobs that have just come, where nobody else waits and nobody is on his way out: they may have
    what is free, and nobody is delayed by it. None where all have to be looked at: also for a job that could have one
    number of workers or another, or whose user may not have all; what it should have depends on the others."""
    new = {}
    for name in fresh:
        job = cluster.jobs.get(name)
        if job is not None and job.attempt is None and is_runnable(cluster, job, now):
            if job.request.least != job.request.most or job.request.user in quotas:
                return None
            new[name] = Candidate(request=job.request, since=job.since)
    for name in cluster.restless - new.keys():
        job = cluster.jobs[name]
        if job.attempt is not None or is_runnable(cluster, job, now):
            return None
    needs = {need for each in new.values() for need in _needs(each.request)}
    nodes = tuple(
        replace(cluster.nodes[name].node, offers=free)
        for name, free in (cluster.free() if new else {}).items()
        # Of thousands of full ones none has to be looked at again.
        if name not in unheard and any(free.holds(need) for need in needs)
    )
    return View(now=now, nodes=nodes, jobs=tuple(new.values()))


def _needs(request: Request) -> Iterator[Resources]:
    """What a node has to have room for, to be of use. A shard that takes nothing finds a place beside a worker, unless
    others of its job must not be there."""
    yield request.worker
    if request.shard != NOTHING or request.replicas:
        yield request.shard


def replacements(cluster: Cluster, unheard: Set[NodeId] = NOBODY) -> Iterator[Decision]:
    """A shard whose node is gone begins again where there is room: it reads its push log there, if it sees that."""
    short = [
        job
        for name, job in cluster.jobs.items()
        if name in cluster.restless and job.is_short and job.attempt is not None and job.attempt.needs_shards
    ]
    if not short:
        return
    free = cluster.free()
    room = Room(
        replace(present.node, offers=free[name])
        for name, present in cluster.nodes.items()
        if not present.node.leaving and name not in unheard
    )
    for job in short:
        attempt = job.attempt
        assert attempt is not None
        names = shard_names(job.request.shards)
        here = [attempt.slots[name].node if name in attempt.slots else None for name in names]
        found = seat(room, job.request, here, beside=attempt.allocation().workers)
        slots = {
            name: node
            for name, before, node in zip(names, here, found, strict=True)
            if before is None and node is not None
        }
        if slots:
            where = ", ".join(f"{slot} on {node}" for slot, node in slots.items())
            yield Grew(job.id, attempt.number, slots, f"its node is gone: {where}")


def differences(
    cluster: Cluster, plan: Plan, but: Container[JobId], unheard: Set[NodeId] = NOBODY
) -> Iterator[Decision]:
    """What has to be decided for the plan to come true, `but` for these jobs. What has to leave first is not waited for
    here: a job for which there is no room yet gets its turn in the next round."""
    free = {
        node: free
        for node, free in cluster.free().items()
        if not cluster.nodes[node].node.leaving and node not in unheard
    }
    for name, verdict in plan.verdicts.items():
        job = cluster.jobs.get(name)
        if job is None or name in but:
            continue
        attempt, wanted = job.attempt, verdict.allocation
        if attempt is None:
            if wanted is not None and (decision := _start(job, wanted, verdict, free)) is not None:
                yield decision
        elif job.standing is Standing.DRAINING or job.is_short:
            continue
        elif wanted is None:
            yield Preempted(name, attempt.number, verdict.because)
        else:
            yield from _resize(job, attempt, wanted, verdict, free)


def _start(job: Job, wanted: Allocation, verdict: Verdict, free: dict[NodeId, Resources]) -> Started | None:
    needs = {node: wanted.on(node, job.request) for node in wanted.nodes}
    if not all(node in free and free[node].holds(need) for node, need in needs.items()):
        return None
    for node, need in needs.items():
        free[node] = free[node] - need
    slots = {f"p{number}": node for number, node in enumerate(wanted.shards)}
    slots |= {f"w{number}": node for number, node in enumerate(wanted.workers)}
    return Started(job.id, job.attempts + 1, slots, verdict.because)


def _resize(
    job: Job, attempt: Attempt, wanted: Allocation, verdict: Verdict, free: dict[NodeId, Resources]
) -> Iterator[Decision]:
    """More workers where the plan has more, fewer where it has fewer; the newest of a node go first."""
    if attempt.began is None:
        return  # they have not all come yet
    workers = attempt.allocation().workers
    if workers == wanted.workers:
        return
    has, should = Counter(workers), Counter(wanted.workers)
    if surplus := has - should:
        leave = []
        for slot in sorted(attempt.workers(), key=number_of, reverse=True):
            node = attempt.slots[slot].node
            if surplus[node] > 0:
                surplus[node] -= 1
                leave.append(slot)
        if len(leave) < len(attempt.workers()):  # one goes on
            because = verdict.because or f"it is to have {counted(len(wanted.workers), 'worker')}"
            yield Shrank(job.id, attempt.number, leave, because)
    more: dict[str, NodeId] = {}
    number = attempt.next_worker
    for node in (should - has).elements():
        if node in free and free[node].holds(job.request.worker):
            free[node] = free[node] - job.request.worker
            more[f"w{number}"] = node
            number += 1
    if more:
        yield Grew(job.id, attempt.number, more, verdict.because)
