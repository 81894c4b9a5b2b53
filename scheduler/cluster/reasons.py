"""A plan in words: each verdict is a sentence with the numbers in it."""

from __future__ import annotations

from ..explain import counted
from .placement import Room
from .plan import Allocation, Candidate, Verdict, Why
from .request import Request
from .resources import NOTHING, Resources


def running(job: Candidate, has: Allocation) -> Verdict:
    """It has this from now on."""
    request, count = job.request, len(has.workers)
    if request.least == request.most:
        where = f"{count} worker{'s' * (count != 1)} on {places(has)}"
    else:
        where = f"{count} of {request.least}..{request.most} workers on {places(has)}"
    if job.allocation is None:
        return Verdict(has, Why.STARTS, f"it begins with {where}")
    if has is job.allocation:
        return Verdict(has, Why.RUNS, f"it has {where}")
    before = len(job.allocation.workers)
    if count > before:
        return Verdict(has, Why.GROWS, f"it had {before}, and gets {where}")
    if count < before:
        return Verdict(has, Why.SHRINKS, f"it had {before}, and keeps {where}")
    moved = job.allocation.nodes - has.nodes
    leaves = f", away from {', '.join(sorted(moved))}" if moved else ""
    return Verdict(has, Why.RUNS, f"it has {where}{leaves}")


def not_now(job: Candidate) -> Verdict | None:
    """It has no turn in this round; None if it has. Whoever made the view knows why, and may say so better."""
    if job.draining and job.allocation is not None:
        said = f"it leaves {places(job.allocation)}, and goes on when it is its turn again"
        return Verdict(None, Why.DRAINING, said)
    if job.runnable:
        return None
    if job.request.after and not job.attained_s:
        return Verdict(None, Why.AFTER, f"it comes after {', '.join(job.request.after)}")
    if job.allocation is None and job.attained_s and job.request.retries:
        return Verdict(None, Why.BACKING_OFF, "it failed, and is tried again after a while")
    return Verdict(None, Why.PAUSED, "it is not to run now")


def named(request: Request, beside: Request) -> str:
    """j14 (priority 5), where that makes a difference to the other."""
    priority = f" (priority {request.priority})" if request.priority != beside.priority else ""
    return f"{request.job}{priority}"


def wants(request: Request) -> str:
    """4 workers with 1 GPU each."""
    plural = request.least != 1
    each = f" with {request.worker}{' each' * plural}" if request.worker != NOTHING else ""
    return f"{request.least} worker{'s' * plural}{each}"


def too_big(request: Request, room: Room) -> str:
    """Not even if nobody else were there: which of it is too much, where one process alone is."""
    many = len(room.free)
    if not many:
        return "no node is here"
    offers = room.free.values()
    most = Resources(
        cpus=max(each.cpus for each in offers),
        gpus=max(each.gpus for each in offers),
        memory_mb=max(each.memory_mb for each in offers),
    )
    for what, kind in (("worker", request.worker), ("shard", request.shard)):
        if not room.counts(kind).total:
            return f"no node has {kind} for one {what}; the most that any of {many} offers is {most}"
    here = "the 1 node that is here, even if it were empty"
    if many != 1:
        here = f"the {many} nodes that are here, even if they were empty"
    return f"{do_not_fit(request)} on {here}"


def do_not_fit(request: Request) -> str:
    """1 worker with 4 CPUs does not fit."""
    if request.shard == NOTHING:
        return f"{wants(request)} {'does' if request.least == 1 else 'do'} not fit"
    each = " each" * (request.shards != 1)
    return f"{wants(request)} and {counted(request.shards, 'shard')} with {request.shard}{each} do not fit"


def places(allocation: Allocation) -> str:
    nodes = allocation.workers or allocation.shards
    if len(nodes) == 1:
        return nodes[0]
    names = sorted(set(nodes))
    return f"{len(names)} nodes" if len(names) > 4 else ", ".join(names)
