"""A round: whoever's turn it is gets all it needs at least, or nothing (gang); then what is left over is shared out.

Jobs are taken in the policy's order. Each that has something keeps it. One that has nothing is placed

1. in what is free; else
2. in what is coming free, because others are leaving it: it waits for that, and nobody else gets it; else
3. in what others would have to give up: workers above their least (anybody's, the last in the order first), then whole
   jobs that come later in the order and are preemptible, again the last first. They are drained, it waits for that.

Nothing is ever given to anybody that somebody else still has: a plan can be carried out at once, and the next round,
when those who leave are gone, gives the rest.

Backfill: where none of this makes room, the job is passed over and those behind it may have what it cannot use. They
never delay it. Whatever is preemptible is drained again once the job in front could begin, so that it costs that one no
more than one drain. What is not preemptible begins behind a job that was passed over only if its time limit ends before
that one can begin (as far as the limits of those who run tell), or in what that one leaves over then (EASY backfill,
Lifka 1995).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

from ..ids import JobId
from .order import executed_s
from .placement import Room, extend, mend, pack, place, shrink
from .plan import Allocation, Candidate, Plan, Quota, Verdict, View, Why
from .request import Request
from .resources import NOTHING, Resources

Worth: TypeAlias = Callable[[Candidate, Allocation, Allocation], bool]
"""Is the second allocation worth changing the first for?"""

UNBOUNDED = Quota()


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a policy wants its order carried out."""

    wanted: Mapping[JobId, int] = field(default_factory=dict)
    """Workers that a job should have; as many as it may have where it is not named."""
    preempts: bool = True
    backfills: bool = True
    grows: Sequence[JobId] | None = None
    """Who gets more workers first; None: the order of the jobs."""
    worth: Worth | None = None


def carry_out(view: View, order: Sequence[Candidate], terms: Terms | None = None) -> Plan:
    return Round(view, order, terms or Terms()).plan()


class Round:
    """The state of one round; it is thrown away afterwards."""

    def __init__(self, view: View, order: Sequence[Candidate], terms: Terms) -> None:
        self.view = view
        self.order = order
        self.terms = terms
        nodes = [node for node in view.nodes if not node.leaving]
        self.empty = Room(nodes)
        self.future = Room(nodes)  # free once all who leave are gone, without what is reserved
        self.now = Room(nodes)  # free at this moment, without what is reserved; never more than `future`
        self.has: dict[JobId, Allocation] = {}  # what runs, and should from now on
        self.verdicts: dict[JobId, Verdict] = {}
        self.began: set[JobId] = set()
        self.holdings: dict[str, Resources] = dict(view.held)  # by user
        self.workers: dict[str, int] = {}
        self.too_big: dict[tuple[object, ...], bool] = {}
        self.fitted: dict[
            tuple[object, ...], bool
        ] = {}  # kinds of request that would have begun, had none gone first
        self.hopeless: set[tuple[object, ...]] = (
            set()
        )  # kinds of request that found no room since the last release
        self.head: Candidate | None = None  # the first that was passed over
        self.shadow_s = inf  # when the head can begin, as far as is known
        self.spare: Room | None = None  # what it leaves over then

    def plan(self) -> Plan:
        self.take_stock()
        self.at_start = self.now.copy()
        self.behind = NOTHING  # what could still be taken from jobs that come later
        for job in self.order:
            if job.request.job in self.has and job.request.preemptible:
                self.behind = self.behind + size(job.request, self.has[job.request.job])
        for job in self.order:
            if job.request.job in self.has:
                if job.request.preemptible:
                    self.behind = self.behind - size(job.request, self.has[job.request.job])
            elif job.request.job not in self.verdicts:
                self.turn(job)
        self.grow()
        for job in self.order:
            if job.request.job not in self.verdicts:
                self.verdicts[job.request.job] = self.running(job)
        return Plan(self.verdicts)

    # -- what there is -------------------------------------------------------------------------------------

    def take_stock(self) -> None:
        """Who has what, without nodes that leave and without workers above what the job should have."""
        for job in self.order:
            if job.allocation is None:
                if not job.runnable:
                    self.verdicts[job.request.job] = held_back(job)
                continue
            self.now.take_all(job.allocation, job.request)
            if job.draining:
                said = f"it leaves {places(job.allocation)}, and goes on when it is its turn again"
                self.verdicts[job.request.job] = Verdict(None, Why.DRAINING, said)
            elif not job.runnable:
                self.verdicts[job.request.job] = held_back(job)
            else:
                self.keep(job, job.allocation)
        over = {node for node, free in self.future.free.items() if not free.holds(NOTHING)}
        for job in reversed(self.order):
            if not over:
                break
            name = job.request.job
            if name in self.has and over & self.has[name].nodes:
                self.release(job)  # the node offers less than it did
                over = {node for node in over if not self.future.free[node].holds(NOTHING)}
        for job in self.order:
            if job.request.job in self.has:
                self.reshape(job)

    def reshape(self, job: Candidate) -> None:
        request, has = job.request, self.has[job.request.job]
        if len(has.shards) != request.shards:
            self.release(job)  # it was asked for anew
            return
        if not has.nodes <= self.future.free.keys():
            mended = mend(self.now, request, has)
            self.release(job)
            if mended is None:
                return
            self.keep(job, mended)
            self.now.give_all(has, request)
            self.now.take_all(mended, request)
            has = mended
        most = min(request.most, max(request.least, self.terms.wanted.get(request.job, request.most)))
        if len(has.workers) > most:
            self.release(job)
            self.keep(job, shrink(has, most))

    def keep(self, job: Candidate, allocation: Allocation) -> None:
        self.has[job.request.job] = allocation
        self.future.take_all(allocation, job.request)
        self.count(job.request, allocation, 1)

    def release(self, job: Candidate) -> Allocation:
        allocation = self.has.pop(job.request.job)
        self.future.give_all(allocation, job.request)
        self.count(job.request, allocation, -1)
        self.hopeless.clear()
        return allocation

    def count(self, request: Request, allocation: Allocation, sign: int) -> None:
        self.holdings[request.user] = (
            self.holdings.get(request.user, NOTHING) + size(request, allocation) * sign
        )
        self.workers[request.user] = self.workers.get(request.user, 0) + len(allocation.workers) * sign

    # -- one job's turn ------------------------------------------------------------------------------------

    def turn(self, job: Candidate) -> None:
        request = job.request
        if self.is_too_big(request):
            said = (
                f"{wants(request)} do not fit on the {len(self.empty.free)} nodes that are here, even if they "
                "were empty"
            )
            self.verdicts[request.job] = Verdict(None, Why.TOO_BIG, said)
            return
        if (beyond := self.beyond_quota(request, request.least)) is not None:
            self.verdicts[request.job] = Verdict(None, Why.QUOTA, beyond)
            return
        if self.head is not None and not self.terms.backfills:
            said = f"{self.head.request.job} is before it and cannot begin yet"
            self.wait(job, Why.BEHIND, said)
            return
        kind = kind_of(request)
        if kind not in self.hopeless:
            found = place(self.now, request, request.least)
            fits = found is not None
            if found is not None and not self.in_time(job):
                found = self.beside_head(request)
            if found is not None:
                self.start(job, found)
                return
            if self.reserve(job):
                return
            if not fits:
                self.hopeless.add(kind)
        self.pass_over(job)

    def start(self, job: Candidate, allocation: Allocation) -> None:
        self.keep(job, allocation)
        self.now.take_all(allocation, job.request)
        if self.spare is not None and not job.request.preemptible:
            self.spare.take_all(allocation, job.request)
        self.began.add(job.request.job)

    def in_time(self, job: Candidate) -> bool:
        """If it begins now, is it out of the way of the job that was passed over when that can begin?"""
        if self.head is None or job.request.preemptible:
            return True
        limit = job.request.time_limit_s
        return limit is not None and self.view.now + limit - executed_s(job) <= self.shadow_s

    def beside_head(self, request: Request) -> Allocation | None:
        """Room that is free now and that the job that was passed over will not need."""
        return None if self.spare is None else place(self.now.and_in(self.spare), request, request.least)

    def reserve(self, job: Candidate) -> bool:
        """Room that is coming free, or is made free by draining others. Nobody else gets it."""
        request = job.request
        if self.head is not None and not request.preemptible:
            return False  # it would hold what the head may need, and for how long is not known
        found = place(self.future, request, request.least)
        waits_for = "for those who leave it"
        if found is None and self.terms.preempts:
            found = self.make_room(job)
            waits_for = "for those who give it up"
        if found is None:
            return False
        self.future.take_all(found, request)
        self.now.take_all(found, request)  # perhaps below zero: nobody else may have the rest of it
        self.wait(job, Why.NO_ROOM, f"{wants(request)} will be free on {places(found)}: it waits {waits_for}")
        return True

    def make_room(self, job: Candidate) -> Allocation | None:
        """Take workers above the least, then whole jobs that come later, until it fits; what proves not to be needed
        is given back."""
        request = job.request
        surplus = NOTHING
        for other in self.order:
            if other.request.job in self.has:
                more = len(self.has[other.request.job].workers) - other.request.least
                surplus = surplus + other.request.worker * max(0, more)
        needs = request.worker * request.least + request.shard * request.shards
        if not (self.future.total + surplus + self.behind).holds(needs):
            return None
        hopeless = set(self.hopeless)
        gone: list[tuple[Candidate, Allocation]] = []
        found = None
        for other in reversed(self.order):
            has = self.has.get(other.request.job)
            if has is None or len(has.workers) <= other.request.least or other.request.job in self.began:
                continue
            gone.append((other, self.release(other)))
            self.keep(other, shrink(has, other.request.least))
            found = self.try_place(request)
            if found is not None:
                break
        if found is None:
            for other in reversed(self.order):
                if other is job:
                    break
                if other.request.job not in self.has or not other.request.preemptible:
                    continue
                gone.append((other, self.release(other)))
                found = self.try_place(request)
                if found is not None:
                    break
        self.give_back(gone, found, request)
        if found is None:
            self.hopeless = hopeless
        return found

    def try_place(self, request: Request) -> Allocation | None:
        if self.future.counts(request.worker).total < request.least:
            return None
        return place(self.future, request, request.least)

    def give_back(
        self, gone: list[tuple[Candidate, Allocation]], found: Allocation | None, request: Request
    ) -> None:
        if found is not None:
            self.future.take_all(found, request)
        for other, had in reversed(gone):
            left = self.release(other) if other.request.job in self.has else None
            if self.future.holds(had, other.request):
                self.keep(other, had)
            elif left is not None:
                self.keep(other, left)
            else:
                self.behind = self.behind - size(other.request, had)
        if found is not None:
            self.future.give_all(found, request)

    def pass_over(self, job: Candidate) -> None:
        request = job.request
        free = self.at_start
        kind = kind_of(request)
        if kind not in self.fitted:
            self.fitted[kind] = place(free, request, request.least) is not None
        if self.fitted[kind]:
            front = f", {self.head.request.job} the first of them" if self.head is not None else ""
            self.wait(job, Why.BEHIND, f"{wants(request)} are free, but others go first{front}")
        else:
            able = free.counts(request.worker).total
            said = f"it needs {wants(request)} at once; there is room for {able} of its workers"
            if able >= request.least:
                said = f"it needs {wants(request)} at once, and there is no room for its shards beside its workers"
            self.wait(job, Why.NO_ROOM, said)
        if self.head is None:
            self.head = job
            self.foresee(job)

    def foresee(self, head: Candidate) -> None:
        """When can the head begin, at the latest, and what is left over then? Known only from time limits. Those who
        are preemptible and come later than the head are out of its way."""
        room = self.future.copy()
        ends: list[tuple[float, Candidate]] = []
        passed = False
        for job in self.order:
            passed = passed or job is head
            if job.request.job not in self.has:
                continue
            if passed and job.request.preemptible:
                room.give_all(self.has[job.request.job], job.request)
            elif job.request.time_limit_s is not None:
                ends.append((self.view.now + job.request.time_limit_s - executed_s(job), job))
        for at, job in sorted(ends, key=lambda item: item[0]):
            room.give_all(self.has[job.request.job], job.request)
            found = place(room, head.request, head.request.least)
            if found is not None:
                room.take_all(found, head.request)
                self.shadow_s, self.spare = at, room
                return

    def wait(self, job: Candidate, why: Why, because: str) -> None:
        if job.allocation is not None:
            why, because = Why.PREEMPTED, f"others go first: {because}"
        self.verdicts[job.request.job] = Verdict(None, why, because)

    # -- what is left over ---------------------------------------------------------------------------------

    def grow(self) -> None:
        byname = {job.request.job: job for job in self.order}
        names = self.terms.grows if self.terms.grows is not None else list(byname)
        for name in names:
            has = self.has.get(name)
            if has is None:
                continue
            job = byname[name]
            request = job.request
            most = min(request.most, self.terms.wanted.get(name, request.most))
            able = min(most - len(has.workers), self.now.counts(request.worker).total)
            while able > 0 and self.beyond_quota(request, able) is not None:
                able -= 1
            more = self.best_of(job, has, len(has.workers) + max(able, 0))
            if more is None:
                continue
            self.release(job)
            self.keep(job, more)
            self.now.give_all(has, request)
            self.now.take_all(more, request)

    def best_of(self, job: Candidate, has: Allocation, workers: int) -> Allocation | None:
        """The job with so many workers: beside those it has, or all of them packed anew where that takes fewer nodes
        and the policy knows what that is worth. None: as it is."""
        request, worth = job.request, self.terms.worth
        found = extend(self.now, request, has, workers) if workers > len(has.workers) else None
        if worth is not None and len(set((found or has).workers)) > self.fewest(request, workers):
            only = Allocation(has.workers, ())
            self.now.give_all(only, request)
            packed = pack(self.now, request.worker, workers)
            self.now.take_all(only, request)
            if packed is not None and len(set(packed)) < len(set((found or has).workers)):
                found = Allocation(packed, has.shards)
        if found is None or worth is None or request.job in self.began or worth(job, has, found):
            return found
        return None

    def fewest(self, request: Request, workers: int) -> int:
        """Nodes for so many workers, if they had the largest ones to themselves."""
        per_node = max(self.empty.counts(request.worker).on.values(), default=1)
        return -(-workers // max(per_node, 1))

    def running(self, job: Candidate) -> Verdict:
        has = self.has[job.request.job]
        count, many = (
            len(has.workers),
            f"{len(has.workers)} of {job.request.least}..{job.request.most} workers",
        )
        if job.request.least == job.request.most:
            many = f"{count} worker{'s' * (count != 1)}"
        where = f"{many} on {places(has)}"
        if job.allocation is None:
            return Verdict(has, Why.STARTS, f"it begins with {where}")
        before = len(job.allocation.workers)
        if count > before:
            return Verdict(has, Why.GROWS, f"it had {before}, and gets {where}")
        if count < before:
            return Verdict(has, Why.SHRINKS, f"it had {before}, and keeps {where}")
        moved = (set(job.allocation.nodes) - has.nodes) or None
        leaves = f", away from {', '.join(sorted(moved))}" if moved else ""
        return Verdict(has, Why.RUNS, f"it has {where}{leaves}")

    # -- questions -----------------------------------------------------------------------------------------

    def is_too_big(self, request: Request) -> bool:
        kind = kind_of(request)
        if kind not in self.too_big:
            self.too_big[kind] = place(self.empty, request, request.least) is None
        return self.too_big[kind]

    def beyond_quota(self, request: Request, more: int) -> str | None:
        """Why its user may not have so many more workers of this job; None if he may."""
        quota = self.view.quotas.get(request.user, UNBOUNDED)
        held = self.holdings.get(request.user, NOTHING) + request.worker * more
        if request.job not in self.has:
            held = held + request.shard * request.shards
        workers = self.workers.get(request.user, 0) + more
        for name, bound, would in (
            ("GPUs", quota.gpus, held.gpus),
            ("CPUs", quota.cpus, held.cpus),
            ("workers", quota.workers, workers),
        ):
            if bound is not None and would > bound:
                return f"with it, {request.user or 'its user'} would hold {would} {name} of {bound} allowed"
        return None


def kind_of(request: Request) -> tuple[object, ...]:
    """Requests of one kind find room together or not at all."""
    return (
        request.worker,
        request.least,
        request.shard,
        request.shards,
        request.replicas,
        request.preemptible,
    )


def size(request: Request, allocation: Allocation) -> Resources:
    return request.worker * len(allocation.workers) + request.shard * len(allocation.shards)


def held_back(job: Candidate) -> Verdict:
    """Whoever made the view knows which of these it is, and may say so better."""
    if job.request.after and not job.attained_s:
        return Verdict(None, Why.AFTER, f"it comes after {', '.join(job.request.after)}")
    if job.allocation is None and job.attained_s and job.request.retries:
        return Verdict(None, Why.BACKING_OFF, "it failed, and is tried again after a while")
    return Verdict(None, Why.PAUSED, "it is not to run now")


def wants(request: Request) -> str:
    """4 workers with 1 GPU each."""
    plural = request.least != 1
    each = f" with {request.worker}{' each' * plural}" if request.worker != NOTHING else ""
    return f"{request.least} worker{'s' * plural}{each}"


def places(allocation: Allocation) -> str:
    nodes = sorted(set(allocation.workers or allocation.shards))
    if len(nodes) > 4:
        return f"{len(nodes)} nodes"
    return ", ".join(nodes)
