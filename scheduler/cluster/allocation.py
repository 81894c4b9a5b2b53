"""How many workers should each job have? As many as teach most, all jobs together, where a profile tells.

Each job that gets its turn has the workers it needs at least. The rest go, a step at a time, to the job whose utility
grows most per worker, in the manner of Pollux' fitness (OSDI 2021, eq. 11) but without a search:

    maximise sum_j  w_j U(GOODPUT_j(k_j) / GOODPUT_j(least_j))      U(s) = s^P / P,  P < 0: the less, the fairer
    w_j = (1 + service_j / SERVICE_S)^-AGEING                           least attained service, here too

A step leads to the number of workers that is worth the most per worker, so that a bad number on the way (the
first worker on a second node) is stepped over. With a heap this is O(workers log jobs).

Changing costs: a job stands still while its workers come and go. It changes only if it would have been worth it, had
it always changed that often:

    f = max(age - changes x R, 0) / (age + R)           Pollux, eq. 12; R: what a change costs, `View.change_s`
    f GOODPUT(new) > (1 + MARGIN) GOODPUT(old)

and it gives up workers only where others need them to begin, or have far fewer than they should (BAND).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from ..ids import JobId
from .gang import Terms
from .order import service_s
from .placement import slots
from .plan import Allocation, Candidate, View
from .request import MOST_WORKERS
from .resources import NOTHING, Resources, total

P = -1.0
SERVICE_S = 7_200.0
AGEING = 1.0
MARGIN = 0.05
BAND = 2.5
NO_PROFILE_S = 60.0
"""A job that has run for so long and has no profile will not have one: it grows by its place in the order."""


@dataclass(slots=True)
class Share:
    """What one job should have, as it is being found out."""

    job: Candidate
    per_node: int
    workers: int
    most: int
    weight: float
    base: float

    def goodput(self, workers: int) -> float:
        profile = self.job.profile
        assert profile is not None
        return profile.goodput(workers, -(-workers // self.per_node))

    def utility(self, workers: int) -> float:
        return float(self.weight * (max(self.goodput(workers), 1e-12) / self.base) ** P / P)

    def step(self) -> tuple[float, int] | None:
        """The best gain per worker, and the number of workers that has it; None if no more are worth anything."""
        here = self.utility(self.workers)
        best: tuple[float, int] | None = None
        for to in self.sizes():
            gain = (self.utility(to) - here) / (to - self.workers)
            if gain > 1e-12 and (best is None or gain > best[0]):
                best = gain, to
        return best

    def sizes(self) -> list[int]:
        """On its first node one more; else up to a whole node, one node more, twice as many in whole nodes, or all that
        it may have. Jobs that have whole nodes leave no odd places on which only parts of others would fit."""
        k, per = self.workers, self.per_node
        whole = (k // per + 1) * per
        found = {whole, whole + per, -(-2 * k // per) * per}
        if k < per:
            found.add(k + 1)
        if self.most < whole:  # it may not have whole nodes
            found.add(self.most)
        return sorted(to for to in found if k < to <= self.most)


def terms(view: View, order: Sequence[Candidate]) -> Terms:
    """The goodput policy's wishes for a round."""
    offers = [node.offers for node in view.nodes if not node.leaving]
    free = total(offers)
    shares: list[Share] = []
    wanted: dict[JobId, int] = {}
    per_node: dict[Resources, int] = {}
    for job in order:
        request = job.request
        if job.draining or not job.runnable:
            continue
        kept = job.allocation if job.ending else None
        workers = request.least if kept is None else len(kept.workers)
        needs = request.worker * workers + request.shard * request.shards
        if not free.holds(needs):
            continue
        free = free - needs
        wanted[request.job] = workers
        if request.most == request.least or kept is not None:
            continue
        if job.profile is None:
            if job.allocation is not None and view.now - job.since >= NO_PROFILE_S:
                wanted[request.job] = request.most
            continue
        if request.worker not in per_node:
            here = max((slots(offer, request.worker) for offer in offers), default=1)
            per_node[request.worker] = min(max(here, 1), MOST_WORKERS)
        share = Share(
            job,
            per_node[request.worker],
            request.least,
            request.most,
            (1.0 + service_s(job) / SERVICE_S) ** -AGEING,
            1.0,
        )
        share.base = max(share.goodput(request.least), 1e-12)
        shares.append(share)
    share_out(shares, free)
    settle(view, shares, wanted, total(offers), order)
    grows = [share.job.request.job for share in sorted(shares, key=urgency)]
    named = set(grows)
    grows += [job.request.job for job in order if job.request.job not in named]
    return Terms(wanted=wanted, grows=grows, worth=lambda job, has, new: worth(view, job, has, new))


def share_out(shares: Sequence[Share], free: Resources) -> None:
    """The greedy steps, until nothing is left or nothing is worth it."""
    heap: list[tuple[float, int, int]] = []
    for i, share in enumerate(shares):
        if (step := share.step()) is not None:
            heap.append((-step[0], i, step[1]))
    heapify(heap)
    while heap:
        _, i, to = heap[0]
        share = shares[i]
        kind = share.job.request.worker
        able = min(to - share.workers, slots(free, kind))
        if able <= 0:
            heappop(heap)
            continue
        if able < to - share.workers:
            # Not all of the step is there. On its first node a job can use what there is.
            part = share.workers + able
            if share.workers >= share.per_node or share.utility(part) <= share.utility(share.workers):
                heappop(heap)
                continue
            to = part
        free = free - kind * (to - share.workers)
        share.workers = to
        step = share.step()
        if step is None:
            heappop(heap)
        else:
            heapreplace(heap, (-step[0], i, step[1]))


def settle(
    view: View,
    shares: Sequence[Share],
    wanted: dict[JobId, int],
    offers: Resources,
    order: Sequence[Candidate],
) -> None:
    """From what would be best to what is worth changing. Fills `wanted`."""
    named = {share.job.request.job for share in shares}
    held = NOTHING  # if nobody shrinks, and everybody whose turn it is has at least his least
    for job in order:
        request = job.request
        if request.job in wanted:
            has = 0 if job.allocation is None else len(job.allocation.workers)
            workers = max(has, request.least) if request.job in named else wanted[request.job]
            held = held + request.worker * workers + request.shard * request.shards
    free = offers - held
    surplus: list[tuple[float, int, Share]] = []
    hunger = NOTHING
    for i, share in enumerate(shares):
        request, allocation = share.job.request, share.job.allocation
        has = 0 if allocation is None else len(allocation.workers)
        wanted[request.job] = max(has, share.workers)
        if has > share.workers:
            heappush(surplus, (-has / share.workers, i, share))
        elif has < share.workers and (allocation is None or pays(view, share, has, share.workers)):
            hunger = hunger + request.worker * (share.workers - max(has, request.least))
    while surplus:
        ratio, _, share = heappop(surplus)
        request = share.job.request
        if free.holds(NOTHING) and (-ratio < BAND or free.holds(hunger)):
            break
        free = free + request.worker * (wanted[request.job] - share.workers)
        wanted[request.job] = share.workers


def urgency(share: Share) -> tuple[float, float]:
    allocation = share.job.allocation
    has = 0 if allocation is None else len(allocation.workers)
    return has / share.workers, share.job.request.submitted


def factor(view: View, job: Candidate) -> float:
    """What is left of a job's time if it changes as often as it did."""
    age = view.now - job.request.submitted
    return max(age - job.changes * view.change_s, 0.0) / max(age + view.change_s, 1e-9)


def pays(view: View, share: Share, has: int, to: int) -> bool:
    return factor(view, share.job) * share.goodput(to) > (1.0 + MARGIN) * share.goodput(has)


def worth(view: View, job: Candidate, has: Allocation, new: Allocation) -> bool:
    """More workers than a running job has: is it worth standing still for?"""
    if job.profile is None:
        return True
    better = job.profile.goodput(len(new.workers), len(set(new.workers)))
    return factor(view, job) * better > (1.0 + MARGIN) * job.profile.goodput(
        len(has.workers), len(set(has.workers))
    )
