"""How many nodes should there be? As many as the jobs can use well.

A job uses k workers at the efficiency SPEEDUP(k) / k, and Pollux (OSDI 2021, section 4.2.3) keeps the mean of that
over all GPUs within a band. Here each job is asked: with how many workers does it still reach the efficiency e? All of
them together need nodes(e), in whole places and beside what runs (`fewest`); the smaller e, the more nodes. With
`low` < e < `high`:

    nodes < nodes(high)                     all would be used better than `high`: more nodes, at once
    nodes > nodes(low) for `idle_s`         some are used worse than `low`, or not at all: fewer (Ray waits like this)
    else                                    as it is: a count that is near right is not worth changing

and either way it goes to nodes((low + high) / 2). A job without a profile needs what it has, or what it needs at least
where it waits: how much more would help is not known. No node is kept for a job that waits and would not find room on
all that there can be, or whose user holds all that his quota allows. Whatever comes out stays between `least` and
`most` nodes, and within the budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from ..explain import counted, listed
from .fewest import Wish, fewest
from .placement import slots
from .plan import Allocation, Candidate, View
from .reach import Reach
from .request import MOST_WORKERS
from .resources import Node, NodeId, Sums
from .stock import UNBOUNDED, exceeded, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the nodes' owner allows. Raises ValueError."""

    least: int = 0
    most: int
    low: float = 0.35
    high: float = 0.65
    idle_s: float = 300.0
    budget_per_hour: float | None = None
    """In the unit of `Node.cost_per_hour`."""

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"nodes must be 0 or more and least <= most, not {self.least}..{self.most}")
        if not 0 < self.low < self.high <= 1:
            raise ValueError(f"efficiencies must be 0 < low < high <= 1, not {self.low:g} and {self.high:g}")
        if self.idle_s < 0:
            raise ValueError(f"the idle time must not be negative, not {self.idle_s:g} s")


@dataclass(frozen=True, slots=True)
class Watch:
    """What is remembered from one decision to the next."""

    over_since: float | None = None
    """Since when there have been too many nodes."""


@dataclass(frozen=True, slots=True)
class Decision:
    nodes: int
    because: str
    watch: Watch


def reach_of(kind: Node, bounds: Bounds, others: Iterable[Node] = ()) -> Reach:
    """All that there can be; `others`: nodes that are not of this pool."""
    return Reach(kind, *affordable(kind, bounds), others)


def decide(view: View, nodes: int, reach: Reach, bounds: Bounds, watch: Watch) -> Decision:
    """How many nodes of the pool there should be; `nodes` there are, those that are still coming included."""
    jobs = within_quotas(view)
    efficiencies = (bounds.high, bounds.low, (bounds.low + bounds.high) / 2)
    counts: dict[tuple[int, ...], int] = {}  # mostly all three are alike
    found = []
    for efficiency in efficiencies:
        wishes = wishes_at(jobs, reach, efficiency)
        workers = tuple(wish.workers for wish in wishes)
        if workers not in counts:
            counts[workers] = bounded(fewest(view, wishes, reach), bounds.least, reach.most)
        found.append(counts[workers])
    few, many, middle = found
    lost = hopeless(view.jobs, reach)
    aside = f"; of no use to {listed(lost)}, which would not fit on all that there can be" if lost else ""
    if nodes < few:
        limited = f", {reach.limit}" if middle == reach.most else ""
        would = f"{counted(few, 'node')} would be used at {bounds.high:.0%} or better"
        return Decision(
            middle, f"{would}, and there {is_or_are(nodes)} {nodes or 'none'}{limited}{aside}", Watch()
        )
    if nodes > many:
        since = view.now if watch.over_since is None else watch.over_since
        over = f"only {many} of {counted(nodes, 'node')} {is_or_are(many)} used at {bounds.low:.0%} or better"
        if view.now - since >= bounds.idle_s or nodes > reach.most:
            return Decision(middle, f"{over}, for {view.now - since:.0f} s{aside}", Watch())
        return Decision(nodes, f"{over}; they go after {bounds.idle_s:g} s of that{aside}", Watch(since))
    return Decision(nodes, used_well(few, many) + aside, Watch())


def used_well(few: int, many: int) -> str:
    if few < many:
        return f"between {few} and {many} nodes are used well"
    return f"{counted(few, 'node')} {is_or_are(few)} used well" if few else "no node is needed"


def is_or_are(count: int) -> str:
    return "is" if count == 1 else "are"


def affordable(kind: Node, bounds: Bounds) -> tuple[int, str]:
    if bounds.budget_per_hour is not None and kind.cost_per_hour > 0:
        paid = pays_for(bounds.budget_per_hour, kind.cost_per_hour)
        if paid < bounds.most:
            return max(paid, bounds.least), f"{bounds.budget_per_hour:g} an hour pays for {paid}"
    return bounds.most, f"the pool has {bounds.most} at most"


def pays_for(budget: float, cost: float) -> int:
    """So many nodes, counted with the numbers as they are written: 3.3 pays for 3 of 1.1."""
    return int(Fraction(repr(budget)) / Fraction(repr(cost)))


def bounded(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def within_quotas(view: View) -> Sequence[Candidate]:
    """All but those that wait until their users hold less, or for ever."""
    if not view.quotas:
        return view.jobs
    held: Sums[str] = Sums()
    workers = Counter(view.held_workers)
    for user, amount in view.held.items():
        held.add(user, amount)
    found = []
    for job in sorted(view.jobs, key=lambda job: job.allocation is None):  # who runs holds what he has
        request = job.request
        asks = Allocation((NodeId(""),) * request.least, (NodeId(""),) * request.shards)
        takes = size(request, job.allocation or asks)
        count = len((job.allocation or asks).workers)
        if job.allocation is None:
            quota = view.quotas.get(request.user, UNBOUNDED)
            if exceeded(quota, held[request.user] + takes, workers[request.user] + count) is not None:
                continue
        found.append(job)
        if job.runnable:
            held.add(request.user, takes)
            workers[request.user] += count
    return found


def hopeless(jobs: Sequence[Candidate], reach: Reach) -> list[str]:
    """Who waits, and will for ever."""
    return [
        job.request.job
        for job in jobs
        if job.runnable and job.allocation is None and reach.nodes_for(job.request) is None
    ]


def wishes_at(jobs: Sequence[Candidate], reach: Reach, efficiency: float) -> list[Wish]:
    """What the jobs can use at this efficiency or better."""
    found = []
    for job in jobs:
        request, has = job.request, job.allocation
        if job.draining or not job.runnable or (has is None and reach.nodes_for(request) is None):
            continue
        per_node = slots(reach.kind.offers, request.worker)
        if has is not None and job.ending:
            workers = len(has.workers)
        elif per_node:
            workers = useful(job, per_node, efficiency)
        else:  # no number of such nodes would bring more
            workers = request.least if has is None else len(has.workers)
        found.append(Wish(job, workers))
    return found


def useful(job: Candidate, per_node: int, efficiency: float) -> int:
    """The most workers at which the job's speedup for each is at least this much of the first ones'."""
    request, profile = job.request, job.profile
    if request.least == request.most or profile is None:
        return request.least if job.allocation is None else max(request.least, len(job.allocation.workers))
    alone = profile.goodput(request.least, ceil(request.least / per_node)) / request.least
    if alone <= 0:
        return request.least
    bound = min(request.most, MOST_WORKERS)
    found = k = request.least
    while k < bound:
        k = min(bound, k + 1 if k < 2 * per_node else k + per_node)
        if profile.goodput(k, ceil(k / per_node)) / k >= efficiency * alone:
            found = k
        elif k > 2 * found:
            break
    return found
