"""Shards with a backup: whatever dies, what was acknowledged counts once, and all who hold a version hold its bits."""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.cluster import Cluster, Script
from tests.zml.test_cluster import run, same, trained
from tests.zml.test_recovery import ALL, MODES, bits, have_trained, replayed, same_bits
from zml.errors import FENCED, UNREACHABLE, ZmlError
from zml.messages import Commit, Copy, JobSpec, Ok
from zml.scheduler.ids import JobId
from zml.shard.mirror import Stage
from zml.shard.ps import Ps
from zml.shard.shard import Shard
from zml.transport.memory import MemoryNetwork


class Case:
    """A cluster with backups, and its scripts."""

    def __init__(
        self,
        seed: int,
        *,
        workers: int = 3,
        shards: int = 2,
        staleness: int | None = 0,
        compress: str = "none",
        optimizer_on: Literal["auto", "shard", "worker"] = "auto",
        folder: Path | None = None,
        compute_s: float = 0.05,
        replicas: int = 1,
        return_s: float = 60.0,
        state: Path | None = None,
    ) -> None:
        spec = JobSpec(
            workers=workers,
            shards=shards,
            replicas=replicas,
            staleness=staleness,
            compress=compress,
            optimizer_on=optimizer_on,
        )
        self.cluster = Cluster(
            MemoryNetwork(seed),
            spec,
            folder=folder,
            state=state,
            compute_s=lambda name: compute_s,
            return_s=return_s,
        )
        self.scripts: list[Script] = []
        self.down: set[int] = set()  # processes that are to stay away
        self.launcher: list[asyncio.Task[None]] = []
        self.cores: dict[str, Shard] = {}  # the shards themselves, wherever they live or lived at the end
        self.newest: dict[str, int] = {}  # and which of their homes that is
        self.hosts: dict[str, str] = {}  # shard -> the member in whose process it lives, or lived at the end

    async def start(self) -> None:
        await self.cluster.start()
        self.scripts = [self.cluster.script(f"w{index}") for index in range(self.cluster.spec.workers)]
        self.cluster.tasks.append(asyncio.ensure_future(self._look_on()))

    async def _look_on(self) -> None:
        """See where the shards live, as long as the job runs."""
        while (job := self.cluster.coordinator.machine.jobs.get(JobId("job"))) is not None:
            for shard, home in job.homes.items():
                ps = self.cluster.shards.get(int(home.host[1:]))
                self.hosts[shard], self.newest[shard] = home.host, home.incarnation
                if ps is not None and shard in ps.cores:
                    self.cores[shard] = ps.cores[shard]
            await asyncio.sleep(0.05)

    def bring_back(self, index: int) -> None:
        """Start a shard's process, and again if it is turned away or fenced, as `zml run` does."""
        self.down.discard(index)
        if not self.launcher:
            self.launcher.append(asyncio.ensure_future(self._launch()))
            self.cluster.tasks += self.launcher

    async def _launch(self) -> None:
        while self.cluster.coordinator.machine.jobs:
            for index, task in self.cluster.shard_tasks.items():
                if task.done() and index not in self.down:
                    if not task.cancelled() and (error := task.exception()) is not None:
                        assert isinstance(error, ZmlError) and error.code in (UNREACHABLE, FENCED), error
                    self.cluster.start_shard(index)
            await asyncio.sleep(0.3)

    def kill(self, index: int) -> None:
        self.down.add(index)
        self.cluster.kill_shard(index)

    def leave(self, index: int) -> None:
        """As SIGTERM."""
        self.down.add(index)
        self.cluster.shards[index].leave("SIGTERM")

    async def has_left(self, index: int) -> int:
        """Its exit code."""
        async with asyncio.timeout(90):
            return await asyncio.shield(self.cluster.shard_tasks[index])

    async def until_trained(self, batches: int) -> None:
        await self.cluster.until(partial(have_trained, self.scripts, batches))

    async def until_backed_up(self, *shards: str) -> None:
        await self.cluster.until(lambda: all(map(self.cluster.backed_up, shards)))

    def trained(self) -> list[tuple[int, int]]:
        return trained(self.scripts)

    async def finish(self) -> None:
        assert await self.cluster.finish() == 0, [script.error for script in self.scripts]
        for ps in self.cluster.shards.values():
            for shard, core in ps.cores.items():
                if ps.homes[shard] >= self.newest[shard]:
                    self.cores[shard], self.newest[shard] = core, ps.homes[shard]

    def audit(self) -> None:
        """Every batch counts once on every shard, and all workers hold the same bits."""
        assert trained(self.scripts) == ALL
        same(self.scripts)
        staleness = self.cluster.spec.staleness
        steps = {f"p{n}": self.cores[f"p{n}"].steps for n in range(self.cluster.spec.shards)}
        expected = len(ALL) // len(self.scripts) if staleness == 0 else len(ALL)
        assert set(steps.values()) == {expected}, f"a step counts once on each shard: {steps}"
        if staleness == 0 and self.cluster.spec.compress == "none":
            calm, _ = run(1, shards=self.cluster.spec.shards)
            same([*calm, *self.scripts])


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize(
    ("compress", "optimizer_on"), [("none", "shard"), ("bf16", "shard"), ("topk:10%", "worker")]
)
def test_a_backup_has_the_bits_of_its_shard_and_a_log_that_makes_them(
    tmp_path: Path, staleness: int | None, compress: str, optimizer_on: Literal["shard", "worker"]
) -> None:
    async def main() -> Case:
        case = Case(1, staleness=staleness, compress=compress, optimizer_on=optimizer_on, folder=tmp_path)
        await case.start()
        await case.until_backed_up("p0", "p1")
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    for index, ps in case.cluster.shards.items():
        other = f"p{1 - index}"
        backup = ps.backups[other]
        assert backup.broken == ""
        # All but the last rosters, which the shards need not wait for when the job is over.
        ours, theirs = bits(backup.core), bits(case.cores[other])
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert ours.keys() == theirs.keys() and backup.core.applied == case.cores[other].applied
        same_bits(replayed(tmp_path / backup.name, other), backup.core)


Deliver = Callable[[Ps, str, Any, memoryview | None, Any], Any]


def killer(case: Case, index: int, at: int, counted: list[int], *, before: bool) -> Deliver:
    """Kill this shard's process at its `at`th message, or at the `at`th that it has sent to its backup."""

    def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
        mine = ps is case.cluster.shards[index] or (
            isinstance(message, Copy) and message.shard == f"p{index}"
        )
        counted[0] += mine
        if mine and counted[0] == at and before:
            case.cluster.kill_shard(index)
        if ps.name == f"p{index}" and counted[0] >= at and before:
            return asyncio.get_running_loop().create_future()
        try:
            return handler(peer, message, payload)
        finally:
            if mine and counted[0] == at and not before:
                case.cluster.kill_shard(index)

    return deliver


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("compress", ["none", "topk:10%"])
@pytest.mark.parametrize("at", [60, 75, *soak(range(61, 75))])
def test_a_shard_that_dies_at_any_message_is_not_missed(
    at: int, compress: str, staleness: int | None
) -> None:
    """It never comes back."""
    index = at // 2 % 2

    async def main() -> Case:
        case = Case(at, staleness=staleness, compress=compress)
        case.cluster.deliver = killer(case, index, at, [0], before=bool(at % 2))
        await case.start()
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.cluster.shards[1 - index].homes.keys() == {"p0", "p1"}, "it was killed"


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("compress", ["none", "topk:10%"])
@pytest.mark.parametrize("shards", [2, *soak([3])])
@pytest.mark.parametrize("seed", [0, *soak([1, 2])])
def test_shards_that_die_and_come_back_in_any_order_lose_nothing(
    tmp_path: Path, seed: int, shards: int, compress: str, staleness: int | None
) -> None:
    print(f"seed {seed}")

    async def main() -> Case:
        dice = random.Random(seed)
        case = Case(
            seed, shards=shards, staleness=staleness, compress=compress, folder=tmp_path, compute_s=0.4
        )
        await case.start()
        for _ in range(5):
            if len(trained(case.scripts)) > len(ALL) - 4:
                break
            await case.until_trained(len(trained(case.scripts)) + dice.randrange(4))
            if dice.random() < 0.5:
                names = [f"p{n}" for n in range(shards)]
                await case.cluster.until(partial(all_backed_up_or_over, case.cluster, names))
            await asyncio.sleep(dice.uniform(0, 0.1))
            killed = dice.sample(range(shards), dice.choice([1, 1, 1, 2]))
            for index in killed:
                case.kill(index)
                await asyncio.sleep(dice.choice([0, 0, dice.uniform(0, 2.5)]))
            for index in killed:
                await asyncio.sleep(dice.uniform(0, 3))
                case.bring_back(index)
        await case.finish()
        return case

    case = simulate(main())
    case.audit()


def all_backed_up_or_over(cluster: Cluster, shards: list[str]) -> bool:
    return not cluster.coordinator.machine.jobs or all(map(cluster.backed_up, shards))


def serves_both(ps: Ps) -> bool:
    return ps.cores.keys() == {"p0", "p1"}


def test_a_process_that_comes_back_keeps_the_backup_and_takes_over_when_the_other_dies() -> None:
    """Without any push log."""

    async def main() -> Case:
        case = Case(1)
        await case.start()
        await case.until_backed_up("p0", "p1")
        for batches, dies in ((4, 0), (12, 1), (18, 0)):
            await case.until_trained(batches)
            case.cluster.kill_shard(dies)
            await case.cluster.until(partial(serves_both, case.cluster.shards[1 - dies]))
            case.cluster.start_shard(dies)
            await case.until_backed_up("p0", "p1")
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.hosts["p0"] == "p1"


def test_a_shard_whose_backup_cannot_be_reached_goes_on_alone_and_makes_another_later(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, folder=tmp_path)
        await case.start()
        await case.until_backed_up("p0", "p1")
        await case.until_trained(4)
        network = case.cluster.network
        network.partition({f"p0.1.{copy}" for copy in range(1, 5)}, {"p1"})
        await case.cluster.until(lambda: not case.cluster.backed_up("p0"))
        before = len(trained(case.scripts))
        assert case.cluster.backed_up("p1"), "that one is reached"
        await case.until_trained(before + 6)
        network.heal()
        await case.finish()
        return case

    simulate(main()).audit()


def test_a_backup_that_is_out_of_date_is_never_promoted(tmp_path: Path) -> None:
    """The shard is waited for: its own log has what the backup lacks."""

    async def main() -> Case:
        case = Case(1, folder=tmp_path)
        await case.start()
        await case.until_backed_up("p0", "p1")
        network = case.cluster.network
        network.partition({f"p0.1.{copy}" for copy in range(1, 9)}, {"p1"})
        await case.cluster.until(lambda: not case.cluster.backed_up("p0"))
        await case.until_trained(len(trained(case.scripts)) + 3)
        case.cluster.kill_shard(0)
        await asyncio.sleep(5)
        assert case.cluster.home("p0") is None
        network.heal()
        case.cluster.start_shard(0)
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.hosts["p0"] == "p0"


def test_a_slow_backup_is_given_up_and_slows_nobody_for_longer_than_a_second() -> None:
    slow: list[float] = []

    async def main() -> Case:
        case = Case(1, staleness=None)
        loop = asyncio.get_running_loop()

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            if isinstance(message, Copy) and message.shard == "p0" and slow:
                return loop.create_future()
            return handler(peer, message, payload)

        case.cluster.deliver = deliver
        await case.start()
        await case.until_backed_up("p0", "p1")
        await case.until_trained(4)
        slow.append(loop.time())
        await case.until_trained(20)
        assert not case.cluster.backed_up("p0")
        assert loop.time() - slow[0] < 3
        await case.finish()
        return case

    simulate(main()).audit()


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("backup_too", [False, True])
def test_a_shard_that_is_replaced_and_does_not_know_it_acknowledges_nothing(
    staleness: int | None, backup_too: bool
) -> None:
    """Only the coordinator cannot reach it; or its backup neither. Workers can, all the time."""
    acknowledged: list[int] = []

    async def main() -> Case:
        case = Case(1, staleness=staleness, compute_s=0.4)
        former: list[Ps] = []

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            answer = handler(peer, message, payload)
            # What came before may be acknowledged after: the backup has it.
            replaced = former and ps is former[0] and case.cluster.home("p0") is not ps
            return note(message, answer) if replaced and isinstance(message, Commit) else answer

        async def note(message: Commit, answer: Any) -> Any:
            reply = answer if isinstance(answer, Ok) else await answer
            acknowledged.append(message.clock)
            return reply

        case.cluster.deliver = deliver
        await case.start()
        await case.until_backed_up("p0", "p1")
        await case.until_trained(4)
        old = case.cluster.shards[0]
        former.append(old)
        network = case.cluster.network
        network.partition({old.endpoint.name}, {"coordinator"})
        if backup_too:
            network.partition({f"p0.1.{copy}" for copy in range(1, 5)}, {"p1"})
        await case.cluster.until(lambda: case.cluster.coordinator.homes.host("p0") == "p1")
        await case.until_trained(20)
        await case.finish()
        mirror = old.cores["p0"].mirror
        assert mirror is not None and mirror.stage in (Stage.ASKING, Stage.OVER)
        return case

    simulate(main()).audit()
    assert acknowledged == []
