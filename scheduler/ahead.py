"""How many batches does a worker hold beyond those that it has begun?

Enough to go on without the coordinator while that is started again, and few enough that who joins in the middle of an
epoch finds some that nobody has taken.
"""

from math import ceil

AHEAD_S = 5.0  # of computing: on a busy machine a coordinator that was killed is away for two to four seconds
PART = 4  # of a worker's share of an epoch, at most
MOST = 1024


def ahead(batch_s: float | None, share: int) -> int:
    """A worker with about `share` batches in an epoch, `batch_s` seconds for each (None: not known yet), asks for more
    when it has so many left."""
    if batch_s is None:
        return 0
    return min(MOST, share // PART, ceil(AHEAD_S / max(batch_s, AHEAD_S / MOST)))
