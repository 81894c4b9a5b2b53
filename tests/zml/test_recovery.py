"""Shards that die and come back, workers that die between two commits: what was acknowledged counts, once."""

import asyncio
import os
import random
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.simulation import simulate
from tests.soaking import soak, soak_cases
from tests.zml.cluster import Cluster, Script
from tests.zml.test_cluster import run, same, trained
from zml.errors import INTERRUPTED, LOG_HELD, ZmlError
from zml.lease import COORDINATOR
from zml.messages import Commit, Exited, JobSpec, Ok
from zml.records import Damaged
from zml.scheduler.actions import Action, Place
from zml.scheduler.ids import JobId
from zml.shard import base
from zml.shard.base import state_of
from zml.shard.ps import Ps
from zml.shard.pushlog import PushLog
from zml.shard.shard import Shard
from zml.transport.memory import MemoryNetwork

MODES = [0, 2, None]
ALL = [(epoch, batch) for epoch in range(2) for batch in range(12)]


def have_trained(scripts: list[Script], batches: int) -> bool:
    return len(trained(scripts)) >= batches


def replayed(folder: Path, name: str = "") -> Shard:
    """A new shard, made from a log alone."""
    shard, log = Shard(JobId("job"), name or folder.name), PushLog(folder)
    try:
        shard.recover(log)
    finally:
        log.close()
    return shard


def bits(shard: Shard) -> dict[str, torch.Tensor]:
    """All that a shard holds of its chunks: parameters, what was published, the optimizer's state."""
    assert shard.store is not None
    found: dict[str, torch.Tensor] = {}
    for index, held in shard.store._held.items():
        found[f"{index}/w"], found[f"{index}/p"] = held.w.clone(), held.p.clone()
        lossless = shard.store.codec.lossless  # what is published is what is there
        found[f"{index}/version"] = torch.tensor(
            [held.version] if lossless else [held.version, held.published, held.budget]
        )
        if held.rule is not None:
            found |= {f"{index}/{name}": value.clone() for name, value in held.rule.state().items()}
    return found


def same_bits(one: Shard, other: Shard) -> None:
    ours, theirs = bits(one), bits(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert one.gate.active == other.gate.active and one.gate.low == other.gate.low
    assert one.last == other.last and one.applied == other.applied


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize(
    ("optimizer_on", "compress"),
    [
        ("shard", "none"),
        ("shard", "bf16"),
        ("worker", "topk:10%"),
        *soak_cases([("shard", "topk:10%"), ("worker", "none"), ("worker", "bf16")]),
    ],
)
def test_a_log_makes_the_same_shard_to_the_bit(
    tmp_path: Path, staleness: int | None, optimizer_on: Literal["shard", "worker"], compress: str
) -> None:
    scripts, cluster = run(
        1, staleness=staleness, compress=compress, optimizer_on=optimizer_on, folder=tmp_path
    )
    assert trained(scripts) == ALL
    for index, ps in cluster.shards.items():
        assert ps.core is not None
        same_bits(replayed(tmp_path / f"p{index}"), ps.core)


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("compress", ["none", "topk:10%"])
@pytest.mark.parametrize("seed", [0, *soak([1, 2, 3, 4])])
def test_a_killed_shard_comes_back_and_nothing_is_lost_or_doubled(
    tmp_path: Path, seed: int, compress: str, staleness: int | None
) -> None:
    print(f"seed {seed}")

    async def main() -> tuple[list[Script], Cluster]:
        dice = random.Random(seed)
        spec = JobSpec(workers=3, shards=2, staleness=staleness, compress=compress)
        cluster = Cluster(MemoryNetwork(seed), spec, folder=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(3)]
        for _ in range(3):
            more = len(trained(scripts)) + dice.randrange(4)
            await cluster.until(partial(have_trained, scripts, more))
            await asyncio.sleep(dice.uniform(0, 0.05))
            assert not cluster.coordinator.machine.over
            shard = dice.randrange(2)
            cluster.kill_shard(shard)
            await asyncio.sleep(dice.uniform(0.8, 4.0))
            cluster.start_shard(shard)
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts, cluster

    scripts, cluster = simulate(main())
    assert trained(scripts) == ALL
    same(scripts)
    steps = [ps.core.steps for ps in cluster.shards.values() if ps.core is not None]
    assert steps == ([8, 8] if staleness == 0 else [24, 24]), "a step counts once on each shard"
    for index, ps in cluster.shards.items():
        assert ps.core is not None
        same_bits(replayed(tmp_path / f"p{index}"), ps.core)
    if staleness == 0 and compress == "none":
        calm, _ = run(1)
        same([*calm, *scripts])


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("reached", [0, 1])
def test_a_step_that_one_shard_has_counted_counts_on_all_when_its_worker_dies(
    tmp_path: Path, staleness: int | None, reached: int
) -> None:
    """The worker is killed when one of its two commits has arrived, and the other has not."""

    async def main() -> tuple[list[Script], Cluster, int]:
        spec = JobSpec(workers=2, shards=2, staleness=staleness)
        network = MemoryNetwork(5)
        cluster = Cluster(network, spec, folder=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        loop = asyncio.get_running_loop()
        killed = loop.create_future()

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            dies = isinstance(message, Commit) and message.worker == "w1" and message.clock >= 3
            if dies and (ps.name != f"p{reached}" or killed.done()):
                return loop.create_future()  # it never arrives
            answer = handler(peer, message, payload)
            if dies:
                assert answer == Ok()
                killed.set_result(message.clock)
                loop.call_soon(cluster.kill, "w1")
            return answer

        cluster.deliver = deliver
        clock = await killed
        assert await cluster.finish() == 0, scripts[0].error
        return scripts, cluster, clock

    scripts, cluster, clock = simulate(main())
    steps = [ps.core.steps for ps in cluster.shards.values() if ps.core is not None]
    assert steps[0] == steps[1], "both shards count the same steps"
    if staleness != 0:
        assert steps[0] == len(ALL), f"each batch is in the parameters once; w1 died at clock {clock}"
    assert len(set(trained(scripts))) == len(trained(scripts)), "no batch was computed twice"


@pytest.mark.parametrize("staleness", [0, None, *soak([2])])
@pytest.mark.parametrize(
    ("compress", "optimizer_on"), [("none", "shard"), ("bf16", "shard"), ("topk:10%", "worker")]
)
def test_a_base_at_any_message_and_the_log_behind_it_make_the_same_shard(
    tmp_path: Path, staleness: int | None, compress: str, optimizer_on: Literal["shard", "worker"]
) -> None:
    scripts, cluster = run(
        1, staleness=staleness, compress=compress, optimizer_on=optimizer_on, folder=tmp_path / "run"
    )
    assert trained(scripts) == ALL
    live = cluster.shards[1].core
    assert live is not None
    log = PushLog(tmp_path / "run" / "p1")
    messages = [(message, bytes(payload)) for message, payload in log.replay()]
    log.close()
    for cut in range(0, len(messages), 7):
        folder = tmp_path / str(cut)
        shard, again = Shard(JobId("job"), "p1"), PushLog(folder)
        for place, (message, payload) in enumerate(messages):
            if place == cut:
                again.rebase(again.cut(), state_of(shard))
            again.append(message, payload)
            shard.replay(message, memoryview(payload))
        again.close()
        assert again.records.first == cut
        same_bits(replayed(folder, "p1"), live)


def test_a_base_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    _, cluster = run(1, folder=tmp_path)
    live = cluster.shards[0].core
    assert live is not None
    log = PushLog(tmp_path / "p0")
    base.write(tmp_path / "p0", log.cut(), state_of(live))
    (path,) = (tmp_path / "p0").glob("base-*/*.records")
    log.close()
    whole = path.read_bytes()
    for size in range(0, len(whole), 101):
        path.write_bytes(whole[:size])
        same_bits(replayed(tmp_path / "p0"), live)


def test_every_changed_byte_of_a_base_is_noticed(tmp_path: Path) -> None:
    _, cluster = run(1, folder=tmp_path)
    live = cluster.shards[0].core
    assert live is not None
    log = PushLog(tmp_path / "p0")
    log.rebase(log.cut(), state_of(live))
    log.close()
    (path,) = (tmp_path / "p0").glob("base-*/*.records")
    whole = path.read_bytes()
    for at in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(Damaged):
            replayed(tmp_path / "p0")


@pytest.mark.parametrize("told", [True, False])
def test_a_shard_that_comes_back_is_found_within_seconds_also_where_the_notice_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    if not told:
        monkeypatch.setattr(Script, "_told", lambda *notice: None)

    async def main() -> float:
        cluster = Cluster(MemoryNetwork(6), JobSpec(workers=2, shards=2), folder=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        await cluster.until(partial(have_trained, scripts, 4))
        cluster.kill_shard(0)
        await asyncio.sleep(2.0)
        cluster.start_shard(0)
        back_at = asyncio.get_running_loop().time()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        assert trained(scripts) == ALL
        return asyncio.get_running_loop().time() - back_at

    assert simulate(main()) < 15


def test_a_worker_that_is_lost_with_a_shard_is_settled_when_the_shard_is_back(tmp_path: Path) -> None:
    """The coordinator has asked the shard's former process, which it did not know to be dead, and asks again."""

    async def main() -> float:
        cluster = Cluster(MemoryNetwork(7), JobSpec(workers=2, shards=2), folder=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        await cluster.until(partial(have_trained, scripts, 4))
        cluster.kill_shard(0)
        assert scripts[1].task is not None
        scripts[1].task.cancel()
        cluster.network.crash(scripts[1].script_name)
        exited = Exited(job="job", member="w1", incarnation=1, signal=9)
        await scripts[1].agent.request(COORDINATOR, exited, timeout_s=5)
        await asyncio.sleep(2.0)
        cluster.start_shard(0)
        back_at = asyncio.get_running_loop().time()
        assert await cluster.finish() == 0, scripts[0].error
        return asyncio.get_running_loop().time() - back_at

    assert simulate(main()) < 15


def test_a_log_is_held_by_one_process_and_the_other_is_told_who(tmp_path: Path) -> None:
    one = PushLog(tmp_path / "p0")
    with pytest.raises(ZmlError) as caught:
        PushLog(tmp_path / "p0")
    assert caught.value.code == LOG_HELD and f"process {os.getpid()}" in caught.value.what
    one.close()
    one.close()
    PushLog(tmp_path / "p0").close()


def test_a_shard_that_ends_when_it_is_to_take_the_layout_is_waited_for(tmp_path: Path) -> None:
    """Its connection is gone before its lease is: that is no reason to end the job."""

    async def main() -> tuple[list[Script], int]:
        cluster = Cluster(MemoryNetwork(1), JobSpec(workers=2, shards=2), folder=tmp_path)
        perform = cluster.coordinator.perform

        def after_its_end(action: Action) -> None:
            if isinstance(action, Place):
                cluster.shards[1].finish(INTERRUPTED)
                asyncio.get_running_loop().call_later(4, cluster.start_shard, 1)
            perform(action)

        cluster.coordinator.perform = after_its_end  # type: ignore[method-assign]
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        return scripts, await cluster.finish()

    scripts, code = simulate(main())
    assert code == 0, [script.error for script in scripts]
    assert trained(scripts) == ALL
