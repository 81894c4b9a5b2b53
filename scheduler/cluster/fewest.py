"""On how few nodes of a pool does everybody find a place? Counted in whole processes on whole nodes, by placing them.

Rule: who runs stays where he is. What stands on nodes that are not of the pool needs none of it, and what is free there
is taken first, by those who wait too. Where more nodes are needed, they come beside all that are here; where fewer will
do, those go on which least is taken, and what runs there has to find a place on the others. So a job waits for a node
that would come if it were asked for, and no node is let go for which another one would have to come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from math import ceil
from typing import NamedTuple

from .placement import Room, add, pack, place, slots
from .plan import Allocation, Candidate, View
from .reach import Reach, whole
from .request import Request
from .resources import NOTHING, Node, NodeId, Resources, Sums, total

OPEN = 32
"""Of nodes that have come to be counted, so many are filled at a time: among thousands it would take seconds to find a
place, and hardly a better one."""


class Wish(NamedTuple):
    """A job that is to have so many workers."""

    job: Candidate
    workers: int


class Lack(NamedTuple):
    """Processes of a job that runs and that have no place."""

    needs: Resources
    wanted: int


def idlest(view: View, names: Iterable[NodeId]) -> list[NodeId]:
    """Of these nodes first those that are let go first. What is on its way out of them anyway does not count."""
    taken: Sums[NodeId] = Sums()
    for job in view.jobs:
        if job.allocation is not None and not job.draining:
            add(taken, job.allocation, job.request)
    order = {name: (taken[name].gpus, taken[name].cpus, name) for name in names}
    return sorted(order, key=order.__getitem__)


def fewest(view: View, wishes: Sequence[Wish], reach: Reach) -> int:
    """Nodes of the pool on which all of them find a place; all that it may have, where they do not."""
    site = Site(view, wishes, reach)
    here = len(site.pool)
    least = site.least()
    if least >= reach.most:
        return reach.most
    alone = max((reach.nodes_for(job.request) or 0 for job, _ in wishes if job.allocation is None), default=0)
    # From below, in growing steps: mostly little more is needed than that, and to fill few nodes takes less time.
    below, kept, step = min(least, here), min(least, here), 1
    while kept < here and site.beside(kept, 0):
        below, kept, step = kept + 1, min(here, kept + step), 2 * step
    if kept == here and (more := site.beside(here, max(0, reach.most - here))):
        return max(alone, min(here + more, reach.most))
    return max(alone, bisect_left(range(kept), True, below, key=lambda kept: not site.beside(kept, 0)))


class Site:
    """The nodes that are not of the pool, and those of the pool, the fullest first; nodes that leave are neither."""

    def __init__(self, view: View, wishes: Sequence[Wish], reach: Reach) -> None:
        self.wishes = wishes
        self.reach = reach
        seen = {node.id: node for node in view.nodes}
        standing = {node.id for node in reach.others}
        self.standing = [seen.get(node.id, node) for node in reach.others]
        of_pool = [name for name, node in seen.items() if name not in standing and not node.leaving]
        self.pool = [seen[name] for name in reversed(idlest(view, of_pool))]
        needs = {need for job, _ in wishes for need in (job.request.worker, job.request.shard)} - {NOTHING}
        self.needs = tuple(needs)

    def least(self) -> int:
        """Fewer of the pool cannot do: so many have what is needed, wherever on them it is."""
        offers = self.reach.kind.offers
        needed: Sums[None] = Sums()
        for job, workers in self.wishes:
            request, has = job.request, job.allocation
            able = slots(offers, request.worker), slots(offers, request.shard)
            if has is None and not all(able):
                continue  # it may wait for nodes that are not of the pool
            needed.add(None, request.worker, workers if able[0] else 0)
            needed.add(None, request.shard, request.shards if able[1] else 0)
        largest = reduce(Resources.or_more, (node.offers for node in self.pool), offers)
        return max(0, whole(needed[None] - total(node.offers for node in self.standing), largest))

    def beside(self, kept: int, most: int) -> int:
        """How many nodes have to come beside the `kept` fullest of the pool; more than `most` is one more."""
        here = [*self.standing, *self.pool[:kept]]
        rank = {node.id: number for number, node in enumerate(here)}
        taken: Sums[NodeId] = Sums()
        lacks: list[Lack] = []
        for job, workers in self.wishes:
            if job.allocation is not None:
                stays = staying(job.allocation, workers, rank)
                add(taken, stays, job.request)
                lacks += lacking(job.request, workers, stays)
        ground = Ground(here, taken, self.reach, self.needs, most)
        waiting = [wish for wish in self.wishes if wish.job.allocation is None]
        if all(ground.seat(lack) for lack in lacks) and all(ground.begin(wish) for wish in waiting):
            return ground.came
        return most + 1


def staying(has: Allocation, workers: int, rank: Mapping[NodeId, int]) -> Allocation:
    """What remains of it on these nodes, of workers no more than it is to have: those on the first ones."""
    remain = [node for node in has.workers if node in rank]
    if len(remain) > workers:
        remain = sorted(remain, key=rank.__getitem__)[:workers]
    return Allocation(tuple(remain), tuple(node for node in has.shards if node in rank))


def lacking(request: Request, workers: int, has: Allocation) -> Iterator[Lack]:
    if workers > len(has.workers):
        yield Lack(request.worker, workers - len(has.workers))
    if request.shards > len(has.shards) and request.shard != NOTHING:
        yield Lack(request.shard, request.shards - len(has.shards))


class Ground:
    """Nodes that fill, and more of them as they are needed: `most` at most. A full one is not looked at again."""

    def __init__(
        self, nodes: Iterable[Node], taken: Sums[NodeId], reach: Reach, needs: Sequence[Resources], most: int
    ) -> None:
        self.reach = reach
        self.needs = needs
        self.most = most
        self.came = 0
        self.open: deque[NodeId] = deque()  # of those that came, the newest
        self.room = Room(nodes, taken)
        self._tidy(list(self.room.free))

    def seat(self, lack: Lack) -> bool:
        """Of a job that runs. False: not on all that may come."""
        per_node = slots(self.reach.kind.offers, lack.needs)
        if not per_node:
            return True  # no number of such nodes would do
        missing = lack.wanted - self.room.counts(lack.needs).total
        if not self._come(max(0, ceil(missing / per_node))):
            return False
        found = pack(self.room, lack.needs, lack.wanted)
        assert found is not None, "as many as there are places for"
        self._take(Allocation(found, ()), lack.needs, NOTHING)
        return True

    def begin(self, wish: Wish) -> bool:
        """A job that waits, whole. False: not on all that may come."""
        request = wish.job.request
        offers = self.reach.kind.offers
        per_node = slots(offers, request.worker)
        able = per_node and slots(offers, request.shard)
        while (found := place(self.room, request, wish.workers)) is None:
            if not able:
                return True  # it waits for nodes that are not of the pool
            missing = wish.workers - self.room.counts(request.worker).total
            if not self._come(max(1, ceil(missing / per_node))):
                return False
        self._take(found, request.worker, request.shard)
        return True

    def _come(self, count: int) -> bool:
        if self.came + count > self.most:
            return False
        for _ in range(count):
            self.came += 1
            name = NodeId(f"{self.reach.kind.id}+{self.came}")
            self.room.add(Node(id=name, offers=self.reach.kind.offers))
            self.open.append(name)
        return True

    def _take(self, found: Allocation, worker: Resources, shard: Resources) -> None:
        for node in found.workers:
            self.room.take(node, worker)
        for node in found.shards:
            self.room.take(node, shard)
        self._tidy(found.nodes)
        while len(self.open) > OPEN:
            self._drop(self.open.popleft())

    def _tidy(self, nodes: Iterable[NodeId]) -> None:
        free = self.room.free
        for name in nodes:
            if name in free and not any(free[name].holds(need) for need in self.needs):
                self._drop(name)

    def _drop(self, name: NodeId) -> None:
        if name in self.room.free:
            self.room.drop(name)
