"""Kernels beside the codec's own that call some of them: compiled once on a machine, when their module is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.extending import intrinsic

from . import kernels

_numba: Any = numba
types: Any = numba.core.types
carray: Any = _numba.carray


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """For arguments of these types; without the interpreter lock. It returns nothing."""

    def compile(function: Callable[..., Any]) -> Any:
        # In the cache of the kernels it calls: numba does not see by itself that one of those has changed.
        folder = kernels._folder(numba.__version__)
        before, _numba.config.CACHE_DIR = _numba.config.CACHE_DIR, str(folder)
        try:
            return _numba.njit(types.void(*signature), nogil=True, cache=True)(function)
        finally:
            _numba.config.CACHE_DIR = before

    return compile


def inline(function: Callable[..., Any]) -> Any:
    """Code that kernels contain: written in the compiler's own language."""
    return intrinsic(function)


def _pointer_to(kind: Any) -> Any:
    def pointer(_typing: Any, _address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return inline(pointer)


# In kernels: a pointer to what lies at an address.
floats, octets = _pointer_to(types.float32), _pointer_to(types.uint8)
