"""The fused update does what torch's optimizer does, but for rounding, on torch's own state; the two may take turns."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zml.hyper import Hyper, OptimizerSpec, hyper_of
from zml.layout import CHUNK, Chunk, Layout
from zml.shard import fused
from zml.shard.optim import UpdateRule, adds, fused_state

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"maximize": True}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.5, "maximize": True, "nesterov": True}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"betas": (0.5, 0.7), "eps": 1e-3, "maximize": True}),
    ("Adam", {"betas": (0.0, 0.9)}),
    ("AdamW", {}),
    ("AdamW", {"betas": (0.8, 0.95), "weight_decay": 0.3}),
    ("AdamW", {"maximize": True, "weight_decay": 0.0}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"amsgrad": True}),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
]
TOLERANCE = 2e-6  # of 1 + |value|, after one step from equal values of about 1: a few units in the last place


def one_chunk(size: int, *more: int) -> Chunk:
    layout = Layout.build([(f"p{i}", (n,), 0) for i, n in enumerate((size, *more))], 1)
    (chunk,) = layout.chunks
    return chunk


class Twin:
    """One chunk twice, from equal values: `torch_s` steps as torch does, `ours` by `fused` where that can."""

    def __init__(self, name: str, options: dict[str, Any], chunk: Chunk, seed: int = 1) -> None:
        self.random = torch.Generator().manual_seed(seed)
        parameter = torch.zeros(1, requires_grad=True)
        optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **options)
        self.spec = OptimizerSpec.of(optimizer)
        (self.hyper,) = self.spec.accept(hyper_of(optimizer))
        self.chunk = chunk
        self.w = [torch.randn(chunk.size, generator=self.random)]
        self.w.append(self.w[0].clone())
        self.torch_s, self.ours = (UpdateRule(self.spec, chunk, w) for w in self.w)

    def gradient(self, workers: int = 1, density: float = 1.0) -> Tensor:
        several = [torch.randn(self.chunk.size, generator=self.random) for _ in range(workers)]
        kept = torch.rand(self.chunk.size, generator=self.random) < density
        return torch.stack(several).sum(0) * kept

    def step(self, total: Tensor, workers: int = 1, absent: frozenset[int] = frozenset()) -> bool:
        """Both; was ours the fused one? The state is compared, and then w and state made equal again."""
        self.torch_s.step(total / workers, self.hyper, absent)
        was_fused = self.alone(total, workers, absent)
        near(self.w[1], self.w[0])
        expected, found = self.torch_s.state(), self.ours.state()
        assert found.keys() == expected.keys()
        for name in expected:
            near(found[name], expected[name])
        self.w[1].copy_(self.w[0])
        self.ours.load_state(expected)
        return was_fused

    def alone(self, total: Tensor, workers: int = 1, absent: frozenset[int] = frozenset()) -> bool:
        spans = self.ours.spans(self.hyper, absent)
        if spans is None:
            self.ours.step(total / workers, self.hyper, absent)
            return False
        before = total.clone()
        entries = np.full(len(spans), int(torch.count_nonzero(total)))
        fused.update(self.spec.name, self.hyper, workers)(spans, total.numpy(), entries)
        assert torch.equal(before.view(torch.int32), total.view(torch.int32)), "sums are only read"
        return True


def near(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))
    assert float(((found - expected).abs() / (1 + expected.abs())).max()) <= TOLERANCE


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 333, CHUNK])
def test_a_fused_step_is_torch_s_but_for_rounding(name: str, options: dict[str, Any], size: int) -> None:
    twin = Twin(name, options, one_chunk(size))
    first = [twin.step(twin.gradient())]
    assert first == [fused_state(name, twin.hyper) == ()]  # what needs a state lets torch make it
    for workers, density in ((1, 1.0), (3, 0.01), (8, 0.1), (2, 0.0)):
        assert twin.step(twin.gradient(workers, density), workers)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_many_fused_steps_stay_with_torch_s(name: str, options: dict[str, Any]) -> None:
    twin = Twin(name, options, one_chunk(1000))
    for _ in range(30):
        total = twin.gradient(4, 0.3)
        twin.torch_s.step(total / 4, twin.hyper)
        twin.alone(total, 4)
    assert float((twin.w[0] - twin.w[1]).abs().max()) <= 30 * TOLERANCE * (1 + float(twin.w[0].abs().max()))


@pytest.mark.parametrize(("name", "options"), OTHERS, ids=str)
def test_other_optimizers_step_as_torch_does(name: str, options: dict[str, Any]) -> None:
    twin = Twin(name, options, one_chunk(100))
    for _ in range(3):
        assert not twin.step(twin.gradient())


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_parameters_without_gradient_keep_their_history(name: str, options: dict[str, Any]) -> None:
    twin = Twin(name, options, one_chunk(20, 3, 41))
    sometimes = [(), (), (1,), (), (0, 2), (1,), (1,), ()]
    for gone in sometimes:
        absent = frozenset(gone)
        total = twin.gradient(2)
        for segment in twin.chunk.segments:
            if segment.parameter in absent:
                total[segment.offset : segment.offset + segment.size] = 0
        twin.step(total, 2, absent)


def test_a_parameter_that_comes_late_lets_torch_make_its_state() -> None:
    twin = Twin("Adam", {}, one_chunk(20, 3))
    last = frozenset({1})
    assert [twin.step(twin.gradient(), 1, last), twin.step(twin.gradient(), 1, last)] == [False, True]
    assert [twin.step(twin.gradient()), twin.step(twin.gradient())] == [False, True]
    assert twin.ours.state()["step"].tolist() == [4, 2]


def test_torch_and_fused_take_turns_on_the_same_tensors() -> None:
    for name, options in (("AdamW", {}), ("SGD", {"momentum": 0.9})):
        twin = Twin(name, options, one_chunk(257))
        twin.step(twin.gradient())
        live = {key: value.data_ptr() for key, value in twin.ours.state().items() if len(value) > 1}
        for turn in range(6):
            total = twin.gradient()
            twin.torch_s.step(total, twin.hyper)
            if turn % 2:
                twin.ours.step(total, twin.hyper)
            else:
                assert twin.alone(total)
            assert {key: twin.ours.state()[key].data_ptr() for key in live} == live
        near(twin.w[1], twin.w[0])


def test_numbers_may_change_between_steps() -> None:
    twin = Twin("SGD", {}, one_chunk(100))
    changes: list[Hyper] = [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.0, "nesterov": False, "weight_decay": 0.2},
        {"momentum": 0.8, "lr": 0.01},
        {"lr": 0.0},
    ]
    for change in changes:
        twin.hyper = twin.hyper | change
        twin.step(twin.gradient())
    cyclic = Twin("Adam", {}, one_chunk(100))
    for beta in (0.9, 0.95, 0.85):
        cyclic.hyper = cyclic.hyper | {"betas": (beta, 0.99)}
        cyclic.step(cyclic.gradient())


def test_a_plain_addition_writes_only_where_something_came() -> None:
    """Bit for bit, also a NaN in w where nothing came: it is neither read nor written."""
    for size, density in ((CHUNK, 0.001), (CHUNK, 0.02), (CHUNK, 0.9), (40, 0.05)):
        twin = Twin("SGD", {}, one_chunk(size))
        assert adds("SGD", twin.hyper)
        total = twin.gradient(1, density)
        w = twin.w[1]
        w[total == 0] = torch.nan
        before = w.clone()
        assert twin.alone(total)
        still = total == 0
        assert torch.equal(w[still].view(torch.int32), before[still].view(torch.int32))
        moved = before - torch.tensor(0.1, dtype=torch.float64).float() * total
        assert torch.equal(w[~still], moved[~still])


def test_only_the_rows_are_written() -> None:
    """Kernels trust the addresses they get: nothing beside the elements of the rows may change."""
    for name, options in CASES:
        (hyper,) = OptimizerSpec.of(
            optimizer := getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)], lr=0.1, **options)
        ).accept(hyper_of(optimizer))
        memory = [torch.full((200,), 7.0) for _ in range(3)]
        steps = torch.ones(3)
        rows = np.zeros((2, fused.COLUMNS), dtype=np.int64)
        for row, (at, start, size) in enumerate(((0, 50, 33), (33, 120, 16))):
            rows[row] = [at, size, *(tensor.data_ptr() + 4 * start for tensor in memory), 0]
            rows[row, fused.STEP] = steps.data_ptr() + 4
        fused.update(name, hyper, 1)(rows, torch.ones(60).numpy(), np.array([60, 0]))
        inside = torch.zeros(200, dtype=torch.bool)
        inside[50:83] = inside[120:136] = True
        for tensor in memory:
            assert torch.equal(tensor[~inside], torch.full((151,), 7.0))
        assert not (memory[0][inside] == 7.0).any()
        assert steps.tolist() == [1.0, 3.0 if name != "SGD" else 1.0, 1.0]


def test_moments_that_fade_become_zero_and_never_denormal() -> None:
    for name, options in (("Adam", {}), ("SGD", {"momentum": 0.5})):
        twin = Twin(name, options, one_chunk(64))
        twin.alone(torch.full((64,), 1e-18))
        twin.alone(torch.full((64,), 1e-18))
        tiny = torch.finfo(torch.float32).tiny
        for _ in range(1200):
            assert twin.alone(torch.zeros(64))
            for key, value in twin.ours.state().items():
                assert key in ("step", "stepped") or not ((value != 0) & (value.abs() < tiny)).any()
        assert any(not value.any() for value in twin.ours.state().values())


def test_what_is_not_finite_is_not_hidden() -> None:
    for name, options in CASES:
        twin = Twin(name, options, one_chunk(32))
        twin.alone(twin.gradient())
        total = twin.gradient()
        total[3], total[20] = torch.nan, torch.inf
        twin.alone(total)
        assert not torch.isfinite(twin.w[1][[3, 20]]).any()
        others = torch.ones(32, dtype=torch.bool)
        others[[3, 20]] = False
        assert torch.isfinite(twin.w[1][others]).all()
