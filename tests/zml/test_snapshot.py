"""A snapshot is what a deep copy would have been, whatever the store does meanwhile and whenever it is read."""

import gc
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zml.codec import UNKNOWN, by_name, split
from zml.hyper import Hyper, OptimizerSpec, hyper_of
from zml.layout import Layout
from zml.shard.snapshot import KEPT, Snapshot
from zml.shard.store import Staged, Store

LAYOUT = Layout.build([("a", (5, 7), 0), ("b", (11,), 0), ("ice", (3, 4), 2), ("c", (9, 4), 1)], 2, 16)
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("SGD", {}),
    "decay": ("SGD", {"weight_decay": 0.1}),
    "momentum": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop": ("RMSprop", {"centered": True, "momentum": 0.5}),
}
CODECS = ["none", "bf16", "topk:30%"]
PARTS = sorted({segment.parameter for chunk in LAYOUT.chunks for segment in chunk.segments})

Step = tuple[str, Any]
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.lists(st.frozensets(st.sampled_from(PARTS)), min_size=1, max_size=2)),
        st.tuples(st.just("pull"), st.integers(0, len(LAYOUT.chunks) - 1)),
        st.tuples(st.just("mark"), st.booleans()),
        st.tuples(st.just("take"), st.integers(0, 3)),
        st.tuples(st.just("drop"), st.integers(0, 3)),
        st.tuples(st.just("load"), st.none()),
    ),
    min_size=3,
    max_size=14,
)


class Bench:
    """A store that trains on noise, and says what it did to its chunks without having told its door."""

    def __init__(self, optimizer: str, codec: str) -> None:
        name, options = OPTIMIZERS[optimizer]
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        made = getattr(torch.optim, name)(groups, lr=0.01, **options)
        self.hyper: list[Hyper] = hyper_of(made)
        self.random = torch.Generator().manual_seed(5)
        self.codec = by_name(codec)
        self.store = Store(LAYOUT, range(len(LAYOUT.chunks)), OptimizerSpec.of(made), self.codec)
        for chunk in LAYOUT.chunks:
            self.store.load(chunk.index, self.noise(chunk.size).numpy().tobytes())
        self.told: set[int] = set()
        door, changes, publishes = self.store._door, self.store._door.changes, self.store._door.publishes
        door.changes = lambda chunks: (self.told.update(chunks), changes(chunks))[1]  # type: ignore[method-assign, func-returns-value]
        door.publishes = lambda chunk: (self.told.add(chunk), publishes(chunk))[1]  # type: ignore[method-assign, func-returns-value]

    def noise(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.random)

    def push(self, absent: frozenset[int]) -> Staged:
        payload, chunks = b"", []
        for chunk in LAYOUT.chunks:
            parameters = {segment.parameter for segment in chunk.segments}
            if LAYOUT.frozen(chunk.index) or parameters <= absent:
                continue
            packer = self.codec.packer([chunk])
            packer.values[chunk.index].copy_(self.noise(chunk.size))
            payload += packer.pack(absent)
            chunks.append(chunk.index)
        return Staged(split(payload, chunks), absent)

    def bits(self, published: bool = True) -> dict[str, Tensor]:
        return {
            f"{chunk}/{name}": part.clone()
            for chunk in self.store.chunks
            for name, part in self.store.parts(chunk, published=published).items()
        }

    def do(self, what: str, how: Any) -> None:
        before = self.bits()
        self.told.clear()
        match what:
            case "apply":
                self.store.apply([[self.push(absent)] for absent in how], self.hyper)
            case "pull":
                self.store.pull(how, UNKNOWN)
            case "load":
                versions = self.store.snapshot(published=True).versions
                self.store.load_state(versions, {name: part * 2 for name, part in before.items()})
        after = self.bits()
        changed = {
            int(name.partition("/")[0])
            for name in before.keys() | after.keys()
            if name not in before or name not in after or not torch.equal(before[name], after[name])
        }
        assert changed <= self.told, "a chunk has changed, and the door was not told"


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


class Reading:
    """A snapshot that is read bit by bit, and what it must be."""

    def __init__(self, bench: Bench, published: bool) -> None:
        self.wanted = bench.bits(published)
        self.snapshot = bench.store.snapshot(published=published)
        self.versions = {
            chunk: (held.version, held.published, held.budget) for chunk, held in bench.store._held.items()
        }
        self.found: dict[str, Tensor] = {}
        self.tensors = self.snapshot.tensors()

    def read(self, most: int) -> None:
        for _, (name, tensor) in zip(range(most), self.tensors, strict=False):
            self.found[name] = tensor

    def check(self) -> None:
        if not self.snapshot.begun:
            assert self.snapshot.described() == [(name, part.numel()) for name, part in self.wanted.items()]
            assert self.snapshot.bytes == sum(part.nbytes for part in self.wanted.values())
        self.read(1000)
        assert equal(self.found, self.wanted) and self.snapshot.versions == self.versions
        assert not self.snapshot.waits


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(steps=STEPS)
@settings(max_examples=8, deadline=None)
def test_a_snapshot_is_a_deep_copy_whatever_comes_between(
    optimizer: str, codec: str, steps: list[Step]
) -> None:
    bench, readings = Bench(optimizer, codec), list[Reading]()
    for what, how in steps:
        match what:
            case "mark":
                readings.append(Reading(bench, how))
            case "take":
                for reading in readings[how : how + 1]:
                    reading.read(3 + how)
            case "drop":
                del readings[how : how + 1]
            case _:
                bench.do(what, how)
    for reading in readings:
        reading.check()


def test_a_snapshot_that_is_read_while_steps_are_made() -> None:
    bench = Bench("Adam", "none")
    bench.do("apply", [frozenset()])
    for _ in range(10):
        reading = Reading(bench, True)
        thread = threading.Thread(target=reading.read, args=(1000,))
        thread.start()
        for _ in range(3):
            bench.do("apply", [frozenset()])
        thread.join()
        reading.check()


def test_chunks_that_leave_the_store_stay_in_its_snapshots() -> None:
    bench = Bench("Adam", "bf16")
    bench.do("apply", [frozenset()])
    reading, some = Reading(bench, True), list(bench.store.chunks[:3])
    moved = bench.store.snapshot(some, published=True)
    assert list(moved.versions) == some
    reading.read(2)
    bench.store.let_go(some)
    come = bench.store.made_of(moved.versions, dict(moved.tensors()))
    bench.store.take_in(come)
    bench.do("apply", [frozenset()])
    reading.check()


def test_only_what_changes_before_it_is_read_is_copied_by_the_store() -> None:
    bench = Bench("plain", "none")
    snapshot = bench.store.snapshot(published=False)
    assert not snapshot.begun and snapshot.stalled_s == 0
    first = LAYOUT.chunks[0].index
    taken = snapshot.take(first)
    bench.do("apply", [frozenset()])
    frozen = {chunk.index for chunk in LAYOUT.chunks if LAYOUT.frozen(chunk.index)}
    assert snapshot.begun and snapshot.stalled_s > 0
    assert snapshot._copied.keys() == bench.store._held.keys() - frozen - {first}
    assert taken.sizes == {"w": LAYOUT.chunks[0].size}


@pytest.mark.parametrize("how", ["closed", "dropped", "read"])
def test_a_snapshot_that_is_over_costs_nothing(how: str) -> None:
    bench = Bench("Adam", "none")
    snapshot: Snapshot | None = bench.store.snapshot(published=False)
    assert snapshot is not None and bench.store._door._marked
    if how == "closed":
        snapshot.close()
    elif how == "read":
        assert len(list(snapshot.data())) == len(LAYOUT.chunks)
    else:
        snapshot = None
        gc.collect()
    bench.do("apply", [frozenset()])
    assert bench.store._door._marked == ()
    assert snapshot is None or (not snapshot._copied and snapshot.stalled_s == 0)


def test_copies_lie_in_memory_that_is_used_again() -> None:
    bench, kept = Bench("Adam", "none"), list[int]()
    for _ in range(4):
        bench.do("apply", [frozenset()])
        snapshot = bench.store.snapshot(published=False)
        bench.do("apply", [frozenset()])
        assert len(list(snapshot.data())) == len(LAYOUT.chunks)
        kept.append(bench.store._door._pages.kept)
    assert 0 < kept[1] == kept[-1] <= KEPT, "the second finds what the first has left"
