"""What a data set's `state_dict` says, as text and back: JSON, in which what JSON has no word for is spelt out.

Plain values, lists, tuples, maps with any plain keys, bytes, tensors, arrays and numpy's numbers. Nothing else: no code
travels, and none is run by reading.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import torch

MOST_BYTES = 64 << 10  # of one state
MOST_DEPTH = 24
WORD = "zml"  # the only key of what is spelt out, with a list: what it is, and its parts

_KINDS = "biuf"  # of numpy: truths, integers, numbers


class NotPlain(ValueError):
    """A state that cannot be told. The text says what is in it."""


def write(state: Any) -> bytes:
    """Raises NotPlain."""
    try:
        said = json.dumps(_spell(state, 0), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise NotPlain(str(error)) from None
    if len(said) > MOST_BYTES:
        raise NotPlain(f"it takes {len(said):,} bytes, and {MOST_BYTES:,} are kept")
    return said


def read(data: bytes) -> Any:
    """What `write` was given. Raises NotPlain."""
    if len(data) > MOST_BYTES:
        raise NotPlain(f"{len(data):,} bytes, more than {MOST_BYTES:,}")
    try:
        return _understand(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotPlain(f"it cannot be read: {error}") from None


def _spell(value: Any, depth: int) -> Any:
    if depth > MOST_DEPTH:
        raise NotPlain(f"it is nested more than {MOST_DEPTH} deep")
    if isinstance(value, np.generic):
        value = value.item()
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {WORD: ["float", repr(value)]}
        case list():
            return [_spell(each, depth + 1) for each in value]
        case tuple():
            return {WORD: ["tuple", *(_spell(each, depth + 1) for each in value)]}
        case dict() if all(type(key) is str for key in value) and WORD not in value:
            return {key: _spell(each, depth + 1) for key, each in value.items()}
        case dict():
            pairs = [[_spell(key, depth + 1), _spell(each, depth + 1)] for key, each in value.items()]
            return {WORD: ["map", *pairs]}
        case bytes():
            return {WORD: ["bytes", _text(value)]}
        case torch.Tensor():
            held = value.detach().cpu()
            return {
                WORD: [
                    "tensor",
                    *_array(held.float().numpy() if held.dtype is torch.bfloat16 else held.numpy()),
                ]
            }
        case np.ndarray():
            return {WORD: ["array", *_array(value)]}
    raise NotPlain(f"a {type(value).__name__} is in it")


def _understand(said: Any) -> Any:
    if isinstance(said, list):
        return [_understand(each) for each in said]
    if not isinstance(said, dict):
        return said
    if set(said) != {WORD}:
        return {key: _understand(each) for key, each in said.items()}
    match said[WORD]:
        case ["float", str(text)]:
            return float(text)
        case ["tuple", *parts]:
            return tuple(_understand(each) for each in parts)
        case ["map", *pairs]:
            return {_understand(key): _understand(each) for key, each in pairs}
        case ["bytes", str(text)]:
            return base64.b64decode(text, validate=True)
        case ["array", *what]:
            return _from_text(*what)
        case ["tensor", *what]:
            return torch.from_numpy(_from_text(*what))
    raise NotPlain(f"something spelt out as {str(said[WORD])[:60]}")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _array(array: Any) -> tuple[str, list[int], str]:
    if array.dtype.kind not in _KINDS:
        raise NotPlain(f"an array of {array.dtype} is in it")
    return array.dtype.str, list(array.shape), _text(np.ascontiguousarray(array).tobytes())


def _from_text(kind: str, shape: list[int], text: str) -> Any:
    dtype = np.dtype(kind)
    if dtype.kind not in _KINDS:
        raise NotPlain(f"an array of {dtype}")
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).reshape(shape).copy()
