"""What a data set's `state_dict` says, as text and back: JSON, in which what JSON has no word for is spelt out.

Plain values, lists, tuples, maps with any plain keys, bytes, tensors, arrays and numpy's numbers; of exactly these
types, for a state must come back as what it was. No code travels, and none is run by reading.
"""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

import numpy as np
import torch

from ..messages import MOST_STATE

MOST_DEPTH = 24
WORD = "zml"  # the only key of what is spelt out, with a list: what it is, and its parts

_DTYPE = re.compile(r"[<>|=]?[biuf]\d{1,2}")  # of numpy: truths, integers, numbers


class NotPlain(ValueError):
    """A state that cannot be told. The text says what is in it."""


def write(state: Any) -> bytes:
    """Raises NotPlain, before anything large is made."""
    try:
        said = json.dumps(_Speller().spell(state, 0), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise NotPlain(str(error)) from None
    if len(said) > MOST_STATE:
        raise NotPlain(f"it takes {len(said):,} bytes, and {MOST_STATE:,} can be kept")
    return said


def read(data: bytes) -> Any:
    """What `write` was given. Raises NotPlain."""
    if len(data) > MOST_STATE:
        raise NotPlain(f"{len(data):,} bytes, more than {MOST_STATE:,}")
    try:
        return _understand(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotPlain(f"it cannot be read: {error}") from None


class _Speller:
    """Of one state. Each value takes a byte at least: what cannot fit is seen before it is spelt."""

    def __init__(self) -> None:
        self.left = MOST_STATE

    def spell(self, value: Any, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise NotPlain(f"it is nested more than {MOST_DEPTH} deep")
        if isinstance(value, np.generic):
            value = value.item()
        kind = type(value)
        self._take(1)
        if value is None or kind in (bool, int):
            return value
        if kind is float:
            return value if math.isfinite(value) else {WORD: ["float", repr(value)]}
        if kind is str:
            self._take(len(value))
            return value
        if kind is list:
            return [self.spell(each, depth + 1) for each in value]
        if kind is tuple:
            return {WORD: ["tuple", *(self.spell(each, depth + 1) for each in value)]}
        if kind is dict and all(type(key) is str for key in value) and WORD not in value:
            return {key: self.spell(each, depth + 1) for key, each in value.items()}
        if kind is dict:
            pairs = [[self.spell(key, depth + 1), self.spell(each, depth + 1)] for key, each in value.items()]
            return {WORD: ["map", *pairs]}
        if kind is bytes:
            self._take(len(value))
            return {WORD: ["bytes", _text(value)]}
        if kind is torch.Tensor and value.layout is torch.strided:
            self._take(value.nbytes)
            held = value.detach().cpu()
            if held.dtype is torch.bfloat16:  # of which numpy knows nothing
                return {WORD: ["bfloat16", *_array(held.view(torch.int16).numpy())]}
            return {WORD: ["tensor", *_array(held.numpy())]}
        if kind is np.ndarray:
            self._take(value.nbytes)
            return {WORD: ["array", *_array(value)]}
        raise NotPlain(f"a {kind.__name__} is in it")

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise NotPlain(f"it takes more than the {MOST_STATE:,} bytes that can be kept")


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
        case ["bfloat16", *what]:
            return torch.from_numpy(_from_text(*what)).view(torch.bfloat16)
    raise NotPlain(f"something spelt out as {str(said[WORD])[:60]}")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _array(array: Any) -> tuple[str, list[int], str]:
    if not _DTYPE.fullmatch(array.dtype.str):
        raise NotPlain(f"an array of {array.dtype} is in it")
    return array.dtype.str, list(array.shape), _text(np.ascontiguousarray(array).tobytes())


def _from_text(kind: str, shape: list[int], text: str) -> Any:
    if not _DTYPE.fullmatch(kind):
        raise NotPlain(f"an array of {kind[:20]}")
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind).reshape(shape).copy()
