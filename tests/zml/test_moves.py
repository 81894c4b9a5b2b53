"""Shards that move to another process while everybody trains: nothing is lost, nothing counts twice, and all who hold a
version hold its bits."""

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.test_checkpointing import go_on, held
from tests.zml.test_cluster import same, trained
from tests.zml.test_recovery import ALL, MODES, replayed, same_bits
from tests.zml.test_replicas import Case
from zml.checkpoint import read
from zml.coordinator.checkpoints import When
from zml.messages import Commit, Copy, Hold, JobSpec
from zml.messages import Promote as PromoteOrder
from zml.scheduler.actions import Action, Pair, Promote, Rehome
from zml.shard.ps import Ps


def moved(case: Case, shard: str, host: str) -> bool:
    ps = case.cluster.home(shard)
    return ps is not None and ps.name == host and case.cluster.coordinator.homes.host(shard) == host


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize(("compress", "optimizer_on"), [("none", "shard"), ("topk:10%", "worker")])
def test_a_process_that_is_told_to_leave_hands_over_what_it_has_and_nobody_misses_it(
    tmp_path: Path,
    staleness: int | None,
    replicas: int,
    compress: str,
    optimizer_on: Literal["shard", "worker"],
) -> None:
    async def main() -> Case:
        case = Case(
            1,
            replicas=replicas,
            staleness=staleness,
            compress=compress,
            optimizer_on=optimizer_on,
            folder=tmp_path,
        )
        await case.start()
        await case.until_trained(4)
        case.leave(1)
        assert await case.has_left(1) == 75
        assert moved(case, "p1", "p0") and case.cluster.coordinator.homes.serves("p1")
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.cluster.shards[0].cores.keys() == {"p0", "p1"}
    for shard, core in case.cluster.shards[0].cores.items():
        log = {"p0": "p0", "p1": "p1-1-1"}[shard]
        same_bits(replayed(tmp_path / log, shard), core)


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("staleness", MODES)
def test_a_shard_moves_home_when_its_process_joins_again(
    tmp_path: Path, staleness: int | None, folder: bool
) -> None:
    """Twice, and without push logs, too."""

    async def main() -> Case:
        case = Case(1, replicas=0, staleness=staleness, folder=tmp_path if folder else None)
        await case.start()
        for batches in (3, 12):
            await case.until_trained(batches)
            case.leave(1)
            assert await case.has_left(1) == 75
            case.cluster.start_shard(1)
            await case.cluster.until(partial(moved, case, "p1", "p1"))
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.newest["p1"] == 5, "it has had five homes"
    assert case.cluster.shards[0].cores.keys() == {"p0"} and case.cluster.shards[1].cores.keys() == {"p1"}


def test_the_last_process_says_goodbye_at_once_and_the_next_one_reads_its_log(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, shards=1, replicas=0, folder=tmp_path, compute_s=0.4)
        await case.start()
        await case.until_trained(4)
        case.leave(0)
        assert await case.has_left(0) == 143, "it has handed over nothing"
        case.cluster.start_shard(0)
        await case.finish()
        return case

    simulate(main()).audit()


def test_at_the_second_signal_a_process_hands_over_nothing(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, compute_s=0.4)

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            if isinstance(message, Copy) and ps.name == "p0":
                return asyncio.get_running_loop().create_future()
            return handler(peer, message, payload)

        case.cluster.deliver = deliver
        await case.start()
        await case.until_trained(4)
        case.leave(1)
        await asyncio.sleep(1)
        case.leave(1)
        assert await case.has_left(1) == 143
        case.cluster.start_shard(1)
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.hosts["p1"] == "p1"


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("at", [1, 6, *soak([2, 3, 4, 5, 7, 8])])
def test_a_move_during_which_either_process_dies_loses_nothing(
    tmp_path: Path, at: int, dies: int, staleness: int | None
) -> None:
    """At the `at`th message of the copy, on either side; and it is started again."""

    async def main() -> Case:
        case = Case(at, replicas=0, staleness=staleness, folder=tmp_path)
        counted = 0

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            nonlocal counted
            if isinstance(message, Copy):
                counted += 1
                if counted == at:
                    case.kill(dies)
                    asyncio.get_running_loop().call_later(0.5, case.bring_back, dies)
                    return asyncio.get_running_loop().create_future()
            return handler(peer, message, payload)

        case.cluster.deliver = deliver
        await case.start()
        await case.until_trained(4)
        case.leave(1)
        await case.until_trained(14)
        if 1 not in case.down or dies == 1:
            case.bring_back(1)
        await case.finish()
        assert counted >= at
        return case

    simulate(main()).audit()


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("dies", [0, 1])
def test_a_promotion_during_which_either_process_dies_loses_nothing(
    tmp_path: Path, dies: int, staleness: int | None
) -> None:
    """The former home says nothing any more, and the next one does not serve yet."""

    async def main() -> Case:
        case = Case(1, replicas=0, staleness=staleness, folder=tmp_path)
        await case.start()
        await case.until_trained(4)
        ps = case.cluster.shards[0]
        promote = ps._promote
        killed: list[int] = []

        async def and_dies(message: PromoteOrder) -> Any:
            if not killed:
                killed.append(dies)
                case.kill(dies)
                asyncio.get_running_loop().call_later(0.5, case.bring_back, dies)
                if dies == 0:
                    return await asyncio.get_running_loop().create_future()
            return await promote(message)

        ps._promote = and_dies  # type: ignore[method-assign]
        case.leave(1)
        await case.cluster.until(lambda: killed)
        case.bring_back(1)
        await case.finish()
        return case

    simulate(main()).audit()


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize("shards", [2, *soak([3])])
@pytest.mark.parametrize("seed", [0, *soak(range(1, 12))])
def test_processes_that_leave_die_and_come_back_in_any_order_lose_nothing(
    tmp_path: Path, seed: int, shards: int, replicas: int, staleness: int | None
) -> None:
    print(f"seed {seed}")

    async def main() -> Case:
        dice = random.Random(seed)
        case = Case(
            seed, shards=shards, replicas=replicas, staleness=staleness, folder=tmp_path, compute_s=0.4
        )
        await case.start()
        for _ in range(5):
            if len(case.trained()) > len(ALL) - 4:
                break
            await case.until_trained(len(case.trained()) + dice.randrange(4))
            await asyncio.sleep(dice.uniform(0, 0.1))
            gone = dice.sample(range(shards), dice.choice([1, 1, 1, 2]))
            for index in gone:
                dice.choice([case.leave, case.leave, case.kill])(index)
                await asyncio.sleep(dice.choice([0, 0, dice.uniform(0, 2.5)]))
            for index in gone:
                await asyncio.sleep(dice.uniform(0, 3))
                case.bring_back(index)
        await case.finish()
        return case

    simulate(main()).audit()


# -- a process does not come back -------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", MODES)
def test_the_log_of_a_shard_that_does_not_come_back_is_read_by_another_process(
    tmp_path: Path, staleness: int | None
) -> None:
    async def main() -> Case:
        case = Case(1, replicas=0, staleness=staleness, folder=tmp_path, return_s=5.0)
        await case.start()
        await case.until_trained(4)
        case.kill(1)
        await case.cluster.until(partial(moved, case, "p1", "p0"))
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    same_bits(replayed(tmp_path / "p1", "p1"), case.cluster.shards[0].cores["p1"])


def test_a_process_that_comes_back_later_gets_its_shard_from_the_one_that_read_its_log(
    tmp_path: Path,
) -> None:
    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, return_s=5.0)
        await case.start()
        await case.until_trained(4)
        case.kill(1)
        await case.cluster.until(partial(moved, case, "p1", "p0"))
        case.cluster.start_shard(1)
        await case.cluster.until(partial(moved, case, "p1", "p1"))
        await case.finish()
        return case

    simulate(main()).audit()


def test_a_log_that_no_other_process_sees_ends_the_job_and_says_so() -> None:
    async def main() -> tuple[int, str]:
        case = Case(1, replicas=0, return_s=5.0)
        await case.start()
        await case.until_trained(4)
        case.kill(1)
        code = await case.cluster.finish()
        return code, case.cluster.coordinator.machine.because(case.cluster.coordinator.job)

    code, because = simulate(main())
    assert code == 4 and because.endswith(
        "it did not come back in time; p0 cannot read the log of p1; its own log says why, "
        "and nobody else can read the log"
    )


def test_of_several_processes_the_one_that_sees_the_log_reads_it(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, shards=3, replicas=0, folder=tmp_path, return_s=5.0, compute_s=0.4)
        await case.start()
        await asyncio.sleep(0)
        case.cluster.shards[2].state = lambda run_dir: tmp_path / "another machine" / "p2"
        await case.until_trained(4)
        case.kill(1)
        # The other cannot read it; what it holds of it later, for it may be the better home, came from the first.
        await case.cluster.until(lambda: (home := case.cluster.home("p1")) is not None and home.name != "p1")
        await case.finish()
        return case

    simulate(main()).audit()


# -- what is left of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [0, 1])
def test_whoever_has_handed_over_keeps_nothing_on_disk_or_in_memory(tmp_path: Path, replicas: int) -> None:
    async def main() -> Case:
        case = Case(1, shards=3, replicas=replicas, folder=tmp_path, compute_s=0.4)
        await case.start()
        for batches in (3, 12):
            await case.until_trained(batches)
            case.leave(1)
            assert await case.has_left(1) == 75
            case.cluster.start_shard(1)
            if replicas:
                await case.until_backed_up("p0", "p1", "p2")
            else:
                await case.cluster.until(partial(moved, case, "p1", "p1"))
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    lives = {shard: ps.name for ps in case.cluster.shards.values() for shard in ps.cores}
    assert lives == case.hosts and sum(len(ps.cores) for ps in case.cluster.shards.values()) == 3
    logs = sorted(folder.name for folder in tmp_path.iterdir())
    of_p1 = [name for name in logs if name.startswith("p1")]
    assert len(of_p1) <= 2 + replicas, (
        "p1 left twice; the folder of the first life stays, nobody was there for it"
    )
    assert sum(len(ps.backups) for ps in case.cluster.shards.values()) == 3 * replicas


def test_a_process_that_takes_over_a_backup_in_step_leaves_nothing_behind_in_the_former_home() -> None:
    """Nobody asked the coordinator for leave: the backup was in step before."""

    async def main() -> Case:
        case = Case(1, shards=4, replicas=1, compute_s=2.0)
        await case.start()
        await case.until_backed_up("p0", "p1", "p2", "p3")
        for index in (1, 2):
            case.leave(index)
            assert await case.has_left(index) == 75
        case.cluster.start_shard(1)
        await case.cluster.until(lambda: case.cluster.backed_up("p1"))
        case.cluster.start_shard(2)
        await case.cluster.until(lambda: case.cluster.coordinator.homes.host("p1") != "p3")
        await case.until_backed_up("p0", "p1", "p2", "p3")
        assert "p1" not in case.cluster.shards[3].cores
        await case.finish()
        return case

    case = simulate(main())
    assert case.trained() == ALL
    same(case.scripts)


@pytest.mark.parametrize("staleness", MODES)
def test_what_is_held_for_a_checkpoint_counts_in_the_next_home_or_nowhere(
    tmp_path: Path, staleness: int | None
) -> None:
    """Commits that wait in the former home are not acknowledged there when they are let go. Nobody is told where the
    shard lives now: whoever waits in the former home has to hear it there."""

    async def main() -> Case:
        case = Case(1, replicas=0, staleness=staleness, folder=tmp_path)
        await case.start()
        await case.until_trained(4)
        case.leave(1)
        assert await case.has_left(1) == 75
        await case.until_trained(8)
        for script in case.scripts:
            script.client.where.moved = lambda message: None  # type: ignore[method-assign]
        assert await case.cluster.coordinator.shard_desk.ask("p1", Hold("job", 99)) is not None
        held = case.cluster.shards[0].cores["p1"].holding
        assert held is not None
        await case.cluster.until(lambda: [w for w in held.queue if isinstance(w.message, Commit)])
        case.cluster.start_shard(1)
        await case.cluster.until(partial(moved, case, "p1", "p1"))
        async with asyncio.timeout(120):
            await case.finish()
        return case

    simulate(main()).audit()


# -- who is not there, or goes too ---------------------------------------------------------------------------------


def test_a_shard_goes_on_at_home_when_the_process_that_was_to_take_it_dies(tmp_path: Path) -> None:
    """Nobody starts anything again, and nobody is fenced."""

    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, compute_s=0.4)
        await case.start()
        await case.until_trained(3)
        case.leave(1)
        assert await case.has_left(1) == 75
        case.cluster.start_shard(1)

        async def dies(message: Any) -> Any:
            case.kill(1)
            return await asyncio.get_running_loop().create_future()

        while 1 not in case.down or not case.cluster.shard_tasks[1].done():
            case.cluster.shards[1]._promote = dies  # type: ignore[method-assign]
            await asyncio.sleep(0.001)
        await case.finish()
        return case

    case = simulate(main())
    case.audit()
    assert case.hosts == {"p0": "p0", "p1": "p0"} and case.cluster.lives[0] == 1


def test_processes_that_are_told_to_leave_together_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, compute_s=2.0)
        await case.start()
        await case.until_trained(2)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for index in (0, 1):
            case.leave(index)
        assert {await case.has_left(0), await case.has_left(1)} <= {75, 143}
        assert loop.time() - began < 10
        case.bring_back(0)
        case.bring_back(1)
        await case.finish()
        return case

    simulate(main()).audit()


def test_a_shard_does_not_wait_for_a_process_that_is_down_when_another_is_there(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, shards=3, replicas=0, folder=tmp_path, compute_s=2.0)
        await case.start()
        await case.until_trained(2)
        case.kill(1)
        await asyncio.sleep(3)
        case.leave(0)
        assert await case.has_left(0) == 75
        assert case.cluster.coordinator.homes.host("p0") == "p2"
        case.cluster.start_shard(1)
        await case.finish()
        return case

    simulate(main()).audit()


@pytest.mark.parametrize("return_s", [0.0, 60.0])
def test_leaving_in_order_needs_no_patience(tmp_path: Path, return_s: float) -> None:
    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, return_s=return_s, compute_s=0.4)
        await case.start()
        await case.until_trained(4)
        case.leave(1)
        assert await case.has_left(1) == 75
        await case.finish()
        return case

    simulate(main()).audit()


@pytest.mark.parametrize("staleness", MODES)
def test_checkpoints_while_shards_move_hold_each_batch_once_or_are_not_taken(
    tmp_path: Path, staleness: int | None
) -> None:
    async def main() -> tuple[Case, list[Path]]:
        case = Case(1, replicas=0, staleness=staleness, folder=tmp_path / "logs", compute_s=0.2)
        await case.start()
        desk = case.cluster.coordinator.checkpoint_desk
        desk.keep(tmp_path / "checkpoints", When(), keep_last=100)
        assert desk.checkpoints is not None
        await case.until_trained(2)
        taken: list[Path] = []
        for _ in range(
            1 if staleness == 0 else 2
        ):  # in sync each comes with a clock, of which there are eight
            case.leave(1)
            for _ in range(1 if staleness == 0 else 4):
                if (path := await desk.checkpoints.take("a moment")) is not None:
                    taken.append(path)
            assert await case.has_left(1) == 75
            case.cluster.start_shard(1)
            if (path := await desk.checkpoints.take("a moment")) is not None:
                taken.append(path)
            await case.cluster.until(partial(moved, case, "p1", "p1"))
        await case.finish()
        return case, taken

    case, taken = simulate(main())
    case.audit()
    assert taken, "most are"
    for place, checkpoint in enumerate(map(read, taken)):
        again = JobSpec(workers=2, shards=2, staleness=staleness)
        later = go_on(tmp_path / str(place), checkpoint, again)
        assert sorted([*held(checkpoint), *trained(later)]) == ALL


# -- the coordinator dies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Pair, Promote, Rehome])
def test_a_coordinator_that_dies_before_it_gives_an_order_of_a_move_gives_it_when_it_is_back(
    tmp_path: Path, order: type[Action]
) -> None:
    """An order that overtakes the welcome is lost, and given again after 2 s: steps take long enough for that."""

    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path / "logs", state=tmp_path / "state", compute_s=0.6)
        await case.start()
        await case.until_trained(4)
        perform = case.cluster.coordinator.perform
        dead = asyncio.Event()

        def or_die(action: Action) -> None:
            if not isinstance(action, order):
                perform(action)
            elif not dead.is_set():
                case.cluster.kill_coordinator()
                dead.set()

        case.cluster.coordinator.perform = or_die  # type: ignore[method-assign]
        case.leave(1)
        await dead.wait()
        await asyncio.sleep(2)
        await case.cluster.restart_coordinator()
        assert await case.has_left(1) == 75
        assert moved(case, "p1", "p0")
        await case.finish()
        return case

    simulate(main()).audit()
