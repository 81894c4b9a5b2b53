"""Shards that join while everybody trains: they get their share, and nothing is lost, doubled or changed in a bit."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.test_recovery import MODES, replayed, same_bits
from tests.zml.test_replicas import Case
from zml.messages import Assign, Cede, Commit, Graft, Push
from zml.shard.ps import Ps
from zml.shard.shard import Shard


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


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize(
    ("compress", "optimizer_on"), [("none", "shard"), ("bf16", "shard"), ("topk:10%", "worker")]
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
    case.audit()
    alike(case)
    held_once(case)
    for shard, core in case.cores.items():
        same_bits(replayed(tmp_path / shard), core)
