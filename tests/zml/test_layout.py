"""Layouts, buckets and registrations: what follows from shapes, and what a hostile peer cannot make follow."""

import itertools

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zml import errors
from zml.errors import ZmlError
from zml.hyper import BadHyper, OptimizerSpec, hyper_of, read_hyper, write_hyper
from zml.layout import (
    CHUNK,
    MOST_ELEMENTS,
    MOST_PARAMETERS,
    BadLayout,
    Layout,
    Registration,
    buckets,
)

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    groups = draw(st.integers(1, 3))
    kinds = st.tuples(shapes, st.integers(0, groups))
    described = [
        (f"p{i}", shape, group) for i, (shape, group) in enumerate(draw(st.lists(kinds, max_size=12)))
    ]
    described.append(("last", (draw(st.integers(1, 40)),), 0))
    return Layout.build(described, groups, draw(st.integers(1, 50)))


def sgd(groups: int = 1) -> OptimizerSpec:
    return OptimizerSpec("SGD", ({},) * groups)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.body = torch.nn.Linear(4, 5)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


# -- layout --------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_every_element_lies_in_exactly_one_place(layout: Layout) -> None:
    for index, parameter in enumerate(layout.parameters):
        at = 0
        for chunk, segment in layout.places[index]:
            assert (segment.parameter, segment.start, segment.ndim) == (index, at, len(parameter.shape))
            assert layout.chunks[chunk].group == parameter.group
            slab_offset = (chunk - layout.groups[parameter.group].chunks.start) * layout.chunk_elements
            assert slab_offset + segment.offset == parameter.start + segment.start
            at += segment.size
        assert at == parameter.size
    for group in layout.groups:
        sizes = [layout.chunks[index].size for index in group.chunks]
        assert sum(sizes) == group.size
        assert all(size == layout.chunk_elements for size in sizes[:-1])
    assert [chunk.index for chunk in layout.chunks] == list(range(len(layout.chunks)))
    for each in layout.chunks:
        ends = [0, *itertools.accumulate(segment.size for segment in each.segments)]
        assert [segment.offset for segment in each.segments] == ends[:-1]
        assert ends[-1] == each.size > 0
    assert [group.frozen for group in layout.groups] == [False] * (len(layout.groups) - 1) + [True]


def test_a_chunk_is_65536_elements_unless_a_test_says_otherwise() -> None:
    layout = Layout.build([("a", (300, 300), 0), ("b", (10,), 0)], 1)
    assert [chunk.size for chunk in layout.chunks] == [CHUNK, 90_010 - CHUNK] == [65_536, 24_474]


def test_tied_weights_are_there_once_and_groups_have_slabs_of_their_own() -> None:
    model = Net()
    model.body.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": [model.body.weight]}, {"params": [model.embed.weight]}])
    layout = Layout.of(model, optimizer, chunk_elements=16)
    assert [(p.name, p.shape, p.group) for p in layout.parameters] == [
        ("embed.weight", (11, 4), 1),
        ("body.weight", (5, 4), 0),
        ("body.bias", (5,), 2),
    ]
    assert [chunk.size for chunk in layout.chunks] == [16, 4, 16, 16, 12, 5]
    assert [layout.frozen(index) for index in range(6)] == [False] * 5 + [True]


def test_a_frozen_parameter_that_the_optimizer_holds_is_frozen_all_the_same() -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    layout = Layout.of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [(p.name, p.group) for p in layout.parameters] == [("weight", 1), ("bias", 0)]


def test_a_compiled_model_keeps_its_names() -> None:
    model = Net()
    compiled = torch.nn.Sequential()
    compiled.add_module("_orig_mod", model)  # what torch.compile makes of the tree, without compiling
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert Layout.of(compiled, optimizer) == Layout.of(model, optimizer)


# -- models that are refused -----------------------------------------------------------------------------


def refused(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ZmlError:
    with pytest.raises(ZmlError) as caught:
        Layout.of(model, optimizer or torch.optim.SGD(model.parameters(), lr=0.1))
    return caught.value


class DistributedDataParallel(torch.nn.Module):
    """Stands for torch's own, which needs a process group."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_wrapped_model_is_refused() -> None:
    error = refused(DistributedDataParallel(Net()))
    assert (error.code, "DistributedDataParallel" in str(error)) == (errors.WRAPPED, True)
    assert refused(torch.nn.DataParallel(Net())).code == errors.WRAPPED


def test_a_parameter_without_optimizer_is_refused_by_name() -> None:
    model = Net()
    error = refused(model, torch.optim.SGD([model.embed.weight, model.body.bias], lr=0.1))
    assert (error.code, "body.weight" in error.what) == (errors.NOT_HELD, True)
    assert error.fix and "one optimizer" in error.fix, "a second one may hold it"


def test_an_optimizer_of_another_model_is_refused() -> None:
    error = refused(torch.nn.Linear(2, 3).requires_grad_(False), torch.optim.SGD(Net().parameters(), lr=0.1))
    assert (error.code, "(11, 4)" in error.what) == (errors.FOREIGN, True)


def test_an_optimizer_that_shards_do_not_have_is_refused_with_those_they_have() -> None:
    class AdamW(torch.optim.AdamW):
        """Same name, another class: shards would not run its code."""

    model = Net()
    for optimizer in (torch.optim.LBFGS(model.parameters()), AdamW(model.parameters())):
        error = refused(model, optimizer)
        assert error.code == errors.OPTIMIZER
        assert "SGD, Adam, AdamW, Adagrad, RMSprop" in error.fix


def test_an_optimizer_that_has_made_steps_is_refused() -> None:
    for kind in (torch.optim.AdamW, torch.optim.Adagrad):
        model = torch.nn.Linear(2, 2)
        optimizer = kind(model.parameters(), lr=0.1)
        Layout.of(model, optimizer)
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        assert refused(model, optimizer).code == errors.STEPPED
    model = torch.nn.Linear(2, 2)
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2)).sum().backward()
    momentum.step()
    assert refused(model, momentum).code == errors.STEPPED


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
        (lambda: torch.nn.Linear(2, 2, device="meta"), "meta"),
        (lambda: torch.nn.Sequential(torch.nn.Embedding(3, 2, sparse=True)), "sparse"),
        (lambda: torch.nn.Sequential(torch.nn.LazyLinear(2)), "no shape yet"),
        (lambda: integers(), "int8"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused_by_name(make: object, says: str) -> None:
    assert callable(make)
    model = make()
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    error = refused(model, torch.optim.SGD(held or [torch.zeros(1)], lr=0.1))
    assert (error.code, says in error.what) == (errors.TENSOR, True)


def integers() -> torch.nn.Module:
    model = torch.nn.Module()
    model.table = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    return model


def test_a_model_without_parameters_is_refused() -> None:
    class Optimizer:
        """torch refuses to make an optimizer of nothing; this is what it would look like."""

        def make(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
            optimizer.param_groups[0]["params"] = []
            return optimizer

    assert refused(torch.nn.ReLU(), Optimizer().make()).code == errors.EMPTY_MODEL


# -- buckets -----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(layouts(), st.integers(1, 5), st.data())
def test_every_chunk_is_in_one_bucket_of_its_shard(layout: Layout, most: int, data: st.DataObject) -> None:
    shards = st.lists(st.integers(0, 2), min_size=len(layout.chunks), max_size=len(layout.chunks))
    placement = data.draw(shards)
    found = buckets(layout, placement, most)
    assert sorted(c for bucket in found for c in bucket.chunks) == list(range(len(layout.chunks)))
    for index, bucket in enumerate(found):
        assert bucket.index == index
        assert 1 <= len(bucket.chunks) <= most
        assert {placement[chunk] for chunk in bucket.chunks} == {bucket.shard}
        assert {layout.frozen(chunk) for chunk in bucket.chunks} == {bucket.frozen}
        assert bucket.parameters == {s.parameter for c in bucket.chunks for s in layout.chunks[c].segments}
    assert found == buckets(layout, tuple(placement), most)


def test_the_buckets_that_backward_completes_first_come_first() -> None:
    layout = Layout.build([("a", (8,), 0), ("b", (8,), 0), ("ice", (4,), 1), ("c", (8,), 0)], 1, 4)
    found = buckets(layout, [0] * 7, 2)
    assert [bucket.chunks for bucket in found] == [(5, 4), (3, 2), (1, 0), (6,)]
    assert [set(bucket.parameters) for bucket in found] == [{3}, {1}, {0}, {2}]
    assert [bucket.frozen for bucket in found] == [False, False, False, True]


def test_a_chunk_is_as_late_as_its_earliest_parameter() -> None:
    """Biases have a slab of their own, whose one chunk waits for the first layer."""
    described = [("w0", (8,), 0), ("b0", (2,), 1), ("w1", (8,), 0), ("b1", (2,), 1), ("w2", (8,), 0)]
    found = buckets(Layout.build(described, 2, 8), [0] * 4, 1)
    assert [sorted(bucket.parameters) for bucket in found] == [[4], [2], [1, 3], [0]]


def test_a_placement_of_another_layout_is_refused() -> None:
    layout = Layout.build([("a", (8,), 0)], 1, 4)
    for placement in ([0], [0, 0, 0], [0, -1]):
        with pytest.raises(BadLayout):
            buckets(layout, placement)
    with pytest.raises(BadLayout):
        buckets(layout, [0, 0], 0)


# -- registrations -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(layouts(), st.integers(1, 100))
def test_a_registration_comes_back_as_it_was(layout: Layout, bucket_chunks: int) -> None:
    registration = Registration(layout, sgd(len(layout.groups) - 1), bucket_chunks)
    back = Registration.from_bytes(registration.to_bytes())
    assert back == registration
    assert back.digest == registration.digest


def test_learning_rates_are_no_part_of_the_digest_but_shapes_and_flags_are() -> None:
    def digest(model: torch.nn.Module, **numbers: object) -> str:
        return Registration.of(model, torch.optim.Adam(model.parameters(), **numbers)).digest  # type: ignore[arg-type]

    model = Net()
    assert digest(model, lr=0.1, weight_decay=0.1) == digest(Net(), lr=0.2)
    assert digest(model, amsgrad=True) != digest(model)
    assert digest(torch.nn.Linear(4, 5)) != digest(torch.nn.Linear(5, 4))


def wire(**change: object) -> bytes:
    plain: dict[str, object] = {
        "zml": 1,
        "chunk": 64,
        "bucket": 8,
        "optimizer": "SGD",
        "groups": [{}],
        "parameters": [["a", [3, 4], 0]],
    }
    packed: bytes = msgpack.packb(plain | change)
    return packed


def test_the_plain_registration_is_good() -> None:
    assert Registration.from_bytes(wire()).layout.parameters[0].shape == (3, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"zml": 2},
        {"chunk": 0},
        {"chunk": CHUNK + 1},
        {"chunk": True},
        {"bucket": 0},
        {"bucket": 1 << 40},
        {"optimizer": "LBFGS"},
        {"optimizer": "__class__"},
        {"groups": []},
        {"groups": [{}] * 5_000},
        {"groups": [{"lr": 1.0}]},
        {"optimizer": "Adagrad", "groups": [{"initial_accumulator_value": float("nan")}]},
        {"optimizer": "Adagrad", "groups": [{"initial_accumulator_value": -1.0}]},
        {"optimizer": "Adagrad", "groups": [{}]},
        {"parameters": []},
        {"parameters": [["a", [0], 0]]},
        {"parameters": [["a", [-3], 0]]},
        {"parameters": [["a", [-3, -3], 0]]},
        {"parameters": [["a", [2.5], 0]]},
        {"parameters": [["a", [MOST_ELEMENTS, MOST_ELEMENTS], 0]]},
        {"parameters": [["a", [MOST_ELEMENTS], 0]], "chunk": 1},
        {"parameters": [["a", [MOST_ELEMENTS], 0], ["b", [1], 0]]},
        {"parameters": [["a", [1] * 65, 0]]},
        {"parameters": [["a", [3], 2]]},
        {"parameters": [["a", [3], -1]]},
        {"parameters": [["", [3], 0]]},
        {"parameters": [["a" * 600, [3], 0]]},
        {"parameters": [["a", [3], 0], ["a", [3], 0]]},
        {"parameters": [["a", [3]]]},
        {"parameters": [["a", [3], 0, 0]]},
        {"parameters": [[b"a", [3], 0]]},
        {"parameters": [["a", [], 0]] * (MOST_PARAMETERS + 1)},
        {"odd": 1},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_hostile_registration_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadLayout):
        Registration.from_bytes(wire(**change))


@settings(max_examples=2_000, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_registration(data: bytes) -> None:
    with pytest.raises(BadLayout):
        Registration.from_bytes(data)


@settings(max_examples=1_000, deadline=None)
@given(st.data())
def test_a_damaged_registration_is_refused_or_is_another_whole_one(data: st.DataObject) -> None:
    damaged = bytearray(wire(parameters=[["a", [3, 4], 0], ["b", [70], 1]]))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        layout = Registration.from_bytes(bytes(damaged)).layout
    except BadLayout:
        return
    assert sum(chunk.size for chunk in layout.chunks) == layout.size


def test_a_registration_beyond_the_limit_is_not_read() -> None:
    with pytest.raises(BadLayout, match="more than"):
        Registration.from_bytes(bytes(5 << 20))


# -- hyperparameters -----------------------------------------------------------------------------------------


def test_the_numbers_of_a_group_are_plain_and_travel_as_they_are() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), betas=(0.0, 0.99), weight_decay=0)
    numbers = hyper_of(optimizer)
    assert numbers == [
        {
            "lr": 0.5,
            "betas": (0.0, 0.99),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "amsgrad": False,
            "maximize": False,
            "decoupled_weight_decay": True,
        }
    ]
    assert [type(value) for value in numbers[0].values()] == [float, tuple, float, float, bool, bool, bool]
    back = read_hyper(write_hyper(numbers), OptimizerSpec.of(optimizer))
    assert back == numbers
    assert [type(value) for value in back[0].values()] == [float, tuple, float, float, bool, bool, bool]


@pytest.mark.parametrize(
    "change",
    [
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -0.1},
        {"lr": True},
        {"lr": "0.1"},
        {"lr": None},
        {"lr": [0.1]},
        {"betas": [0.9, 1.0]},
        {"betas": [0.9]},
        {"betas": 0.9},
        {"eps": -1e-8},
        {"maximize": 1},
        {"amsgrad": True},
        {"foreach": True},
    ],
    ids=str,
)
def test_numbers_that_an_optimizer_cannot_have_are_refused(change: dict[str, object]) -> None:
    optimizer = torch.optim.Adam(Net().parameters())
    spec = OptimizerSpec.of(optimizer)
    (group,) = hyper_of(optimizer)
    assert spec.accept([group]) == [group]
    with pytest.raises(BadHyper):
        read_hyper(msgpack.packb([{**group, **change}]), spec)
    wrong: list[list[object]] = [[], [group, group], [{}], [[1]]]
    for hypers in wrong:
        with pytest.raises(BadHyper):
            read_hyper(msgpack.packb(hypers), spec)


@settings(max_examples=1_000, deadline=None)
@given(st.binary(max_size=100))
def test_random_bytes_are_no_numbers(data: bytes) -> None:
    with pytest.raises(BadHyper):
        read_hyper(data, sgd())
