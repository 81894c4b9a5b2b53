"""Shards that join while everybody trains: they get their share, and nothing is lost, doubled or changed in a bit."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.simulation import simulate
from tests.soaking import soak, soak_cases
from tests.zml.test_checkpointing import go_on
from tests.zml.test_cluster import same, trained
from tests.zml.test_recovery import ALL, MODES, replayed, same_bits
from tests.zml.test_replicas import Case
from zml.checkpoint import read
from zml.coordinator.checkpoints import When
from zml.coordinator.facts import Deciding, Spread
from zml.coordinator.spreading import Spreading
from zml.messages import Assign, Cede, Commit, Enter, Graft, JobSpec, Push
from zml.shard.ps import Ps
from zml.shard.shard import Shard
from zml.transport import Refusal


def holders(case: Case) -> list[int]:
    return case.cluster.coordinator.facts.holders


def has_its_share(case: Case, shard: int = 2) -> bool:
    facts = case.cluster.coordinator.facts
    desk = case.cluster.coordinator.shard_desk
    return shard in facts.holders and all(desk.editions.get(s) == facts.edition for s in desk.all)


def held_once(case: Case) -> None:
    """Every bucket lives in exactly one shard, and that is who is said to hold it."""
    cores = [case.cores[f"p{number}"] for number in range(len(case.cluster.shards))]
    found = {index: core.name for core in cores for index in core.buckets}
    assert sum(len(core.buckets) for core in cores) == len(found) == len(cores[0].cut)
    assert found == {index: f"p{holder}" for index, holder in enumerate(holders(case))}
    assert all(core.doubt is None for core in cores)


def alike(case: Case) -> None:
    """On every shard the same steps count, also on the newcomer, which was not there for all of them."""
    cores = [case.cores[f"p{number}"] for number in range(len(case.cluster.shards))]
    assert len({core.steps for core in cores}) == 1, {core.name: core.steps for core in cores}
    assert all(core.applied == cores[0].applied for core in cores)


def whole(case: Case) -> None:
    """Nothing is lost, nothing is doubled, and everything is where it is said to be."""
    case.audit()
    alike(case)
    held_once(case)


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize(
    ("compress", "optimizer_on"),
    [("none", "shard"), *soak_cases([("bf16", "shard")]), ("topk:10%", "worker")],
)
def test_a_shard_that_joins_gets_its_share_and_nobody_misses_anything(
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
        await case.until_trained(3)
        case.cluster.start_shard(2)
        await case.cluster.until(partial(has_its_share, case))
        await case.finish()
        return case

    case = simulate(main())
    whole(case)
    for shard, core in case.cores.items():
        same_bits(replayed(tmp_path / shard), core)


# -- whoever dies while buckets move -------------------------------------------------------------------------

STEPS: dict[str, tuple[type, int]] = {  # what a process is about to do, or has just done, when it dies
    "cede": (Cede, 0),
    "graft": (Graft, 2),
    "source's edition": (Assign, 0),
    "target's edition": (Assign, 2),
    "another's edition": (Assign, 1),
}


def killing(case: Case, monkeypatch: pytest.MonkeyPatch, step: str, *, before: bool) -> list[str]:
    """Kill the process of a shard at this order, once; who that was is in the list then. It is started again."""
    killed: list[str] = []
    ceding: list[str] = []  # who was asked to first
    kind, index = STEPS[step]
    order = Shard.order

    def mine(core: Shard, message: Any) -> bool:
        if core.replaying:
            return False
        if isinstance(message, Cede) and not ceding:
            ceding.append(core.name)
        if killed or not ceding or not isinstance(message, kind):
            return False
        return core.name == [ceding[0], {"p0": "p1", "p1": "p0"}[ceding[0]], "p2"][index]

    def die(core: Shard) -> None:
        killed.append(core.name)
        case.cluster.kill_shard(int(core.name[1:]))
        case.bring_back(int(core.name[1:]))

    def ordered(core: Shard, message: Any, payload: Any) -> Any:
        if not mine(core, message):
            return order(core, message, payload)
        if before:
            die(core)
            raise Refusal("dead", "nobody hears this")
        answer = order(core, message, payload)
        die(core)
        return answer

    monkeypatch.setattr(Shard, "order", ordered)
    return killed


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("staleness", [0, *soak([2, None])])
@pytest.mark.parametrize("compress", ["none", *soak(["topk:10%"])])
def test_a_shard_that_dies_while_buckets_move_goes_on_where_its_log_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    staleness: int | None,
    compress: str,
    step: str,
    before: bool,
) -> None:
    async def main() -> tuple[Case, list[str]]:
        case = Case(
            1,
            replicas=0,
            staleness=staleness,
            compress=compress,
            folder=tmp_path,
            compute_s=0.3,
        )
        await case.start()
        await case.until_trained(3)
        killed = killing(case, monkeypatch, step, before=before)
        case.cluster.start_shard(2)
        await case.cluster.until(lambda: killed and has_its_share(case))
        await case.finish()
        return case, killed

    case, killed = simulate(main())
    assert len(killed) == 1
    whole(case)
    for shard, core in case.cores.items():
        same_bits(replayed(tmp_path / shard), core)


@pytest.mark.parametrize("fact", [Deciding, Spread])
@pytest.mark.parametrize("staleness", [0, *soak([2, None])])
def test_a_coordinator_that_dies_while_buckets_move_leaves_nobody_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: type, staleness: int | None
) -> None:
    """Right after it has written that it decides, with a portion ceded meanwhile, or what it has decided."""

    async def main() -> Case:
        case = Case(
            1, replicas=0, staleness=staleness, folder=tmp_path, state=tmp_path / "state", compute_s=0.3
        )
        await case.start()
        await case.until_trained(3)
        dead = asyncio.Event()
        spreading = case.cluster.coordinator.spreading

        async def decide(edition: Spread, *where: Any) -> None:
            if fact is Spread:
                case.cluster.coordinator.docket.fact(edition)
            case.cluster.kill_coordinator()
            dead.set()
            await asyncio.get_running_loop().create_future()

        spreading._decide = decide  # type: ignore[method-assign,assignment]
        case.cluster.start_shard(2)
        await dead.wait()
        doubts = [ps.cores[name].doubt for ps in case.cluster.shards.values() for name in ps.cores]
        assert len([doubt for doubt in doubts if doubt is not None]) == 2, "who gave and who got"
        await asyncio.sleep(2)
        before = len(case.trained())
        await case.cluster.restart_coordinator()
        await case.cluster.until(lambda: has_its_share(case) and len(case.trained()) > before)
        await case.finish()
        return case

    case = simulate(main())
    whole(case)


@pytest.mark.parametrize("staleness", [0, *soak([2, None])])
@pytest.mark.parametrize("kind", [Push, Commit, Enter])
def test_a_worker_that_dies_while_buckets_move_counts_everywhere_or_nowhere(
    tmp_path: Path, kind: type, staleness: int | None
) -> None:
    """With the first message that the newcomer has from it."""

    async def main() -> Case:
        case = Case(1, replicas=0, staleness=staleness, folder=tmp_path, compute_s=0.3)
        killed: list[str] = []

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            reply = handler(peer, message, payload)
            if ps.name == "p2" and isinstance(message, kind) and peer.startswith("w1.") and not killed:
                killed.append(peer)
                case.cluster.kill("w1")
            return reply

        case.cluster.deliver = deliver
        await case.start()
        await case.until_trained(3)
        case.cluster.start_shard(2)
        await case.cluster.until(lambda: killed and has_its_share(case))
        await case.finish()
        return case

    case = simulate(main())
    alike(case)
    held_once(case)
    for shard, core in case.cores.items():
        same_bits(replayed(tmp_path / shard), core)


def test_a_newcomer_that_dies_for_good_before_it_has_anything_is_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody else sees its disk, and nothing on it is missed: its empty place lives elsewhere, and moves to the next
    process of its name."""
    monkeypatch.setattr(Spreading, "start", lambda self: None)

    async def main() -> Case:
        case = Case(1, replicas=0, compute_s=1.0, return_s=3.0)
        await case.start()
        await case.until_trained(2)
        case.cluster.start_shard(2)
        await case.cluster.until(lambda: "p2" in case.cluster.coordinator.shard_desk.assigned)
        case.kill(2)
        await case.cluster.until(lambda: case.cluster.coordinator.homes.host("p2") != "p2")
        await case.finish()
        return case

    case = simulate(main())
    assert trained(case.scripts) == ALL and case.hosts["p2"] in ("p0", "p1")


def test_a_newcomer_is_asked_of_lost_workers_once_it_holds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is away and empty keeps nobody waiting for what it cannot say."""
    start = Spreading.start
    monkeypatch.setattr(Spreading, "start", lambda self: None)

    async def main() -> tuple[list[str], list[str]]:
        case = Case(1, replicas=0, folder=tmp_path, compute_s=0.3)
        await case.start()
        await case.until_trained(3)
        hall = case.cluster.coordinator
        case.cluster.start_shard(2)
        await case.cluster.until(lambda: len(hall.shard_desk.all) == 3)
        before = list(hall.rosters.asked())
        start(hall.spreading)
        await case.cluster.until(partial(has_its_share, case))
        after = list(hall.rosters.asked())
        await case.finish()
        return before, after

    assert simulate(main()) == (["p0", "p1"], ["p0", "p1", "p2"])


def test_what_fails_in_the_midst_of_a_move_leaves_nobody_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, compute_s=0.3)
        await case.start()
        await case.until_trained(3)
        spreading = case.cluster.coordinator.spreading
        cede, failed = spreading._cede, list[Any]()

        async def fails(*args: Any) -> Any:
            took = await cede(*args)
            if not failed:
                failed.append(took)
                raise KeyError("a mistake")
            return took

        monkeypatch.setattr(spreading, "_cede", fails)
        case.cluster.start_shard(2)
        await case.cluster.until(lambda: failed and has_its_share(case))
        await case.finish()
        return case

    case = simulate(main())
    whole(case)


# -- what comes beside ---------------------------------------------------------------------------------------


def test_two_shards_join_and_one_that_has_joined_leaves_again(tmp_path: Path) -> None:
    async def main() -> Case:
        case = Case(1, shards=1, replicas=0, folder=tmp_path, compute_s=0.3)
        await case.start()
        await case.until_trained(2)
        case.cluster.start_shard(1)
        await case.cluster.until(partial(has_its_share, case, 1))
        case.cluster.start_shard(2)
        await case.cluster.until(partial(has_its_share, case, 2))
        case.leave(1)
        assert await case.has_left(1) == 75
        await case.finish()
        return case

    case = simulate(main())
    whole(case)
    assert case.hosts["p1"] == "p2", "the next on the ring, which is there"


def test_a_portion_that_cannot_be_taken_stays_where_it_is_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newcomer's disk is full for a while."""
    refused: list[int] = []

    async def main() -> Case:
        case = Case(1, replicas=0, folder=tmp_path, compute_s=0.3)
        await case.start()
        await case.until_trained(3)
        order = Shard.order

        def ordered(core: Shard, message: Any, payload: Any) -> Any:
            if isinstance(message, Graft) and not refused and not core.replaying:
                refused.append(message.edition)
                raise Refusal("full", "there is no room")
            return order(core, message, payload)

        monkeypatch.setattr(Shard, "order", ordered)
        case.cluster.start_shard(2)
        await case.cluster.until(partial(has_its_share, case))
        await case.finish()
        return case

    case = simulate(main())
    assert refused == [1], "it was decided that all stays as it was"
    whole(case)


def test_a_checkpoint_after_a_move_has_every_chunk_once_and_is_gone_on_from(tmp_path: Path) -> None:
    async def main() -> Path:
        case = Case(1, replicas=0, folder=tmp_path / "logs", compute_s=0.3)
        await case.start()
        desk = case.cluster.coordinator.checkpoint_desk
        desk.keep(tmp_path / "checkpoints", When())
        await case.until_trained(3)
        case.cluster.start_shard(2)
        await case.cluster.until(partial(has_its_share, case))
        assert desk.checkpoints is not None
        path = await desk.checkpoints.take("asked")
        assert path is not None
        await case.finish()
        held_once(case)
        return path

    path = simulate(main())
    same(go_on(tmp_path / "next", read(path), JobSpec(workers=2, shards=2)))
