"""A model held against its layout: what may be trained, and the copies between its tensors and chunks.

Chunks are float32 on the CPU; a parameter may have any float dtype, device and strides. Tensors are looked up
at every copy, not kept, because `model.to()` and `p.data = ...` exchange what lies under a parameter.
"""

import ctypes
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..codec.runs import Run
from ..errors import EMPTY_MODEL, FOREIGN, NOT_HELD, OPTIMIZER, STEPPED, TENSOR, WRAPPED, ZmlError
from ..hyper import OPTIMIZERS
from ..layout import Layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}
COMPILED = "_orig_mod."  # what torch.compile puts before every name

_memcmp = ctypes.CDLL(None).memcmp  # a third of the time of torch.equal, and it tells 0 from -0
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """In the order of the model, tied weights once, under the names they had before torch.compile."""
    return {name.replace(COMPILED, ""): parameter for name, parameter in model.named_parameters()}


def describe(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, any_optimizer: bool = False
) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, group) of each parameter, the frozen in one group more. Raises ZmlError."""
    _check_model(model)
    if not any_optimizer:
        _check_optimizer(optimizer)
    frozen = len(optimizer.param_groups)
    held = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    described = []
    for name, parameter in named_parameters(model).items():
        _check_tensor(name, parameter)
        group = held.pop(id(parameter), None)
        if parameter.requires_grad and group is None:
            raise ZmlError(
                NOT_HELD,
                f"{name} has requires_grad, but no group of the optimizer holds it",
                f"Add it to the optimizer, or call requires_grad_(False) on {name} before zml.join, which takes one "
                "optimizer: what a second one would hold goes into a param group of the first.",
            )
        described.append(
            (name, tuple(parameter.shape), group if parameter.requires_grad and group is not None else frozen)
        )
    if held:
        group = min(held.values())
        shapes = [tuple(p.shape) for p in optimizer.param_groups[group]["params"] if id(p) in held]
        raise ZmlError(
            FOREIGN,
            f"group {group} of the optimizer holds a parameter of shape {shapes[0]} that is not in the model",
            "Make the optimizer from model.parameters(), after the last change of the model.",
        )
    if not any(parameter.numel() for parameter in model.parameters()):
        raise ZmlError(EMPTY_MODEL, f"{type(model).__name__} has no parameters")
    return described


def _check_model(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if wrapper := kinds & WRAPPERS:
            what = "the model" if not name else f"{name} in the model"
            raise ZmlError(
                WRAPPED,
                f"{what} is wrapped in {min(wrapper)}",
                "Give zml.join the module itself, without the wrapper.",
            )
        if getattr(module, "sparse", False) is True and kinds & {"Embedding", "EmbeddingBag"}:
            raise ZmlError(TENSOR, f"{name} makes sparse gradients", f"Make {name} with sparse=False.")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    if kind is not getattr(torch.optim, kind.__name__, None) or kind.__name__ not in OPTIMIZERS:
        raise ZmlError(
            OPTIMIZER,
            f"{kind.__module__}.{kind.__qualname__} cannot run on the shards",
            f"Use one of torch.optim's own: {', '.join(OPTIMIZERS)}.",
        )
    if any(_has_stepped(state) for state in optimizer.state.values()):
        raise ZmlError(
            STEPPED,
            "the optimizer has already made steps",
            "Call zml.join before the first step and before load_state_dict.",
        )


def _has_stepped(state: Mapping[str, Any]) -> bool:
    # Adagrad makes its state with the optimizer, at step 0; SGD keeps no count, only a momentum buffer.
    if "step" in state:
        return float(state["step"]) > 0
    return any(isinstance(value, Tensor) for value in state.values())


def _check_tensor(name: str, parameter: Tensor) -> None:
    if torch.nn.parameter.is_lazy(parameter):
        raise ZmlError(
            TENSOR, f"{name} has no shape yet", "Run the model once on an example before zml.join."
        )
    if parameter.is_meta:
        raise ZmlError(
            TENSOR,
            f"{name} is on the meta device and has no values",
            "Call model.to_empty() and initialise it.",
        )
    if type(parameter).__name__ == "DTensor":
        raise ZmlError(
            TENSOR, f"{name} is a sharded DTensor", "Give zml.join the module before it is sharded."
        )
    if parameter.layout is not torch.strided:
        raise ZmlError(TENSOR, f"{name} is stored as {parameter.layout}", f"Make {name} dense.")
    if parameter.dtype not in FLOATS:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
        raise ZmlError(
            TENSOR, f"{name} is {parameter.dtype}", f"Make it one of {kinds}, or register it as a buffer."
        )


class Binding:
    """The tensors of a model in the places of a layout. `parameters[i]` is `layout.parameters[i]`."""

    def __init__(self, layout: Layout, model: torch.nn.Module) -> None:
        """Raises ValueError if the model does not have exactly the parameters of the layout."""
        named = named_parameters(model)
        described = {parameter.name: parameter.shape for parameter in layout.parameters}
        if described != {name: tuple(parameter.shape) for name, parameter in named.items()}:
            raise ValueError("the model does not have the parameters of this layout")
        self.layout = layout
        self.parameters = [named[parameter.name] for parameter in layout.parameters]

    def bytes_of(self, chunks: Iterable[int]) -> int:
        """What the parameters that lie in these chunks take, in the types that they have."""
        segments = (segment for chunk in chunks for segment in self.layout.chunks[chunk].segments)
        return sum(each.size * self.parameters[each.parameter].element_size() for each in segments)

    def exact(self, parameters: Iterable[int]) -> bool:
        """Does the model hold these as chunks do, in float32 on the CPU?"""
        tensors = map(self.parameters.__getitem__, parameters)
        return all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)

    def read(self, chunk: int, into: Tensor) -> None:
        """Copy the parameters of one chunk into `into`, float32 of the chunk's size."""
        for segment in self.layout.chunks[chunk].segments:
            flat = into[segment.offset : segment.offset + segment.size]
            self._read(segment.parameter, segment.start, flat)

    def read_runs(self, runs: Iterable[Run], into: Tensor) -> None:
        """The same for a whole bucket, into its memory."""
        for run in runs:
            self._read(run.parameter, run.start, into[run.at : run.at + run.size])

    def _read(self, parameter: int, start: int, into: Tensor) -> None:
        for part, at in pieces(self.parameters[parameter].detach(), start, len(into)):
            into[at : at + part.numel()].view(part.shape).copy_(part)

    def write(self, chunk: int, values: Tensor, less: Tensor | None = None) -> None:
        """Set the parameters that one chunk holds to `values - less`, float32, rounding to their dtype."""
        for segment in self.layout.chunks[chunk].segments:
            place = slice(segment.offset, segment.offset + segment.size)
            rest = None if less is None else less[place]
            self._write(segment.parameter, segment.start, values[place], rest)

    def write_runs(self, runs: Iterable[Run], values: Tensor, less: Tensor) -> None:
        """The same for a whole bucket, from its memory."""
        for run in runs:
            place = slice(run.at, run.at + run.size)
            self._write(run.parameter, run.start, values[place], less[place])

    def _write(self, parameter: int, start: int, values: Tensor, less: Tensor | None) -> None:
        for part, at in pieces(self.parameters[parameter].detach(), start, len(values)):
            whole = values[at : at + part.numel()].view(part.shape)
            if less is None:
                part.copy_(whole)
                continue
            lacks = less[at : at + part.numel()].view(part.shape)
            if part.dtype == torch.float32 and part.device == lacks.device == whole.device:
                torch.sub(whole, lacks, out=part)
            else:
                part.copy_(whole.to(lacks.device) - lacks)

    def difference(self, chunk: int, before: Tensor, into: Tensor) -> None:
        """Set `into` to what was in the parameters before, less what is in them now.

        `before` is the chunk in float32 as it was written into them: rounded to their dtype, as `write` rounds.
        """
        for segment in self.layout.chunks[chunk].segments:
            place = slice(segment.offset, segment.offset + segment.size)
            old, flat = before[place], into[place]
            for part, at in pieces(self.parameters[segment.parameter].detach(), segment.start, segment.size):
                size = part.numel()
                written = old[at : at + size].view(part.shape).to(part.device, part.dtype)
                if part.dtype == torch.float32 and part.device == flat.device:
                    torch.sub(written, part, out=flat[at : at + size].view(part.shape))
                else:
                    flat[at : at + size].view(part.shape).copy_(written.float() - part.float())

    def gather(self, parameter: int, into: Mapping[int, Tensor]) -> bool:
        """Copy a parameter's gradient into the chunks it lies in, as float32; `into` is chunk -> the chunk's
        values.

        Without a gradient its segments become zeros, and the answer is False: the parameter is absent from
        the step.
        """
        gradient = self.parameters[parameter].grad
        if gradient is None:
            for chunk, segment in self.layout.places[parameter]:
                into[chunk][segment.offset : segment.offset + segment.size].zero_()
            return False
        if gradient.layout is not torch.strided:
            name = self.layout.parameters[parameter].name
            raise ZmlError(
                TENSOR, f"the gradient of {name} is sparse", "Make the embedding with sparse=False."
            )
        gradient = gradient.detach()
        if not gradient.is_contiguous():
            gradient = gradient.contiguous()  # row-major, as a parameter is flattened
        flat = gradient.view(-1)
        for chunk, segment in self.layout.places[parameter]:
            start, size = segment.start, segment.size
            into[chunk][segment.offset : segment.offset + size].copy_(flat[start : start + size])
        return True

    def device(self, parameters: Collection[int]) -> str:
        """Where all of these live; the CPU if that is not one place."""
        devices = {str(self.parameters[parameter].device) for parameter in parameters}
        return devices.pop() if len(devices) == 1 else "cpu"

    def holds(self, parameter: int, values: Mapping[int, Tensor]) -> bool:
        """Do the chunks' values hold a parameter's gradient as it is now, to the bit? It must have one.

        Version counters do not tell: `GradScaler.unscale_` and whoever writes through `.data` leave them as they were.
        """
        gradient = self.parameters[parameter].grad
        assert gradient is not None
        where = (
            values[self.layout.places[parameter][0].chunk].device if self.layout.places[parameter] else None
        )
        if where is not None and where.type != "cpu":
            bits = gradient.detach().to(where, torch.float32).contiguous().view(-1).view(torch.int32)
            return all(
                torch.equal(
                    values[chunk][segment.offset : segment.offset + segment.size].view(torch.int32),
                    bits[segment.start : segment.start + segment.size],
                )
                for chunk, segment in self.layout.places[parameter]
            )
        flat = gradient.detach().to("cpu", torch.float32).contiguous().view(-1)
        return not any(
            _memcmp(
                values[chunk].data_ptr() + 4 * segment.offset,
                flat.data_ptr() + 4 * segment.start,
                4 * segment.size,
            )
            for chunk, segment in self.layout.places[parameter]
        )


def pieces(tensor: Tensor, start: int, size: int) -> Iterator[tuple[Tensor, int]]:
    """Views that together are the elements [start, start + size) of the tensor in row-major order.

    Each comes with its place relative to `start`. One view if the tensor is contiguous; otherwise whole rows
    of the first dimension at once, and the two ragged ends row by row.
    """
    if tensor.is_contiguous():
        yield tensor.view(-1)[start : start + size], 0
        return
    if tensor.dim() == 1:
        yield tensor[start : start + size], 0
        return
    row = tensor[0].numel()
    first, last = -(-start // row), (start + size) // row  # the rows that lie wholly inside
    if first > last:  # within one row
        yield from pieces(tensor[last], start - last * row, size)
        return
    if head := first * row - start:
        yield from pieces(tensor[first - 1], row - head, head)
    if first < last:
        yield tensor[first:last], head
    if tail := start + size - last * row:
        yield from ((part, size - tail + at) for part, at in pieces(tensor[last], 0, tail))
