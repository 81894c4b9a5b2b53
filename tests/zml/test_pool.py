"""Nodes are asked for when there are jobs, no more than the owner allows, and let go in order."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from tests.zml.hub import FakeCluster, FakeNode
from tests.zml.test_hub import run
from zml.cluster.pool import Pool, PoolConfig, read_pool
from zml.cluster.serving import read_users
from zml.errors import ZmlError
from zml.scheduler.cluster.plan import Quota
from zml.slurm.table import Allocation, State


class FakeProvider:
    """Machines that come when they are asked for, after a while; `late`: those asked for stay in the queue."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.loop = asyncio.get_running_loop()
        self.late = False
        self.states: dict[str, State] = {}
        self.nodes: dict[str, FakeNode] = {}
        self.released: list[str] = []
        self.most = 0  # that there were at once

    def ask(self, count: int) -> list[str]:
        ids = [str(len(self.states) + number) for number in range(count)]
        for id in ids:
            self.states[id] = State.PENDING if self.late else State.RUNNING
            if not self.late:
                self.loop.call_soon_threadsafe(self.come, id)
        return ids

    def come(self, id: str) -> None:
        self.nodes[id] = self.cluster.node(f"pool-{id}", cpus=1)

    def release(self, id: str, *, now: bool = False) -> None:
        self.released.append(id)
        self.states[id] = State.ENDED

    def look(self) -> list[Allocation]:
        for id, node in self.nodes.items():
            if node.gone:
                self.states[id] = State.ENDED
        found = [Allocation(id, state) for id, state in self.states.items()]
        self.most = max(self.most, sum(not each.state.over for each in found))
        return found

    def forget(self, id: str) -> None:
        assert self.states[id].over


def config(**more: object) -> PoolConfig:
    asked = {"backend": "local", "most": 3, "cpus": 1, "memory_mb": 1000, "idle_s": 5.0}
    return PoolConfig(**(asked | more))  # type: ignore[arg-type]


async def looks(pool: Pool, seconds: float) -> None:
    for _ in range(int(seconds)):
        await pool.look()
        await asyncio.sleep(1.0)


def test_nodes_come_for_jobs_and_go_after_them(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        pool = Pool(cluster.hub, config(), provider)
        await looks(pool, 5)
        assert not provider.states, "nobody needs one"
        jobs = [cluster.submit() for _ in range(8)]
        pooling = asyncio.ensure_future(pool.run())
        for job in jobs:
            await cluster.until_state(job, "SUCCEEDED")
        assert provider.most == 3 == len(provider.nodes), "as many as it may ask for, and no more"
        await cluster.until(lambda: not cluster.desk.nodes(), "all are let go")
        assert all(node.gone for node in provider.nodes.values()) and not provider.released
        pooling.cancel()
        await cluster.close()

    run(main())


def test_what_still_waits_for_its_machine_is_taken_back(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        provider.late = True
        pool = Pool(cluster.hub, config(), provider)
        job = cluster.submit()
        await looks(pool, 2)
        assert list(provider.states.values()) == [State.PENDING], "one, however often it is looked at"
        cluster.desk.cancel(job, "not needed")
        await looks(pool, 8)
        assert provider.released == ["0"]
        await cluster.close()

    run(main())


def test_a_budget_bounds_the_nodes(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        pool = Pool(cluster.hub, config(cost_per_hour=0.9, budget_per_hour=2.0), provider)
        for _ in range(5):
            cluster.submit()
        await looks(pool, 5)
        assert provider.most == 2
        await cluster.close()

    run(main())


def test_another_coordinator_tells_nodes_again_that_are_to_go(tmp_path: Path) -> None:
    """The one before died when it had written down that they are to, and had not told them."""

    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        pool = Pool(cluster.hub, config(), provider)
        job = cluster.submit()
        await looks(pool, 2)
        await cluster.until_state(job, "SUCCEEDED")
        cluster.hub.nodes.let_go = lambda node, because: None  # type: ignore[method-assign]
        await looks(pool, 8)
        assert [node.state for node in cluster.desk.nodes()] == ["LEAVING"]
        await cluster.kill()
        await cluster.start()
        again = Pool(cluster.hub, config(), provider)
        pooling = asyncio.ensure_future(again.run())
        await cluster.until(lambda: provider.nodes["0"].gone, "it is told")
        await cluster.until(lambda: not cluster.desk.nodes(), "and goes")
        pooling.cancel()
        await cluster.close()

    run(main())


def test_who_can_never_run_keeps_nobody_and_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        pool = Pool(cluster.hub, config(), provider)
        wide = cluster.submit(workers="6")
        dear = cluster.submit(cpus=8)
        await looks(pool, 3)
        assert not provider.states, "none would be of use"
        assert (cluster.desk.job(wide).why, cluster.desk.job(wide).because) == (
            "TOO_BIG",
            "it needs 6 nodes: the pool has 3 at most",
        )
        assert (cluster.desk.job(dear).why, cluster.desk.job(dear).because) == (
            "TOO_BIG",
            "no node of the pool has 8 CPUs for one worker; each has 1 CPU, 1,000 MB",
        )
        provider.late = True
        two = cluster.submit(workers="2")
        await looks(pool, 2)
        seen = cluster.desk.job(two)
        assert (seen.why, seen.because) == ("NO_ROOM", "no node is here; 2 nodes have been asked for")
        await cluster.close()

    run(main())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("backend = 'cloud'\nmost = 1", "backend"),
        ("backend = 'local'", "most"),
        ("backend = 'local'\nmost = 1\nleast = 2", "least"),
        ("backend = 'local'\nmost = 1\nmosst = 2", "mosst"),
        ("backend =", "pool.toml"),
        ("backend = 'local'\nmost = 0", "most"),
        ("backend = 'local'\nmost = 1\ncpus = 0", "cpus"),
        ("backend = 'local'\nmost = 1\ngpus = -1", "gpus"),
        ("backend = 'local'\nmost = 1\nmemory_mb = -5", "memory_mb"),
        ("backend = 'local'\nmost = 1\nidle_s = -1", "idle_s"),
        ("backend = 'local'\nmost = 1\nidle_s = nan", "idle_s"),
        ("backend = 'local'\nmost = 1\nlow = 0.8", "low"),
        ("backend = 'local'\nmost = 1\ncost_per_hour = -1", "cost_per_hour"),
        ("backend = 'local'\nmost = 1\ncost_per_hour = 1\nbudget_per_hour = -3", "budget_per_hour"),
        ("backend = 'local'\nmost = 1\nbudget_per_hour = 3", "without cost_per_hour"),
        ("backend = 'local'\nmost = 3\nleast = 3\ncost_per_hour = 2\nbudget_per_hour = 5", "least = 3"),
        ("backend = 'local'\nmost = 1\nsetup = ['module load x']", "setup"),
    ],
)
def test_a_pool_that_makes_no_sense_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "pool.toml").write_text(text)
    with pytest.raises(ZmlError, match=what):
        read_pool(tmp_path / "pool.toml")


def test_the_pool_that_the_readme_shows_is_one() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    shown = text.partition("# pool.toml")[2].partition("```")[0]
    config = msgspec.toml.decode(shown.partition("\n")[2], type=PoolConfig)
    config.bounds()
    named = {line.split()[0] for line in shown.splitlines() if " = " in line}
    assert {*PoolConfig.__struct_fields__} - named == {"options"} and "[options]" in shown


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[ada]\ngpus = -1", "gpus"),
        ("[ada]\nshare = -2.0", "share"),
        ("[ada]\nshare = 0.0", "share"),
        ("[ada]\nworkers = 'many'", "workers"),
        ("[ada]\ncpu = 1", "cpu"),
    ],
)
def test_quotas_that_make_no_sense_are_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "users.toml").write_text(text)
    with pytest.raises(ZmlError, match=what):
        read_users(tmp_path / "users.toml")


def test_quotas_and_shares_are_read(tmp_path: Path) -> None:
    (tmp_path / "users.toml").write_text("[ada]\ngpus = 8\nworkers = 0\n[bob]\ncpus = 64\nshare = 2")
    assert read_users(tmp_path / "users.toml") == (
        {"ada": Quota(gpus=8, workers=0), "bob": Quota(cpus=64)},
        {"ada": 1.0, "bob": 2.0},
    )
