"""Which jobs that are over may go, with all that lies on disk of them?

Rule: only what is over, never the newest ones, never what somebody else may still need; and nothing at all unless it
was asked for. Where both bounds are given, a job goes when it is beyond both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..explain import counted
from ..ids import JobId
from .state import Cluster

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Of jobs that are over. Raises ValueError."""

    jobs: int | None = None
    """So many, the newest, stay however old they are."""
    days: float | None = None
    """And all that ended less long ago."""

    def __post_init__(self) -> None:
        if (self.jobs or 0) < 0 or (self.days or 0.0) < 0:
            raise ValueError("what is kept of jobs that are over must not be negative")

    @property
    def everything(self) -> bool:
        return self.jobs is None and self.days is None


def expired(cluster: Cluster, keep: Keep, needed: Collection[JobId], now: float) -> list[tuple[JobId, str]]:
    """Who goes, and why; those that ended first come first. `needed`: by others."""
    if keep.everything:
        return []
    found = []
    newer = len(cluster.over)
    for name, over in cluster.over.items():
        newer -= 1
        age_s = now - over.at
        if newer < (keep.jobs or 0) or (keep.days is not None and age_s < keep.days * DAY_S):
            break  # and all that come after it ended later
        if name not in needed:
            found.append((name, f"it ended {age_s / DAY_S:.1f} days ago, and {counted(newer, 'job')} since"))
    return found
