"""Checkpoints of clusters that run: cut without a stop, the same for all shards, and gone on from with any numbers."""

import asyncio
import random
from pathlib import Path

import pytest
import torch

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.cluster import JOB, Cluster, Script, parameters
from tests.zml.test_cluster import run, same, trained
from zml.checkpoint import Checkpoint, newest, read
from zml.coordinator.checkpoints import When
from zml.lease import ask
from zml.messages import Exited, JobSpec
from zml.transport.memory import MemoryNetwork

MODES = [0, 2, None]
ALL = [(epoch, batch) for epoch in range(2) for batch in range(12)]


def held(checkpoint: Checkpoint) -> set[tuple[int, int]]:
    """The batches that the checkpoint says are in its parameters."""
    ledger = checkpoint.ledger
    done = {(epoch, batch) for epoch in range(ledger["epoch"]) for batch in range(12)}
    return done | {
        (ledger["epoch"], batch) for first, last in ledger["committed"] for batch in range(first, last + 1)
    }


def with_checkpoints(
    folder: Path, seed: int, spec: JobSpec, moments: int, *, faults: bool = False
) -> tuple[list[Script], list[Checkpoint]]:
    """A run with checkpoints at random moments, one at the end, and perhaps a worker and a shard that die."""

    async def main() -> tuple[list[Script], list[Path]]:
        dice = random.Random(seed)
        cluster = Cluster(
            MemoryNetwork(seed),
            spec,
            folder=folder / "logs",
            compute_s=lambda name: 0.03 * (1 + int(name[1:])),
        )
        await cluster.start()
        cluster.coordinator.checkpoint_desk.keep(folder / "checkpoints", When(), keep_last=100)
        scripts = [cluster.script(f"w{index}") for index in range(spec.workers)]
        await cluster.until(lambda: scripts[0].trained)
        paths: list[Path] = []
        assert cluster.coordinator.checkpoint_desk.checkpoints is not None
        for moment in range(moments):
            await asyncio.sleep(dice.uniform(0, 0.08))
            if faults and moment == 1:
                cluster.kill("w1")
            if faults and moment == 2:
                cluster.kill_shard(1)
                await asyncio.sleep(2)
                cluster.start_shard(1)
                await asyncio.sleep(0.5)
            if (path := await cluster.coordinator.checkpoint_desk.checkpoints.take("a moment")) is not None:
                paths.append(path)
        assert await cluster.finish() == 0, [script.error for script in scripts]
        found, skipped = newest(folder / "checkpoints")
        assert found is not None and not skipped
        return scripts, [*paths, found.path]

    scripts, paths = simulate(main())
    return scripts, [read(path) for path in paths]


def go_on(folder: Path, checkpoint: Checkpoint, spec: JobSpec) -> list[Script]:
    async def main() -> list[Script]:
        cluster = Cluster(
            MemoryNetwork(3),
            spec,
            folder=folder,
            resumed=checkpoint,
            compute_s=lambda name: 0.03 * (1 + int(name[1:])),
        )
        await cluster.start()
        scripts = [cluster.script(f"w{index}", seed=100 + index) for index in range(spec.workers)]
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts

    return simulate(main())


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("compress", ["none", "topk:10%"])
@pytest.mark.parametrize("seed", [0, *soak([1])])
def test_a_checkpoint_and_what_is_trained_after_it_are_every_batch_once(
    tmp_path: Path, seed: int, compress: str, staleness: int | None
) -> None:
    print(f"seed {seed}")
    spec = JobSpec(workers=3, shards=2, staleness=staleness, compress=compress)
    scripts, checkpoints = with_checkpoints(tmp_path, seed, spec, moments=3)
    assert trained(scripts) == ALL, "checkpoints change no count"
    same(scripts)
    assert len(checkpoints) == 4
    for place, checkpoint in enumerate(checkpoints):
        workers, shards = [(2, 3), (5, 1)][place % 2]
        again = JobSpec(workers=workers, shards=shards, staleness=staleness, compress=compress)
        later = go_on(tmp_path / str(place), checkpoint, again)
        assert sorted([*held(checkpoint), *trained(later)]) == ALL
        same(later)
    at_end = checkpoints[-1]
    assert held(at_end) == set(ALL)
    reasons = [read(path).manifest.because for path in (tmp_path / "checkpoints").glob("step-*")]
    assert reasons.count("run ended") == 1


def test_in_bsp_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    calm, _ = run(1)
    spec = JobSpec(workers=3, shards=2, staleness=0)
    scripts, checkpoints = with_checkpoints(tmp_path, 4, spec, moments=4)
    same([*calm, *scripts])
    for place, checkpoint in enumerate(checkpoints[:-1]):
        assert len(held(checkpoint)) < len(ALL)
        same([*calm, *go_on(tmp_path / str(place), checkpoint, spec)])


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("seed", [0, *soak([1])])
def test_a_checkpoint_between_deaths_holds_each_batch_once(
    tmp_path: Path, seed: int, staleness: int | None
) -> None:
    print(f"seed {seed}")
    spec = JobSpec(workers=3, shards=2, staleness=staleness)
    _, checkpoints = with_checkpoints(tmp_path, seed, spec, moments=3, faults=True)
    for place, checkpoint in enumerate(checkpoints):
        again = JobSpec(workers=2, shards=2, staleness=staleness)
        later = go_on(tmp_path / str(place), checkpoint, again)
        assert sorted([*held(checkpoint), *trained(later)]) == ALL


def test_the_last_checkpoint_is_the_model(tmp_path: Path) -> None:
    scripts, checkpoints = with_checkpoints(tmp_path, 1, JobSpec(workers=2, shards=2), moments=1)
    found = [torch.from_numpy(checkpoints[-1].parameter(i).copy()) for i in range(4)]  # type: ignore[union-attr]
    assert all(torch.equal(a.flatten(), b) for a, b in zip(parameters(scripts[0]), found, strict=True))


def test_a_checkpoint_does_not_wait_for_what_a_script_that_is_gone_was_to_keep(tmp_path: Path) -> None:
    async def main() -> float:
        spec = JobSpec(workers=2, shards=2, optimizer_on="worker")
        cluster = Cluster(MemoryNetwork(1), spec, compute_s=lambda name: 0.4)
        cluster.silent = True
        await cluster.start()
        desk = cluster.coordinator.checkpoint_desk
        desk.keep(tmp_path, When())
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        await cluster.until(lambda: scripts[0].trained)
        assert desk.checkpoints is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        taking = asyncio.ensure_future(desk.checkpoints.take("now"))
        await cluster.until(lambda: any(script.keep for script in scripts))
        asked = next(script for script in scripts if script.keep)
        assert asked.task is not None
        asked.task.cancel()
        member, incarnation = asked.seat.worker, asked.seat.incarnation
        await ask(asked.agent, Exited(job=JOB, member=member, incarnation=incarnation, signal=9), within_s=5)
        assert await taking is not None
        took_s = loop.time() - began
        assert await cluster.finish() == 0
        return took_s

    assert simulate(main()) < 5


def test_when_a_checkpoint_is_due() -> None:
    when = When(steps=100, minutes=5)
    when.begin(0.0)
    assert when.due(0, 1e6) == "", "nothing has happened"
    assert when.due(99, 10.0) == ""
    assert when.due(100, 10.0) == "every 100 steps"
    assert when.due(50, 300.0) == "every 5 minutes"
    when.taken(100, 310.0)
    assert when.due(150, 600.0) == ""
    assert When().due(10**9, 1e9) == ""
