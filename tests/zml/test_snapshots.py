"""A picture of the cluster is that of its moment, whatever happens while it is made into bytes."""

import random
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cluster.test_machine import live, new_world
from zml.cluster import snapshots
from zml.cluster.docket import Accepted, Docket, Facts, Record
from zml.cluster.jobs import AttemptView, Submission
from zml.journal import Journal
from zml.scheduler.cluster import events
from zml.scheduler.cluster.machine import Machine
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.rules import Rules
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
