"""What is left over once everybody has had his turn lets jobs grow: beside the workers they have, or packed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from ..ids import JobId
from .placement import extend, pack
from .plan import Allocation, Candidate
from .request import Request
from .stock import Stock

Worth: TypeAlias = Callable[[Candidate, Allocation, Allocation], bool]
"""Is the second allocation worth changing the first for?"""


def grow(stock: Stock, jobs: Mapping[JobId, Candidate], names: Iterable[JobId], worth: Worth | None) -> None:
    """In this order."""
    for name in names:
        has = stock.has.get(name)
        job = jobs[name]
        if has is None or job.ending:
            continue
        request, count = job.request, len(has.workers)
        able = stock.most(request) - count
        if able <= 0 and (worth is None or count == 1):
            continue  # no more for it, and nothing that could stand nearer together
        able = min(able, stock.now.counts(request.worker).total)
        while able > 0 and stock.beyond_quota(request, able) is not None:
            able -= 1
        more = best_of(stock, job, has, count + max(able, 0), worth)
        if more is not None:
            stock.change(job, has, more)


def best_of(
    stock: Stock, job: Candidate, has: Allocation, workers: int, worth: Worth | None
) -> Allocation | None:
    """The job with so many workers: beside those it has, or all of them packed anew where that takes fewer nodes
    and the policy knows what that is worth. None: as it is."""
    request = job.request
    found = extend(stock.now, request, has, workers) if workers > len(has.workers) else None
    if worth is not None and len(set((found or has).workers)) > fewest(stock, request, workers):
        only = Allocation(has.workers, ())
        stock.now.give_all(only, request)
        packed = pack(stock.now, request.worker, workers)
        stock.now.take_all(only, request)
        if packed is not None and len(set(packed)) < len(set((found or has).workers)):
            found = Allocation(packed, has.shards)
    if found is None or worth is None or request.job in stock.began or worth(job, has, found):
        return found
    return None


def fewest(stock: Stock, request: Request, workers: int) -> int:
    """Nodes for so many workers, if they had the largest ones to themselves."""
    per_node = max(stock.empty.counts(request.worker).on.values(), default=1)
    return -(-workers // max(per_node, 1))
