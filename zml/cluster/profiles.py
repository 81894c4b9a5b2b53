"""What the attempts' own coordinators know of how fast their jobs learn, as profiles for the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..scheduler.cluster.observed import Step, observe
from ..scheduler.cluster.plan import Profile
from ..scheduler.cluster.state import Cluster
from ..scheduler.ids import JobId
from .attempts import Attempts, attempt_name

FRESH_S = 5.0  # a profile is looked at again after this long


class Known(NamedTuple):
    at: float
    profile: Profile | None


class Profiles:
    """Of jobs that may have more workers than they have to: nobody asks about others."""

    def __init__(self, attempts: Attempts) -> None:
        self.attempts = attempts
        self.known: dict[JobId, Known] = {}

    def of(self, cluster: Cluster, now: float) -> Mapping[JobId, Profile]:
        """What a job has shown in one attempt it is believed to do in the next, until that shows more."""
        for name in [name for name in self.known if name not in cluster.jobs]:
            del self.known[name]
        for job in cluster.jobs.values():
            attempt, request = job.attempt, job.request
            if request.least == request.most or attempt is None or attempt.began is None:
                continue
            known = self.known.get(job.id)
            if known is not None and now - known.at < FRESH_S:
                continue
            life = self.attempts.lives.get(attempt_name(job.id, attempt.number))
            hall = life.coordinator if life is not None else None
            if hall is None or hall.ledger.current is None:
                continue
            batch = hall.ledger.current.batch_size
            nodes = len(set(attempt.allocation().workers)) or 1
            found = observe(
                [Step(each.workers, each.step_s, each.batch_size) for each in hall.board.step_times(batch)],
                nodes=nodes,
                shards=request.shards,
                base=request.least,
                phi=hall.board.noise(batch).scale,
            )
            before = known.profile if known is not None else None
            self.known[job.id] = Known(now, found or before)
        return {name: known.profile for name, known in self.known.items() if known.profile is not None}
