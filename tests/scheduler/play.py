"""A machine and a clock that tests move by hand: tell it what happened, compare what it orders."""

from zml.scheduler.actions import Action, Admit
from zml.scheduler.events import Event, Joined, Registered, Renewed, Submitted, Ticked
from zml.scheduler.ids import JobId, Role
from zml.scheduler.machine import Machine
from zml.scheduler.membership import Alive
from zml.scheduler.rules import Rules

JOB = JobId("j")
RULES = Rules(lease_s=1.0, goodbye_s=10.0)


class Play:
    """One job on a machine of its own. Every event is followed by a check of every invariant."""

    def __init__(self, workers: int, shards: int, rules: Rules = RULES, replicas: int = 0) -> None:
        self.machine = Machine(rules)
        self.now = 100.0
        assert self.tell(Submitted(JOB, workers, shards, 0, replicas=replicas)) == []

    def tell(self, event: Event) -> list[Action]:
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions

    def join(self, role: Role, peer: str, member: str = "") -> list[Action]:
        return self.tell(Joined(JOB, role, member, peer))

    def wait(self, seconds: float) -> list[Action]:
        """Time passes, everybody alive is heard in time; then it is looked at."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.5, end)
            assert self.hear(*self.alive()) == []
        return self.tell(Ticked(JOB))

    def fall_silent(self, *members: str) -> list[Action]:
        """Everybody else is heard until the leases of these are over."""
        others = [member for member in self.alive() if member not in members]
        actions: list[Action] = []
        for _ in range(3):
            self.now += 0.5
            actions += [*self.hear(*others), *self.tell(Ticked(JOB))]
        return actions

    def hear(self, *members: str) -> list[Action]:
        return [action for m in members for action in self.tell(Renewed(JOB, m, self.incarnation(m)))]

    def register(self, worker: str, digest: str = "d", chunks: int = 4) -> list[Action]:
        return self.tell(Registered(JOB, worker, self.incarnation(worker), digest, chunks))

    def alive(self) -> list[str]:
        job = self.machine.jobs.get(JOB)
        return list(job.members.everybody()) if job is not None else []

    def incarnation(self, member: str) -> int:
        (view,) = [view for view in self.machine.members(JOB) if view.member == member]
        return view.incarnation

    def peer(self, member: str) -> str:
        job = self.machine.jobs[JOB]
        (record,) = [record for name, record in job.members.records.items() if name == member]
        assert isinstance(record, Alive)
        return record.peer

    def state(self) -> str:
        return self.machine.state(JOB).name


def running(workers: int, shards: int, rules: Rules = RULES, replicas: int = 0) -> Play:
    """A job whose members have just become complete. Peers are called agent-0, ... and shard-0, ..."""
    play = Play(workers, shards, rules, replicas)
    for number in range(shards):
        play.join("shard", f"shard-{number}")
    for number in range(workers):
        assert any(isinstance(action, Admit) for action in play.join("worker", f"agent-{number}"))
    assert play.state() == "RUNNING"
    return play
