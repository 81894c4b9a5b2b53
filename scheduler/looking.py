"""Questions to the machine about its jobs. A part of it that changes nothing."""

from collections.abc import Sequence

from . import explain
from .actions import Action, Ignored, Refuse
from .events import Event, Finding, Joined, Renewed, Ticked
from .explain import MemberView
from .ids import JobId, Seat, ShardId, WorkerId, shard_id
from .state import Forming, Job, Over, State


class Looking:
    """Whoever asks about a job that is not known gets a KeyError, unless it says otherwise."""

    jobs: dict[JobId, Job]
    over: dict[JobId, Over]

    def state(self, job: JobId) -> State:
        """Raises KeyError for a job that is not known, as do the other questions."""
        return self._find(job).state

    def because(self, job: JobId) -> str:
        """Why the job is in its state, as a sentence; empty where all is well."""
        return explain.why(self._find(job))

    def waiting_for(self, job: JobId) -> str:
        """Who keeps the job from going on: "waiting for 1 of 4 workers and shard p1"; empty when nobody does."""
        found = self._find(job)
        return explain.waiting_for(found) if isinstance(found, Job) else ""

    def missing(self, job: JobId) -> list[str]:
        """Who has to join before the job begins: "1 of 4 workers", "shards p1 and p2". Nobody, once it has."""
        found = self.jobs.get(job)
        return explain.missing(found) if found is not None and isinstance(found.phase, Forming) else []

    def exit_code(self, job: JobId) -> int | None:
        """None until the job is over."""
        found = self._find(job)
        return found.exit_code if isinstance(found, Over) else None

    def generation(self, job: JobId) -> int:
        return self._find(job).generation

    def members(self, job: JobId) -> list[MemberView]:
        """All that ever were members: the workers by number, then the shards."""
        return explain.members(self._find(job))

    def workers(self, job: JobId) -> list[WorkerId]:
        """The active workers in order of seniority."""
        found = self._find(job)
        return found.members.workers() if isinstance(found, Job) else []

    def seats(self, job: JobId) -> tuple[Seat, ...]:
        """The active workers with their incarnations, in order of seniority."""
        found = self._find(job)
        return found.members.seats() if isinstance(found, Job) else ()

    def shards(self, job: JobId) -> list[ShardId]:
        """The shards asked for and those that have joined since: what a placement's numbers point into."""
        found = self._find(job)
        return [shard_id(number) for number in range(found.shards)] if isinstance(found, Job) else []

    def is_current(self, job: JobId, member: str, incarnation: int) -> bool:
        """Is this incarnation a member now? What any other sends is to be refused."""
        found = self.jobs.get(job)
        return found is not None and found.members.current(member, incarnation) is not None

    def _find(self, job: JobId) -> Job | Over:
        return self.jobs[job] if job in self.jobs else self.over[job]


def changed(event: Event | Finding, actions: Sequence[Action]) -> bool:
    """Must whoever tells the story again tell of this event too? These actions were the answer to it."""
    if isinstance(event, Renewed | Ticked):
        return False
    no = Ignored | Refuse if isinstance(event, Joined) else Ignored
    return not actions or not all(isinstance(action, no) for action in actions)
