"""The numbers of an optimizer: what they are called, what they may be, how they travel.

An optimizer is a class name and numbers, never a pickle. The numbers of every parameter group travel with
every step, so that a learning rate schedule in the script acts on the shard; what shapes the optimizer's
state is fixed when the job begins. Names and ranges are those of torch.optim's constructors. This module does
not import torch: the coordinator reads it too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

Number = bool | float | tuple[float, float]
Hyper = dict[str, Number]  # the numbers of one parameter group

MOST_GROUPS = 4_096
MOST_BYTES = 1 << 20  # of the numbers of all groups, as msgpack
NO_WISH = -1  # of a worker, on how all compress
MOST_WISH = 255


class BadHyper(ValueError):
    """These numbers are no hyperparameters of this optimizer. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a number may be: a bool, or `count` finite floats in [low, high). `fixed`: it shapes the state."""

    count: int = 1
    low: float = 0.0
    high: float = math.inf
    boolean: bool = False
    fixed: bool = False

    def read(self, name: str, value: object) -> Number:
        if self.boolean:
            if not isinstance(value, bool):
                raise BadHyper(f"{name} is {value!r}, not true or false")
            return value
        if self.count == 1:
            return self._float(name, value)
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise BadHyper(f"{name} is {value!r}, not two numbers")
        return self._float(name, value[0]), self._float(name, value[1])

    def _float(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadHyper(f"{name} is {value!r}, not a number")
        number = float(value)
        if not math.isfinite(number) or not self.low <= number < self.high:
            raise BadHyper(f"{name} is {number!r}, outside [{self.low:g}, {self.high:g})")
        return number


_FLAG = Rule(boolean=True)
_SHAPE = Rule(boolean=True, fixed=True)
RULES: dict[str, Rule] = {
    "lr": Rule(),
    "momentum": Rule(),
    "dampening": Rule(low=-math.inf),
    "weight_decay": Rule(),
    "nesterov": _FLAG,
    "maximize": _FLAG,
    "betas": Rule(count=2, high=1.0),
    "eps": Rule(),
    "amsgrad": _SHAPE,
    "decoupled_weight_decay": _SHAPE,
    "lr_decay": Rule(),
    "initial_accumulator_value": Rule(fixed=True),
    "alpha": Rule(),
    "centered": _SHAPE,
}
_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adagrad": ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", "maximize"),
    "RMSprop": ("lr", "momentum", "alpha", "eps", "centered", "weight_decay", "maximize"),
}


def _read(names: Sequence[str], numbers: object, where: str) -> Hyper:
    if not isinstance(numbers, Mapping):
        raise BadHyper(f"{where} is not a map of numbers")
    if numbers.keys() != set(names):
        raise BadHyper(f"{where} does not have exactly these numbers: {', '.join(names)}")
    return {key: RULES[key].read(f"{key} of {where}", numbers[key]) for key in names}


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """Which optimizer, and per parameter group the numbers that shape its state. Building one checks them.

    The other numbers are not in it: they come with every step, and two workers whose learning rates differ at
    the start (one came late, say) still speak of the same optimizer.
    """

    name: str
    fixed: tuple[Hyper, ...]

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise BadHyper(f"there is no optimizer {self.name[:40]!r} here, only {', '.join(OPTIMIZERS)}")
        if not 1 <= len(self.fixed) <= MOST_GROUPS:
            raise BadHyper(f"{len(self.fixed)} parameter groups, not 1 to {MOST_GROUPS}")
        names = [key for key in OPTIMIZERS[self.name] if RULES[key].fixed]
        fixed = tuple(_read(names, group, f"group {i}") for i, group in enumerate(self.fixed))
        object.__setattr__(self, "fixed", fixed)

    @staticmethod
    def of(optimizer: Any) -> "OptimizerSpec":
        """The spec of a torch optimizer whose class is one of OPTIMIZERS."""
        fixed = [{key: group[key] for key in group if RULES[key].fixed} for group in hyper_of(optimizer)]
        return OptimizerSpec(type(optimizer).__name__, tuple(fixed))

    def accept(self, hypers: Sequence[object]) -> list[Hyper]:
        """The numbers for one step, one map per group, checked. Raises BadHyper if they do not fit."""
        if len(hypers) != len(self.fixed):
            raise BadHyper(f"numbers for {len(hypers)} groups, not {len(self.fixed)}")
        names = OPTIMIZERS[self.name]
        read = [_read(names, hyper, f"group {i}") for i, hyper in enumerate(hypers)]
        for index, (new, fixed) in enumerate(zip(read, self.fixed, strict=True)):
            for key, value in fixed.items():
                if new[key] != value:
                    raise BadHyper(f"{key} of group {index} was {value!r} and cannot become {new[key]!r}")
        return read


def hyper_of(optimizer: Any) -> list[Hyper]:
    """The numbers of each param_group of a torch optimizer, as they are now; a tensor becomes its float."""
    name = type(optimizer).__name__
    return [{key: _plain(name, group, key) for key in OPTIMIZERS[name]} for group in optimizer.param_groups]


def _plain(optimizer: str, group: Mapping[str, Any], key: str) -> Number:
    if key == "decoupled_weight_decay":  # not in the groups of older torch
        return bool(group.get(key, optimizer == "AdamW"))
    rule, value = RULES[key], group[key]
    if rule.boolean:
        return bool(value)
    if rule.count == 2:
        return float(value[0]), float(value[1])
    return float(value)


def write_hyper(hypers: Sequence[Hyper], wish: int = NO_WISH) -> bytes:
    """The numbers of all groups as msgpack, the payload of a `messages.Commit`, and behind them what the worker would
    compress with, if it has a wish: it is kept and handed on wherever the numbers of a step are."""
    packed: bytes = msgpack.packb([*hypers, wish] if wish != NO_WISH else list(hypers))
    return packed


def scaled(hypers: list[Hyper], factor: float) -> list[Hyper]:
    """The same numbers with another learning rate; with a factor of 1, the very same."""
    if factor == 1.0:
        return hypers
    return [{**hyper, "lr": factor * _float(hyper["lr"])} for hyper in hypers]


def _float(value: Number) -> float:
    assert isinstance(value, float)
    return value


def read_hyper(data: bytes | memoryview, spec: OptimizerSpec) -> list[Hyper]:
    """The numbers that a peer sent for one step, checked against the optimizer. Raises BadHyper."""
    return spec.accept(_read_step(data)[0])


def read_wish(data: bytes | memoryview) -> int:
    """What the worker of this step would compress with; NO_WISH where it does not say. Raises BadHyper."""
    return _read_step(data)[1]


def _read_step(data: bytes | memoryview) -> tuple[list[Any], int]:
    if len(data) > MOST_BYTES:
        raise BadHyper(f"{len(data)} bytes of numbers, more than {MOST_BYTES}")
    try:
        hypers = unpack(data, array=MOST_GROUPS + 1, text=64)
    except ValueError as bad:
        raise BadHyper(f"the numbers cannot be read: {bad}") from bad
    if not isinstance(hypers, list):
        raise BadHyper("the numbers are not a list of groups")
    if not hypers or isinstance(hypers[-1], bool) or not isinstance(hypers[-1], int):
        return hypers, NO_WISH
    *hypers, wish = hypers
    if not 0 <= wish <= MOST_WISH:
        raise BadHyper(f"the wish {wish} is outside [0, {MOST_WISH}]")
    return hypers, wish


def unpack(data: bytes | memoryview, *, array: int, text: int) -> Any:
    """What msgpack says these bytes are, within limits; ValueError and nothing else if they are not."""
    try:
        return msgpack.unpackb(
            data, max_array_len=array, max_map_len=64, max_str_len=text, max_bin_len=0, max_ext_len=0
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"no msgpack within limits ({type(error).__name__})") from error
