"""A mark cuts at its clock and nowhere else, holds nothing up, and is forgotten when another cut is made."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.simulation import simulate
from tests.zml.cluster import Cluster
from tests.zml.test_shard import JOB, Bench
from zml.coordinator.checkpoints import When
from zml.messages import Advance, Front, Hold, JobSpec, Mark, Marked, Release
from zml.scheduler.batches import Ledger, Opened, Taken
from zml.scheduler.epoch import COMMITTED
from zml.scheduler.ids import Seat, WorkerId
from zml.shard.holding import cut_alike
from zml.transport import Refusal
from zml.transport.memory import MemoryNetwork

W0, W1 = WorkerId("w0"), WorkerId("w1")


def ordered(bench: Bench, clock: int, checkpoint: int = 1) -> Awaitable[Any]:
    reply = bench.shard.order(Mark(JOB, checkpoint, clock), b"")
    assert isinstance(reply, Awaitable)
    return reply


async def said(reply: Awaitable[Any]) -> tuple[Marked, Front]:
    message, payload = await asyncio.wait_for(reply, 1.0)
    return message, msgspec.msgpack.decode(payload, type=Front)


def loaded(staleness: int | None = 0) -> Bench:
    bench = Bench(staleness)
    bench.load()
    return bench


def both(bench: Bench, clock: int) -> None:
    bench.step("w0", clock)
    bench.step("w1", clock)


def of_copy(bench: Bench) -> torch.Tensor:
    assert bench.shard.copy is not None
    return dict(bench.shard.copy[1].tensors())["0/w"]


def test_a_shard_marks_what_it_has_after_the_clock_that_was_named() -> None:
    async def main() -> None:
        bench = loaded()
        both(bench, 0)
        reply = ordered(bench, 2)
        both(bench, 1)
        assert bench.shard.copy is None
        bench.step("w0", 2)
        bench.step("w1", 2)
        wanted = bench.held().clone()
        both(bench, 3)
        marked, front = await said(reply)
        assert marked.cut and marked.bytes == wanted.nbytes and front.updates == 3
        assert front.applied.keys() == {"w0", "w1"} and {last[0] for last in front.applied.values()} == {2}
        assert torch.equal(of_copy(bench), wanted) and not torch.equal(bench.held(), wanted)

    asyncio.run(main())


def test_a_shard_that_stands_there_marks_at_once_and_one_that_is_further_says_where() -> None:
    async def main() -> None:
        bench = loaded()
        assert (await said(ordered(bench, -1)))[0].cut, "nothing was trained yet"
        both(bench, 0)
        both(bench, 1)
        assert (await said(ordered(bench, 1)))[0].cut
        marked, front = await said(ordered(bench, 0))
        assert not marked.cut and {last[0] for last in front.applied.values()} == {1}
        assert bench.shard.copy is None, "nothing was cut, and what was before is not wanted any more"

    asyncio.run(main())


def test_a_clock_that_nobody_computes_is_cut_before_the_next() -> None:
    async def main() -> None:
        bench = loaded()
        both(bench, 0)
        reply = ordered(bench, 2)
        for worker in ("w0", "w1"):
            assert bench.shard.copy is None
            bench.ask(worker, Advance(JOB, worker, 1, 5))
        assert bench.shard.copy is not None, "nobody can compute it any more"
        both(bench, 5)
        marked, front = await said(reply)
        assert marked.cut and front.updates == 1 and bench.shard.steps == 2

    asyncio.run(main())


@pytest.mark.parametrize("other", [Mark(JOB, 1, 9), Mark(JOB, 2, 3), Hold(JOB, 1), Release(JOB, 1)])
def test_another_order_forgets_a_mark(other: Any) -> None:
    async def main() -> None:
        bench = loaded()
        reply = ordered(bench, 3)
        assert bench.shard.marking is not None
        bench.shard.order(other, b"")
        with pytest.raises(Refusal, match="another cut"):
            await said(reply)
        if bench.shard.holding is not None:
            bench.shard.holding.release()
        for clock in range(4):
            both(bench, clock)
        cut = other == Mark(JOB, 2, 3)
        assert (bench.shard.copy is not None) == cut

    asyncio.run(main())


def test_the_same_order_twice_is_one_cut_and_a_release_of_another_leaves_it() -> None:
    async def main() -> None:
        bench = loaded()
        first, second = ordered(bench, 0), ordered(bench, 0)
        bench.shard.order(Release(JOB, 7), b"")
        both(bench, 0)
        copy = bench.shard.copy
        third = ordered(bench, 0)
        assert [await said(first), await said(second)] == 2 * [await said(third)]
        assert bench.shard.copy is copy is not None

    asyncio.run(main())


@pytest.mark.parametrize("staleness", [2, None])
def test_only_in_sync_is_a_clock_the_same_everywhere(staleness: int | None) -> None:
    async def main() -> None:
        with pytest.raises(Refusal, match="not in sync"):
            ordered(loaded(staleness), 3)
        with pytest.raises(Refusal, match="no parameters"):
            ordered(Bench(0), 3)

    asyncio.run(main())


def test_cuts_of_other_steps_or_other_workers_are_not_alike() -> None:
    async def main() -> Front:
        bench = loaded()
        both(bench, 0)
        return (await said(ordered(bench, 0)))[1]

    front = asyncio.run(main())
    assert cut_alike(front, msgspec.structs.replace(front, stands={}, counted={}))
    changes: list[dict[str, Any]] = [{"generation": 2}, {"applied": {}}, {"updates": 5}, {"orphans": True}]
    for change in changes:
        other = msgspec.structs.replace(front, **change)
        assert not cut_alike(front, other) and not cut_alike(other, front)


def test_a_ledger_that_has_gone_on_tells_what_was_in_the_cut() -> None:
    ledger = Ledger()
    ledger.members([Seat(W0, 1, True), Seat(W1, 1, True)])
    for worker in (W0, W1):
        assert ledger.open(worker, 0, 9, b"order") == Opened(0, b"order")
    given: dict[WorkerId, list[int]] = {}
    for worker in (W0, W1):
        answer = ledger.take(worker, 0, 4)
        assert isinstance(answer, Taken)
        given[worker] = list(answer.batches)
        ledger.commit(worker, 0, given[worker][:3])
    ledger.skip(W1, 0, given[W1][3])
    cut = ledger.at_cut({W0: (0, 2), W1: (0, 1)}, gone_on=True)
    assert cut is not None
    assert [batch for batch, how in enumerate(cut.state) if how == COMMITTED] == sorted(
        [*given[W0][:2], given[W1][0]]
    )
    assert cut.skipped == 1 and ledger.committed == 6
    none = ledger.at_cut({W0: (0, 0)}, gone_on=True)
    assert none is not None and none.state.count(COMMITTED) == 0


@pytest.mark.parametrize(("staleness", "holds"), [(0, False), (2, True), (None, True)])
def test_in_sync_no_shard_is_held_while_workers_train(
    tmp_path: Path, staleness: int | None, holds: bool
) -> None:
    async def main() -> list[str]:
        cluster = Cluster(
            MemoryNetwork(1), JobSpec(workers=2, shards=2, staleness=staleness), compute_s=lambda name: 0.05
        )
        await cluster.start()
        desk, orders = cluster.coordinator.checkpoint_desk, list[str]()
        asked = cluster.coordinator.shard_desk.ask

        async def ask(shard: str, message: Any, payload: Any = None, within_s: float = 30.0) -> Any:
            orders.append(type(message).__name__)
            return await asked(shard, message, payload, within_s)

        cluster.coordinator.shard_desk.ask = ask  # type: ignore[method-assign]
        desk.keep(tmp_path / "checkpoints", When())
        script = cluster.script("w0")
        cluster.script("w1")
        await cluster.until(lambda: len(script.trained) > 2)
        assert desk.checkpoints is not None and await desk.checkpoints.take("a test") is not None
        taken = list(orders)
        assert await cluster.finish() == 0
        assert "Hold" in orders, "the last one: nobody trains any more"
        return taken

    orders = simulate(main())
    assert ("Hold" in orders) is holds and ("Mark" in orders) is not holds
