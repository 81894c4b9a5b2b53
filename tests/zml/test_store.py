"""The store, alone and with a worker's replica: whole steps or none, torch's bits, and deltas that lead everywhere."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from zml.codec import (
    UNKNOWN,
    BadFrame,
    Buffer,
    Header,
    Kind,
    by_name,
    cut,
    parse,
    read_parameters,
    split,
)
from zml.codec.dense import Bf16, Exact, join
from zml.codec.frame import expect
from zml.codec.sparse import TopK
from zml.compression import VALUES
from zml.hyper import BadHyper, Hyper, OptimizerSpec, hyper_of
from zml.layout import Bucket, Chunk, Layout, buckets
from zml.pages import SIZE, Pages
from zml.shard.store import Staged, Store
from zml.worker.binding import Binding
from zml.worker.replica import Replica


class Net(torch.nn.Module):
    """Small, with a branch that is not always used and a frozen table."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(13, 6).requires_grad_(False)
        self.first = torch.nn.Linear(6, 11)
        self.branch = torch.nn.Linear(11, 11)
        self.norm = torch.nn.LayerNorm(11)
        self.last = torch.nn.Linear(11, 3)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        hidden = torch.relu(self.first(self.table(x)))
        if branch:
            hidden = hidden + self.branch(hidden)
        out: Tensor = self.last(self.norm(hidden))
        return out


def optimizer_of(model: torch.nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    """Two groups, as users make them: matrices with weight decay, the rest without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, lr=0.05, **options)
    return optimizer


class Worker:
    """The compute half of a worker, without a network: gathers, encodes, and takes what shards send."""

    def __init__(self, model: torch.nn.Module, layout: Layout, found: Sequence[Bucket], codec: str) -> None:
        self.layout = layout
        self.buckets = found
        self.codec = codec_of(codec)
        self.binding = Binding(layout, model)
        self.replica = Replica(self.binding, by_name(codec))
        self.residual = {c.index: None if self.codec.lossless else torch.zeros(c.size) for c in layout.chunks}

    def push(self) -> list[Staged]:
        return [self._push(bucket) for bucket in self.buckets if not bucket.frozen]

    def _push(self, bucket: Bucket) -> Staged:
        into = {
            index: torch.full((self.layout.chunks[index].size,), 9.0)
            for index in range(len(self.layout.chunks))
        }
        absent = frozenset(p for p in bucket.parameters if not self.binding.gather(p, into))
        payload = b""
        for index in bucket.chunks:
            chunk = self.layout.chunks[index]
            if {segment.parameter for segment in chunk.segments} <= absent:
                continue
            out = bytearray(self.codec.bound(chunk))
            size = self.codec.encode(chunk, into[index], self.residual[index], memoryview(out), absent)
            payload += out[:size]
        return Staged(split(payload, bucket.chunks), absent)

    def pull(self, store: Store) -> None:
        for bucket in self.buckets:
            if bucket.chunks[0] in store.chunks:
                have = [self.replica.versions[index] for index in bucket.chunks]
                self.replica.take(bucket.chunks, *store.pull_bucket(bucket.chunks, have))


def cluster(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, codec: str, shards: int = 2, chunk: int = 32
) -> tuple[Layout, list[Store], tuple[Bucket, ...]]:
    layout = Layout.of(model, optimizer, chunk)
    placement = [index % shards for index in range(len(layout.chunks))]
    spec = OptimizerSpec.of(optimizer)
    stores = []
    for shard in range(shards):
        mine = [index for index in range(len(layout.chunks)) if placement[index] == shard]
        stores.append(Store(layout, mine, spec, by_name(codec)))
    found = buckets(layout, placement, 3)
    binding = Binding(layout, model)
    for bucket in found:
        payload = b""
        for index in bucket.chunks:
            values = torch.empty(layout.chunks[index].size)
            binding.read(index, values)
            payload += values.numpy().tobytes()
        assert not stores[bucket.shard].ready
        stores[bucket.shard].load_bucket(bucket.chunks, payload)
    assert all(store.ready for store in stores)
    return layout, stores, found


def backward(model: torch.nn.Module, step: int, seed: int) -> None:
    random = torch.Generator().manual_seed(100 * seed + step)
    x = torch.randint(0, 13, (8,), generator=random)
    y = torch.randint(0, 3, (8,), generator=random)
    model.zero_grad()
    torch.autograd.backward(torch.nn.functional.cross_entropy(model(x, step % 3 != 1), y))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def of_shard(pushes: list[Staged], store: Store) -> list[Staged]:
    return [staged for staged in pushes if staged.frames.keys() <= set(store.chunks)]


class Mean(Bf16):
    """A codec with tiny deltas, as sparse ones have: one number, which moves every element of the chunk."""

    name = "mean"
    id = 77

    def _publish(self, chunk: Chunk, w: Tensor, p: Tensor, base: int, version: int, _: int) -> bytes:
        step = torch.sub(w, p).mean().reshape(1)
        p.add_(step)
        return join(Header(self.id, Kind.DELTA, chunk.index, base, 4), step)

    def advance(self, chunk: Chunk, frame: Buffer, p: Tensor, base: int) -> None:
        if expect(frame, self.id, Kind.DELTA, chunk.index, base).body != 4:
            raise BadFrame("one number")
        p.add_(struct.unpack_from("<f", frame, 16)[0])


def codec_of(name: str) -> Exact | Bf16:
    kinds: dict[str, type[Exact | Bf16]] = {"none": Exact, "bf16": Bf16, "mean": Mean}
    return kinds[name]()


# -- against torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {}),
        ("Adagrad", {}),
        ("RMSprop", {"centered": True, "momentum": 0.5}),
    ],
)
@pytest.mark.parametrize("chunk", [32, 65_536])
def test_one_worker_trains_as_torch_alone_does(name: str, options: dict[str, Any], chunk: int) -> None:
    alone, model = Net(), Net()
    optimizer, schedule = optimizer_of(alone, name, **options), optimizer_of(model, name, **options)
    layout, stores, found = cluster(model, schedule, "none", chunk=chunk)
    worker = Worker(model, layout, found, "none")
    for store in stores:
        worker.pull(store)
    for step in range(8):
        for each in (optimizer, schedule):
            each.param_groups[0]["lr"] = 0.05 / (1 + step)
        backward(alone, step, 0)
        optimizer.step()
        backward(model, step, 0)
        pushes = worker.push()
        for store in stores:
            store.apply([of_shard(pushes, store)], hyper_of(schedule))
            worker.pull(store)
        assert same(alone, model)


def test_workers_train_with_the_mean_of_their_gradients_and_absent_ones_count_as_zero() -> None:
    alone, models = Net(), [Net() for _ in range(3)]
    optimizer = optimizer_of(alone, "AdamW")
    layout, stores, found = cluster(models[0], optimizer_of(models[0], "AdamW"), "none")
    workers = [Worker(model, layout, found, "none") for model in models]
    for step in range(6):
        for index, model in enumerate(models):
            backward(model, step + index, index)  # in each step one of the three does not use the branch
        gradients = [[p.grad for p in model.parameters()] for model in models]
        for parameter, several in zip(alone.parameters(), zip(*gradients, strict=True), strict=True):
            there = [torch.zeros_like(parameter) if g is None else g for g in several]
            if parameter.requires_grad:
                parameter.grad = (there[0] + there[1] + there[2]) / 3
        optimizer.step()
        pushes = [worker.push() for worker in workers]
        for store in stores:
            store.apply([of_shard(own, store) for own in pushes], hyper_of(optimizer))
            for worker in workers:
                worker.pull(store)
        assert all(same(alone, model) for model in models)


def test_with_bf16_replicas_are_the_same_and_near_the_exact_parameters() -> None:
    models = [Net() for _ in range(3)]
    optimizer = optimizer_of(models[0], "AdamW")
    layout, stores, found = cluster(models[0], optimizer, "bf16")
    workers = [Worker(model, layout, found, "bf16") for model in models]
    for step in range(9):
        for index, model in enumerate(models):
            backward(model, step, index)
        pushes = [worker.push() for worker in workers]
        for store in stores:
            store.apply([of_shard(own, store) for own in pushes], hyper_of(optimizer))
            for worker in workers[: 3 if step % 4 == 3 else 2]:  # the third asks seldom: several deltas, or p
                worker.pull(store)
        if step % 4 == 3:
            assert same(models[0], models[2])
        assert same(models[0], models[1])
    late = Worker(Net(seed=9), layout, found, "bf16")
    for store in stores:
        late.pull(store)
    assert late.replica.versions == workers[0].replica.versions
    assert all(
        torch.equal(a, b) for a, b in zip(late.binding.parameters, workers[0].binding.parameters, strict=True)
    )


# -- one chunk, by hand -----------------------------------------------------------------------------------------


def small(codec: str = "none", shapes: Sequence[tuple[int, ...]] = ((4,), (2,)), chunk: int = 8) -> Store:
    layout = Layout.build([(f"p{i}", shape, 0) for i, shape in enumerate(shapes)], 1, chunk)
    return Store(layout, range(len(layout.chunks)), OptimizerSpec("SGD", ({},)), codec_of(codec))


def numbers(lr: float = 1.0, momentum: float = 0.0) -> list[Hyper]:
    model = torch.nn.Linear(1, 1)
    return hyper_of(torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum))


def staged(store: Store, values: Sequence[float], absent: Sequence[int] = (), chunk: int = 0) -> Staged:
    codec = codec_of(store.codec.name)
    out = bytearray(codec.bound(store.layout.chunks[chunk]))
    codec.encode(store.layout.chunks[chunk], torch.tensor(values), None, memoryview(out))
    return Staged({chunk: bytes(out)}, frozenset(absent))


def loaded(codec: str = "none") -> Store:
    store = small(codec)
    store.load(0, torch.zeros(6).numpy().tobytes())
    return store


def held(store: Store, chunk: int = 0) -> tuple[int, list[float]]:
    version, frames = store.pull(chunk, UNKNOWN)
    assert [parse(frame).kind for frame in frames] == [Kind.PARAMETERS]
    return version, read_parameters(store.layout.chunks[chunk], frames[0], version).tolist()


def test_a_chunk_begins_at_version_zero_with_what_was_loaded() -> None:
    store = small()
    assert (store.ready, store.version(0)) == (False, UNKNOWN)
    store.load(0, torch.arange(6.0).numpy().tobytes())
    assert (store.ready, held(store)) == (True, (0, [0, 1, 2, 3, 4, 5]))
    store.load(0, torch.ones(6).numpy().tobytes())  # the second initialiser, after the first was lost
    assert held(store) == (0, [1.0] * 6)


def test_first_parameters_of_the_wrong_length_or_after_a_step_change_nothing() -> None:
    store = loaded()
    for wrong in (b"", bytes(23), bytes(25), bytes(28)):
        with pytest.raises(BadFrame):
            store.load(0, wrong)
    store.apply([[staged(store, [-1.0] * 6)]], numbers())
    with pytest.raises(BadFrame):
        store.load(0, bytes(24))
    with pytest.raises(BadFrame):
        store.load(1, bytes(24))
    assert held(store) == (1, [1.0] * 6)


def test_gradients_are_summed_in_order_and_divided_by_the_workers() -> None:
    store = loaded()
    pushes = [[staged(store, [value] * 6)] for value in (1e8, 1.0, -1e8)]
    store.apply(pushes, numbers())
    wanted = -((torch.tensor(1e8) + 1.0 + -1e8) / 3).item()  # in this order the 1 is lost
    assert held(store) == (1, [wanted] * 6)
    store.apply([pushes[0], pushes[2], pushes[1]], numbers())
    assert held(store) == (2, [wanted - torch.tensor(1 / 3).item()] * 6)


def test_an_absent_parameter_is_skipped_only_if_no_worker_has_it() -> None:
    store = loaded()
    ones = [-1.0] * 6
    store.apply([[staged(store, ones, absent=[1])], [staged(store, ones)]], numbers())
    assert held(store) == (1, [1, 1, 1, 1, 0.5, 0.5])
    store.apply([[staged(store, ones, absent=[1])], [staged(store, ones, absent=[1])]], numbers())
    assert held(store) == (2, [2, 2, 2, 2, 0.5, 0.5])
    store.apply([[Staged({}, frozenset({0, 1}))], [staged(store, ones, absent=[0])]], numbers())
    assert held(store) == (3, [2, 2, 2, 2, 1, 1])


def test_a_step_in_which_nobody_has_a_gradient_makes_no_version() -> None:
    store = loaded()
    store.apply([[Staged({}, frozenset({0, 1}))], [staged(store, [1.0] * 6, absent=[0, 1])]], numbers())
    assert held(store) == (0, [0.0] * 6)
    assert store.pull(0, 0) == (0, [])


def test_a_step_with_one_bad_push_changes_nothing_at_all() -> None:
    store = small(shapes=((8,), (8,)), chunk=8)
    for chunk in range(2):
        store.load(chunk, bytes(32))
    good = [staged(store, [1.0] * 8, chunk=0), staged(store, [1.0] * 8, chunk=1)]
    frame = good[1].frames[1]
    bad: list[list[Staged]] = [
        [good[0], Staged({1: frame[:-1]})],
        [good[0], Staged({1: good[0].frames[0]})],
        [good[0], Staged({7: frame})],
        [good[0]],
        [good[0], Staged({}, frozenset({0}))],
        [*good, Staged({}, frozenset({2}))],
        [*good, Staged({}, frozenset({-1}))],
        [*good, staged(store, [1.0] * 8, chunk=1)],
    ]
    for step in bad:
        with pytest.raises(BadFrame):
            store.check_step(step)
        with pytest.raises(BadFrame):
            store.apply([good, step], numbers())
    wrong: list[list[Hyper]] = [[], numbers() * 2, [{}], [{**numbers()[0], "lr": math.nan}]]
    for hypers in wrong:
        with pytest.raises(BadHyper):
            store.apply([good], hypers)
    assert [held(store, chunk) for chunk in range(2)] == [(0, [0.0] * 8)] * 2
    store.apply([good], numbers())
    assert [held(store, chunk) for chunk in range(2)] == [(1, [-1.0] * 8)] * 2


def test_a_frozen_chunk_takes_no_gradient_and_keeps_version_zero() -> None:
    layout = Layout.build([("a", (3,), 0), ("ice", (2,), 1)], 1)
    store = Store(layout, (0, 1), OptimizerSpec("SGD", ({},)), codec_of("none"))
    store.load_bucket((0, 1), torch.arange(5.0).numpy().tobytes())
    with pytest.raises(BadFrame, match="frozen"):
        store.check(staged(store, [1.0, 1.0], chunk=1))
    store.apply([[staged(store, [1.0, 1.0, 1.0])]], numbers())
    assert [held(store, chunk) for chunk in (0, 1)] == [(1, [-1.0, 0.0, 1.0]), (0, [3.0, 4.0])]


def test_frames_may_be_read_only_memory_and_are_not_kept() -> None:
    store = loaded()
    (frame,) = staged(store, [1.0] * 6).frames.values()
    memory = bytearray(frame)
    store.apply([[Staged({0: memoryview(memory).toreadonly()})]], numbers(momentum=0.9))
    memory[16:] = bytes(24)
    del memory[:]  # a view that still looked at it would forbid this
    store.apply([[staged(store, [0.0] * 6)]], numbers(momentum=0.9))
    version, values = held(store)
    assert version == 2
    assert values == pytest.approx([-1.9] * 6)


# -- versions, deltas, parameters ---------------------------------------------------------------------------------


def test_whoever_has_the_version_gets_nothing_and_whoever_has_none_gets_the_parameters() -> None:
    for codec in ("none", "bf16"):
        store = loaded(codec)
        assert store.pull(0, 0) == (0, [])
        store.apply([[staged(store, [-1.0] * 6)]], numbers())
        assert store.pull(0, 1) == (1, []) or codec == "bf16"
        assert held(store) == (1, [1.0] * 6)
        assert store.pull(0, 1) == (1, [])
        assert [parse(f).kind for f in store.pull(0, 99)[1]] == [Kind.PARAMETERS]  # a version of another life


def test_a_delta_is_made_once_per_version_and_only_when_somebody_asks() -> None:
    store = small("mean", ((24,),), 24)
    store.load(0, bytes(96))
    for _ in range(3):
        store.apply([[staged(store, [-1.0] * 24)]], numbers())
    version, (frame,) = store.pull(0, 0)
    assert (version, parse(frame)[:4]) == (3, (77, Kind.DELTA, 0, 0))
    again, (same_frame,) = store.pull(0, 0)
    assert (again, same_frame is frame) == (3, True)
    store.apply([[staged(store, [-1.0] * 24)]], numbers())
    version, frames = store.pull(0, 0)
    assert (version, [parse(frame).version for frame in frames]) == (4, [0, 3])
    assert [parse(frame).version for frame in store.pull(0, 3)[1]] == [3]
    assert [parse(frame).kind for frame in store.pull(0, 1)[1]] == [Kind.PARAMETERS]  # never published


def test_the_log_is_never_larger_than_the_parameters() -> None:
    for codec, most in (("bf16", 1), ("mean", 5)):  # deltas of 64 and of 20 bytes, parameters of 112
        store = small(codec, ((24,),), 24)
        store.load(0, bytes(96))
        for version in range(1, 10):
            store.apply([[staged(store, [-1.0] * 24)]], numbers())
            store.pull(0, version - 1)
            for have in range(version):
                frames = store.pull(0, have)[1]
                deltas = [parse(frame).version for frame in frames if parse(frame).kind == Kind.DELTA]
                assert deltas == (list(range(have, version)) if version - have <= most else [])
                assert sum(map(len, frames)) <= 112


def test_parameters_that_stop_being_finite_are_still_the_same_everywhere() -> None:
    store = loaded("bf16")
    layout = store.layout
    model = torch.nn.ParameterDict({"p0": torch.zeros(4), "p1": torch.zeros(2)})
    replica = Replica(Binding(layout, model), codec_of("bf16"))
    replica.take((0,), *store.pull_bucket((0,), (UNKNOWN,)))
    for _ in range(3):
        store.apply([[staged(store, [1e38] * 6)]], numbers(lr=1e30))
        replica.take((0,), *store.pull_bucket((0,), replica.versions))
        assert model["p0"].tolist() == [-math.inf] * 4


def test_deltas_from_before_a_jump_are_forgotten() -> None:
    store = loaded("bf16")
    store.apply([[staged(store, [-1.0] * 6)]], numbers())
    assert [parse(frame).kind for frame in store.pull(0, 0)[1]] == [Kind.DELTA]
    store.apply([[staged(store, [1e38] * 6)]], numbers(lr=1e30))
    assert [parse(frame).kind for frame in store.pull(0, 0)[1]] == [Kind.PARAMETERS]
    assert held(store) == (2, [-math.inf] * 6)


def test_what_was_pulled_is_not_changed_by_later_steps() -> None:
    store = loaded()
    version, frames = store.pull(0, UNKNOWN)
    _, _, payload = store.pull_bucket((0,), (UNKNOWN,))
    store.apply([[staged(store, [1.0] * 6)]], numbers())
    pulled: list[Buffer] = [*frames, *cut(payload, 1)]
    for frame in pulled:
        assert read_parameters(store.layout.chunks[0], frame, version).tolist() == [0.0] * 6


# -- replicas -----------------------------------------------------------------------------------------------------


def mirrored(codec: str = "bf16") -> tuple[Store, Replica, torch.nn.ParameterDict]:
    store = loaded(codec)
    model = torch.nn.ParameterDict({"p0": torch.full((4,), 8.0), "p1": torch.full((2,), 8.0)})
    return store, Replica(Binding(store.layout, model), codec_of(codec)), model


def test_a_replica_ends_at_the_version_that_it_was_given() -> None:
    for codec in ("none", "bf16"):
        store, replica, model = mirrored(codec)
        replica.take((0,), *store.pull_bucket((0,), replica.versions))
        assert (replica.versions, model["p1"].tolist()) == ([0], [0.0, 0.0])
        store.apply([[staged(store, [-1.0] * 6)]], numbers())
        replica.take((0,), *store.pull_bucket((0,), replica.versions))
        replica.take((0,), *store.pull_bucket((0,), replica.versions))
        assert (replica.versions, model["p1"].tolist()) == ([1], [1.0, 1.0])


def test_what_the_script_does_to_its_parameters_does_not_flow_into_the_replica() -> None:
    store, replica, model = mirrored()
    replica.take((0,), *store.pull_bucket((0,), replica.versions))
    with torch.no_grad():
        model["p0"].fill_(100.0)
    store.apply([[staged(store, [-1.0] * 6)]], numbers())
    replica.take((0,), *store.pull_bucket((0,), replica.versions))
    assert model["p0"].tolist() == [1.0] * 4


def test_frames_that_do_not_lead_to_the_version_are_refused() -> None:
    store, replica, model = mirrored()
    replica.take((0,), *store.pull_bucket((0,), replica.versions))
    deltas = []
    for version in range(2):
        store.apply([[staged(store, [-1.0] * 6)]], numbers())
        deltas += store.pull(0, version)[1]
    first, second = deltas
    (parameters,) = store.pull(0, UNKNOWN)[1]
    for version, frames in (
        (1, []),
        (0, [first]),
        (2, [second]),
        (2, [second, first]),
        (2, [first, first]),
        (1, [parameters]),
        (2, [parameters, second]),
        (2, [first, parameters]),
        (2, [b"", first]),
        (1, [first[:-1]]),
    ):
        with pytest.raises(BadFrame):
            replica.apply(0, version, frames)
        assert (replica.versions, model["p0"].tolist()) == ([0], [0.0] * 4)
    for versions, counts, payload in (
        ([1], [2], first),
        ([1], [0], first),
        ([1], [1], b""),
        ([1, 2], [1], first),
        ([1], [-1], b""),
        ([1], [1], first + b"x"),
    ):
        with pytest.raises(BadFrame):
            replica.take((0,), versions, counts, payload)
    with pytest.raises(BadFrame):
        mirrored("none")[1].apply(0, 1, [first])
    replica.take((0,), [2], [2], first + second)
    assert (replica.versions, model["p0"].tolist()) == ([2], [2.0] * 4)


def test_a_replica_that_broke_off_between_two_deltas_goes_on_from_there() -> None:
    store, replica, model = mirrored()
    replica.take((0,), *store.pull_bucket((0,), replica.versions))
    deltas = []
    for version in range(2):
        store.apply([[staged(store, [-1.0] * 6)]], numbers())
        deltas += store.pull(0, version)[1]
    damaged = bytearray(deltas[1])
    damaged[0] = 9
    with pytest.raises(BadFrame):
        replica.apply(0, 2, [deltas[0], bytes(damaged)])
    assert replica.versions == [1]
    replica.take((0,), *store.pull_bucket((0,), replica.versions))
    assert (replica.versions, model["p0"].tolist()) == ([2], [2.0] * 4)


class Cluster(RuleBasedStateMachine):
    """Steps, pulls and late workers in any order: replicas of one version are one, whatever way they came."""

    @initialize(codec=st.sampled_from(["none", "bf16", "mean"]))
    def begin(self, codec: str) -> None:
        layout = Layout.build([("a", (9,), 0), ("b", (4,), 0), ("c", (3,), 1)], 2, 8)
        spec = OptimizerSpec("SGD", ({}, {}))
        self.store = Store(layout, range(len(layout.chunks)), spec, codec_of(codec))
        self.random = torch.Generator().manual_seed(0)
        for chunk in layout.chunks:
            self.store.load(chunk.index, torch.randn(chunk.size, generator=self.random).numpy().tobytes())
        self.replicas: list[Replica] = []
        self.seen: dict[tuple[int, int], Tensor] = {}  # by chunk and version

    @rule(absent=st.sets(st.integers(0, 2)), workers=st.integers(1, 3))
    def step(self, absent: set[int], workers: int) -> None:
        def push() -> list[Staged]:
            pushes = []
            for chunk in self.store.layout.chunks:
                values = torch.randn(chunk.size, generator=self.random).tolist()
                pushes.append(staged(self.store, values, tuple(absent), chunk.index))
            return pushes

        self.store.apply([push() for _ in range(workers)], numbers(lr=0.1, momentum=0.9) * 2)

    @rule()
    def come(self) -> None:
        if len(self.replicas) < 4:
            model = torch.nn.ParameterDict({"a": torch.zeros(9), "b": torch.zeros(4), "c": torch.zeros(3)})
            self.replicas.append(Replica(Binding(self.store.layout, model), codec_of(self.store.codec.name)))

    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        if not self.replicas:
            return
        replica = data.draw(st.sampled_from(self.replicas))
        chunks = data.draw(st.lists(st.sampled_from(self.store.chunks), unique=True))
        have = [replica.versions[chunk] for chunk in chunks]
        replica.take(chunks, *self.store.pull_bucket(chunks, have))
        for chunk in chunks:
            assert replica.versions[chunk] == self.store.version(chunk)
            values = torch.empty(self.store.layout.chunks[chunk].size)
            replica._binding.read(chunk, values)
            known = self.seen.setdefault((chunk, replica.versions[chunk]), values)
            assert torch.equal(known.view(torch.int32), values.view(torch.int32))

    @invariant()
    def the_log_is_bounded(self) -> None:
        for one in self.store._held.values():
            assert one.log_bytes == sum(len(frame) for _, frame in one.log) <= len(one.dense)
            assert not (one.log and self.store.codec.lossless)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


# -- sparse gradients, sparse deltas ---------------------------------------------------------------------------------


class Sender:
    """A worker's compute half with packers: gathers, packs, and takes what shards send."""

    def __init__(self, model: torch.nn.Module, layout: Layout, found: Sequence[Bucket], codec: str) -> None:
        self.buckets = found
        own = by_name(codec)
        self.packers = {b.index: own.packer([layout.chunks[c] for c in b.chunks]) for b in found}
        self.binding = Binding(layout, model)
        self.replica = Replica(self.binding, own)

    def push(self) -> list[Staged]:
        return [self._push(bucket) for bucket in self.buckets if not bucket.frozen]

    def _push(self, bucket: Bucket) -> Staged:
        packer = self.packers[bucket.index]
        everywhere = {c.index: torch.zeros(c.size) for c in self.binding.layout.chunks} | dict(packer.values)
        absent = frozenset(p for p in bucket.parameters if not self.binding.gather(p, everywhere))
        return Staged(split(bytes(packer.pack(absent)), bucket.chunks), absent)

    def pull(self, store: Store) -> None:
        for bucket in self.buckets:
            if bucket.chunks[0] in store.chunks:
                have = [self.replica.versions[index] for index in bucket.chunks]
                self.replica.take(bucket.chunks, *store.pull_bucket(bucket.chunks, have))


SPARSE_RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {}),
    ("AdamW", {}),
    ("Adam", {"amsgrad": True}),
    ("RMSprop", {}),
]


@pytest.mark.parametrize(("name", "options"), SPARSE_RULES, ids=str)
@pytest.mark.parametrize("chunk", [32, 65_536])
def test_with_everything_sent_a_sparse_codec_trains_as_torch_does(
    name: str, options: dict[str, Any], chunk: int
) -> None:
    """But for rounding: vectors travel in 16 bits, so that the bound is bfloat16's."""
    alone, models = Net(), [Net() for _ in range(3)]
    optimizer = optimizer_of(alone, name, **options)
    layout, stores, found = cluster(
        models[0], optimizer_of(models[0], name, **options), "topk:100%:fp32", chunk=chunk
    )
    workers = [Sender(model, layout, found, "topk:100%:fp32") for model in models]
    for step in range(6):
        for index, model in enumerate(models):
            backward(model, step + index, index)  # in each step one of the three does not use the branch
        gradients = [[p.grad for p in model.parameters()] for model in models]
        for parameter, several in zip(alone.parameters(), zip(*gradients, strict=True), strict=True):
            there = [torch.zeros_like(parameter) if g is None else g for g in several]
            if parameter.requires_grad:
                parameter.grad = (there[0] + there[1] + there[2]) / 3
        optimizer.step()
        pushes = [worker.push() for worker in workers]
        for store in stores:
            store.apply([of_shard(own, store) for own in pushes], hyper_of(optimizer))
            for worker in workers:
                worker.pull(store)
        assert all(same(models[0], model) for model in models)
        for one, other in zip(alone.parameters(), models[0].parameters(), strict=True):
            if one.dim() > 1:
                assert torch.allclose(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("name", "options"), SPARSE_RULES[:4], ids=str)
def test_with_sparse_deltas_replicas_are_the_same_and_a_late_one_gets_p(
    name: str, options: dict[str, Any]
) -> None:
    models = [Net() for _ in range(3)]
    optimizer = optimizer_of(models[0], name, **options)
    layout, stores, found = cluster(models[0], optimizer, "topk:10%")
    workers = [Sender(model, layout, found, "topk:10%") for model in models]
    for step in range(13):
        for index, model in enumerate(models):
            backward(model, step, index)
        pushes = [worker.push() for worker in workers]
        for store in stores:
            store.apply([of_shard(own, store) for own in pushes], hyper_of(optimizer))
            for worker in workers[: 3 if step % 4 == 0 else 2]:  # the third asks seldom: several deltas, or p
                worker.pull(store)
        assert same(models[0], models[1])
        assert same(models[0], models[2]) == (step % 4 == 0)
    late = Sender(Net(seed=9), layout, found, "topk:10%")
    for store in stores:
        late.pull(store)
    assert late.replica.versions == workers[0].replica.versions
    for parameter, other in zip(late.binding.parameters, workers[0].binding.parameters, strict=True):
        assert torch.equal(parameter, other)


def matrix_store(codec: str, name: str = "SGD", rows: int = 64) -> Store:
    layout = Layout.build([("m", (rows, 64), 0)], 1, 2_048)
    optimizer = getattr(torch.optim, name)([torch.zeros(1)], lr=0.1)
    store = Store(layout, range(len(layout.chunks)), OptimizerSpec.of(optimizer), by_name(codec))
    for chunk in layout.chunks:
        store.load(chunk.index, torch.zeros(chunk.size).numpy().tobytes())
    return store


def sparse_push(store: Store, values: Tensor, codec: str) -> Staged:
    packer = by_name(codec).packer(store.layout.chunks)
    for chunk in store.layout.chunks:
        packer.values[chunk.index].copy_(values[2_048 * chunk.index :][: chunk.size])
    return Staged(split(bytes(packer.pack()), store.chunks))


def sgd(**options: Any) -> list[Hyper]:
    return hyper_of(torch.optim.SGD([torch.zeros(1)], lr=0.5, **options))


def test_after_a_plain_addition_nothing_is_left_to_publish() -> None:
    """What came up goes down: as many elements, so that p is w where deltas are exact."""
    store, random = matrix_store("topk:5%:fp32"), torch.Generator().manual_seed(1)
    for version in range(1, 6):
        pushes = [sparse_push(store, torch.randn(4_096, generator=random), "topk:5%:fp32") for _ in range(4)]
        store.apply([[push] for push in pushes], sgd())
        for chunk in store.chunks:
            _, (frame,) = store.pull(chunk, version - 1)
            held = store._held[chunk]
            assert parse(frame).kind == Kind.DELTA
            assert torch.equal(held.w, held.p)
            assert 2_048 * 0.05 <= int(torch.count_nonzero(held.w))


def test_where_momentum_moves_everything_a_delta_stays_small_and_p_follows() -> None:
    codec = "topk:1%:int8"
    store, random = matrix_store(codec), torch.Generator().manual_seed(1)
    far = []
    for version in range(1, 200):
        quiet = version > 20
        values = torch.zeros(4_096) if quiet else torch.randn(4_096, generator=random)
        store.apply([[sparse_push(store, values, codec)]], sgd(momentum=0.9))
        _, (frame,) = store.pull(0, version - 1)
        assert parse(frame).kind == Kind.DELTA
        assert store.codec.entries(store.layout.chunks[0], frame) <= 2 * (2 * 50 + 64) + 16
        held = store._held[0]
        far.append(float((held.w - held.p).abs().max()))
    assert far[-1] < 0.01 * far[20]  # also where nothing comes any more


def test_a_step_that_changes_nothing_makes_a_version_and_a_delta_of_a_few_bytes() -> None:
    store = matrix_store("topk:1%")
    store.apply([[sparse_push(store, torch.zeros(4_096), "topk:1%")]], sgd())
    version, (frame,) = store.pull(0, 0)
    assert (version, len(frame)) == (1, 20)
    assert store.pull(0, 1) == (1, [])


def test_the_log_of_sparse_deltas_leads_on_from_every_version_until_p_is_smaller() -> None:
    store, random = matrix_store("topk:1%"), torch.Generator().manual_seed(1)
    for version in range(1, 120):
        store.apply([[sparse_push(store, torch.randn(4_096, generator=random), "topk:1%")]], sgd())
        store.pull(0, version - 1)
        for have in (version, version - 1, version // 2, 0):
            found, frames = store.pull(0, have)
            assert found == version
            kinds = [parse(frame).kind for frame in frames]
            assert kinds in ([Kind.DELTA] * (version - have), [Kind.PARAMETERS])
            assert sum(map(len, frames)) <= len(store._held[0].dense)


def test_a_frame_that_changes_after_its_check_harms_its_own_sum_at_most() -> None:
    """Shared memory belongs to the peer as well. Nothing else moves, and nothing breaks."""
    random = torch.Generator().manual_seed(3)
    for seed in range(300):
        store = matrix_store("topk:3%")
        push = sparse_push(store, torch.randn(4_096, generator=random), "topk:3%")
        memory = {chunk: bytearray(frame) for chunk, frame in push.frames.items()}
        changed = Staged({chunk: memoryview(frame).toreadonly() for chunk, frame in memory.items()})
        store.check(changed)
        for _ in range(1 + seed % 7):
            at, byte = torch.randint(16, len(memory[0]), (), generator=random), seed * 37 % 256
            memory[0][int(at)] = byte
        store.apply([[changed]], sgd())
        expected = matrix_store("topk:3%")
        expected.apply([[push]], sgd())
        assert torch.equal(store._held[1].w, expected._held[1].w)


@pytest.mark.parametrize("compress", ["none", "bf16", "topk:3%"])
def test_a_frame_whose_header_changes_after_its_check_is_left_out_and_the_step_is_whole(
    compress: str,
) -> None:
    # A chunk of which a part is absent is read frame by frame; sums of whole ones know of no headers.
    absent = frozenset({1}) if compress == "topk:3%" else frozenset[int]()
    layout = Layout.build([("a", (8, 8), 0), ("b", (8, 4), 0), ("c", (8, 4), 0), ("d", (8, 8), 0)], 1, 64)
    store = Store(layout, range(3), OptimizerSpec("SGD", ({},)), by_name(compress))
    for chunk in layout.chunks:
        store.load(chunk.index, bytes(4 * chunk.size))
    packer = by_name(compress).packer(layout.chunks)
    for values in packer.values.values():
        values.fill_(1.0)
    memory = {chunk: bytearray(frame) for chunk, frame in split(bytes(packer.pack()), store.chunks).items()}
    push = Staged({chunk: memoryview(frame).toreadonly() for chunk, frame in memory.items()}, absent)
    store.check(push)
    memory[1][4] ^= 1
    store.apply([[push]], sgd())
    moved = [bool(store._held[chunk].w.any()) for chunk in range(3)]
    assert moved == [True, False, True]
    assert [store.version(chunk) for chunk in (1, 2)] == [1, 1]


def test_deltas_are_written_as_the_newest_gradients_were_where_workers_choose() -> None:
    layout = Layout.build([("m", (64, 64), 0)], 1)
    store = Store(layout, [0], OptimizerSpec("SGD", ({},)), by_name("topk:1%"), follow=True)
    store.load(0, bytes(4 * 4_096))
    codec = by_name("topk:1%")
    assert isinstance(codec, TopK)
    packer = codec.packer(layout.chunks)
    at = codec.table(layout.chunks[0]).count_at - 1
    for version, values in enumerate(("int4", "fp32", "bf16", "int8")):
        codec.write_as(values)
        packer.values[0].copy_(torch.randn(4_096, generator=torch.Generator().manual_seed(version)))
        store.apply([[Staged(split(bytes(packer.pack(density=1.0)), [0]))]], sgd())
        _, (delta,) = store.pull(0, version)
        if values == "fp32":  # as large as the parameters themselves
            assert parse(delta).kind == Kind.PARAMETERS
        else:
            assert (delta[at] >> 3) & 7 == VALUES.index(values)


def test_sparse_steps_in_two_groups_use_the_numbers_of_each() -> None:
    layout = Layout.build([("a", (9, 16), 0), ("b", (8, 16), 1), ("c", (2, 16), 1)], 2, 64)
    store = Store(
        layout, range(len(layout.chunks)), OptimizerSpec("SGD", ({}, {})), by_name("topk:100%:fp32")
    )
    for chunk in layout.chunks:
        store.load(chunk.index, bytes(4 * chunk.size))
    packer = by_name("topk:100%:fp32").packer(layout.chunks)
    for values in packer.values.values():
        values.fill_(1.0)
    push = Staged(split(bytes(packer.pack()), store.chunks))
    hypers = [numbers(lr=1.0)[0], numbers(lr=0.5)[0]]
    store.apply([[push], [push]], hypers)
    found = {chunk.group: set(held(store, chunk.index)[1]) for chunk in layout.chunks}
    assert found == {0: {-1.0}, 1: {-0.5}}


# -- payload memory -------------------------------------------------------------------------------------------------


def test_payload_memory_is_lent_again_only_when_nobody_looks_at_it() -> None:
    pages = Pages(most=3 * SIZE)
    first = pages.lend(100)
    first[:5] = b"first"
    inner = memoryview(first)[:5].toreadonly()
    del first
    second = pages.lend(200)
    second[:5] = b"other"
    assert (bytes(inner), len(second), pages.kept) == (b"first", 200, 2 * SIZE)
    del inner
    third = pages.lend(SIZE)
    assert (bytes(third[:5]), pages.kept) == (b"first", 2 * SIZE)  # the first, again
    assert bytes(second[:5]) == b"other"
    more = [pages.lend(0), pages.lend(SIZE), pages.lend(SIZE + 1)]
    assert [len(view) for view in more] == [0, SIZE, SIZE + 1]
    assert pages.kept == 3 * SIZE  # beyond that, buffers are lent but not remembered


def test_a_payload_that_is_still_held_is_not_written_over() -> None:
    store = loaded()
    kept = []
    for version in range(5):
        kept.append((version, store.pull_bucket((0,), (UNKNOWN,))[2]))
        store.apply([[staged(store, [-1.0] * 6)]], numbers())
    for version, payload in kept:
        assert payload.readonly
        (frame,) = cut(payload, 1)
        assert read_parameters(store.layout.chunks[0], frame, version).tolist() == [version] * 6
