"""How many nodes should there be? As many as the jobs can use well.

A job uses k workers at the efficiency SPEEDUP(k) / k, and Pollux (OSDI 2021, section 4.2.3) keeps the mean of that
over all GPUs within a band. Here each job is asked: with how many workers does it still reach the efficiency e? All of
them together need nodes(e); the smaller e, the more nodes. With `low` < e < `high`:

    nodes < nodes(high)                     all would be used better than `high`: more nodes, at once
    nodes > nodes(low) for `idle_s`         some are used worse than `low`, or not at all: fewer (Ray waits like this)
    else                                    as it is: a count that is near right is not worth changing

and either way it goes to nodes((low + high) / 2). A job without a profile needs what it has, or what it needs at least
where it waits: how much more would help is not known. Whatever comes out stays between `least` and `most` nodes, and
within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from .placement import slots
from .plan import Candidate, View
from .request import MOST_WORKERS
from .resources import NOTHING, Node, Resources


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


def decide(view: View, nodes: int, kind: Node, bounds: Bounds, watch: Watch) -> Decision:
    """How many nodes of this kind there should be; `nodes` there are, those that are still coming included."""
    most, limit = affordable(kind, bounds)
    few = bounded(nodes_at(view.jobs, kind, bounds.high), bounds.least, most)
    many = bounded(nodes_at(view.jobs, kind, bounds.low), bounds.least, most)
    middle = bounded(nodes_at(view.jobs, kind, (bounds.low + bounds.high) / 2), bounds.least, most)
    if nodes < few:
        limited = f", {limit}" if middle == most else ""
        said = f"{few} nodes would be used at {bounds.high:.0%} or better, and there are {nodes}{limited}"
        return Decision(middle, said, Watch())
    if nodes > many:
        since = view.now if watch.over_since is None else watch.over_since
        over = f"only {many} of {nodes} nodes are used at {bounds.low:.0%} or better"
        if view.now - since >= bounds.idle_s or nodes > most:
            return Decision(middle, f"{over}, for {view.now - since:.0f} s", Watch())
        return Decision(nodes, f"{over}; they go after {bounds.idle_s:g} s of that", Watch(since))
    return Decision(nodes, f"between {few} and {many} nodes are used well", Watch())


def affordable(kind: Node, bounds: Bounds) -> tuple[int, str]:
    if bounds.budget_per_hour is not None and kind.cost_per_hour > 0:
        paid = int(bounds.budget_per_hour / kind.cost_per_hour)
        if paid < bounds.most:
            return max(paid, bounds.least), f"{bounds.budget_per_hour:g} an hour pays for {paid}"
    return bounds.most, f"{bounds.most} is the most"


def bounded(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def nodes_at(jobs: Sequence[Candidate], kind: Node, efficiency: float) -> int:
    """Nodes for all that the jobs can use at this efficiency or better."""
    needed = NOTHING
    greatest = 0
    for job in jobs:
        request = job.request
        if job.draining or not job.runnable:
            continue
        per_node = slots(kind.offers, request.worker)
        if not per_node or not slots(kind.offers, request.shard):
            continue  # no number of such nodes would do
        workers = useful(job, per_node, efficiency)
        needed = needed + request.worker * workers + request.shard * request.shards
        greatest = max(greatest, ceil(workers / per_node))  # whole workers, not shares of them
    return max(greatest, whole(needed, kind.offers))


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


def whole(needed: Resources, offers: Resources) -> int:
    shares = [
        (needed.gpus, offers.gpus),
        (needed.cpus, offers.cpus),
        (needed.memory_mb, offers.memory_mb),
    ]
    return max(ceil(need / offer) if offer else 0 for need, offer in shares)
