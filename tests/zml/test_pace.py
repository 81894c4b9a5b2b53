"""Rates and measurements where updates are made: on shards that come late, die, come back and move on."""

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simulation import simulate
from tests.zml.cluster import Cluster, Script
from tests.zml.test_cluster import run, same, trained
from tests.zml.test_recovery import replayed, same_bits
from tests.zml.test_shard import Bench
from tests.zml.test_store import Net, optimizer_of
from zml.checkpoint import Checkpoint, newest, read
from zml.codec import by_name, cut
from zml.config import resolve
from zml.coordinator.board import Board
from zml.coordinator.checkpoints import When
from zml.hyper import OptimizerSpec, hyper_of
from zml.layout import Layout
from zml.messages import Gauge, JobSpec, Push, Seat
from zml.noise import NOTHING, Estimate
from zml.rates import Course, Rule
from zml.runs.resume import again
from zml.runs.rundir import CONFIG
from zml.scheduler.ids import JobId
from zml.shard import pace
from zml.shard.base import become, state_of
from zml.shard.pace import Pace
from zml.shard.shard import Shard
from zml.shard.store import Staged, Store
from zml.status import JobStatus, NoiseStatus
from zml.transport.memory import MemoryNetwork

LINEAR = JobSpec(workers=2, shards=2, lr_scaling="linear", lr_warm_up_steps=4)


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, set[tuple[str, float]]]]:
    """By clock: which shards have used which factor, in any of their lives."""
    used: dict[int, set[tuple[str, float]]] = {}
    together = Pace.together

    def spied(self: Pace, store: Store, clock: int, steps: Any) -> int:
        epoch = together(self, store, clock, steps)
        used.setdefault(clock, set()).add((self.shard, self.course.factor))
        return epoch

    monkeypatch.setattr(Pace, "together", spied)
    yield used


def agreed(used: dict[int, set[tuple[str, float]]]) -> list[float]:
    """The factor of each clock, on which all shards must agree."""
    for clock, pairs in used.items():
        assert {shard for shard, _ in pairs} == {"p0", "p1"}, clock
        assert len({factor for _, factor in pairs}) == 1, (clock, pairs)
    return [next(iter(pairs))[1] for _, pairs in sorted(used.items())]


# -- scaling -----------------------------------------------------------------------------------------------


def test_the_factor_acts_on_the_update() -> None:
    bench = Bench(0, workers=2)
    bench.shard.pace.begin(Rule("linear", 1), Course(), noise=False)
    bench.load()
    before = bench.held()
    bench.step("w0", 0, 3.0)
    bench.step("w1", 0, 1.0)
    assert torch.equal(bench.held(), before - 1.0 * torch.full_like(before, 2.0)), "twice the rate of 0.5"


def late_worker_and_dead_shard(folder: Path, seed: int) -> tuple[list[Script], Cluster, list[str], JobStatus]:
    """A third worker comes while two train, then a shard dies and comes back, then the third worker dies."""

    async def main() -> tuple[list[Script], Cluster, list[str], JobStatus]:
        cluster = Cluster(MemoryNetwork(seed), LINEAR, folder=folder)
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=60) for index in range(2)]
        await cluster.until(lambda: len(scripts[0].trained) > 5)
        scripts.append(cluster.script("w2", batches=60))
        await cluster.until(lambda: len(scripts[2].trained) > 2)
        cluster.kill_shard(1)
        await asyncio.sleep(1.0)
        cluster.start_shard(1)
        await cluster.until(lambda: len(scripts[2].trained) > 12)
        cluster.kill("w2")
        await cluster.until(lambda: len(scripts[0].trained) > 45)
        status = cluster.coordinator.status()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        events = [
            f"{line.what}: {line.because}"
            for line in cluster.coordinator.events.recent
            if line.what.startswith("learning rate")
        ]
        return scripts, cluster, events, status

    return simulate(main())


@pytest.mark.parametrize("seed", [0, 1])
def test_all_shards_use_one_factor_through_arrivals_and_deaths(
    tmp_path: Path, factors: dict[int, set[tuple[str, float]]], seed: int
) -> None:
    print(f"seed {seed}")
    scripts, cluster, events, status = late_worker_and_dead_shard(tmp_path, seed)
    found = agreed(factors)
    assert found[0] == 1.0 and max(found) == 1.5
    ramp = found[found.index(1.125) :][:4]
    assert ramp == [1.125, 1.25, 1.375, 1.5]
    assert found[-1] == 1.0, "w2 is gone"
    same(scripts[:2])
    for index, ps in cluster.shards.items():
        assert ps.core is not None
        again = replayed(tmp_path / f"p{index}")
        same_bits(again, ps.core)
        assert again.pace.course == ps.core.pace.course
    assert status.rate is not None
    assert (status.rate.scaling, status.rate.base_workers) == ("linear", 2)
    assert any(line.startswith("learning rate x 1.5: 3 workers where 2 were asked for") for line in events), (
        events
    )
    assert status.step_times and {each.workers for each in status.step_times} <= {1, 2, 3}


def test_a_copy_in_the_midst_of_a_warm_up_goes_on_with_it() -> None:
    bench = Bench(0, workers=1)
    bench.shard.pace.begin(Rule("linear", 1, 4), Course(), noise=False)
    bench.load()
    bench.step("w0", 0)
    bench.shard.roster(2, [*bench.seats, Seat("w1", 1, True)])
    other = Shard(JobId("job"), "p0")
    other.assign(bench.registration, [0], 0, "none")
    other.pace.begin(bench.shard.pace.rule, Course(), noise=False)
    become(other, state_of(bench.shard))
    assert other.pace.course == bench.shard.pace.course
    assert other.pace.course.workers == 1 and other.pace.course.factor == 1.0


def leg(
    folder: Path, workers: int, resumed: Checkpoint | None = None, after: int | None = None
) -> tuple[list[Script], Checkpoint]:
    """A run, perhaps one that goes on, with a checkpoint after so many steps; two workers were asked for first."""

    async def main() -> tuple[list[Script], Path]:
        spec = JobSpec(workers=workers, shards=2, lr_scaling="linear", lr_base_workers=2, lr_warm_up_steps=6)
        cluster = Cluster(MemoryNetwork(4), spec, folder=folder / "logs", resumed=resumed)
        await cluster.start()
        desk = cluster.coordinator.checkpoint_desk
        desk.keep(folder / "checkpoints", When())
        scripts = [cluster.script(f"w{index}", batches=40, seed=workers + index) for index in range(workers)]
        path: Path | None = None
        if after is not None:
            await cluster.until(lambda: len(scripts[0].trained) >= after)
            assert desk.checkpoints is not None
            path = await desk.checkpoints.take("a moment")
        assert await cluster.finish() == 0, [script.error for script in scripts]
        found, _ = newest(folder / "checkpoints")
        assert found is not None
        return scripts, path or found.path

    scripts, path = simulate(main())
    return scripts, read(path)


def test_a_job_that_goes_on_from_a_checkpoint_has_the_factors_of_one_that_never_stopped(
    tmp_path: Path,
) -> None:
    """Two workers train, four go on, and others like them from the midst of those four's warm-up."""
    _, two = leg(tmp_path / "two", 2, after=4)
    assert two.job["course"]["factor"] == 1.0 and two.job["course"]["crew"] == {}
    four, middle = leg(tmp_path / "four", 4, two, after=3)
    assert 1.0 < middle.job["course"]["factor"] < 2.0
    again, end = leg(tmp_path / "again", 4, middle)
    same([*four, *again])
    assert end.job["course"]["level"] == 2.0


def test_without_the_rule_nothing_is_kept_and_nothing_said() -> None:
    scripts, cluster = run(1)
    assert all(ps.core is not None and ps.core.pace.course == Course() for ps in cluster.shards.values())
    assert cluster.coordinator.board.rate() is None
    same(scripts)


# -- damping -----------------------------------------------------------------------------------------------


def push(bench: Bench, worker: str, clock: int, value: float, seen: int) -> None:
    bench.ask(worker, Push("job", worker, 1, clock, 0, seen=seen), bench.gradient(value))
    bench.commit(worker, clock)


@pytest.mark.parametrize("staleness", [4, None])
def test_a_gradient_counts_less_the_later_it_comes(staleness: int | None) -> None:
    bench = Bench(staleness)
    bench.shard.pace.begin(Rule(damping=True), Course(), noise=False)
    bench.load()
    values = [bench.held()]
    for clock in range(4):
        push(bench, "w0", clock, 1.0, seen=clock)
        values.append(bench.held())
    push(bench, "w1", 0, 1.0, seen=0)  # four updates late
    values.append(bench.held())
    steps = [float((before - after).mean()) for before, after in pairwise(values)]
    assert steps == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.125], abs=1e-6)
    push(bench, "w1", 1, 1.0, seen=-1)  # it did not say
    assert float((values[-1] - bench.held()).mean()) == pytest.approx(0.5, abs=1e-6)
    gauge = bench.shard.pace.gauge("job", "p0", 1, 6)
    assert gauge.late == pytest.approx(4 / 6) and gauge.damping == pytest.approx((5 + 0.25) / 6)


def test_what_is_staged_keeps_how_late_it_is_in_a_copy() -> None:
    bench = Bench(None)
    bench.load()
    bench.ask("w0", Push("job", "w0", 1, 0, 0, seen=7), bench.gradient(1.0))
    other = Shard(JobId("job"), "p0")
    other.assign(bench.registration, [0], None, "none")
    become(other, state_of(bench.shard))
    staged = {
        str(worker): {c: step.pushes[0].seen for c, step in steps.items()}
        for worker, steps in other.staged.items()
    }
    assert staged == {"w0": {0: 7}}


@pytest.mark.parametrize("staleness", [2, None])
@pytest.mark.parametrize("compress", ["none", "topk:10%"])
def test_damping_on_a_cluster_is_in_the_log_to_the_bit(
    tmp_path: Path, staleness: int | None, compress: str
) -> None:
    async def main() -> tuple[list[Script], Cluster, JobStatus]:
        spec = JobSpec(workers=3, shards=2, staleness=staleness, compress=compress, staleness_damping=True)
        cluster = Cluster(
            MemoryNetwork(2), spec, folder=tmp_path, compute_s=lambda name: 0.05 * (1 + 2 * int(name[1:]))
        )
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=40) for index in range(3)]
        await cluster.until(lambda: len(trained(scripts)) > 60)
        status = cluster.coordinator.status()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts, cluster, status

    scripts, cluster, status = simulate(main())
    same(scripts)
    for index, ps in cluster.shards.items():
        assert ps.core is not None and min(factor for _, factor in ps.core.pace.damped) < 1.0
        same_bits(replayed(tmp_path / f"p{index}"), ps.core)
    assert status.rate is not None and status.rate.damping < 1.0 and status.rate.staleness > 0.5


# -- noise, and how long steps take ----------------------------------------------------------------------------


@pytest.mark.parametrize("compress", ["none", "bf16"])
@pytest.mark.parametrize("workers", [1, 3])
def test_norms_are_those_of_the_gradients_and_measuring_changes_no_bit(compress: str, workers: int) -> None:
    model = Net()
    optimizer = optimizer_of(model, "AdamW")
    layout = Layout.of(model, optimizer, chunk_elements=64)
    codec, random = by_name(compress), torch.Generator().manual_seed(1)
    stores = [Store(layout, range(len(layout.chunks)), OptimizerSpec.of(optimizer), codec) for _ in range(2)]
    moving = [chunk for chunk in layout.chunks if not layout.frozen(chunk.index)]
    absent = frozenset({moving[1].segments[0].parameter})
    for store in stores:
        for chunk in layout.chunks:
            store.load(chunk.index, torch.ones(chunk.size).numpy().data.cast("B"))
    steps, whole = [], []
    for worker in range(workers):
        packer = codec.packer(moving)
        lacks = absent if worker == 0 else frozenset[int]()
        for chunk in moving:
            packer.values[chunk.index].copy_(torch.randn(chunk.size, generator=random))
        frames = dict(
            zip([c.index for c in moving], cut(memoryview(bytes(packer.pack())), len(moving)), strict=True)
        )
        steps.append([Staged(frames, lacks)])
        values = []
        for chunk in moving:
            one = torch.empty(chunk.size)
            codec.decode(chunk, frames[chunk.index], one, add=False)
            for segment in chunk.segments:
                if segment.parameter in lacks:
                    one[segment.offset : segment.offset + segment.size].zero_()
            values.append(one)
        whole.append(torch.cat(values))
    norms = stores[0].apply(steps, hyper_of(optimizer), measure=True)
    assert stores[1].apply(steps, hyper_of(optimizer)) is None
    gradients = torch.stack(whole)
    assert norms is not None
    assert norms.each == pytest.approx(float(gradients.square().sum(1).mean()), rel=1e-5)
    assert norms.mean == pytest.approx(float(gradients.mean(0).square().sum()), rel=1e-5)
    snapshots = [store.snapshot(published=True) for store in stores]
    ours, theirs = (dict(snapshot.tensors()) for snapshot in snapshots)
    assert snapshots[0].versions == snapshots[1].versions and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_a_frame_that_its_sender_has_changed_spoils_the_measurement_and_not_the_step() -> None:
    layout = Layout.build([("w", (8, 8), 0)], 1, chunk_elements=32)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    store, codec = Store(layout, [0, 1], OptimizerSpec.of(optimizer), by_name("none")), by_name("none")
    for chunk in layout.chunks:
        store.load(chunk.index, torch.ones(chunk.size).numpy().data.cast("B"))
    memory, steps = [], []
    for _ in range(2):
        packer = codec.packer(layout.chunks)
        for chunk in layout.chunks:
            packer.values[chunk.index].fill_(1.0)
        memory.append(bytearray(packer.pack()))
        staged = Staged(dict(enumerate(cut(memoryview(memory[-1]), 2))))
        store.check(staged)
        steps.append([staged])
    memory[1][:8] = b"\xff" * 8  # shared memory, after it was checked
    assert store.apply(steps, hyper_of(optimizer), measure=True) is None
    assert [store.version(0), store.version(1)] == [1, 1]


def test_sparse_gradients_are_not_measured() -> None:
    layout = Layout.build([("w", (8, 8), 0)], 1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    store = Store(layout, [0], OptimizerSpec.of(optimizer), by_name("topk:50%"))
    store.load(0, torch.ones(64).numpy().data.cast("B"))
    everything = frozenset({0})
    assert store.apply([[Staged({}, everything)]] * 2, hyper_of(optimizer), measure=True) is None


def test_a_clusters_noise_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' gradients are small and nearly all noise."""
    monkeypatch.setattr(pace, "EVERY", 1)

    async def main() -> JobStatus:
        cluster = Cluster(MemoryNetwork(1), JobSpec(workers=3, shards=2))
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=90) for index in range(3)]
        await cluster.until(lambda: len(scripts[0].trained) > 45)
        status = cluster.coordinator.status()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return status

    status = simulate(main())
    assert status.noise.updates > 20 and status.noise.square is not None
    assert status.noise.scale is None and status.noise.because == "the batch size is not known"
    (times,) = status.step_times
    assert times.workers == 3 and times.steps > 20


def told(board: Board, shard: str, noise: Estimate, holders: int = 2) -> None:
    gauge = Gauge(
        job="job", member=shard, incarnation=1, shard=shard, updates=9, noise=noise, holders=holders
    )
    board.gauge(gauge, lambda what, because: None)


def test_the_noise_of_all_shards_together_is_told_in_samples_and_never_that_of_some() -> None:
    board = Board(JobSpec(workers=2, shards=3), [])
    told(board, "p0", Estimate(20, 1.0, 3.0))
    assert board.noise(32) == NoiseStatus(because="not enough yet: 0 updates measured"), (
        "p1 holds chunks, too"
    )
    told(board, "p1", Estimate(24, 2.0, 3.0))
    assert board.noise(32) == NoiseStatus(scale=64.0, updates=20, square=3.0, variance=192.0)
    told(board, "p1", Estimate(24, -2.0, 3.0))
    assert board.noise(32).scale is None and board.noise(32).because == "the mean gradient drowns in noise"
    assert board.noise(0).because == "the batch size is not known"


def test_a_change_of_the_rate_is_told_once_by_one_shard_for_all() -> None:
    board, notes = Board(JobSpec(workers=2, shards=2, lr_scaling="sqrt"), []), []

    def gauge(shard: str, factor: float, because: str) -> None:
        said = Gauge(job="job", member=shard, incarnation=1, shard=shard, updates=1, change=(factor, because))
        board.gauge(said, lambda what, because: notes.append((what, because)))

    gauge("p0", 1.0, "")
    for shard, factor, because in (
        ("p0", 1.0, "two"),
        ("p1", 1.0, "two"),
        ("p0", 1.5, "four"),
        ("p1", 1.0, "two"),
    ):
        gauge(shard, factor, because)
    gauge("p1", 1.5, "four")
    assert notes == [("learning rate x 1", "two"), ("learning rate x 1.5", "four")]


@pytest.mark.parametrize("given", [{}, {"workers": 8}])
def test_a_run_that_is_resumed_with_other_workers_keeps_what_its_rate_is_meant_for(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = leg(tmp_path / "run", 2)
    resolved = resolve({"lr_scaling": "linear", "workers": 2}, {})
    about = {**resolved.as_json(), "script": "train.py", "args": [], "folder": str(tmp_path)}
    (tmp_path / "run" / CONFIG).write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    settings = again(checkpoint.path, given, {}, print).resolved.settings
    assert (settings.workers, settings.lr_scaling) == (given.get("workers", 2), "linear")
    assert settings.lr_base_workers == (2 if given else 0)


@pytest.mark.parametrize(
    ("spec", "because"),
    [
        (
            JobSpec(workers=2, compress="topk:10%"),
            "it takes sync, whole gradients, and the optimizer on the shards",
        ),
        (JobSpec(workers=2, staleness=2), "it takes sync, whole gradients, and the optimizer on the shards"),
        (JobSpec(workers=1), "it takes two workers or more in an update: 0 updates measured"),
    ],
)
def test_where_there_is_nothing_to_compare_no_noise_is_told(spec: JobSpec, because: str) -> None:
    async def main() -> tuple[JobStatus, list[Any]]:
        cluster = Cluster(MemoryNetwork(1), spec)
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=60) for index in range(spec.workers)]
        await cluster.until(lambda: len(scripts[0].trained) > 25)
        status = cluster.coordinator.status()
        found = [ps.core.pace.estimate for ps in cluster.shards.values() if ps.core is not None]
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return status, found

    status, found = simulate(main())
    assert found == [NOTHING] and status.noise.scale is None and status.noise.because == because


def test_times_between_steps_of_one_epoch_are_kept_by_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    kept = Pace("p0")
    for at, epoch, workers in (
        (0, 0, 2),
        (1, 0, 2),
        (3, 0, 2),
        (9, 1, 2),
        (10, 1, 2),
        (14, 1, 3),
        (15, 1, 3),
    ):
        now = float(at)
        kept.observe("", epoch, workers)
    assert kept.gauge("job", "p0", 1, 7).step_times == [(2, 3, 1.0), (3, 1, 1.0)]


def test_numbers_of_workers_seen_seldom_are_forgotten_first() -> None:
    kept = Pace("p0")
    for workers in range(1, pace.COUNTS + 10):
        for _ in range(3 if workers == 5 else 2):
            kept.observe("", 0, workers)
    assert len(kept.times) == len(kept.counts) == pace.COUNTS and 5 in kept.times
