"""The state of an optimizer that runs in the script, as named tensors and JSON, and back.

Tensors are called PARAMETER/KEY: `0.weight/exp_avg`. Names and not indices, because which index a parameter has is a
matter of how the script has sorted them into groups. What the groups say is not in here: `schedules` has it.

Rule: a state is taken back only by the same kind of optimizer, for a parameter of the same name, shape and dtype, and
whole: torch makes a parameter's state where there is none, and breaks where half of it is missing. Everything else is
left out and named. What waits in a worker's residual is no part of it: that is in units of this
worker's own updates, and leaves with it or is lost with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint.folder import ABOUT, TENSORS
from .schedules import Told, plain

FORMAT = 1
MOST_ABOUT = 64 << 20  # bytes of the JSON
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Described(msgspec.Struct, forbid_unknown_fields=True):
    """A parameter with a state: what it is, and of its state what is no tensor."""

    shape: list[int]
    dtype: str
    tensors: list[str]
    plain: dict[str, Any] = {}


class About(msgspec.Struct, forbid_unknown_fields=True):
    """worker.json. `told` is what the schedules said at the same moment."""

    optimizer: str
    parameters: dict[str, Described]
    told: Told
    format: int = FORMAT


class BadState(ValueError):
    """These bytes are no such state. The text says why, and begins in mid-sentence."""


def kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def copy_state(
    optimizer: Optimizer, named: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Described], list[str]]:
    """Copies on the CPU of all tensors, what else there is, and the names of what cannot be kept."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Described] = {}
    left_out: list[str] = []
    for name, parameter in named.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        own = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        odd = [key for key, value in own.items() if not _plain_tensor(value) or not isinstance(key, str)]
        rest = plain({key: value for key, value in state.items() if key not in own}, name, odd)
        if odd:
            left_out.append(f"{name}, for its {odd[0]}")
            continue
        for key, value in sorted(own.items()):
            tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
        described[name] = Described(list(parameter.shape), _dtype(parameter), sorted(own), rest)
    held = {id(parameter) for parameter in named.values()}
    left_out += [
        str(key)[:60] if isinstance(key, str) else f"that of a {type(key).__name__}"
        for key in optimizer.state
        if id(key) not in held
    ]
    return tensors, described, left_out


def _plain_tensor(tensor: Tensor) -> bool:
    return tensor.dtype in DTYPES and tensor.layout is torch.strided


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def files(tensors: Mapping[str, Tensor], about: About) -> dict[str, list[memoryview]]:
    """The two files, each as pieces of memory one after another; tensors, contiguous on the CPU, are not copied."""
    said = json.dumps(msgspec.to_builtins(about), allow_nan=False, separators=(",", ":")).encode()
    entries, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    data = [
        tensor.view(-1).view(torch.uint8).numpy().data.cast("B")
        for tensor in tensors.values()
        if tensor.numel()
    ]
    return {
        TENSORS: [memoryview(len(head).to_bytes(8, "little") + head), *data],
        ABOUT: [memoryview(said + b"\n")],
    }


def read_about(data: bytes) -> About:
    """Raises BadState."""
    if len(data) > MOST_ABOUT:
        raise BadState(f"has {len(data)} bytes, more than {MOST_ABOUT}")
    try:
        about = msgspec.json.decode(data, type=About)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadState(f"cannot be read: {error}") from None
    if about.format != FORMAT:
        raise BadState(f"is of format {about.format}; this is zml's format {FORMAT}")
    return about


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Raises BadState."""
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BadState(f"cannot be read: {error}") from None


def restore_optimizer(
    optimizer: Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor], about: About
) -> list[str]:
    """Let the optimizer go on from this state, to the bit; its groups stay as they are.

    Returns what was left out. Parameters of which nothing is known keep what they have.
    """
    if about.optimizer != kind(optimizer):
        return [f"all of it: it is {about.optimizer}'s, and the script has {kind(optimizer)}"]
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    left_out = [name for name in by_name if name not in about.parameters]
    # torch's own way back: it knows which numbers belong onto which device. It counts parameters over all groups.
    whole = optimizer.state_dict()
    indices = {
        id(parameter): index
        for group, said in zip(optimizer.param_groups, whole["param_groups"], strict=True)
        for parameter, index in zip(group["params"], said["params"], strict=True)
    }
    taken: dict[str, dict[str, Tensor]] = {}
    for name, described in about.parameters.items():
        parameter = named.get(name)
        index = indices.get(id(parameter))
        if parameter is None or index is None:
            left_out.append(name)
            continue
        if (described.shape, described.dtype) != (list(parameter.shape), _dtype(parameter)):
            now = f"{_dtype(parameter)}{list(parameter.shape)}"
            left_out.append(f"{name}, which was {described.dtype}{described.shape} and is {now}")
            continue
        mine = whole["state"].get(index, {})
        came = by_name.get(name, {})
        fitted = {key: _fit(parameter, tensor, mine.get(key)) for key, tensor in came.items()}
        odd = [
            key
            for key in {*described.tensors, *came}
            if fitted.get(key) is None or key not in described.tensors
        ]
        if odd:
            left_out.append(f"{name}, for its {min(odd)}")
            continue
        taken[name] = {key: tensor for key, tensor in fitted.items() if tensor is not None}
        whole["state"][index] = taken[name] | described.plain
    optimizer.load_state_dict(whole)
    for name, state in taken.items():  # torch brings all of it to the parameter's dtype
        now = optimizer.state[named[name]]
        for key, value in state.items():
            if value.dtype != now[key].dtype:
                now[key] = value.to(now[key].device)
    return left_out


def _fit(parameter: Tensor, tensor: Tensor, mine: Any) -> Tensor | None:
    """The tensor in the parameter's own order in memory, as kernels over both expect it; None if it does not fit."""
    if isinstance(mine, Tensor) and (mine.shape, mine.dtype) != (tensor.shape, tensor.dtype):
        return None
    if tensor.shape == parameter.shape and tensor.numel() > 1:
        return torch.empty_like(parameter, dtype=tensor.dtype, device="cpu", requires_grad=False).copy_(
            tensor
        )
    if tensor.numel() > 1 and tensor.numel() >= math.prod(parameter.shape):
        return None
    return tensor
