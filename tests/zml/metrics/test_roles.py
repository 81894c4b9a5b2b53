"""What roles say of themselves through the phases of a life, and who they say can be scraped."""

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import structlog

from tests.simulation import simulate
from tests.zml import cluster as clusters
from tests.zml.cluster import Cluster
from zml.address import host_of
from zml.cluster.nodes import NOWHERE, Reached
from zml.coordinator.board import Board
from zml.figures import WorkerFigures
from zml.lease import join
from zml.messages import JobSpec, Join, Joined
from zml.metrics.lag import Lag
from zml.metrics.lines import Counting
from zml.metrics.roles import CoordinatorSource, ShardSource, Unseen, WorkerSource, why_not
from zml.scheduler import events
from zml.shard import ps as processes
from zml.transport.memory import MemoryNetwork

Checks = dict[str, str]


def open_(checks: Any) -> Checks:
    """What is not as it should be."""
    return {what: because for what, because in checks.items() if because}


def test_a_coordinator_and_its_shards_say_why_they_are_not_ready_and_then_are() -> None:
    async def main() -> list[tuple[Checks, Checks]]:
        cluster = Cluster(MemoryNetwork(1), JobSpec(workers=2, shards=1))
        coordinator = CoordinatorSource(cluster.coordinator, Lag(), "")
        seen: list[tuple[Checks, Checks]] = []

        def look() -> None:
            shard = ShardSource(cluster.shards[0], Lag()) if cluster.shards else None
            now = (open_(coordinator.checks()), open_(shard.checks()) if shard is not None else {})
            if now not in seen:
                seen.append(now)

        async def looking() -> None:
            while True:
                look()
                await asyncio.sleep(0.001)

        await cluster.coordinator.start()
        look()
        task = asyncio.ensure_future(looking())
        await asyncio.sleep(0.1)
        cluster.start_shard(0)
        await asyncio.sleep(0.5)
        for number in range(2):
            cluster.script(f"w{number}", batches=40)
            await asyncio.sleep(0.5)
        await cluster.until(lambda: not seen[-1][0])
        cluster.coordinator.dispatch(events.DrainAsked(cluster.coordinator.job, "enough"))
        await cluster.finish()
        look()
        task.cancel()
        return seen

    seen = simulate(main())
    coordinator = [each for each, _ in seen]
    assert coordinator[0] == {
        "members": "waiting for 2 of 2 workers and shard p0",
        "parameters": "the shards have no parameters yet",
    }
    assert {
        "members": "waiting for 1 of 2 workers",
        "parameters": coordinator[0]["parameters"],
    } in coordinator
    assert {} in coordinator, "it was ready"
    assert {"staying": "the job ends: enough"} in coordinator[coordinator.index({}) :]
    assert coordinator[-1] == {"job": "the job is over"}
    shard = [each for _, each in seen]
    assert list(dict.fromkeys(each.get("p0", each.get("joined", "ready")) for each in shard[1:])) == [
        "it has not joined",
        "p0 has no parameters yet",
        "ready",
    ]
    assert shard[-1] == {"staying": "it leaves"}


def test_an_agent_says_what_it_waits_for() -> None:
    child = SimpleNamespace(runs=False, figures=None)
    agent = SimpleNamespace(lease=None, child=None, leaving="", stopping="")
    source = WorkerSource(cast(Any, agent), Lag())
    waits = {"script": "its script does not run", "parameters": "its script is not in the job yet"}
    assert open_(source.checks()) == {"joined": "it has not joined", **waits}
    agent.lease = object()
    assert open_(source.checks()) == waits
    agent.child, child.runs = child, True
    assert open_(source.checks()) == {"parameters": waits["parameters"]}
    child.figures = WorkerFigures()
    assert open_(source.checks()) == {}
    agent.leaving = "SIGTERM on its machine"
    assert open_(source.checks()) == {"staying": "it leaves: SIGTERM on its machine"}
    agent.leaving, agent.stopping, child.runs = "", "its script ended", False
    assert open_(source.checks()) == {"staying": "it leaves: its script ended", "script": waits["script"]}


def test_who_can_be_scraped_is_known_again_when_the_coordinator_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def joining(endpoint: Any, settings: Any, role: Any, member: str, **more: Any) -> Any:
        port = 9000 + 10 * (role == "shard") + int(member[1:])
        return await join(endpoint, settings, role, member, **{**more, "metrics": f"http://10.0.0.1:{port}"})

    kept: list[Cluster] = []
    monkeypatch.setattr(clusters, "join", joining)
    monkeypatch.setattr(processes, "join", joining)

    async def main() -> list[list[tuple[list[str], dict[str, str]]]]:
        cluster = Cluster(MemoryNetwork(1), JobSpec(workers=2, shards=2), state=tmp_path, folder=tmp_path)
        looks = []

        def look() -> None:
            found = CoordinatorSource(cluster.coordinator, Lag(), "http://h:7078").targets()
            looks.append([(each.targets, each.labels) for each in found])

        await cluster.start()
        look()
        for number in range(2):
            cluster.script(f"w{number}", batches=200)
        await cluster.until(lambda: cluster.coordinator.docket.loaded)
        look()
        cluster.kill_coordinator()
        await asyncio.sleep(0.2)
        await cluster.restart_coordinator()
        look()
        kept.append(cluster)  # the end of its lease is nobody's to see
        cluster.kill("w1")
        await cluster.until(lambda: len(cluster.coordinator.machine.workers(cluster.coordinator.job)) == 1)
        look()
        assert await cluster.finish() == 0
        return looks

    alone, before, again, later = simulate(main())
    assert [labels["role"] for _, labels in alone] == ["coordinator"]
    assert before == again
    assert [(targets, labels["role"], labels["member"]) for targets, labels in before] == [
        (["h:7078"], "coordinator", "coordinator"),
        (["10.0.0.1:9000"], "worker", "w0"),
        (["10.0.0.1:9001"], "worker", "w1"),
        (["10.0.0.1:9010"], "shard", "p0"),
        (["10.0.0.1:9011"], "shard", "p1"),
    ]
    assert {labels["job_id"] for _, labels in before} == {"job"} and all(
        labels["node"] for _, labels in before
    )
    assert [labels["member"] for _, labels in later] == ["coordinator", "w0", "p0", "p1"]


def test_lines_are_counted_by_level_and_levels_of_other_names_as_the_one_below() -> None:
    import logging

    counting = Counting()
    for level in (1, logging.DEBUG, logging.INFO, 25, logging.WARNING, logging.ERROR, 50, 99):
        counting.handle(logging.LogRecord("n", level, "f", 1, "m", (), None))
    assert counting.counts == {"debug": 2, "info": 2, "warning": 1, "error": 1, "critical": 2}


def test_a_loop_that_is_blocked_is_seen_to_wake_late() -> None:
    async def main() -> Lag:
        lag = Lag()
        lag.start()
        await asyncio.sleep(1.4)
        loop: Any = asyncio.get_running_loop()
        loop.advance(2.0)
        await asyncio.sleep(0.9)
        lag.stop()
        lag.stop()
        await asyncio.sleep(5.0)
        return lag

    lag = simulate(main())
    assert sum(lag.counts) == 4 and lag.counts[9] == 1, "once, by less than 2.5 s"
    assert lag.sum_s == pytest.approx(1.9)


def test_only_what_is_an_address_is_believed() -> None:
    good = ["http://10.0.0.1:9000", "http://[::1]:80", "http://node-7.example:1"]
    assert [host_of(each) for each in good] == ["10.0.0.1", "::1", "node-7.example"]
    bad = ["", "10.0.0.1:9", "https://h:1", "http://h", "http://u@h:1", "http://h:1/x", "http://a/b:1"]
    assert [
        host_of(each) for each in [*bad, "http://h:99999", "http://h?x:1", "http://h:1\n", "http://h:01"]
    ] == ([""] * 11)
    said = Join(job="j", role="worker", member="w0", node="n", pid=1, metrics="http://u:p@evil:1")
    board = Board(JobSpec(workers=1, shards=1), [])
    answer = Joined(job="j", member="w0", incarnation=1, generation=1, lease_s=1, heartbeat_s=1, run_dir="")
    board.joined(said, answer, 0.0)
    assert board.cards["w0"].metrics == ""
    board.joined(msgspec.structs.replace(said, metrics=good[0]), answer, 0.0)
    assert board.cards["w0"].metrics == good[0]


def test_nobody_is_sent_to_a_loopback_of_another_machine_or_to_a_host_that_a_job_made_up() -> None:
    here = socket.gethostname()
    assert why_not("127.0.0.1", here, None) == why_not("10.0.0.1", "other", None) == ("", "")
    because, fix = why_not("127.0.0.1", "other", None)
    assert because == "it answers on 127.0.0.1 of other alone" and "--http 0.0.0.0:0 --http-tokens" in fix
    node = Reached("other", frozenset({"10.0.0.7", "127.0.0.1"}))
    assert why_not("10.0.0.7", here, node) == ("", "")
    assert why_not("evil", "evil", node)[0] == "evil is no address of its node"
    assert why_not("127.0.0.1", here, node)[0], "whatever the member says of its node"
    assert why_not("10.0.0.7", here, NOWHERE)[0], "the hub has not put it anywhere"
    unseen = Unseen()
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            unseen.say("j", "w0", "http://127.0.0.1:9", because, fix)
    assert [(line["member"], line["fix"]) for line in lines] == [("w0", fix)]
