"""layout.json: a layout's registration in a form that people read, there and back without loss."""

import json
from typing import Any

import msgspec

from ..hyper import BadHyper, Hyper, OptimizerSpec
from ..layout import BadLayout, Layout, Registration

MOST_BYTES = 64 << 20


class _Optimizer(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    groups: list[Hyper]  # the numbers that shape the state; the others come with every step


class _Parameter(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    group: int  # the frozen ones are in the group after the optimizer's last


class _Description(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    chunk_elements: int
    bucket_chunks: int
    optimizer: _Optimizer
    parameters: list[_Parameter]


def describe(registration: Registration) -> bytes:
    layout = registration.layout
    said: dict[str, Any] = {
        "format": 1,
        "chunk_elements": layout.chunk_elements,
        "bucket_chunks": registration.bucket_chunks,
        "optimizer": {"name": registration.optimizer.name, "groups": list(registration.optimizer.fixed)},
    }
    # One line per parameter: that is what people look for and what `diff` shows.
    lines = [json.dumps({"name": p.name, "shape": p.shape, "group": p.group}) for p in layout.parameters]
    head = json.dumps(said, indent=2).removesuffix("\n}")
    return (head + ',\n  "parameters": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n").encode()


def understand(data: bytes) -> Registration:
    """Raises BadLayout, before anything of the model's size is allocated."""
    if len(data) > MOST_BYTES:
        raise BadLayout(f"{len(data)} bytes, more than {MOST_BYTES}")
    try:
        said = msgspec.json.decode(data, type=_Description)
        optimizer = OptimizerSpec(said.optimizer.name, tuple(said.optimizer.groups))
    except (msgspec.MsgspecError, BadHyper, ValueError, RecursionError) as error:
        raise BadLayout(f"the description cannot be read: {error}") from None
    if said.format != 1:
        raise BadLayout(f"the description is of format {said.format}; this is zml's format 1")
    if not 1 <= said.bucket_chunks <= 1_024:
        raise BadLayout(f"buckets of {said.bucket_chunks} chunks")
    described = [(p.name, p.shape, p.group) for p in said.parameters]
    layout = Layout.build(described, len(said.optimizer.groups), said.chunk_elements)
    return Registration(layout, optimizer, said.bucket_chunks)
