"""Where do a job's processes go? On as few nodes as will do, in one rack if that is possible, and where they already
are if they are anywhere.

Workers are packed: each step crosses the network once less for every two that share a node. Among the nodes that can
take all that is left, the fullest is chosen (best fit), so that whole nodes stay free for jobs that need them. Shards
are spread: what they take is memory and the link. With a replica, shard k's backup lives in the process of shard k + 1
(the last one's in that of shard 0), so neighbours on this ring are kept apart wherever the nodes allow it.

Everything here counts in whole processes: a `Room` knows how many more of a kind each node can take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

from .plan import Allocation
from .request import MOST_WORKERS, Request
from .resources import NOTHING, Node, NodeId, Resources, Sums, total

KINDS_KEPT = 64  # kinds of process whose counts are kept up to date; those beyond are counted anew each time


@dataclass(slots=True)
class Counts:
    """How many more processes of one kind each node can take."""

    kind: Resources
    on: dict[NodeId, int]
    total: int


class Room:
    """What is free on each node. It may be taken below zero, and then holds nothing more."""

    def __init__(self, nodes: Iterable[Node], taken: Sums[NodeId] | None = None) -> None:
        """`taken`: what is not free of what nodes offer."""
        self.free: dict[NodeId, Resources] = {}
        self.rack: dict[NodeId, str] = {}
        for node in nodes:
            free = node.offers
            self.free[node.id] = free - taken[node.id] if taken is not None and node.id in taken else free
            self.rack[node.id] = node.rack
        self.total = total(self.free.values())
        self._counts: dict[Resources, Counts] = {}

    def nodes(self) -> list[Node]:
        """As if this were all that they offer."""
        return [Node(id=name, offers=free, rack=self.rack[name]) for name, free in self.free.items()]

    def has_all(self, allocation: Allocation) -> bool:
        """Are all its nodes here?"""
        return all(node in self.free for node in allocation.workers) and all(
            node in self.free for node in allocation.shards
        )

    def copy(self) -> Room:
        made = Room(())
        made.free = dict(self.free)
        made.rack = self.rack
        made.total = self.total
        return made

    def and_in(self, other: Room) -> Room:
        """What is free in both."""
        made = self.copy()
        for node, free in self.free.items():
            there = other.free[node]
            made.free[node] = Resources(
                cpus=min(free.cpus, there.cpus),
                gpus=min(free.gpus, there.gpus),
                memory_mb=min(free.memory_mb, there.memory_mb),
            )
        made.total = total(made.free.values())
        return made

    def counts(self, kind: Resources) -> Counts:
        found = self._counts.get(kind)
        if found is None:
            on = {node: slots(free, kind) for node, free in self.free.items()}
            found = Counts(kind, on, sum(on.values()))
            if len(self._counts) < KINDS_KEPT:
                self._counts[kind] = found
        return found

    def add(self, node: Node) -> None:
        self.free[node.id] = free = node.offers
        self.rack[node.id] = node.rack
        self.total = self.total + free
        for counts in self._counts.values():
            counts.on[node.id] = now = slots(free, counts.kind)
            counts.total += now

    def drop(self, node: NodeId) -> None:
        self.total = self.total - self.free.pop(node)
        for counts in self._counts.values():
            counts.total -= counts.on.pop(node)

    def take(self, node: NodeId, amount: Resources) -> None:
        """Nodes that are not here have nothing and lose nothing."""
        if amount == NOTHING or node not in self.free:
            return
        self.free[node] = free = self.free[node] - amount
        self.total = self.total - amount
        for counts in self._counts.values():
            now = slots(free, counts.kind)
            counts.total += now - counts.on[node]
            counts.on[node] = now

    def take_all(self, allocation: Allocation, request: Request, sign: int = 1) -> None:
        for node, amount in takes(allocation, request).items():
            self.take(node, amount * sign)

    def holds(self, allocation: Allocation, request: Request) -> bool:
        """Is all of it here, and free?"""
        here = self.free
        return all(
            node in here and here[node].holds(amount) for node, amount in takes(allocation, request).items()
        )

    def give_all(self, allocation: Allocation, request: Request) -> None:
        self.take_all(allocation, request, -1)


def slots(free: Resources, kind: Resources) -> int:
    """How many processes of this kind find room in `free`."""
    most = MOST_WORKERS
    if kind.gpus:
        most = min(most, free.gpus // kind.gpus)
    if kind.cpus:
        most = min(most, free.cpus // kind.cpus)
    if kind.memory_mb:
        most = min(most, free.memory_mb // kind.memory_mb)
    return max(most, 0)


def add(sums: Sums[NodeId], allocation: Allocation, request: Request) -> None:
    """What an allocation takes of each node, added to what others take."""
    for node in allocation.workers:
        sums.add(node, request.worker)
    if request.shard != NOTHING:
        for node in allocation.shards:
            sums.add(node, request.shard)


def takes(allocation: Allocation, request: Request) -> dict[NodeId, Resources]:
    """What an allocation takes of each node."""
    found: dict[NodeId, Resources] = {}
    for node, count in Counter(allocation.workers).items():
        found[node] = request.worker * count
    if request.shard != NOTHING:
        for node, count in Counter(allocation.shards).items():
            found[node] = found.get(node, NOTHING) + request.shard * count
    return found


# -- the whole job ---------------------------------------------------------------------------------------


def place(room: Room, request: Request, workers: int) -> Allocation | None:
    """All shards and so many workers, or nothing. The room is left as it was."""
    if room.counts(request.worker).total < workers or room.counts(request.shard).total < request.shards:
        return None
    found = pack(room, request.worker, workers)
    if found is None:
        return None
    if request.shard == NOTHING and not request.replicas:
        return Allocation(
            found, found[:1] * request.shards if request.shards == 1 else around(found, request)
        )
    with_workers = Allocation(found, ())
    room.take_all(with_workers, request)
    shards = spread(room, request, near=set(found))
    room.give_all(with_workers, request)
    if shards is not None:
        return Allocation(found, shards)
    # Workers stand where shards would have to: shards first, where they cost the fewest places for workers.
    shards = squeeze(room, request)
    if shards is None:
        return None
    with_shards = Allocation((), shards)
    room.take_all(with_shards, request)
    again = pack(room, request.worker, workers)
    room.give_all(with_shards, request)
    return None if again is None else Allocation(again, shards)


def around(workers: tuple[NodeId, ...], request: Request) -> tuple[NodeId, ...]:
    """Shards that take nothing, in turn on the workers' nodes."""
    nodes = list(dict.fromkeys(workers))
    return tuple(nodes[k % len(nodes)] for k in range(request.shards))


def extend(room: Room, request: Request, has: Allocation, workers: int) -> Allocation | None:
    """The job as it is and more workers, so that it has so many; None if they do not all find room. The room is
    without what the job has."""
    more = pack(room, request.worker, workers - len(has.workers), beside=has.workers)
    return None if more is None else Allocation(has.workers + more, has.shards)


def shrink(has: Allocation, workers: int) -> Allocation:
    """The job with fewer workers: those go that stand alone, or with the fewest of their own."""
    gone = len(has.workers) - workers
    kept = Counter(has.workers)
    while gone > 0:
        node = min(kept, key=lambda n: (kept[n], n in has.shards))
        leaves = min(gone, kept[node])
        gone -= leaves
        kept[node] -= leaves
        if not kept[node]:
            del kept[node]
    remain: list[NodeId] = []
    for node in has.workers:
        if kept[node] > 0:
            kept[node] -= 1
            remain.append(node)
    return Allocation(tuple(remain), has.shards)


def mend(room: Room, request: Request, has: Allocation) -> Allocation | None:
    """What the job has without the nodes that are not in the room (they leave, or have left): lost workers go as far
    as there is room, lost shards must all find a place; None if they do not, or if fewer workers remain than it needs
    at least. The room is without what the job has on nodes that are in it."""
    workers = tuple(node for node in has.workers if node in room.free)
    before = [node if node in room.free else None for node in has.shards]
    after = seat(room, request, before, beside=workers)
    try:
        shards = tuple(node for node in after if node is not None)
        wanted = min(len(has.workers), len(workers) + room.counts(request.worker).total)
        if wanted < request.least or len(shards) < len(after):
            return None
        more = pack(room, request.worker, wanted - len(workers), beside=workers)
        assert more is not None, "as many as there are places for"
        return Allocation(workers + more, shards)
    finally:
        for node, here in zip(after, before, strict=True):
            if node is not None and here is None:
                room.take(node, request.shard * -1)


def seat(
    room: Room, request: Request, shards: Sequence[NodeId | None], beside: Sequence[NodeId]
) -> list[NodeId | None]:
    """Shards with places for those that have none, as far as there are any: away from those that keep their backups or
    whose backups they keep, where there are few of them, beside the workers. What they take is taken of the room."""
    found = list(shards)
    for k, at in enumerate(found):
        if at is not None:
            continue
        able = [node for node, count in room.counts(request.shard).on.items() if count > 0]
        if not able:
            break
        apart = {found[k - 1], found[(k + 1) % len(found)]} if request.replicas else set()
        load = Counter(found)
        node = min(able, key=lambda n: (n in apart, load[n], n not in beside, -room.free[n].memory_mb))
        found[k] = node
        room.take(node, request.shard)
    return found


# -- workers ---------------------------------------------------------------------------------------------


def pack(
    room: Room, kind: Resources, wanted: int, beside: Sequence[NodeId] = ()
) -> tuple[NodeId, ...] | None:
    """Nodes for so many processes: first those of `beside`, then those of one rack, the fewest that will do."""
    if wanted <= 0:
        return ()
    counts = room.counts(kind)
    if counts.total < wanted:
        return None
    chosen: list[NodeId] = []
    for node, _ in Counter(beside).most_common():
        here = min(counts.on.get(node, 0), wanted - len(chosen))
        chosen += [node] * here
    if len(chosen) == wanted:
        return tuple(chosen)
    racks: dict[str, list[tuple[int, NodeId]]] = {}
    own = set(beside)
    for node, count in counts.on.items():
        if count and node not in own:
            racks.setdefault(room.rack[node], []).append((count, node))
    home = {room.rack[node] for node in own if node in room.rack}
    while len(chosen) < wanted:
        left = wanted - len(chosen)
        rack = min(racks, key=lambda name: (name not in home, *cost(racks[name], left)))
        chosen += fill(racks.pop(rack), left)
    return tuple(chosen)


def cost(nodes: list[tuple[int, NodeId]], wanted: int) -> tuple[bool, int, int]:
    """What speaks against a rack: that it cannot take all, how many nodes it needs, how much is left over."""
    nodes.sort(key=lambda item: -item[0])
    found = used = 0
    for count, _ in nodes:
        if found >= wanted:
            break
        found += count
        used += 1
    if found < wanted:
        return True, -found, 0
    return False, used, sum(count for count, _ in nodes) - wanted


def fill(nodes: list[tuple[int, NodeId]], wanted: int) -> list[NodeId]:
    """Up to so many processes on the fewest nodes; `nodes` are in order of falling room. The last node is the one
    with the least room that takes what is left."""
    chosen: list[NodeId] = []
    for i, (count, node) in enumerate(nodes):
        left = wanted - len(chosen)
        if not left:
            break
        if count >= left:
            tightest = min(nodes[i:], key=lambda item: item[0] if item[0] >= left else MOST_WORKERS + 1)
            chosen += [tightest[1]] * left
        else:
            chosen += [node] * count
    return chosen


# -- shards ----------------------------------------------------------------------------------------------


def spread(room: Room, request: Request, near: set[NodeId]) -> tuple[NodeId, ...] | None:
    """A node for each shard: evenly, beside the job's workers where that is even, where memory is free."""
    places = dict(room.counts(request.shard).on)
    wanted = request.shards
    if sum(places.values()) < wanted:
        return None
    # More than half of a ring on one node cannot be without neighbours there.
    bound = wanted // 2 if request.replicas else wanted
    have: Counter[NodeId] = Counter()
    open_nodes = [node for node, count in places.items() if count > 0]
    if request.shard == NOTHING and len(near) >= (2 if request.replicas else 1):
        open_nodes = [node for node in open_nodes if node in near]
    # So many nodes are enough: the job's own, and those with the most memory.
    others = [node for node in open_nodes if node not in near]
    if len(others) > wanted:
        others = nlargest(wanted, others, key=lambda node: room.free[node].memory_mb)
    open_nodes = [node for node in open_nodes if node in near] + others
    for _ in range(wanted):
        node = min(
            (node for node in open_nodes if have[node] < places[node]),
            key=lambda n: (
                have[n] >= bound,
                have[n],
                n not in near,
                request.shard.memory_mb * have[n] - room.free[n].memory_mb,
            ),
        )
        have[node] += 1
    return ring(have, wanted)


def ring(have: Mapping[NodeId, int], wanted: int) -> tuple[NodeId, ...]:
    """Shards in an order in which neighbours are on different nodes, if no node has more than half of them: the node
    with the most takes every other seat, the next go on where it stopped."""
    line = [node for node, count in sorted(have.items(), key=lambda item: -item[1]) for _ in range(count)]
    seats = [*range(0, wanted, 2), *range(1, wanted, 2)]
    found = dict(zip(seats, line, strict=True))
    return tuple(found[k] for k in range(wanted))


def squeeze(room: Room, request: Request) -> tuple[NodeId, ...] | None:
    """A node for each shard, where it costs the fewest places for workers."""
    free = {node: amount for node, amount in room.free.items() if slots(amount, request.shard)}
    have: Counter[NodeId] = Counter()
    for _ in range(request.shards):
        if not free:
            return None
        node = min(
            free,
            key=lambda n: (
                slots(free[n], request.worker) - slots(free[n] - request.shard, request.worker),
                have[n],
                -free[n].memory_mb,
            ),
        )
        have[node] += 1
        free[node] = free[node] - request.shard
        if not slots(free[node], request.shard):
            del free[node]
    return ring(have, request.shards)
