"""What there is while a round is planned: what is free now, what will be, and who has what from now on.

Jobs that run and may go on keep what they have, without nodes that leave and without workers above what they should
have. Rule: `now` is never more than `future`, so that whatever is given of `now` can be had at once.

Against a quota counts what somebody has at this moment, until it is gone, and what he gets in this round: of each job
the more of what it has and what it is to have. So nobody has more than his quota at any moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..ids import JobId
from .placement import Room, add, mend, shrink
from .plan import Allocation, Candidate, Quota, View
from .request import Request
from .resources import NOTHING, NodeId, Resources, Sums

UNBOUNDED = Quota()


class Holding(NamedTuple):
    """What counts against a quota."""

    amount: Resources = NOTHING
    workers: int = 0


class GaveWay(NamedTuple):
    """For whom, and where that one is to be."""

    to: Request
    where: Allocation


class Stock:
    """`wanted`: workers that a job should have; as many as it may have where it is not named."""

    def __init__(self, view: View, order: Sequence[Candidate], wanted: Mapping[JobId, int]) -> None:
        self.quotas = view.quotas
        self.wanted = wanted
        self.has: dict[JobId, Allocation] = {}  # what runs, and should from now on
        self.began: set[JobId] = set()  # those of them that did not run before
        self.gave_way: dict[JobId, GaveWay] = {}  # who gives up workers, or all that he has
        self.releases = 0  # times that somebody lost something: what found no room before may find some
        # Of users with a quota: what they hold, and for each of their jobs what is in that.
        self._holdings: Sums[str] = Sums()
        self._workers = dict(view.held_workers)
        self._counted: dict[JobId, Holding] = {}
        self._had = {job.request.job: job.allocation for job in order if job.allocation is not None}
        for user, amount in view.held.items():
            self._holdings.add(user, amount)
        nodes = [node for node in view.nodes if not node.leaving]
        kept: Sums[NodeId] = Sums()
        going: Sums[NodeId] = Sums()
        for job in order:
            if job.allocation is None:
                continue
            goes_on = job.runnable and not job.draining
            add(kept if goes_on else going, job.allocation, job.request)
            if goes_on:
                self.has[job.request.job] = job.allocation
            self._count(job.request)
        self.empty = Room(nodes)
        self.future = Room(nodes, kept)  # free once all who leave are gone, without what is reserved
        self.now = Room(self.future.nodes(), going)  # free at this moment, without what is reserved
        self._fit(order)
        for job in order:
            if job.request.job in self.has:
                self._reshape(job)
        self.at_start = self.now.copy()

    def _fit(self, order: Sequence[Candidate]) -> None:
        """Some node may offer less than it did: the last in the order lose what they have there."""
        over = {node for node, free in self.future.free.items() if not free.holds(NOTHING)}
        for job in reversed(order):
            if not over:
                break
            name = job.request.job
            if name in self.has and over & self.has[name].nodes:
                self.release(job)
                over = {node for node in over if not self.future.free[node].holds(NOTHING)}

    def _reshape(self, job: Candidate) -> None:
        request, has = job.request, self.has[job.request.job]
        if len(has.shards) != request.shards:
            self.release(job)  # it was asked for anew
            return
        if not self.future.has_all(has):
            mended = None if job.ending else mend(self.now, request, has)
            self.release(job)
            if mended is None:
                return
            self.keep(job, mended)
            self.now.give_all(has, request)
            self.now.take_all(mended, request)
            has = mended
        most = max(request.least, self.most(request))
        if len(has.workers) > most and not job.ending:
            self.release(job)
            self.keep(job, shrink(has, most))

    def most(self, request: Request) -> int:
        return min(request.most, self.wanted.get(request.job, request.most))

    # -- who has what --------------------------------------------------------------------------------------

    def keep(self, job: Candidate, allocation: Allocation) -> None:
        self.has[job.request.job] = allocation
        self.future.take_all(allocation, job.request)
        self._count(job.request)

    def release(self, job: Candidate) -> Allocation:
        allocation = self.has.pop(job.request.job)
        self.future.give_all(allocation, job.request)
        self._count(job.request)
        self.releases += 1
        return allocation

    def begin(self, job: Candidate, allocation: Allocation) -> None:
        self.keep(job, allocation)
        self.now.take_all(allocation, job.request)
        self.began.add(job.request.job)

    def reserve(self, allocation: Allocation, request: Request) -> None:
        """Nobody else gets it; `now` perhaps goes below zero, for nobody else may have the rest of it either."""
        self.future.take_all(allocation, request)
        self.now.take_all(allocation, request)

    def change(self, job: Candidate, has: Allocation, more: Allocation) -> None:
        self.release(job)
        self.keep(job, more)
        self.now.give_all(has, job.request)
        self.now.take_all(more, job.request)

    def _count(self, request: Request) -> None:
        """It is to have something else."""
        user = request.user
        if user not in self.quotas:
            return
        has = self.has.get(request.job)
        before = self._counted.get(request.job, Holding())
        found = self._counted[request.job] = self._holding(request, 0 if has is None else len(has.workers))
        self._holdings.add(user, before.amount, -1)
        self._holdings.add(user, found.amount)
        self._workers[user] = self._workers.get(user, 0) + found.workers - before.workers

    def _holding(self, request: Request, workers: int) -> Holding:
        """What its user has of it, until it has so many workers and then."""
        had = self._had.get(request.job)
        shards = request.shard * request.shards if workers else NOTHING
        found = request.worker * workers + shards
        if had is None:
            return Holding(found, workers)
        return Holding(size(request, had).or_more(found), max(len(had.workers), workers))

    def beyond_quota(self, request: Request, more: int) -> str | None:
        """Why its user may not have so many more workers of this job; None if he may."""
        quota = self.quotas.get(request.user, UNBOUNDED)
        if quota == UNBOUNDED:
            return None
        has = self.has.get(request.job)
        before = self._counted.get(request.job, Holding())
        after = self._holding(request, more if has is None else len(has.workers) + more)
        held = self._holdings[request.user] - before.amount + after.amount
        beyond = exceeded(quota, held, self._workers.get(request.user, 0) - before.workers + after.workers)
        return None if beyond is None else f"with it, {request.user or 'its user'} would hold {beyond}"


def exceeded(quota: Quota, held: Resources, workers: int) -> str | None:
    """What is too much, if somebody holds this; None: nothing."""
    for name, bound, has in (
        ("GPUs", quota.gpus, held.gpus),
        ("CPUs", quota.cpus, held.cpus),
        ("workers", quota.workers, workers),
    ):
        if bound is not None and has > bound:
            return f"{has} {name} of {bound} allowed"
    return None


def size(request: Request, allocation: Allocation) -> Resources:
    return request.worker * len(allocation.workers) + request.shard * len(allocation.shards)
