"""The state of an optimizer as named tensors and JSON: the same bits come back, and nothing else gets in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from zml.checkpoint.folder import ABOUT, TENSORS
from zml.worker.binding import named_parameters
from zml.worker.optimizer_state import (
    About,
    BadState,
    copy_state,
    files,
    kind,
    read_about,
    read_tensors,
    restore_optimizer,
)
from zml.worker.schedules import Told

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "plain SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=0.01),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups),
}


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.out = torch.nn.Linear(3, 2)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.conv(x).mean((2, 3))) * self.scale
        return found


class Training:
    def __init__(self, make: Make, dtype: torch.dtype = torch.float32, mirrored: bool = False) -> None:
        self.model = Net(dtype)
        parts: list[dict[str, Any]] = [
            {"params": list(self.model.conv.parameters())},
            {"params": [*self.model.out.parameters(), self.model.scale, self.model.unused]},
        ]
        self.optimizer = make(parts[::-1] if mirrored else parts)
        self.x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(2)).to(dtype)

    def train(self, steps: int) -> "Training":
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x).float(), torch.tensor([0, 1, 0, 1])).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return self

    @property
    def named(self) -> dict[str, torch.nn.Parameter]:
        return named_parameters(self.model)

    def kept(self) -> dict[str, bytes]:
        tensors, described, left_out = copy_state(self.optimizer, self.named)
        assert left_out == []
        about = About(kind(self.optimizer), described, Told(0))
        return {name: b"".join(data) for name, data in files(tensors, about).items()}

    def restore(self, kept: dict[str, bytes]) -> list[str]:
        tensors, about = read_tensors(kept[TENSORS]), read_about(kept[ABOUT])
        return restore_optimizer(self.optimizer, self.named, tensors, about)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_goes_on_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    one = Training(OPTIMIZERS[name], dtype).train(3)
    kept = one.kept()
    other = Training(OPTIMIZERS[name], dtype)
    other.model.load_state_dict(one.model.state_dict())
    assert other.restore(kept) == []
    assert other.kept() == kept
    one.train(3)
    other.train(3)
    for (path, ours), theirs in zip(one.named.items(), other.named.values(), strict=True):
        assert torch.equal(ours, theirs), path
    assert other.kept() == one.kept()


def test_parameters_go_by_their_names_and_lie_in_memory_as_the_model_has_them() -> None:
    one = Training(OPTIMIZERS["AdamW"]).train(2)
    other = Training(OPTIMIZERS["AdamW"], mirrored=True)
    assert other.restore(one.kept()) == []
    state = other.optimizer.state[other.model.conv.weight]
    assert torch.equal(state["exp_avg"], one.optimizer.state[one.model.conv.weight]["exp_avg"])
    assert state["exp_avg"].stride() == other.model.conv.weight.stride() != (18, 9, 3, 1)
    assert other.model.unused not in other.optimizer.state or not other.optimizer.state[other.model.unused]


def test_the_copy_is_one_and_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    one = Training(OPTIMIZERS["AdamW"]).train(1)
    tensors, described, _ = copy_state(one.optimizer, one.named)
    about = About(kind(one.optimizer), described, Told(0))
    before = {name: b"".join(data) for name, data in files(tensors, about).items()}
    one.train(1)
    assert {name: b"".join(data) for name, data in files(tensors, about).items()} == before
    (tmp_path / TENSORS).write_bytes(before[TENSORS])
    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert set(file.keys()) == set(tensors) and "conv.weight/exp_avg" in tensors
        assert torch.equal(file.get_tensor("scale/step"), torch.tensor(1.0))
    assert json.loads(before[ABOUT])["optimizer"] == "torch.optim.adamw.AdamW"


def test_a_state_in_another_dtype_than_its_parameter_keeps_its_digits() -> None:
    one, other = (Training(OPTIMIZERS["SGD"], torch.bfloat16) for _ in range(2))
    one.train(1)
    wide = torch.full((3,), 1.0009765625)
    one.optimizer.state[one.named["conv.bias"]]["momentum_buffer"] = wide
    assert other.restore(one.kept()) == []
    assert torch.equal(other.optimizer.state[other.named["conv.bias"]]["momentum_buffer"], wide)


def test_what_does_not_fit_is_left_out_by_name_and_the_rest_is_taken() -> None:
    one = Training(OPTIMIZERS["AdamW"]).train(2)
    kept = one.kept()
    other = Training(OPTIMIZERS["AdamW"])
    tensors, about = read_tensors(kept[TENSORS]), read_about(kept[ABOUT])
    about.parameters["gone"] = about.parameters.pop("conv.bias")
    about.parameters["out.bias"].shape = [3]
    about.parameters["scale"].dtype = "float64"
    tensors["out.weight/exp_avg"] = torch.zeros(5, 7)
    tensors["odd/exp_avg"] = torch.zeros(2)
    about.parameters["conv.weight"].tensors.append("missing")
    left_out = restore_optimizer(other.optimizer, other.named, tensors, about)
    assert sorted(left_out) == [
        "conv.bias",
        "conv.weight, for its missing",
        "gone",
        "odd",
        "out.bias, which was float32[3] and is float32[2]",
        "out.weight, for its exp_avg",
        "scale, which was float64[] and is float32[]",
    ]
    state = other.optimizer.state
    assert not any(state.values())
    del about.parameters["out.weight"]
    about.parameters["conv.weight"].tensors.remove("missing")
    assert "conv.weight" not in restore_optimizer(other.optimizer, other.named, tensors, about)
    state = other.optimizer.state
    assert {name for name, p in other.named.items() if state.get(p)} == {"conv.weight"}
    other.train(1)
    steps = {name: float(state[p]["step"]) for name, p in other.named.items() if state.get(p)}
    assert steps == {"conv.weight": 3, "conv.bias": 1, "out.weight": 1, "out.bias": 1, "scale": 1}


def test_a_state_that_is_more_than_tensors_and_numbers_is_left_out_whole() -> None:
    one = Training(OPTIMIZERS["AdamW"]).train(1)
    one.optimizer.state[one.model.scale]["history"] = object()
    one.optimizer.state[one.model.out.bias]["odd"] = torch.zeros(1, dtype=torch.complex64)
    one.optimizer.state["global"] = {"n": 1}  # type: ignore[index]
    one.optimizer.state[one.named["conv.bias"]]["number"] = [1, 2.5]
    tensors, described, left_out = copy_state(one.optimizer, one.named)
    assert sorted(left_out) == ["global", "out.bias, for its odd", "scale, for its scale.history"]
    assert set(described) == {"conv.weight", "conv.bias", "out.weight"}
    assert described["conv.bias"].plain == {"number": [1, 2.5]}
    assert {name.rpartition("/")[0] for name in tensors} == set(described)


def test_another_kind_of_optimizer_takes_nothing() -> None:
    other = Training(OPTIMIZERS["SGD"])
    (said,) = other.restore(Training(OPTIMIZERS["AdamW"]).train(1).kept())
    assert said == "all of it: it is torch.optim.adamw.AdamW's, and the script has torch.optim.sgd.SGD"
    assert not other.optimizer.state


@given(st.binary(max_size=200))
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(BadState):
        read_about(data)
    with pytest.raises(BadState):
        read_tensors(data)


@given(st.data())
def test_a_file_that_ends_early_is_refused(data: st.DataObject) -> None:
    kept = Training(OPTIMIZERS["SGD"]).train(1).kept()
    with pytest.raises(BadState):
        read_tensors(kept[TENSORS][: data.draw(st.integers(0, len(kept[TENSORS]) - 1))])
    with pytest.raises(BadState):
        read_about(kept[ABOUT][: data.draw(st.integers(0, len(kept[ABOUT]) - 3))])
