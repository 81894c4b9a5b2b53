"""The cluster machine in a small world that does what it is told, now or later, and in which anything may happen."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zml.scheduler.cluster import actions, events, whys
from zml.scheduler.cluster.events import Outcome
from zml.scheduler.cluster.machine import HANDLERS, Machine
from zml.scheduler.cluster.plan import View, Why
from zml.scheduler.cluster.policies import POLICIES
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.resources import Node, NodeId, Resources
from zml.scheduler.cluster.rules import Rules
from zml.scheduler.cluster.state import Cluster, Standing, Then
from zml.scheduler.cluster.view import view_of
from zml.scheduler.ids import JobId
from zml.scheduler.plain import build, build_fields, plain, plain_fields

RULES = Rules(
    lease_s=5, start_s=60, drain_s=30, stop_s=10, finish_s=20, retry_s=5, losses=50, false_starts=50
)
OTHERS = Rules(
    lease_s=9,
    start_s=600,
    drain_s=300,
    stop_s=100,
    finish_s=2,
    retry_s=9,
    losses=1,
    false_starts=1,
    remembered=1,
)
ONE = Resources(cpus=1)


def node(name: str, cpus: int = 4, **more: Any) -> Node:
    return Node(id=NodeId(name), offers=Resources(cpus=cpus), **more)


class World:
    """Nodes and attempts as a dictionary of processes. `told` is the journal: what was told, and when."""

    def __init__(self, policy: str = "las") -> None:
        self.machine = Machine(RULES)
        self.policy = POLICIES[policy]
        self.now = 1000.0
        self.told: list[tuple[Any, float]] = []
        self.log: list[actions.Action] = []
        self.boots: dict[str, str] = {}  # of nodes that are well
        self.running: dict[tuple[str, int, str], str] = {}  # process -> node
        self.attempts: dict[
            tuple[str, int], str
        ] = {}  # opened and not closed -> what its coordinator was told
        self.finished: dict[str, Standing] = {}
        self.seen: View | None = None

    # -- time and events --------------------------------------------------------------------------------

    def tell(self, event: Any) -> list[actions.Action]:
        self.told.append((event, self.now))
        ordered = self.machine.tell(event, self.now)
        self.machine.cluster.check()
        for action in ordered:
            self.obey(action)
        return ordered

    def find(self) -> None:
        while (finding := self.machine.finding(self.now)) is not None:
            self.tell(finding)

    def round(self) -> None:
        self.seen = None
        for decision in self.machine.decide(self.policy, self.now):
            self.tell(decision)

    def look(self) -> None:
        """A plan begins to be made of what there is now."""
        self.seen = self.machine.look(self.now)

    def agree(self) -> None:
        """It is made, whatever has happened meanwhile."""
        seen, self.seen = self.seen, None
        if seen is not None:
            for decision in self.machine.agree(self.policy(seen)):
                self.tell(decision)

    def advance(self, seconds: float) -> None:
        """In small steps, while everybody who is well is heard."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            for name, boot in self.boots.items():
                self.machine.tell(events.NodeHeard(NodeId(name), boot), self.now)
            self.find()
            self.round()

    # -- the world does what it is told --------------------------------------------------------------------

    def obey(self, action: actions.Action) -> None:
        self.log.append(action)
        match action:
            case actions.Open(job=job, attempt=number):
                assert (job, number) not in self.attempts
                assert not any(other == job for other, _ in self.attempts), "two attempts of one job"
                self.attempts[job, number] = ""
            case actions.Close(job=job, attempt=number):
                del self.attempts[job, number]
                assert not [key for key in self.running if key[:2] == (job, number)], "closed, and it runs"
            case actions.Run(job=job, attempt=number, slot=slot, node=name):
                told = [(gone.job, gone.attempt, gone.slot) for gone in self.later]  # but not heard yet
                if name in self.boots and (job, number, slot) not in told:
                    self.running[job, number, slot] = name
            case actions.Quit(job=job, attempt=number, slot=slot, at_once=True):
                self.cease(job, number, slot)
            case actions.Drain(job=job, attempt=number):
                self.attempts[job, number] = "drain"
            case actions.Stop(job=job, attempt=number):
                self.attempts[job, number] = "stop"
            case actions.Finish(job=job, state=state):
                assert job not in self.finished, "over twice"
                self.finished[job] = state

    def come(self, name: str, cpus: int = 4) -> None:
        if name in self.boots:  # started again
            self.die(name)
        self.boots[name] = f"boot-{name}-{len(self.told)}"
        self.tell(events.NodeCame(node(name, cpus), self.boots[name]))

    def die(self, name: str) -> None:
        """Nobody says so."""
        del self.boots[name]
        self.running = {key: where for key, where in self.running.items() if where != name}

    def cease(self, job: str, number: int, slot: str, *, done: bool = False) -> None:
        if self.running.pop((job, number, slot), None) is not None:
            self.later.append(events.Gone(JobId(job), number, slot, "it ended", done))

    later: list[Any]

    def settle(self) -> None:
        """What nodes still have to say is said."""
        while self.later:
            self.tell(self.later.pop(0))

    def begin(self, job: str, number: int) -> None:
        self.tell(events.Began(JobId(job), number))

    def end(self, job: str, number: int, outcome: Outcome, code: int = 1) -> None:
        code = 0 if outcome is Outcome.SUCCEEDED else code
        self.tell(events.Ended(JobId(job), number, outcome, code, "so"))
        for key in [key for key in self.running if key[:2] == (job, number)]:
            self.cease(*key)
        self.settle()

    def submit(self, job: str, **more: Any) -> None:
        self.tell(events.Submitted(Request(job=JobId(job), worker=ONE, **{"submitted": self.now, **more})))


@pytest.fixture
def world() -> World:
    return new_world()


def new_world(policy: str = "las") -> World:
    world = World(policy)
    world.later = []
    return world


def standing(world: World, job: str) -> Standing:
    found = world.machine.cluster.jobs.get(JobId(job))
    return found.standing if found is not None else world.machine.cluster.over[JobId(job)].standing


def test_a_job_begins_when_there_is_room_and_ends_when_nothing_of_it_is_left(world: World) -> None:
    world.submit("j1", least=2, most=2)
    world.round()
    assert standing(world, "j1") is Standing.QUEUED

    world.come("n1", cpus=2)
    world.round()
    runs = [a for a in world.log if isinstance(a, actions.Run)]
    assert [(a.job, a.attempt, a.slot, a.node) for a in runs] == [
        ("j1", 1, slot, "n1") for slot in ("p0", "w0", "w1")
    ]
    assert standing(world, "j1") is Standing.STARTING
    world.begin("j1", 1)
    assert standing(world, "j1") is Standing.RUNNING
    world.tell(events.Ended(JobId("j1"), 1, Outcome.SUCCEEDED, 0, "all finished"))
    assert standing(world, "j1") is Standing.DRAINING and not world.finished
    world.end("j1", 1, Outcome.SUCCEEDED)
    assert world.finished == {"j1": Standing.SUCCEEDED} and not world.attempts


def test_a_job_that_comes_after_one_that_failed_never_begins(world: World) -> None:
    world.come("n1")
    world.submit("j1")
    world.submit("j2", after=(JobId("j1"),))
    world.submit("j3", after=(JobId("j2"),))
    world.round()
    world.begin("j1", 1)
    world.end("j1", 1, Outcome.FAILED)
    assert world.finished == {"j1": Standing.FAILED, "j2": Standing.CANCELLED, "j3": Standing.CANCELLED}


def test_a_failure_is_tried_again_as_often_as_was_asked_for(world: World) -> None:
    world.come("n1")
    world.submit("j1", retries=1)
    world.round()
    for number in (1, 2):
        world.begin("j1", number)
        world.end("j1", number, Outcome.FAILED)
        world.round()
        assert world.attempts == {}, "not at once"
        world.advance(6)
    assert world.finished == {"j1": Standing.FAILED}


def test_machines_that_are_lost_cost_no_retry(world: World) -> None:
    world.come("n1", cpus=1)
    world.submit("j1", retries=0)
    world.round()
    world.begin("j1", 1)
    world.die("n1")
    world.advance(20)
    assert [a.because for a in world.log if isinstance(a, actions.Bury)], "its coordinator is told"
    world.end("j1", 1, Outcome.CANCELLED)
    world.come("n2")
    world.advance(10)
    assert list(world.attempts) == [("j1", 2)] and not world.finished


def test_whoever_does_not_leave_is_stopped_and_then_killed(world: World) -> None:
    world.come("n1")
    world.submit("j1")
    world.round()
    world.begin("j1", 1)
    world.tell(events.CancelAsked(JobId("j1"), "not needed"))
    assert world.attempts["j1", 1] == "drain"
    world.advance(31)
    assert world.attempts["j1", 1] == "stop"
    world.advance(11)
    assert not world.running, "killed"
    world.settle()
    assert world.finished == {"j1": Standing.CANCELLED} and not world.attempts


def test_a_pause_that_is_taken_back_on_the_way_out_is_none(world: World) -> None:
    world.come("n1")
    world.submit("j1")
    world.round()
    world.begin("j1", 1)
    world.tell(events.PauseAsked(JobId("j1"), "lunch"))
    world.tell(events.ResumeAsked(JobId("j1")))
    job = world.machine.cluster.jobs[JobId("j1")]
    assert job.attempt is not None and job.attempt.leaving is not None
    assert job.attempt.leaving.then is Then.REQUEUE
    world.end("j1", 1, Outcome.DRAINED)
    world.round()
    assert list(world.attempts) == [("j1", 2)]


def test_a_job_that_was_cancelled_is_not_paused_instead(world: World) -> None:
    world.come("n1")
    world.submit("j1")
    world.round()
    world.begin("j1", 1)
    world.tell(events.CancelAsked(JobId("j1"), "not needed"))
    world.tell(events.PauseAsked(JobId("j1"), "lunch"))
    world.end("j1", 1, Outcome.DRAINED)
    assert world.finished == {"j1": Standing.CANCELLED}


@pytest.mark.parametrize("outcome", [None, Outcome.DRAINED, Outcome.CANCELLED, Outcome.FAILED])
def test_a_cancelled_job_has_one_exit_code_whether_it_waited_or_ran(
    world: World, outcome: Outcome | None
) -> None:
    world.submit("j1")
    if outcome is not None:
        world.come("n1")
        world.round()
        world.begin("j1", 1)
    world.tell(events.CancelAsked(JobId("j1"), "not needed"))
    if outcome is not None:
        world.end("j1", 1, outcome, 75)
    over = world.machine.cluster.over[JobId("j1")]
    assert (over.standing, over.exit_code) == (Standing.CANCELLED, 130)


def test_a_node_that_leaves_takes_its_workers_along_and_no_job(world: World) -> None:
    world.come("n1", cpus=2)
    world.submit("j1", least=1, most=4)
    world.round()
    world.begin("j1", 1)
    world.come("n2", cpus=2)
    world.advance(2)
    assert sorted(world.running.values()) == ["n1", "n1", "n1", "n2", "n2"], "it has grown"
    world.tell(events.NodeLeaving(NodeId("n2"), "maintenance"))
    leaves = [a.slot for a in world.log if isinstance(a, actions.Quit)]
    assert leaves == [key[2] for key, where in world.running.items() if where == "n2"]
    assert world.attempts == {("j1", 1): ""}
    world.advance(5)
    assert [a for a in world.log if isinstance(a, actions.Open)][1:] == []


def test_a_node_that_offers_itself_again_is_told_what_it_may_have_missed(world: World) -> None:
    world.come("n1", cpus=1)
    world.submit("j1")
    world.round()
    ordered = world.tell(events.NodeCame(node("n1", 1), world.boots["n1"]))
    assert [(a.slot, a.node) for a in ordered if isinstance(a, actions.Run)] == [("p0", "n1"), ("w0", "n1")]


def test_a_long_row_of_jobs_ends_with_its_first(world: World) -> None:
    world.submit("j0")
    for number in range(1, 2000):
        world.submit(f"j{number}", after=(JobId(f"j{number - 1}"),))
    world.tell(events.CancelAsked(JobId("j0"), "not needed"))
    assert len(world.finished) == 2000 and {*world.finished.values()} == {Standing.CANCELLED}


def test_a_job_waits_for_all_that_it_comes_after_however_long_ago_they_succeeded(world: World) -> None:
    """Also where the first of them is not remembered any more when the last one ends."""
    world.machine.rules = replace(RULES, remembered=1)
    world.come("n1", cpus=8)
    for name in ("j1", "j2"):
        world.submit(name)
    world.submit("j3", after=(JobId("j1"), JobId("j2")))
    world.round()
    world.begin("j1", 1)
    world.end("j1", 1, Outcome.SUCCEEDED)
    world.submit("j4")
    world.tell(events.CancelAsked(JobId("j4"), "so that j1 is forgotten"))
    assert JobId("j1") not in world.machine.cluster.over
    world.begin("j2", 1)
    world.end("j2", 1, Outcome.SUCCEEDED)
    world.round()
    assert ("j3", 1) in world.attempts


def test_a_worker_that_does_not_leave_is_killed(world: World) -> None:
    world.come("n1", cpus=2)
    world.submit("j1", least=1, most=2)
    world.round()
    world.begin("j1", 1)
    world.tell(events.ScaleAsked(JobId("j1"), 1, 1))
    world.advance(20)
    assert [key[2] for key in sorted(world.running)] == ["p0", "w0", "w1"], "it has time"
    world.advance(15)
    world.settle()
    assert [key[2] for key in sorted(world.running)] == ["p0", "w0"]
    assert world.attempts == {("j1", 1): ""}, "and the job goes on"


def test_a_job_that_loses_one_before_it_begins_does_not_keep_the_others_waiting(world: World) -> None:
    world.come("n1")
    world.submit("j1", least=2, most=2)
    world.round()
    world.cease("j1", 1, "w1")
    world.settle()
    assert world.attempts["j1", 1] == "stop"
    world.end("j1", 1, Outcome.CANCELLED)
    world.advance(6)
    assert list(world.attempts) == [("j1", 2)]


def test_attempts_that_do_not_begin_and_those_that_are_lost_are_counted_apart(world: World) -> None:
    world.machine.rules = replace(RULES, false_starts=2, losses=3)
    world.come("n1")
    world.submit("j1")

    def lose(*, begun: bool) -> None:
        world.advance(400)
        job, number = max(world.attempts)
        if begun:
            world.begin(job, number)
        world.end(job, number, Outcome.LOST)

    lose(begun=True)
    lose(begun=False)
    lose(begun=True)
    lose(begun=False)
    assert not world.finished, "two of each, never two false starts in a row"
    lose(begun=False)
    assert world.finished == {"j1": Standing.FAILED}
    assert "did not begin" in world.machine.cluster.over[JobId("j1")].because


def test_who_was_to_be_gone_while_nobody_watched_has_his_time_again(world: World) -> None:
    """The coordinator was away for an hour; nobody could tell the job to leave."""
    world.come("n1")
    world.submit("j1")
    world.round()
    world.begin("j1", 1)
    world.tell(events.PauseAsked(JobId("j1"), "lunch"))
    world.now += 3600
    world.machine.watch(world.now, 15)
    world.advance(20)
    assert world.attempts["j1", 1] == "drain"
    world.advance(30)
    assert world.attempts["j1", 1] == "stop"


def test_a_shard_that_is_replaced_stays_apart_from_its_backup(world: World) -> None:
    for name in ("n1", "n2", "n3"):
        world.come(name, cpus=1)
    world.submit("j1", shards=2, replicas=1)
    world.round()
    world.begin("j1", 1)
    shards = {key[2]: where for key, where in world.running.items() if key[2][0] == "p"}
    assert shards["p0"] != shards["p1"]
    world.die(shards["p1"])
    world.advance(30)
    now = {key[2]: where for key, where in world.running.items() if key[2][0] == "p"}
    assert now["p0"] == shards["p0"] and now["p1"] not in (shards["p0"], shards["p1"])


def test_what_happens_while_a_plan_is_made_goes_before_it(world: World) -> None:
    for name in ("n1", "n2", "n3"):
        world.come(name, cpus=1)
    for job in ("j1", "j2", "j3"):
        world.submit(job)
    world.look()
    world.tell(events.PauseAsked(JobId("j1"), "lunch"))
    world.tell(events.NodeLeaving(NodeId("n2"), "maintenance"))
    world.submit("j4")
    world.agree()
    assert {key[0]: where for key, where in world.running.items()} == {"j3": "n3"}
    world.round()
    assert {key[0]: where for key, where in world.running.items()} == {"j2": "n1", "j3": "n3"}


def test_a_policy_sees_how_long_a_job_has_run_and_not_how_long_it_began(world: World) -> None:
    world.come("n1", cpus=4)
    world.submit("j1", least=1, most=4, time_limit_s=100.0)
    world.round()
    world.advance(20)
    world.begin("j1", 1)
    world.advance(30)
    (seen,) = world.machine.look(world.now).jobs
    assert len(world.running) == 5 and seen.attained_s > 100
    assert (seen.ran_s, seen.may_run_s) == (30.0, 70.0)
    world.end("j1", 1, Outcome.DRAINED)
    world.round()
    world.advance(5)
    (seen,) = world.machine.look(world.now).jobs
    assert (seen.ran_s, seen.may_run_s) == (30.0, 70.0)


def test_workers_that_leave_and_jobs_that_lack_a_shard_are_held_by_their_users(world: World) -> None:
    for name in ("n1", "n2"):
        world.come(name, cpus=2)
    world.submit("j1", least=1, most=2, shards=2, user="ada")
    world.submit("j2", least=2, most=2, user="bob")
    world.round()
    for name in ("j1", "j2"):
        world.begin(name, 1)
    world.advance(2)
    world.tell(events.ScaleAsked(JobId("j1"), 1, 1))
    world.round()
    seen = world.machine.look(world.now)
    assert (seen.held, seen.held_workers) == ({"ada": ONE}, {"ada": 1})
    job = world.machine.cluster.jobs[JobId("j1")]
    world.tell(events.Gone(JobId("j1"), 1, "p1", "it ended"))
    assert job.is_short
    seen = world.machine.look(world.now)
    assert (seen.held, seen.held_workers) == ({"ada": ONE * 2}, {"ada": 2})


def test_a_shard_that_is_lost_comes_again_also_where_a_script_has_come_to_its_end(world: World) -> None:
    for name in ("n1", "n2", "n3"):
        world.come(name, cpus=1)
    world.submit("j1", least=2, most=2, shards=2, replicas=1)
    world.round()
    world.begin("j1", 1)
    places = {slot: where for (_, _, slot), where in world.running.items()}
    stays = next(slot for slot in ("w0", "w1") if places[slot] == places["p0"])
    world.cease("j1", 1, "w1" if stays == "w0" else "w0", done=True)
    world.settle()
    world.die(places["p1"])
    world.advance(15)
    assert standing(world, "j1") is Standing.DRAINING
    assert ("j1", 1, "p1") in world.running and len(world.running) == 3


def test_a_job_whose_scripts_do_not_all_end_makes_room_like_any_other_after_a_while(world: World) -> None:
    world.come("n1", cpus=3)
    world.submit("j1", least=2, most=3)
    world.round()
    world.begin("j1", 1)
    world.cease("j1", 1, "w0", done=True)
    world.settle()
    world.advance(15)
    assert standing(world, "j1") is Standing.DRAINING
    world.advance(15)
    assert standing(world, "j1") is Standing.RUNNING
    assert len([slot for _, _, slot in world.running if slot[0] == "w"]) == 2, (
        "nobody is added to those who end"
    )
    world.submit("j2", priority=5, least=3, most=3)
    world.come("n2", cpus=1)  # where one of its workers could go
    world.advance(2)
    assert world.attempts == {("j1", 1): "drain"}
    world.end("j1", 1, Outcome.DRAINED)
    world.advance(2)
    assert [*world.attempts] == [("j2", 1)] and standing(world, "j1") is Standing.QUEUED


def test_of_a_job_that_finishes_by_a_former_version_time_is_up_at_once(world: World) -> None:
    world.come("n1", cpus=2)
    world.submit("j1", least=2, most=2)
    world.round()
    world.begin("j1", 1)
    world.cease("j1", 1, "w0", done=True)
    world.settle()
    data = plain(world.machine.cluster)
    del data["jobs"]["j1"]["attempt"]["finishing_until"], data["rules"]
    again = Machine(RULES)
    again.become(build(Cluster, data, "cluster"))
    assert again.cluster.jobs[JobId("j1")].standing is Standing.DRAINING
    again.watch(world.now, 100.0)
    assert again.finding(world.now) is None, "nobody has listened yet"
    again.patient_until = world.now
    found = again.finding(world.now)
    assert found == events.TimeUp(JobId("j1"), events.Late.FINISH)
    again.tell(found, world.now)
    assert again.cluster.jobs[JobId("j1")].standing is Standing.RUNNING
    assert again.finding(world.now) is None, "once"


def test_every_event_has_a_handler_and_a_place_in_the_journal() -> None:
    kinds = {*events.Event.__args__}
    assert kinds == HANDLERS.keys()


# -- anything may happen ---------------------------------------------------------------------------------


def live(world: World, rng: random.Random) -> None:
    """One thing happens, chosen by chance among those that can."""
    cluster = world.machine.cluster
    attempts = [(job, number) for job, number in world.attempts]
    began = [
        (job.id, job.attempt.number) for job in cluster.jobs.values() if job.attempt and job.attempt.began
    ]
    jobs = [*cluster.jobs, JobId("j999")]
    ended = [*cluster.over, JobId("j999"), *cluster.jobs]
    choices: list[Any] = [
        lambda: world.submit(
            f"j{len(world.told)}",
            least=rng.randint(1, 3),
            most=rng.randint(3, 6),
            shards=rng.randint(1, 2),
            priority=rng.randint(0, 1),
            retries=rng.randint(0, 1),
            after=tuple(rng.sample([*cluster.jobs], k=min(len(cluster.jobs), rng.randint(0, 1)))),
            time_limit_s=rng.choice([None, None, 40.0]),
        ),
        lambda: world.come(rng.choice(["n1", "n2", "n3"]), rng.randint(1, 6)),
        lambda: world.advance(rng.choice([1.0, 7.0, 30.0])),
        world.round,
        world.look,
        world.agree,
        world.settle,
        lambda: world.tell(events.CancelAsked(rng.choice(jobs), "asked")),
        lambda: world.tell(events.PauseAsked(rng.choice(jobs), "asked")),
        lambda: world.tell(events.ResumeAsked(rng.choice(jobs))),
        lambda: world.tell(events.Discarded(rng.choice(ended), "asked")),
        lambda: world.tell(events.ScaleAsked(rng.choice(jobs), 1, rng.randint(1, 5))),
    ]
    if world.boots:
        name = rng.choice(sorted(world.boots))
        choices += [
            lambda: world.die(name),
            lambda: world.tell(events.NodeLeaving(NodeId(name), "asked")),
            lambda: world.tell(events.NodeCame(node(name, 6), world.boots[name])),
        ]
    if attempts:
        job, number = rng.choice(attempts)
        choices += [lambda: world.begin(job, number)] * 3
        choices.append(lambda: world.end(job, number, rng.choice([*Outcome])))
    if began:
        job, number = rng.choice(began)
        choices.append(lambda: world.end(job, number, Outcome.SUCCEEDED))
    if world.running:
        key = rng.choice(sorted(world.running))
        choices.append(lambda: world.cease(*key, done=rng.random() < 0.3))
    rng.choice(choices)()


def check_reasons(world: World) -> None:
    """Whoever does not run is told why, and nobody is told what is not true any more."""
    machine = world.machine
    for job in machine.cluster.jobs.values():
        why, because = whys.why(machine.cluster, job, machine.verdicts, world.now, "so")
        assert because
        runs = why in (Why.RUNS, Why.GROWS, Why.SHRINKS, Why.STARTS)
        assert (why is Why.PAUSED) == (job.standing is Standing.PAUSED)
        assert (why is Why.DRAINING) == (job.standing is Standing.DRAINING)
        if job.standing is Standing.QUEUED:
            assert not runs
            assert (why is Why.BACKING_OFF) <= (job.not_before > world.now)
        elif job.standing is not Standing.PAUSED:
            assert runs or why is Why.DRAINING or job.is_short


def heal(world: World) -> None:
    """Nothing bad happens any more: everybody does what they are told, and every script comes to its end."""
    for job in list(world.machine.cluster.jobs):
        world.tell(events.ResumeAsked(job))
    for name in ("n1", "n2", "n3"):
        world.come(name, 6)
    for _ in range(400):
        if not world.machine.cluster.jobs:
            return
        world.advance(5)
        for (name, number), told in list(world.attempts.items()):
            if (name, number) in world.attempts and not told:
                world.begin(name, number)
                world.end(name, number, Outcome.SUCCEEDED)
            elif (name, number) in world.attempts:
                world.end(name, number, Outcome.CANCELLED if told == "stop" else Outcome.DRAINED)
        world.settle()


@pytest.mark.parametrize("policy", ["las", "fifo", "static"])
@given(seed=st.integers(0, 2**32), steps=st.integers(5, 60))
@example(seed=3229, steps=51)  # an order to run what has just ended
@settings(max_examples=60, deadline=None)
def test_whatever_happens_every_job_comes_to_its_end(policy: str, seed: int, steps: int) -> None:
    """No node is given more than it has, and what the journal holds makes the same state again, at every moment."""
    rng, world = random.Random(seed), new_world(policy)
    world.tell(events.Ruled(RULES))
    for _ in range(steps):
        live(world, rng)
        world.machine.cluster.check()
        check_reasons(world)

    again = Machine(OTHERS)  # who reads it has other rules
    again.unwatched()
    for event, at in world.told:
        kind = type(event)
        again.tell(build_fields(kind, plain_fields(event), kind.__name__), at)
    assert plain(again.cluster) == plain(world.machine.cluster)
    assert build(Cluster, plain(world.machine.cluster), "cluster") == world.machine.cluster

    heal(world)
    assert world.machine.cluster.jobs == {}, "every job is over"
    assert world.attempts == {} and not world.running


@pytest.mark.parametrize("drain_s", [30.0, 300.0])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_journal_that_names_neither_rules_nor_what_was_late_is_read_too(drain_s: float, seed: int) -> None:
    rng, world = random.Random(seed), new_world()
    former = world.machine.rules = replace(RULES, finish_s=1e6)  # as long as there was no end to that
    for name in ("n1", "n2", "n3"):
        world.come(name, 6)
    for _ in range(30):
        live(world, rng)
        for job, number in [*world.attempts]:
            if rng.random() < 0.5:
                world.begin(job, number)
        if rng.random() < 0.3:
            world.advance(31)  # some were to leave by now
    is_as_then = drain_s == former.drain_s
    again = Machine(former if is_as_then else replace(RULES, drain_s=drain_s))
    again.unwatched()
    for event, at in world.told:
        again.tell(events.TimeUp(event.job) if isinstance(event, events.TimeUp) else event, at)
        again.cluster.check()
    if is_as_then:
        assert plain(again.cluster) == plain(world.machine.cluster)
    assert {job.id: job.standing for job in again.cluster.jobs.values()} == {
        job.id: job.standing for job in world.machine.cluster.jobs.values()
    }


def test_rules_that_are_new_are_kept_from_then_on(world: World) -> None:
    """Who was asked to leave before still has the time that he was given."""
    world.come("n1", cpus=3)
    for job in ("j1", "j2", "j3"):
        world.submit(job)
    world.round()
    for job in ("j1", "j2"):
        world.begin(job, 1)
    world.tell(events.PauseAsked(JobId("j1"), "lunch"))
    world.tell(events.Ruled(replace(RULES, drain_s=5, start_s=20)))
    world.tell(events.PauseAsked(JobId("j2"), "lunch"))
    world.advance(6)
    assert (world.attempts["j1", 1], world.attempts["j2", 1]) == ("drain", "stop")
    assert world.attempts["j3", 1] == ""
    world.advance(15)
    assert world.attempts["j3", 1] == "stop", "not everybody has come"


def test_nobody_gives_way_for_room_on_a_node_that_is_only_not_heard_yet(world: World) -> None:
    world.come("n1", cpus=1)
    world.submit("low", preemptible=True)
    world.advance(1)
    world.begin("low", 1)
    world.come("n2", cpus=1)
    world.machine.watch(world.now, 15.0)
    world.machine.tell(events.NodeHeard(NodeId("n1"), world.boots["n1"]), world.now)
    world.submit("high", priority=10)
    for _ in range(3):
        world.round()
    assert standing(world, "low") is Standing.RUNNING and standing(world, "high") is Standing.QUEUED
    assert not [key for key in world.running if key[0] == "high"]
    world.machine.tell(events.NodeHeard(NodeId("n2"), world.boots["n2"]), world.now)
    world.round()
    assert world.running["high", 1, "w0"] == "n2"


def test_a_pool_counts_those_who_come_to_their_end_or_lack_a_shard_with_what_they_have(world: World) -> None:
    for name in ("n1", "n2"):
        world.come(name, cpus=2)
    world.submit("ending", least=2, most=2)
    world.submit("short", least=2, most=2, shards=1, shard=ONE)
    world.come("n3", cpus=1)
    world.advance(1)
    for job in ("ending", "short"):
        world.begin(job, 1)
    world.cease("ending", 1, "w0", done=True)
    world.settle()
    lost = world.running["short", 1, "p0"]
    world.die(lost)
    world.tell(events.NodeLeft(NodeId(lost), "it is gone"))
    world.settle()
    cluster = world.machine.cluster
    assert (
        cluster.jobs[JobId("short")].is_short and cluster.jobs[JobId("ending")].standing is Standing.DRAINING
    )
    plans = {str(each.request.job): each for each in view_of(cluster, world.now, {}, {}, {}).jobs}
    assert plans["ending"].draining and "short" not in plans, "nothing is decided about either"
    seen = view_of(cluster, world.now, {}, {}, {}, of_nodes=True)
    counts = {str(each.request.job): each for each in seen.jobs}
    assert not counts["ending"].draining and counts["ending"].ending
    for job in ("ending", "short"):
        had = counts[job].allocation
        here = [node for key, node in world.running.items() if key[0] == job and key[2][0] == "w"]
        assert had is not None and sorted(had.workers) == sorted(here) != []


def test_who_comes_to_his_end_goes_as_a_whole_or_not_at_all(world: World) -> None:
    world.come("n1", cpus=4)
    world.submit("ending", least=1, most=4)
    world.advance(60)
    world.begin("ending", 1)
    world.advance(60)
    assert len([key for key in world.running if key[2][0] == "w"]) == 4
    world.cease("ending", 1, "w0", done=True)
    world.settle()
    world.advance(RULES.finish_s + 5)
    world.log.clear()
    world.submit("high", least=2, most=2, priority=10)
    for _ in range(3):
        world.round()
    quits = [action for action in world.log if isinstance(action, actions.Quit) and action.job == "ending"]
    assert not quits and world.attempts["ending", 1] == "drain"


@pytest.mark.parametrize("first", ["p0", "w0"])
def test_a_shard_that_ends_with_its_job_is_not_placed_again(world: World, first: str) -> None:
    """Its processes end before its coordinator has told how it went, in whatever order that is heard."""
    world.come("n1", cpus=4)
    world.submit("j1", least=2, most=2)
    world.advance(1)
    world.begin("j1", 1)
    world.cease("j1", 1, "w1", done=True)
    for slot in [first, "w0"] if first == "p0" else ["w0", "p0"]:
        world.cease("j1", 1, slot, done=True)
        world.settle()
        world.round()
    assert not world.running, "and nothing of it was begun anew"
    world.end("j1", 1, Outcome.SUCCEEDED)
    assert standing(world, "j1") is Standing.SUCCEEDED
