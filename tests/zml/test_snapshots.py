"""A picture of the cluster is that of its moment, whatever happens while it is made into bytes."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cluster.test_machine import live, new_world
from zml.cluster import snapshots
from zml.cluster.docket import Accepted, Docket, Facts, Record
from zml.cluster.jobs import AttemptView, Submission
from zml.journal import Journal
from zml.scheduler.cluster import events
from zml.scheduler.cluster.events import Outcome
from zml.scheduler.cluster.machine import Machine
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.resources import Node, NodeId, Resources
from zml.scheduler.cluster.rules import Rules
from zml.scheduler.cluster.state import Standing
from zml.scheduler.ids import JobId
from zml.scheduler.plain import plain


def record(job: str) -> Record:
    return Record(
        Accepted(job=job, user="ada", key="", submission=Submission(script="x.py", folder="/")), 1.0
    )


@given(seed=st.integers(0, 2**32), steps=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_what_happens_afterwards_is_not_in_it(seed: int, steps: int) -> None:
    rng, world = random.Random(seed), new_world()
    for _ in range(steps):
        live(world, rng)
    cluster = world.machine.cluster
    facts = Facts(number=steps, records={job: record(job) for job in [*cluster.jobs, *cluster.over]})
    meant = msgspec.msgpack.decode(
        msgspec.msgpack.encode({"time": 2.0, "cluster": plain(cluster), "facts": msgspec.to_builtins(facts)})
    )
    picture = snapshots.take(cluster, facts, 2.0)
    for _ in range(20):
        live(world, rng)
    for each in facts.records.values():
        each.attempts = [AttemptView(number=1, run_dir="/", began_at=1.0)]
    facts.records["new"] = record("new")
    facts.discarding.append("old")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshots.told(picture))) == meant


def test_records_that_are_written_meanwhile_come_after_it(tmp_path: Path) -> None:
    def docket() -> Docket:
        return Docket(Machine(Rules()), Journal(tmp_path, snapshot_bytes=400), lambda job, n: "/run")

    def submit(into: Docket) -> None:
        job = into.next_job()
        assert into.accept(record(job).accepted)
        into.event(events.Submitted(Request(job=JobId(job), submitted=into.now)))

    first, late = docket(), []
    first.beside = lambda work, then: late.append((work, then))
    for _ in range(5):
        submit(first)
    assert len(late) == 1, "one at a time"
    ((work, then),) = late
    then(work())
    for _ in range(5):
        submit(first)
    assert first.journal is not None and len(list(tmp_path.glob("*.snapshot"))) == 1
    first.journal.close()
    again = docket()
    assert plain(again.machine.cluster) == plain(first.machine.cluster)
    assert (again.facts, again.next_job()) == (first.facts, "j11")
    again.journal.close()  # type: ignore[union-attr]


ONE = JobId("j1")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lived(docket: Docket, clock: Clock) -> None:
    """A job is tried again after a loss, and paused, does not leave, and is stopped; others are over and discarded."""
    for number in range(3):
        job = docket.next_job()
        assert docket.accept(record(job).accepted)
        docket.event(events.Submitted(Request(job=job, submitted=docket.now)))
        if number:
            docket.event(events.CancelAsked(job, "not needed"))
    docket.event(events.Discarded(JobId("j2"), "asked"))
    docket.discarded("j2")
    docket.event(events.NodeCame(Node(id=NodeId("n1"), offers=Resources(cpus=1)), "boot"))
    for attempt in (1, 2):
        docket.event(events.Started(ONE, attempt, {"w0": NodeId("n1")}, "its turn"))
        docket.event(events.Began(ONE, attempt))
        if attempt == 1:
            docket.event(events.Ended(ONE, attempt, Outcome.LOST, 1, "a machine was lost"))
            docket.event(events.Gone(ONE, attempt, "w0", "it ended"))
    docket.event(events.PauseAsked(ONE, "lunch"))
    clock.now += docket.machine.rules.drain_s
    found = docket.machine.finding(docket.now)
    while isinstance(found, events.NodeLost):  # nobody is heard here
        found = docket.machine.finding(docket.now, 1e9)
    assert found is not None
    docket.event(found)


OTHERS = Rules(drain_s=600, start_s=9, stop_s=9, retry_s=9, losses=1, false_starts=1, remembered=1)


@pytest.mark.parametrize("snapshot_bytes", [1 << 20, 300])
def test_a_coordinator_with_other_rules_goes_on_from_the_same_state(
    tmp_path: Path, snapshot_bytes: int
) -> None:
    def docket(rules: Rules, clock: Callable[[], float]) -> Docket:
        journal = Journal(tmp_path, snapshot_bytes=snapshot_bytes)
        return Docket(Machine(rules), journal, lambda job, n: "/run", clock)

    clock = Clock()
    first = docket(Rules(), clock)
    lived(first, clock)
    attempt = first.machine.cluster.jobs[ONE].attempt
    assert attempt is not None and attempt.leaving is not None and attempt.leaving.stopped
    first.journal.close()  # type: ignore[union-attr]
    for _ in range(2):
        again = docket(OTHERS, clock)
        assert again.machine.rules == OTHERS
        assert plain(replace(again.machine.cluster, rules=Rules())) == plain(first.machine.cluster)
        assert again.facts == first.facts
        again.journal.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_written_before_rules_were_is_read(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As records, and as a snapshot."""
    clock = Clock()
    first = Docket(Machine(Rules()), None, lambda job, n: "/run", clock)
    journal, picture = Journal(tmp_path), None

    def write(kind: str, fields: dict[str, Any], now: float) -> None:
        if kind == "event.TimeUp":
            fields = {"job": fields["job"]}
        journal.write(kind, now, fields)

    monkeypatch.setattr(first, "_write", write)
    take_in = first._accept

    def accept(accepted: Accepted, now: float) -> None:
        write("fact.Accepted", msgspec.to_builtins(accepted), now)
        take_in(accepted, now)

    monkeypatch.setattr(first, "_accept", accept)
    lived(first, clock)
    if whole:
        picture = snapshots.told(snapshots.take(first.machine.cluster, first.facts, first.now))
        del picture["cluster"]["rules"]
        journal.shorten(picture)
    journal.close()
    again = Docket(Machine(replace(Rules(), drain_s=600)), Journal(tmp_path), lambda job, n: "/run", clock)
    job = again.machine.cluster.jobs[ONE]
    assert job.standing is Standing.DRAINING and job.attempt is not None and job.attempt.leaving is not None
    assert job.attempt.leaving.stopped
    assert again.machine.rules.drain_s == 600
    again.journal.close()  # type: ignore[union-attr]
