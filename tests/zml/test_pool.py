"""Nodes are asked for when there are jobs, no more than the owner allows, and let go in order."""

import asyncio
import itertools
from pathlib import Path

import msgspec
import pytest

from tests.zml.hub import FakeCluster, FakeNode
from tests.zml.test_hub import run
from zml.cluster.away import mark_of
from zml.cluster.inventory import inventory
from zml.cluster.pool import Pool, PoolConfig, read_pool
from zml.cluster.serving import pool_name, read_users
from zml.errors import SLURM, ZmlError
from zml.scheduler.cluster.plan import Quota
from zml.scheduler.cluster.resources import NodeId
from zml.slurm.processes import LocalProvider
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
        self.forgotten: set[str] = set()
        self.because = ""  # why what waits is stuck, and what fails has failed
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
        found = [
            Allocation(id, state, self.because, stuck=state is State.PENDING and self.because != "")
            for id, state in self.states.items()
            if id not in self.forgotten
        ]
        self.most = max(self.most, sum(not each.state.over for each in found))
        return found

    def forget(self, id: str) -> None:
        assert self.states[id].over
        self.forgotten.add(id)

    def close(self) -> None:
        pass


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


def test_nodes_on_their_way_out_cost_until_they_are_gone(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=60.0)
        await cluster.start()
        provider = FakeProvider(cluster)
        pool = Pool(cluster.hub, config(most=6, cost_per_hour=1.1, budget_per_hour=3.3, idle_s=2.0), provider)
        jobs = [cluster.submit() for _ in range(3)]
        await looks(pool, 5)
        assert provider.most == 3, "the budget pays for three"
        for job in jobs[:2]:
            cluster.desk.cancel(job, "not needed")
        for node in provider.nodes.values():
            node.leave = lambda: asyncio.sleep(1e6)  # type: ignore[method-assign]
        await looks(pool, 8)
        assert sorted(node.state for node in cluster.desk.nodes()) == ["LEAVING", "LEAVING", "UP"]
        late = [cluster.submit() for _ in range(3)]
        await looks(pool, 5)
        assert provider.most == 3
        assert "2 nodes on the way out count until they are gone" in cluster.desk.job(late[0]).because
        for name, node in list(provider.nodes.items()):
            if node.let_go:
                provider.states[name] = State.ENDED
                node.die()
        await looks(pool, 15)
        assert len(provider.states) == 5, "now they come"
        await cluster.close()

    run(main())


def test_what_is_stuck_is_no_node_that_comes_and_people_are_told(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        provider.late, provider.because = True, "PartitionTimeLimit"
        pool = Pool(cluster.hub, config(backend="slurm"), provider)
        job = cluster.submit()
        await looks(pool, 3)
        because = cluster.desk.job(job).because
        assert "1 node cannot come: PartitionTimeLimit; more are asked for in " in because
        assert "asked for; " not in because, "none is awaited"
        assert str(cluster.hub.fleet) in because and not provider.released
        await looks(pool, 200)
        assert len(provider.states) <= 5, "it is asked again after pauses that grow"
        assert len(provider.released) == len(provider.states) - 1, "those that are stuck are taken back"
        (left,) = [id for id, state in provider.states.items() if not state.over]
        asked, provider.because, provider.states[left] = len(provider.states), "", State.RUNNING
        provider.come(left)  # somebody has changed the limit
        await cluster.until_state(job, "SUCCEEDED")
        await looks(pool, 5)
        assert len(provider.states) == asked, "nothing was lost by waiting"
        await cluster.close()

    run(main())


def test_what_fails_is_asked_for_again_after_pauses_until_one_stays(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=300.0)
        await cluster.start()
        provider = FakeProvider(cluster)
        provider.late = True
        pool = Pool(cluster.hub, config(), provider)
        job = cluster.submit()
        asked_at: list[int] = []
        for second in range(400):
            before = len(provider.states)
            await looks(pool, 1)
            if len(provider.states) > before:
                asked_at.append(second)
            provider.because = "exit code 3"
            for id, state in provider.states.items():
                if not state.over:
                    provider.states[id] = State.FAILED
        gaps = [b - a for a, b in itertools.pairwise(asked_at)]
        assert 4 <= len(gaps) <= 8 and gaps == sorted(gaps) and gaps[-1] > 60
        assert "1 node that came or was to come failed: exit code 3" in cluster.desk.job(job).because
        provider.late, provider.because = False, ""
        await looks(pool, 600)
        assert cluster.desk.job(job).state == "SUCCEEDED" and pool.trouble is None
        await cluster.close()

    run(main())


def test_a_refusal_is_told_and_not_repeated_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        provider = FakeProvider(cluster)
        asked = []

        def refuse(count: int) -> list[str]:
            asked.append(count)
            raise ZmlError(SLURM, "sbatch refuses: Invalid account")

        provider.ask = refuse  # type: ignore[method-assign]
        pool = Pool(cluster.hub, config(backend="slurm"), provider)
        job = cluster.submit()
        await looks(pool, 100)
        assert len(asked) == 3
        assert "none can be asked for: sbatch refuses: Invalid account" in cluster.desk.job(job).because
        await cluster.close()

    run(main())


def test_nodes_that_another_coordinator_asked_for_count_and_nobody_asks_for_them_again(
    tmp_path: Path,
) -> None:
    """As after kill -9 of the coordinator of a local pool; and new ones take their time to come."""

    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=600.0)
        await cluster.start()
        for number in range(3):
            cluster.node(f"pool-old-{number}", cpus=1)
        await cluster.running(3)
        provider = FakeProvider(cluster)
        come, provider.come = provider.come, lambda id: None  # type: ignore[method-assign]
        pool = Pool(cluster.hub, config(most=5), provider)
        cluster.submit()
        await looks(pool, 5)
        assert list(provider.states) == ["0"], "one, however often it is looked at"
        come("0")
        await looks(pool, 5)
        assert list(provider.states) == ["0"]
        await cluster.close()

    run(main())


def test_a_pool_that_closes_while_it_asks_leaves_no_process(tmp_path: Path) -> None:
    provider = LocalProvider(["sleep", "600"])

    async def main() -> None:
        pool = Pool(Gone(), config(), provider)  # type: ignore[arg-type]
        asking = asyncio.ensure_future(pool._in_thread(provider.ask, 60))
        while not provider.processes:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        await pool.close()

    asyncio.run(main())
    assert provider.processes and all(each.poll() is not None for each in provider.processes.values())
    assert provider.ask(1) == [], "and begins none"


class Gone:
    """A hub that is not asked anything."""


def test_two_clusters_whose_folders_are_called_alike_have_pools_of_their_own(tmp_path: Path) -> None:
    names = []
    for folder in (tmp_path / "a" / "cluster", tmp_path / "b" / "cluster"):
        name = pool_name(folder, mark_of(folder))
        assert name == pool_name(folder, mark_of(folder)) != pool_name(folder, "")
        names.append(name)
    assert len({*names, *(pool_name(tmp_path / each / "cluster", "") for each in "ab")}) == 4
    assert "," not in pool_name(tmp_path / "a,b", ""), "squeue would take it for two names"


def test_a_node_tells_by_its_name_of_which_allocation_it_is() -> None:
    alive = [
        Allocation("7", State.RUNNING),
        Allocation("8", State.RUNNING),
        Allocation("9", State.RUNNING),
        Allocation("10", State.PENDING),
        Allocation("11", State.PENDING, "JobHeldAdmin", stuck=True),
        Allocation("3fa2-1", State.RUNNING),
    ]
    nodes = {NodeId("pool-7-4711"): False, NodeId("pool-3fa2-1"): True, NodeId("pool-0e00-1"): False}
    there = inventory(alive, nodes, {"3fa2-1", "9"})
    assert there.staying == ["pool-7-4711", "pool-0e00-1"] and there.leaving == ["pool-3fa2-1"]
    assert (there.ending, there.coming, there.waiting) == (["9"], ["8"], ["10"])
    assert [each.id for each in there.stuck] == ["11"]
    assert (there.count, there.going) == (4, 2)


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


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("[ada]\ngpu = 3", "[ada] has an unknown key gpu", "Did you mean gpus?"),
        ("[ada]\nx = 3", "[ada] has an unknown key x", "It can have gpus, cpus, workers, share."),
        ("[ada]\ngpus = 'all'", "[ada]: Expected", "Each user is a table: "),
        ("ada = 3", "[ada]: Expected", "Each user is a table: "),
    ],
)
def test_a_mistake_in_quotas_names_the_user_and_the_nearest_key(
    tmp_path: Path, text: str, what: str, fix: str
) -> None:
    (tmp_path / "users.toml").write_text(text)
    with pytest.raises(ZmlError) as told:
        read_users(tmp_path / "users.toml")
    assert what in told.value.what and fix in told.value.fix
    (tmp_path / "pool.toml").write_text("mosst = 1")
    with pytest.raises(ZmlError) as told:
        read_pool(tmp_path / "pool.toml")
    assert "pool.toml has an unknown key mosst" in told.value.what and told.value.fix == "Did you mean most?"
