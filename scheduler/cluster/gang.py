"""A round: whoever's turn it is gets all it needs at least, or nothing (gang); then what is left over is shared out.

Jobs are taken in the policy's order. Each that has something keeps it (`stock`). One that has nothing is placed

1. in what is free; else
2. in what is coming free, because others are leaving it: it waits for that, and nobody else gets it; else
3. in what others would have to give up (`drains`). They are drained, it waits for that.

Nothing is ever given to anybody that somebody else still has: a plan can be carried out at once, and the next round,
when those who leave are gone, gives the rest.

Backfill: where none of this makes room, the job is passed over and those behind it may have what it cannot use. They
never delay it. Whatever is preemptible is drained again once the job in front could begin, so that it costs that one no
more than one drain. What is not preemptible begins behind a job that was passed over only if its time limit ends before
that one can begin (as far as the limits of those who run tell), or in what that one leaves over then (EASY backfill,
Lifka 1995). Where they do not tell, nothing ends in time, and only what would be of no use to that one is left over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from ..explain import listed
from ..ids import JobId
from .drains import make_room
from .growing import Worth, grow
from .placement import Room, place
from .plan import Allocation, Candidate, Plan, Verdict, View, Why
from .reasons import named, not_now, places, running, too_big, wants
from .request import Kind, Request, kind_of
from .resources import NOTHING, total
from .stock import Stock


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
    """The turns of one round; it is thrown away afterwards."""

    def __init__(self, view: View, order: Sequence[Candidate], terms: Terms) -> None:
        self.view = view
        self.order = order
        self.terms = terms
        self.stock = Stock(view, order, terms.wanted)
        self.leaving = [(job, job.allocation) for job in order if job.draining and job.allocation is not None]
        self.verdicts: dict[JobId, Verdict] = {}
        self.too_big: dict[Kind, bool] = {}
        self.fitted: dict[Kind, bool] = {}  # would have begun, had none gone first
        self.hopeless: dict[Kind, int] = {}  # found no room after so many releases
        self.none_beside: dict[Kind, int] = {}  # the same, beside the head
        self.holders: dict[Kind, str] = {}  # who has what requests of this kind wait for
        self.first: Candidate | None = None  # the first that took something, or waits
        self.head: Candidate | None = None  # the first that was passed over
        self.shadow_s = -inf  # when the head can begin, if that is known: it may be at any time
        self.spare: Room | None = None  # what it leaves over then

    def plan(self) -> Plan:
        for job in self.order:
            if (verdict := not_now(job)) is not None:
                self.verdicts[job.request.job] = verdict
            elif job.request.job not in self.stock.has:
                self.turn(job)
        jobs = {job.request.job: job for job in self.order}
        grow(self.stock, jobs, self.terms.grows if self.terms.grows is not None else jobs, self.terms.worth)
        for name, job in jobs.items():
            if name not in self.verdicts:
                self.verdicts[name] = running(job, self.stock.has[name])
        return Plan(self.verdicts)

    # -- one job's turn ------------------------------------------------------------------------------------

    def turn(self, job: Candidate) -> None:
        request, stock = job.request, self.stock
        kind = kind_of(request)
        if job.ending:
            self.wait(job, Why.NO_ROOM, "what it had is not there any more")
            return
        if self.is_too_big(request, kind):
            self.verdicts[request.job] = Verdict(None, Why.TOO_BIG, too_big(request, stock.empty))
            return
        if (beyond := stock.beyond_quota(request, request.least)) is not None:
            self.verdicts[request.job] = Verdict(None, Why.QUOTA, beyond)
            return
        if self.head is not None and not self.terms.backfills:
            said = f"{self.head.request.job} is before it and cannot begin yet"
            self.wait(job, Why.BEHIND, said)
            return
        if self.hopeless.get(kind) != stock.releases:
            found = place(stock.now, request, request.least)
            fits = found is not None
            if found is not None and not self.in_time(job):
                found = self.beside_head(request, kind)
            if found is not None:
                self.start(job, found)
                return
            if self.reserve(job):
                return
            if not fits:
                self.hopeless[kind] = stock.releases
        self.pass_over(job, kind)

    def start(self, job: Candidate, allocation: Allocation) -> None:
        self.stock.begin(job, allocation)
        self.first = self.first or job
        if self.spare is not None and not job.request.preemptible:
            self.spare.take_all(allocation, job.request)

    def in_time(self, job: Candidate) -> bool:
        """If it begins now, is it out of the way of the job that was passed over when that can begin?"""
        if self.head is None or job.request.preemptible:
            return True
        return self.view.now + job.may_run_s <= self.shadow_s

    def beside_head(self, request: Request, kind: Kind) -> Allocation | None:
        """Room that is free now and that the job that was passed over will not need."""
        if self.spare is None or self.none_beside.get(kind) == self.stock.releases:
            return None
        found = place(self.stock.now.and_in(self.spare), request, request.least)
        if found is None:  # nor for any other of this kind: both only become less
            self.none_beside[kind] = self.stock.releases
        return found

    def reserve(self, job: Candidate) -> bool:
        """Room that is coming free, or is made free by draining others. Nobody else gets it."""
        request = job.request
        if self.head is not None and not request.preemptible:
            return False  # it would hold what the head may need, and for how long is not known
        found = place(self.stock.future, request, request.least)
        if found is None and self.terms.preempts:
            found = make_room(self.stock, self.order, job)
        if found is None:
            return False
        self.stock.reserve(found, request)
        self.first = self.first or job
        whom = [each.request.job for each, had in self.leaving if had.nodes & found.nodes]
        whom += [name for name, gave in self.stock.gave_way.items() if gave.to is request]
        for_them = f"for {listed(whom)} to give it up" if whom else "for those who leave it"
        self.wait(job, Why.NO_ROOM, f"{wants(request)} will be free on {places(found)}: it waits {for_them}")
        return True

    def pass_over(self, job: Candidate, kind: Kind) -> None:
        request, free = job.request, self.stock.at_start
        if kind not in self.fitted:
            self.fitted[kind] = place(free, request, request.least) is not None
        if self.fitted[kind]:
            front = (
                f", {named(self.first.request, request)} the first of them" if self.first is not None else ""
            )
            are = "is" if request.least == 1 else "are"
            self.wait(job, Why.BEHIND, f"{wants(request)} {are} free, but others go first{front}")
        else:
            able = free.counts(request.worker).total
            said = f"it needs {wants(request)} at once; there is room for {able} of its workers"
            if able >= request.least:
                said = f"it needs {wants(request)} at once, and there is no room for its shards beside its workers"
            self.wait(
                job, Why.NO_ROOM, said if job.allocation is not None else said + self.held_by(request, kind)
            )
        self.first = self.first or job
        if self.head is None:
            self.head = job
            self.foresee(job)

    def foresee(self, head: Candidate) -> None:
        """When can the head begin, at the latest, and what is left over then? Known only from time limits. Those who
        are preemptible and come later than the head are out of its way."""
        has = self.stock.has
        room = self.stock.future.copy()
        ends: list[tuple[float, Candidate]] = []
        passed = False
        for job in self.order:
            passed = passed or job is head
            if job.request.job not in has:
                continue
            if passed and job.request.preemptible:
                room.give_all(has[job.request.job], job.request)
            elif job.may_run_s < inf:
                ends.append((self.view.now + job.may_run_s, job))
        for at, job in sorted(ends, key=lambda item: item[0]):
            room.give_all(has[job.request.job], job.request)
            found = place(room, head.request, head.request.least)
            if found is not None:
                room.take_all(found, head.request)
                self.shadow_s, self.spare = at, room
                return
        self.spare = self.of_no_use(head.request)

    def of_no_use(self, request: Request) -> Room:
        """What comes free on nodes that have room for nothing of this job, even if they were empty."""
        room = self.stock.future.copy()
        for kind in (request.worker, request.shard):
            if kind != NOTHING:  # what takes nothing is in nobody's way
                for node, count in self.stock.empty.counts(kind).on.items():
                    if count:
                        room.take(node, room.free[node])
        return room

    def held_by(self, request: Request, kind: Kind) -> str:
        """Who has something on nodes that would be of use to it."""
        if kind not in self.holders:
            useful = {node for node, count in self.stock.empty.counts(request.worker).on.items() if count}
            holders = [
                other.request.job
                for other in self.order
                if other.allocation is not None and not useful.isdisjoint(other.allocation.workers)
            ]
            self.holders[kind] = f"; {listed(holders)} {'has' if len(holders) == 1 else 'have'} the rest"
            if not holders:
                self.holders[kind] = ""
        return self.holders[kind]

    def wait(self, job: Candidate, why: Why, because: str) -> None:
        if job.allocation is not None:
            why, because = Why.PREEMPTED, self.why_it_leaves(job, job.allocation, because)
        self.verdicts[job.request.job] = Verdict(None, why, because)

    def why_it_leaves(self, job: Candidate, had: Allocation, because: str) -> str:
        gave = self.stock.gave_way.get(job.request.job)
        if gave is None:  # its nodes leave, or offer less
            return f"it cannot stay as it is on {places(had)}: {because}"
        takes = {node: gave.where.on(node, gave.to) for node in sorted(had.nodes & gave.where.nodes)}
        needs = f"needs {total(takes.values())} of {listed([*takes])}" if takes else f"needs {wants(gave.to)}"
        return f"{named(gave.to, job.request)} goes first and {needs}"

    def is_too_big(self, request: Request, kind: Kind) -> bool:
        if kind not in self.too_big:
            self.too_big[kind] = place(self.stock.empty, request, request.least) is None
        return self.too_big[kind]
