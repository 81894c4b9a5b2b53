"""The shard's update is torch's, to the bit: every optimizer, every option, cut anywhere, with gradients missing."""

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from zml.hyper import OPTIMIZERS, RULES, OptimizerSpec, hyper_of
from zml.layout import Chunk, Layout
from zml.shard.optim import UpdateRule

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.5, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.5, 0.7), "eps": 1e-3, "maximize": True}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    ("AdamW", {"maximize": True, "weight_decay": 0.0}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    ("Adagrad", {"maximize": True, "eps": 1e-3}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "alpha": 0.7}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "maximize": True, "eps": 1e-4}),
]
RATES = (0.1, 0.1, 0.03, 0.5, 0.0, 0.2, 0.01)


class Twin:
    """The same parameters twice: as torch's optimizer knows them, and as the update rules of their chunks do."""

    def __init__(
        self, name: str, options: dict[str, Any], shapes: list[tuple[int, ...]], chunk: int, seed: int
    ):
        self.random = torch.Generator().manual_seed(seed)
        self.parameters = [torch.randn(shape, generator=self.random).requires_grad_() for shape in shapes]
        self.optimizer = getattr(torch.optim, name)(self.parameters, lr=0.1, **options)
        self.layout = Layout.build([(f"p{i}", shape, 0) for i, shape in enumerate(shapes)], 1, chunk)
        self.spec = OptimizerSpec.of(self.optimizer)
        self.w = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        self.rules = self.make_rules()

    def make_rules(self) -> list[UpdateRule]:
        return [UpdateRule(self.spec, chunk, self.part(self.w, chunk)) for chunk in self.layout.chunks]

    def part(self, flat: Tensor, chunk: Chunk) -> Tensor:
        start = chunk.index * self.layout.chunk_elements
        return flat[start : start + chunk.size]

    def gradients(self, absent: frozenset[int]) -> None:
        for index, parameter in enumerate(self.parameters):
            gradient = torch.randn(parameter.shape, generator=self.random)
            parameter.grad = None if index in absent else gradient

    def step(self, rate: float, absent: frozenset[int] = frozenset()) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.gradients(absent)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters]
        )
        (hyper,) = self.spec.accept(hyper_of(self.optimizer))
        for rule in self.rules:
            gradient = self.part(flat, rule.chunk)
            before = gradient.clone()
            if not {segment.parameter for segment in rule.chunk.segments} <= absent:
                rule.step(gradient, hyper, absent)
            assert torch.equal(gradient, before), "a gradient may be the memory of a message"
        self.optimizer.step()

    def check(self) -> None:
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        assert torch.equal(self.w.view(torch.int32), flat.view(torch.int32))

    def check_state(self) -> None:
        """The rules' state, put together again, is torch's."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        mine = [rule.state() for rule in self.rules]
        for index, state in enumerate(states):
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                for chunk, segment in self.layout.places[index]:
                    found = mine[chunk][name]
                    if name == "step":
                        which = self.layout.chunks[chunk].segments.index(segment)
                        assert found[which] == value
                        continue
                    part = value.reshape(-1)[segment.start : segment.start + segment.size]
                    assert torch.equal(found[segment.offset : segment.offset + segment.size], part)


def shapes_from(seed: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    return [tuple(number(1, 14) for _ in range(number(0, 4))) for _ in range(number(1, 6))]


def absences(seed: int, parameters: int, steps: int) -> list[frozenset[int]]:
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand((steps, parameters), generator=random) < 0.25
    return [frozenset(index for index in range(parameters) if draw[index]) for draw in draws]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_chunks_step_as_torch_steps_whole_parameters(name: str, options: dict[str, Any]) -> None:
    for seed, chunk in enumerate((2, 7, 61)):
        twin = Twin(name, options, shapes_from(seed), chunk, seed)
        for rate in RATES:
            twin.step(rate)
            twin.check()
        twin.check_state()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_parameter_without_gradient_is_skipped_as_torch_skips_it(
    name: str, options: dict[str, Any]
) -> None:
    for seed, chunk in enumerate((2, 7, 61)):
        shapes = shapes_from(seed + 10)
        twin = Twin(name, options, shapes, chunk, seed)
        for rate, absent in zip(RATES, absences(seed, len(shapes), len(RATES)), strict=True):
            twin.step(rate, absent)
            twin.check()
        twin.check_state()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_large_tensors_are_cut_at_any_place(name: str, options: dict[str, Any]) -> None:
    """Vector bodies, their tails and more than one thread: element-wise kernels do not care where a tensor ends."""
    twin = Twin(name, options, [(300, 333), (5,), (40_001,)], 40_961, 5)
    for rate, absent in zip(RATES[:3], (frozenset[int](), frozenset({1}), frozenset({2})), strict=True):
        twin.step(rate, absent)
        twin.check()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("missing", [False, True])
def test_a_rule_that_is_restored_goes_on_to_the_bit(
    name: str, options: dict[str, Any], missing: bool
) -> None:
    shapes: list[tuple[int, ...]] = [(5, 7), (3,), (), (31,), (2, 2)]
    sometimes = absences(4, len(shapes), 6) if missing else [frozenset[int]()] * 6
    for cut in (0, 3):
        twin = Twin(name, options, shapes, 16, 1)
        for index, absent in enumerate(sometimes):
            if index == cut:
                states = [{k: v.clone() for k, v in rule.state().items()} for rule in twin.rules]
                twin.rules = twin.make_rules()
                for rule, state in zip(twin.rules, states, strict=True):
                    rule.load_state(state)
                    assert rule.state().keys() == state.keys()
                    assert all(torch.equal(rule.state()[key], state[key]) for key in state)
            twin.step(RATES[index], absent)
            twin.check()


def test_a_state_of_another_chunk_is_refused() -> None:
    twin = Twin("Adam", {}, [(5,), (3,)], 8, 1)
    twin.step(0.1)
    (rule,) = twin.rules
    state = {key: value.clone() for key, value in rule.state().items()}
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "step", "stepped"]
    wrong: list[dict[str, Tensor]] = [
        state | {"exp_avg": torch.zeros(7)},
        state | {"exp_avg": torch.zeros(8, dtype=torch.float64)},
        state | {"step": torch.zeros(())},
        {key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")},
    ]
    for bad in wrong:
        with pytest.raises(ValueError):
            rule.load_state(bad)
    twin.step(0.1)
    twin.check()


def test_options_may_change_between_steps_as_in_torch() -> None:
    twin = Twin("SGD", {}, [(40,), (3, 3)], 16, 2)
    group = twin.optimizer.param_groups[0]
    for momentum, nesterov, decay in (
        (0.0, False, 0.0),
        (0.9, False, 0.1),
        (0.5, True, 0.0),
        (0.0, False, 0.2),
    ):
        group.update(momentum=momentum, nesterov=nesterov, weight_decay=decay)
        twin.step(0.1)
        twin.check()
    cyclic = Twin("Adam", {}, [(40,)], 16, 2)
    for beta in (0.95, 0.85, 0.9):
        cyclic.optimizer.param_groups[0]["betas"] = (beta, 0.99)
        cyclic.step(0.1)
        cyclic.check()


def test_momentum_turned_on_later_begins_at_rest() -> None:
    """torch's RMSprop breaks there; a shard must not."""
    twin = Twin("RMSprop", {}, [(20,)], 8, 3)
    twin.step(0.1)
    twin.check()
    (hyper,) = twin.spec.accept(hyper_of(twin.optimizer))
    for rule in twin.rules:
        rule.step(torch.ones(rule.chunk.size), hyper | {"momentum": 0.9})
    assert torch.isfinite(twin.w).all()


def test_every_group_has_the_state_that_it_asked_for() -> None:
    layout = Layout.build([("a", (4,), 0), ("b", (4,), 1)], 2)
    parameters = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [parameters[0]], "amsgrad": True}, {"params": [parameters[1]]}]
    optimizer = torch.optim.Adam(groups)
    spec = OptimizerSpec.of(optimizer)
    states = []
    for chunk, hyper in zip(layout.chunks, spec.accept(hyper_of(optimizer)), strict=True):
        rule = UpdateRule(spec, chunk, torch.zeros(4))
        rule.step(torch.ones(4), hyper)
        states.append(sorted(rule.state()))
    assert states == [["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "stepped"], states[1]]
    assert "max_exp_avg_sq" not in states[1]


def test_torch_has_the_numbers_that_we_name() -> None:
    """All of them, and of what torch has beside them only switches of its implementation."""
    ours = {"params", "foreach", "fused", "capturable", "differentiable"}
    for name, numbers in OPTIMIZERS.items():
        optimizer = getattr(torch.optim, name)([torch.zeros(1)], lr=0.1)
        assert set(optimizer.param_groups[0]) - ours <= set(numbers) <= set(RULES)
        assert set(numbers) - set(optimizer.param_groups[0]) <= {"decoupled_weight_decay"}
        assert set(itertools.chain(*hyper_of(optimizer))) == set(numbers)


STEPS = """
import json, sys, torch
from zml.hyper import RULES, OptimizerSpec
from zml.layout import Layout
from zml.shard.optim import UpdateRule
layout = Layout.build([("a", (4,), 0), ("b", (4,), 0)], 8)
for name, numbers in json.loads(sys.argv[1]).items():
    spec = OptimizerSpec(name, ({key: number for key, number in numbers.items() if RULES[key].fixed},))
    (hyper,) = spec.accept([numbers])
    rule = UpdateRule(spec, layout.chunks[0], torch.zeros(8))
    rule.step(torch.ones(8), hyper)
    rule.step(torch.ones(8), hyper, absent={1})
    UpdateRule(spec, layout.chunks[0], torch.zeros(8)).load_state(rule.state())
print("torch._dynamo" in sys.modules)
"""


def test_a_shard_steps_without_loading_torchs_compiler() -> None:
    """It takes seconds to load, in which a shard that was started again answers nobody."""
    numbers = {name: hyper_of(getattr(torch.optim, name)([torch.zeros(1)], lr=0.1))[0] for name in OPTIMIZERS}
    command = [sys.executable, "-c", STEPS, json.dumps(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")
