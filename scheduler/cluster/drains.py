"""Who gives up what, so that a job can begin: workers above the least, anybody's, the last in the order first; then
whole jobs that come later in the order and are preemptible, again the last first. What proves not to be needed is given
back.
"""

from __future__ import annotations

from collections.abc import Sequence

from .placement import place, shrink
from .plan import Allocation, Candidate
from .request import Request
from .resources import Resources, Sums
from .stock import GaveWay, Stock


def make_room(stock: Stock, order: Sequence[Candidate], job: Candidate) -> Allocation | None:
    """Where it will find room, once those have left who lose what they have by this; None, and nothing has changed."""
    request = job.request
    needs = request.worker * request.least + request.shard * request.shards
    if not (stock.future.total + obtainable(stock, order, job)).holds(needs):
        return None
    releases = stock.releases
    gone: list[tuple[Candidate, Allocation]] = []
    found = None
    for other in reversed(order):
        has = stock.has.get(other.request.job)
        if has is None or len(has.workers) <= other.request.least or other.request.job in stock.began:
            continue
        if other.ending:  # it goes as a whole, or not at all
            continue
        gone.append((other, stock.release(other)))
        stock.keep(other, shrink(has, other.request.least))
        found = try_place(stock, request)
        if found is not None:
            break
    if found is None:
        for other in reversed(order):
            if other is job:
                break
            if other.request.job not in stock.has or not other.request.preemptible:
                continue
            gone.append((other, stock.release(other)))
            found = try_place(stock, request)
            if found is not None:
                break
    give_back(stock, gone, found, request)
    if found is None:
        stock.releases = releases  # everybody has what he had
    return found


def obtainable(stock: Stock, order: Sequence[Candidate], job: Candidate) -> Resources:
    """All that could be taken from others for this job: no more than that, wherever it is."""
    found: Sums[None] = Sums()
    later = False
    for other in order:
        later = later or other is job
        has = stock.has.get(other.request.job)
        if has is None:
            continue
        request = other.request
        if later and request.preemptible:
            found.add(None, request.worker, len(has.workers))
            found.add(None, request.shard, len(has.shards))
        elif len(has.workers) > request.least and not other.ending:
            found.add(None, request.worker, len(has.workers) - request.least)
    return found[None]


def try_place(stock: Stock, request: Request) -> Allocation | None:
    if stock.future.counts(request.worker).total < request.least:
        return None
    return place(stock.future, request, request.least)


def give_back(
    stock: Stock, gone: list[tuple[Candidate, Allocation]], found: Allocation | None, request: Request
) -> None:
    if found is not None:
        stock.future.take_all(found, request)
    for other, had in reversed(gone):
        left = stock.release(other) if other.request.job in stock.has else None
        if stock.future.holds(had, other.request):
            stock.keep(other, had)
        else:
            if left is not None:
                stock.keep(other, left)
            if found is not None:
                stock.gave_way[other.request.job] = GaveWay(request, found)
    if found is not None:
        stock.future.give_all(found, request)
