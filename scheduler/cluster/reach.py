"""All that there can be: as many nodes of a pool as its owner allows, beside those that are not of it.

A job that would not find room there, were nobody else in it, never begins: no node is kept for it, and it is told so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from ..explain import counted
from .placement import Room, place, slots
from .reasons import do_not_fit
from .request import Kind, Request, kind_of
from .resources import Node, NodeId, Resources


class Reach:
    """`kind`: a node of the pool; `limit`: why there are no more than `most`; `others`: nodes that are not of it."""

    def __init__(self, kind: Node, most: int, limit: str, others: Iterable[Node] = ()) -> None:
        self.kind = kind
        self.most = most
        self.limit = limit
        self.others = tuple(node for node in others if not node.leaving)
        self._known: dict[Kind, int | None] = {}

    def nodes_for(self, request: Request) -> int | None:
        """The fewest nodes of the pool with which it could begin, were nobody else there; None: not with all."""
        kind = kind_of(request)
        if kind not in self._known:
            enough = min(self.most, request.least + request.shards)  # each process on one of its own
            fewest = bisect_left(range(enough + 1), True, key=lambda count: self._fits(request, count))
            self._known[kind] = fewest if fewest <= enough else None
        return self._known[kind]

    def _fits(self, request: Request, count: int) -> bool:
        pool = [Node(id=NodeId(f"{self.kind.id}{i}"), offers=self.kind.offers) for i in range(count)]
        return place(Room([*self.others, *pool]), request, request.least) is not None

    def why_not(self, request: Request) -> str:
        """In words, where `nodes_for` finds none."""
        offers = self.kind.offers
        for what, needs in (("worker", request.worker), ("shard", request.shard)):
            if not any(slots(each, needs) for each in (offers, *(node.offers for node in self.others))):
                others = ", and no other node that is here has" if self.others else ""
                return f"no node of the pool has {needs} for one {what}; each has {offers}{others}"
        if self.others:
            here = "the 1 node that is" if len(self.others) == 1 else f"the {len(self.others)} nodes that are"
            return f"{do_not_fit(request)} on {here} not of the pool and all that it may have: {self.limit}"
        needs = request.worker * request.least + request.shard * request.shards
        fewest = max(ceil(request.least / slots(offers, request.worker)), whole(needs, offers))
        if fewest > self.most:
            return f"it needs {counted(fewest, 'node')}: {self.limit}"
        return f"{do_not_fit(request)}, even if all nodes were empty: {self.limit}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """What an autoscaler says."""

    reach: Reach
    because: str
    """Why there are as many nodes as there are."""
    coming: int = 0
    """Nodes that were asked for and are not here yet."""
    trouble: str = ""
    """Why those that were asked for have not come, where they have not."""

    def __str__(self) -> str:
        if self.coming:
            said = (
                "a node has been asked for"
                if self.coming == 1
                else f"{self.coming} nodes have been asked for"
            )
        else:
            said = f"of further nodes: {self.because}"
        return f"{said}; {self.trouble}" if self.trouble else said


def whole(needs: Resources, offers: Resources) -> int:
    """So many nodes that offer this have it, wherever on them it is."""
    shares = [(needs.gpus, offers.gpus), (needs.cpus, offers.cpus), (needs.memory_mb, offers.memory_mb)]
    return max(ceil(need / offer) if offer else 0 for need, offer in shares)
