"""How a machine dies and goes on as another, and what holds of it at any time. A part of the machine."""

from .ids import JobId
from .leases import Leases, Unwatched
from .rules import Rules
from .state import Finishing, Job, Kept, Over, Return, Running


class GoingOn:
    """What it is made of, in and out."""

    rules: Rules
    jobs: dict[JobId, Job]
    over: dict[JobId, Over]
    leases: Leases
    goodbyes: dict[JobId, float]
    returns: dict[JobId, Return]

    def keep(self) -> Kept:
        """All that another machine needs to go on as this one."""
        return Kept(self.jobs, self.over, self.goodbyes, self.returns)

    def unwatched(self, kept: Kept | None = None) -> None:
        """Become what another was, and wait to be told what happened to it then."""
        if kept is not None:
            self.jobs, self.over = kept.jobs, kept.over
            self.goodbyes, self.returns = kept.goodbyes, kept.returns
        self.leases = Unwatched(self.rules)
        self._grant_all(None)

    def watch(self, now: float, grace_s: float) -> None:
        """From now on time counts again; everybody who is alive is to be heard within `grace_s`."""
        self.leases = Leases(self.rules)
        self.leases.look(now)
        self._grant_all(grace_s)

    def _grant_all(self, lasts_s: float | None) -> None:
        for job in self.jobs.values():
            for member in job.members.everybody():
                self.leases.grant((job.id, member), lasts_s)

    def check(self) -> None:
        """Every invariant between two events; for tests."""
        for job in self.jobs.values():
            job.check()
        for over in self.over.values():
            over.check()
        alive = {(job.id, member) for job in self.jobs.values() for member in job.members.everybody()}
        assert alive == set(self.leases), "leases and members differ"
        finishing = {job.id for job in self.jobs.values() if isinstance(job.phase, Finishing)}
        assert finishing == self.goodbyes.keys(), (finishing, self.goodbyes)
        idle = {
            job.id
            for job in self.jobs.values()
            if isinstance(job.phase, Running) and not job.members.workers()
        }
        assert idle == self.returns.keys(), (idle, self.returns)
        assert not self.jobs.keys() & self.over.keys()
        assert len(self.over) <= self.rules.remembered_jobs
