"""The update of one chunk: torch's own optimizer on views of it.

Equality with torch is by construction: the same class runs the same element-wise kernels, and those give the
same bits wherever a tensor is cut. While all segments of a chunk get a gradient in every step their histories
are equal, and one tensor stands for all of them; from the first step in which some have none, as torch skips
a parameter whose gradient is None, each segment is a tensor of its own.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..hyper import BadHyper, Hyper, OptimizerSpec, hyper_of, read_hyper, write_hyper
from ..layout import Chunk, Segment

__all__ = [
    "BadHyper",
    "Hyper",
    "OptimizerSpec",
    "UpdateRule",
    "adds",
    "fused_state",
    "hyper_of",
    "read_hyper",
    "write_hyper",
]

STEP = "step"  # the one number in torch's optimizer states that is not per element
COLUMN = {"momentum_buffer": 3, "exp_avg": 3, "exp_avg_sq": 4, STEP: 5}  # of a row of `fused`
STEPPED = "stepped"  # ours, beside torch's: which segments have a state at all


def fused_state(optimizer: str, hyper: Hyper) -> tuple[str, ...] | None:
    """What torch calls the state that `fused` needs for this update; None where only torch can make it."""
    if optimizer == "SGD":
        return ("momentum_buffer",) if hyper["momentum"] else ()
    if optimizer in ("Adam", "AdamW") and not hyper["amsgrad"]:
        return ("exp_avg", "exp_avg_sq", STEP)
    return None


def adds(optimizer: str, hyper: Hyper) -> bool:
    """Is this update a plain addition? Then w changes only where a gradient is not zero."""
    return optimizer == "SGD" and not hyper["momentum"] and not hyper["weight_decay"]


class UpdateRule:
    """One chunk's optimizer. It changes `w`, float32 of the chunk's size, in place, and owns the state.

    A step is torch's own, or one of `fused` on the same tensors; the two may take turns.
    """

    def __init__(self, spec: OptimizerSpec, chunk: Chunk, w: Tensor) -> None:
        self.spec = spec
        self.chunk = chunk
        self._w = w
        self._hyper: Hyper | None = None  # what the optimizer's group holds now
        self._parameters = [w]
        self._spans: tuple[tuple[str, ...], frozenset[int], NDArray[np.int64]] | None = None  # the last ones
        self._optimizer = self._make()
        # torch wraps `step` for its profiler, hooks and compiler: 12 us a call, a third of SGD's time for a chunk.
        self._run = inspect.unwrap(type(self._optimizer).step)

    def step(self, gradient: Tensor, hyper: Hyper, absent: Collection[int] = ()) -> None:
        """One step; the gradient is only read. Parameters in `absent` are skipped, as torch skips them."""
        self._split_for(absent)
        if hyper is not self._hyper:
            self._optimizer.param_groups[0].update(hyper)
            self._hyper = hyper
            if self.spec.name == "RMSprop" and hyper["momentum"]:
                self._give_momentum()
        if len(self._parameters) == 1:
            self._parameters[0].grad = gradient
        else:
            for segment, parameter in zip(self.chunk.segments, self._parameters, strict=True):
                parameter.grad = None if segment.parameter in absent else _part(gradient, segment)
        with torch.no_grad():
            self._run(self._optimizer)
        for parameter in self._parameters:
            parameter.grad = None  # it may be memory of a message, which must not outlive the step

    def spans(self, hyper: Hyper, absent: frozenset[int] = frozenset()) -> NDArray[np.int64] | None:
        """Where `fused` finds w and the state of all but the absent parameters: its rows, good for one step.

        None where torch has to make this step: with its first one it makes the state.
        """
        names = fused_state(self.spec.name, hyper)
        if names is None:
            return None
        self._split_for(absent)
        if self._spans is None or self._spans[:2] != (names, absent):
            rows = self._rows(names, absent)
            if rows is None:
                return None
            self._spans = (names, absent, np.array(rows, dtype=np.int64))
        return self._spans[2]

    def _rows(self, names: tuple[str, ...], absent: Collection[int]) -> list[list[int]] | None:
        rows: list[list[int]] = []
        whole = len(self._parameters) == 1
        for segment, parameter in zip(self.chunk.segments, self._parameters, strict=not whole):
            if not whole and segment.parameter in absent:
                continue
            row = [0 if whole else segment.offset, parameter.numel(), parameter.data_ptr(), 0, 0, 0]
            state = self._optimizer.state.get(parameter, {})
            for name in names:
                tensor = state.get(name)
                if not isinstance(tensor, Tensor):
                    return None
                assert tensor.dtype == torch.float32 and tensor.is_contiguous()
                assert tensor.numel() == (1 if name == STEP else parameter.numel())
                row[COLUMN[name]] = tensor.data_ptr()
            rows.append(row)
        return rows

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state in float32: per element, but `step` per segment; empty before the first step.

        `stepped` says which segments have one; the elements of the others are zeros. Tensors may be the live
        ones.
        """
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        tensors = [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in states]
        names = sorted({name for state in tensors for name in state})
        if not names:
            return {}
        segments = self.chunk.segments
        if len(tensors) == 1:
            whole = {name: value for name, value in tensors[0].items() if name != STEP}
            if STEP in tensors[0]:
                whole[STEP] = tensors[0][STEP].repeat(len(segments))
            return whole | {STEPPED: torch.ones(len(segments))}
        found = {name: torch.zeros(len(segments) if name == STEP else self.chunk.size) for name in names}
        for index, (segment, state) in enumerate(zip(segments, tensors, strict=True)):
            for name, value in state.items():
                if name == STEP:
                    found[name][index] = value
                else:
                    _part(found[name], segment).copy_(value)
        return found | {STEPPED: torch.tensor([float(bool(state)) for state in tensors])}

    def sizes(self) -> dict[str, int]:
        """How many elements `state()` has under each name, in its order."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        names = [name for name, value in states[0].items() if isinstance(value, Tensor)]
        if len(states) > 1:
            names = sorted({k for state in states for k, v in state.items() if isinstance(v, Tensor)})
        elif STEP in names:
            names = [*(name for name in names if name != STEP), STEP]
        if not names:
            return {}
        few = len(self.chunk.segments)
        return {name: few if name == STEP else self.chunk.size for name in names} | {STEPPED: few}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state()` said, to the bit; tensors are copied. ValueError if they do not fit."""
        segments = self.chunk.segments
        for name, value in state.items():
            size = len(segments) if name in (STEP, STEPPED) else self.chunk.size
            if value.dtype != torch.float32 or value.shape != (size,):
                raise ValueError(f"{name} is {value.dtype}{tuple(value.shape)}, not float32({size},)")
        if state and STEPPED not in state:
            raise ValueError(f"a state without {STEPPED}")
        self._parameters = [self._w]
        self._optimizer = self._make()
        if not state:
            return
        stepped, steps = state[STEPPED].tolist(), state[STEP].tolist() if STEP in state else [0.0]
        elements = {name: value.clone() for name, value in state.items() if name not in (STEP, STEPPED)}
        if all(stepped) and len(set(steps)) == 1:
            whole: dict[str, Tensor] = dict(elements)
            if STEP in state:
                whole[STEP] = state[STEP][0].clone()
            self._optimizer.state[self._w] = whole
            return
        self._split()
        for index, (segment, parameter) in enumerate(zip(segments, self._parameters, strict=True)):
            if stepped[index]:
                own = {name: _part(value, segment) for name, value in elements.items()}
                if STEP in state:
                    own[STEP] = state[STEP][index].clone()
                self._optimizer.state[parameter] = own

    def _make(self) -> torch.optim.Optimizer:
        # foreach=False: 10 % faster for one chunk in one thread, and torch's own choice on a CPU.
        # The other numbers come with the steps; those that are fixed shape the state.
        fixed = {k: v for k, v in self.spec.fixed[self.chunk.group].items() if k != "decoupled_weight_decay"}
        optimizer = _kind(self.spec.name)(self._parameters, lr=0.0, foreach=False, **fixed)
        self._hyper = None
        self._spans = None  # of tensors that may be gone
        return optimizer

    def _give_momentum(self) -> None:
        # torch makes this buffer with the first step or never, and breaks if momentum is turned on later.
        for parameter in self._parameters:
            state = self._optimizer.state.get(parameter)
            if state and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)

    def _split_for(self, absent: Collection[int]) -> None:
        if absent and len(self._parameters) < len(self.chunk.segments):
            if any(segment.parameter in absent for segment in self.chunk.segments):
                self._split()

    def _split(self) -> None:
        """Let every segment have a history of its own, which begins as the common one."""
        common = self._optimizer.state.get(self._w, {})
        self._parameters = [_part(self._w, segment) for segment in self.chunk.segments]
        self._optimizer = self._make()
        for segment, parameter in zip(self.chunk.segments, self._parameters, strict=True):
            for name, value in common.items():
                own = value
                if isinstance(value, Tensor):
                    own = value.clone() if name == STEP else _part(value, segment)
                self._optimizer.state[parameter][name] = own


@cache
def _kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    """torch's optimizer without the wrappers of its methods. The first call of one imports torch's compiler: seconds of
    a shard's start, and of each return of one that was killed, in which it answers nobody."""
    methods = inspect.getmembers(torch.optim.Optimizer, lambda member: hasattr(member, "__wrapped__"))
    bare = {each: inspect.unwrap(method) for each, method in methods}
    kind: Callable[..., torch.optim.Optimizer] = type(name, (getattr(torch.optim, name),), bare)
    return kind


def _part(values: Tensor, segment: Segment) -> Tensor:
    return values[segment.offset : segment.offset + segment.size]
