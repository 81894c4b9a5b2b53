"""A process that has ended is lost as soon as somebody says so, that very process, once, and never its successor."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.simulation import simulate
from tests.zml.cluster import Cluster, Script
from tests.zml.test_cluster import same, trained
from zml.lease import COORDINATOR
from zml.messages import AnyMessage, Ended, JobSpec, Ok
from zml.scheduler.ids import JobId
from zml.transport import Refused
from zml.transport.memory import MemoryEndpoint, MemoryNetwork

MODES = [0, 2, None]
JOB = JobId("job")
ALL = [(epoch, batch) for epoch in range(2) for batch in range(12)]
KILLED = "its process ended by SIGKILL"


def ended(member: str, **other: Any) -> Ended:
    """All processes of these clusters are this one."""
    fields = {"job": JOB, "node": socket.gethostname(), "pid": os.getpid(), "because": KILLED}
    return Ended(member=member, **{**fields, **other})


async def launcher(cluster: Cluster) -> MemoryEndpoint:
    def nothing(peer: str, message: Any, payload: Any) -> Any:
        raise AssertionError(f"nobody says anything to a launcher, not even {message}")

    endpoint = cluster.network.endpoint("launcher", vocabulary=AnyMessage, handler=nothing)
    await endpoint.start()
    await endpoint.connect(COORDINATOR, cluster.settings.coordinator)
    return endpoint


async def tell(endpoint: MemoryEndpoint, message: Ended) -> None:
    answer = await endpoint.request(COORDINATOR, message, timeout_s=5.0)
    assert answer.message == Ok()


def of(cluster: Cluster, member: str) -> tuple[str, int]:
    """How it stands, and in which incarnation."""
    (view,) = [view for view in cluster.coordinator.machine.members(JOB) if view.member == member]
    return view.state, view.incarnation


@pytest.mark.parametrize("staleness", MODES)
def test_the_others_finish_what_a_worker_leaves_whose_death_is_told_and_nobody_waits_for_its_lease(
    staleness: int | None,
) -> None:
    """Its lease would last for longer than the whole job, in the virtual time of these clusters."""

    async def main() -> tuple[list[Script], int]:
        spec = JobSpec(workers=3, shards=2, staleness=staleness)
        cluster = Cluster(MemoryNetwork(3), spec, lease_s=5.0)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(3)]
        zml_run = await launcher(cluster)
        await cluster.until(lambda: len(scripts[1].trained) >= 2)
        killed_at = asyncio.get_running_loop().time()
        cluster.kill("w1")
        await tell(zml_run, ended("w1"))
        assert of(cluster, "w1") == ("lost", 1)
        generation = cluster.coordinator.machine.generation(JOB)
        await tell(zml_run, ended("w1"))
        assert cluster.coordinator.machine.generation(JOB) == generation, "twice is the same as once"
        code = await cluster.finish()
        assert asyncio.get_running_loop().time() - killed_at < cluster.settings.lease_s
        await zml_run.close()
        return scripts, code

    scripts, code = simulate(main())
    assert code == 0
    assert trained(scripts) == ALL
    same([scripts[0], scripts[2]])


def test_a_shard_whose_death_is_told_is_let_in_again_at_once(tmp_path: Path) -> None:
    async def main() -> list[Script]:
        spec = JobSpec(workers=2, shards=2)
        cluster = Cluster(MemoryNetwork(4), spec, lease_s=5.0, folder=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        zml_run = await launcher(cluster)
        await cluster.until(lambda: len(scripts[0].trained) >= 2)
        cluster.kill_shard(1)
        await tell(zml_run, ended("p1"))
        cluster.start_shard(1)
        assert await cluster.finish() == 0, [script.error for script in scripts]
        await zml_run.close()
        return scripts

    scripts = simulate(main())
    assert trained(scripts) == ALL
    same(scripts)


@pytest.mark.parametrize(
    "other",
    [
        {"pid": os.getpid() + 1},
        {"node": "elsewhere"},
        {"member": "w7"},
        {"member": ""},
        {"member": "coordinator"},
    ],
)
def test_what_is_said_of_another_process_changes_nothing(other: dict[str, Any]) -> None:
    async def main() -> list[Script]:
        cluster = Cluster(MemoryNetwork(5), JobSpec(workers=2, shards=1))
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        zml_run = await launcher(cluster)
        await cluster.until(lambda: scripts[0].trained)
        await tell(zml_run, ended(**{"member": "w1", **other}))
        assert of(cluster, "w1") == ("active", 1)
        with pytest.raises(Refused, match="serves job job, not another"):
            await tell(zml_run, ended("w1", job="another"))
        assert await cluster.finish() == 0
        await zml_run.close()
        return scripts

    scripts = simulate(main())
    assert all(script.trained for script in scripts)
    assert trained(scripts) == ALL


def test_a_coordinator_that_goes_on_knows_which_process_was_which_member(tmp_path: Path) -> None:
    """And another remembers the death."""

    async def main() -> tuple[list[Script], int]:
        spec = JobSpec(workers=3, shards=1)
        cluster = Cluster(MemoryNetwork(6), spec, lease_s=5.0, state=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(3)]
        await cluster.until(lambda: len(scripts[1].trained) >= 2)
        cluster.kill("w1")
        cluster.kill_coordinator()
        await cluster.restart_coordinator()
        zml_run = await launcher(cluster)
        await tell(zml_run, ended("w1"))
        await zml_run.close()
        assert of(cluster, "w1") == ("lost", 1)
        cluster.kill_coordinator()
        await cluster.restart_coordinator()
        assert of(cluster, "w1") == ("lost", 1)
        return scripts, await cluster.finish()

    scripts, code = simulate(main())
    assert code == 0
    assert trained(scripts) == ALL
    same([scripts[0], scripts[2]])


def test_who_has_said_goodbye_has_not_died() -> None:
    async def main() -> None:
        cluster = Cluster(MemoryNetwork(8), JobSpec(workers=2, shards=1))
        await cluster.start()
        for member in ("w0", "w1"):
            cluster.script(member)
        assert await cluster.finish() == 0
        coordinator = cluster.coordinator
        before = repr(coordinator.machine.members(JOB))
        for member in ("w0", "w1", "p0"):
            assert coordinator.handle("launcher", ended(member), None) == Ok()
        assert repr(coordinator.machine.members(JOB)) == before

    simulate(main())
