"""The update of a shard's chunks in one pass over memory: the mean of the workers' gradients, then w and its state.

The rule: what torch.optim's SGD, Adam and AdamW do, element by element (their single-tensor forms), on the very
tensors that torch's optimizer object keeps, so that its own step may come next. Only the rounding differs: a few
units in the last place of the gradient and of the update. The sums of a step are consumed: zeros are left behind,
where the next step's frames are added.

A *span* is a run of elements with one history, mostly a whole chunk. One call takes any number of them, as rows of
int64: where its sums begin (elements), how many elements it has, and the addresses of its w, of its state (momentum
or exp_avg; exp_avg_sq) and of its float32 `step`; 0 where the optimizer has none. The kernels trust the rows.

Importing this module compiles the kernels, or loads them where they were compiled before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from .hyper import Hyper

AT, SIZE, W, FIRST, SECOND, STEP = range(6)
COLUMNS = 6

LINE = 16  # elements of a cache line
AHEAD = 16  # touched lines between asking memory for one and using it
SPARSE = 0.4  # of the lines touched; above, streaming all of w is faster
TINY = np.float32(np.finfo(np.float32).tiny)

Spans = NDArray[np.int64]
Sums = NDArray[np.float32]

_f = np.float32
_numba: Any = numba  # its own annotations stop where the compiler begins
_types: Any = numba.core.types


def _inline(function: Callable[..., Any]) -> Any:
    """Code that the kernels contain: written in the compiler's own language."""
    return intrinsic(function)


def _kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    # Division as numpy does it: Python's raises, and a loop that may raise does not become vectors.
    compiled: Any = _numba.njit(signature, nogil=True, cache=True, error_model="numpy")
    return lambda function: compiled(function)


# -- vectors ---------------------------------------------------------------------------------------------

_VECTOR = ir.VectorType(ir.FloatType(), LINE)
_BITS = ir.VectorType(ir.IntType(32), LINE)


@_inline
def _floats(_typing: Any, _address: Any) -> Any:
    """A pointer to float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return _types.CPointer(_types.float32)(_types.int64), code


@_inline
def _any_set(_typing: Any, _address: Any) -> Any:
    """1 if a bit of the LINE elements there is set, else 0."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.load(builder.inttoptr(arguments[0], _BITS.as_pointer()), align=4)
        mask = builder.bitcast(builder.icmp_unsigned("!=", bits, ir.Constant(_BITS, None)), ir.IntType(LINE))
        found = builder.icmp_unsigned("!=", mask, ir.Constant(ir.IntType(LINE), 0))
        return builder.zext(found, ir.IntType(64))

    return _types.int64(_types.int64), code


@_inline
def _prefetch(_typing: Any, _address: Any) -> Any:
    """Ask memory for the line that holds this address, to write there soon."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        get: Any = cgutils.get_or_insert_function
        function = get(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [builder.inttoptr(arguments[0], byte), number(1), number(3), number(1)])
        return context.get_dummy_value()

    return _types.void(_types.int64), code


@_inline
def _add_line(_typing: Any, _w: Any, _sums: Any, _factor: Any) -> Any:
    """w += factor * sums, and sums = 0, for the LINE elements at two addresses."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        w = builder.inttoptr(arguments[0], _VECTOR.as_pointer())
        sums = builder.inttoptr(arguments[1], _VECTOR.as_pointer())
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[2], ir.IntType(32)(0))
        factor = builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_BITS, None))
        product = builder.fmul(factor, builder.load(sums, align=4))
        builder.store(builder.fadd(builder.load(w, align=4), product), w, align=4)
        builder.store(ir.Constant(_VECTOR, None), sums, align=4)
        return context.get_dummy_value()

    return _types.void(_types.int64, _types.int64, _types.float32), code


# -- kernels ---------------------------------------------------------------------------------------------


@_kernel("int64(int64[:,::1],float32[::1],float32)")
def _add(spans: Any, sums: Any, factor: Any) -> Any:
    """w += factor * sums. Where few lines of w change, the others are not even read."""
    touched = np.zeros(AHEAD, dtype=np.int64)
    visited = 0
    for row in range(spans.shape[0]):
        at, size, w_at = spans[row, AT], spans[row, SIZE], spans[row, W]
        lines = size // LINE
        if len(touched) < lines + AHEAD:
            touched = np.zeros(lines + AHEAD, dtype=np.int64)
        sums_at = sums.ctypes.data + 4 * at
        count = 0
        for line in range(lines):
            touched[count] = line
            count += _any_set(sums_at + 4 * LINE * line)
        w, g = _numba.carray(_floats(w_at), size), sums[at : at + size]
        first = 0
        if count <= SPARSE * lines:
            for index in range(count):
                _prefetch(
                    w_at + 4 * LINE * touched[index + AHEAD]
                )  # beyond `count` a useless line, but one of w
                line = touched[index]
                _add_line(w_at + 4 * LINE * line, sums_at + 4 * LINE * line, factor)
            first = lines * LINE
            visited += count * LINE
        visited += size - first
        for i in range(first, size):
            w[i] += factor * g[i]
            g[i] = _f(0)
    return visited


@_kernel("void(int64[:,::1],float32[::1],float32,float32)")
def _decay_add(spans: Any, sums: Any, keep: Any, factor: Any) -> None:
    """w = keep * w + factor * sums."""
    for row in range(spans.shape[0]):
        at, size = spans[row, AT], spans[row, SIZE]
        w, g = _numba.carray(_floats(spans[row, W]), size), sums[at : at + size]
        for i in range(size):
            w[i] = keep * w[i] + factor * g[i]
            g[i] = _f(0)


@_kernel("void(int64[:,::1],float32[::1],float32,float32,float32,float32,float32,float32,float32)")
def _momentum(
    spans: Any,
    sums: Any,
    scale: Any,
    decay: Any,
    momentum: Any,
    fresh: Any,
    direct: Any,
    through: Any,
    lr: Any,
) -> None:
    """g = scale * sums + decay * w;  b = momentum * b + fresh * g;  w -= lr * (direct * g + through * b)."""
    for row in range(spans.shape[0]):
        at, size = spans[row, AT], spans[row, SIZE]
        w, g = _numba.carray(_floats(spans[row, W]), size), sums[at : at + size]
        b = _numba.carray(_floats(spans[row, FIRST]), size)
        for i in range(size):
            x = scale * g[i] + decay * w[i]
            y = momentum * b[i] + fresh * x
            y = y if abs(y) >= TINY else _f(0)
            b[i] = y
            w[i] -= lr * (direct * x + through * y)
            g[i] = _f(0)


@_kernel("void(int64[:,::1],float32[::1],float32,float64,float64,float64,float32,float32,float32)")
def _adam(
    spans: Any, sums: Any, scale: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, keep: Any, decay: Any
) -> None:
    """w *= keep;  g = scale * sums + decay * w;  then Kingma & Ba 2015, Alg. 1, with torch's place of eps."""
    b2, fresh1, fresh2 = _f(beta2), _f(1.0 - beta1), _f(1.0 - beta2)
    for row in range(spans.shape[0]):
        at, size = spans[row, AT], spans[row, SIZE]
        w, g = _numba.carray(_floats(spans[row, W]), size), sums[at : at + size]
        m, v = (
            _numba.carray(_floats(spans[row, FIRST]), size),
            _numba.carray(_floats(spans[row, SECOND]), size),
        )
        step = _numba.carray(_floats(spans[row, STEP]), 1)
        step[0] += _f(1)
        rate = _f(lr / (1.0 - beta1 ** float(step[0])))
        widen = _f(1.0 / math.sqrt(1.0 - beta2 ** float(step[0])))
        for i in range(size):
            x = scale * g[i] + decay * w[i]
            m_i = m[i] + fresh1 * (x - m[i])
            v_i = b2 * v[i] + fresh2 * x * x
            m_i = m_i if abs(m_i) >= TINY else _f(0)  # a moment that only decays becomes denormal, and slow
            v_i = v_i if v_i >= TINY else _f(0)
            m[i] = m_i
            v[i] = v_i
            w[i] = keep * w[i] - rate * m_i / (widen * math.sqrt(v_i) + eps)
            g[i] = _f(0)


# -- optimizers ------------------------------------------------------------------------------------------


def state_names(optimizer: str, hyper: Hyper) -> tuple[str, ...] | None:
    """What torch calls the state that a span of this optimizer needs; None: there is no fused update for it."""
    if optimizer == "SGD":
        return ("momentum_buffer",) if hyper["momentum"] else ()
    if optimizer in ("Adam", "AdamW") and not hyper["amsgrad"]:
        return ("exp_avg", "exp_avg_sq", "step")
    return None


def adds(optimizer: str, hyper: Hyper) -> bool:
    """Is this update a plain addition? Then w changes only where a gradient is not zero."""
    return optimizer == "SGD" and not hyper["momentum"] and not hyper["weight_decay"]


def update(optimizer: str, spans: Spans, sums: Sums, workers: int, hyper: Hyper) -> None:
    """One step of every span with sums / workers. `sums` becomes zeros there.

    The optimizer is one that `state_names` knows with these numbers, and the spans have that state.
    """
    scale = (-1.0 if hyper["maximize"] else 1.0) / workers
    lr, decay = _number(hyper, "lr"), _number(hyper, "weight_decay")
    if optimizer == "SGD":
        momentum = _number(hyper, "momentum")
        if momentum:
            direct, through = (1.0, momentum) if hyper["nesterov"] else (0.0, 1.0)
            fresh = 1.0 - _number(hyper, "dampening")
            _momentum(spans, sums, scale, decay, momentum, fresh, direct, through, lr)
        elif decay:
            _decay_add(spans, sums, 1.0 - lr * decay, -lr * scale)
        else:
            _add(spans, sums, -lr * scale)
        return
    betas = hyper["betas"]
    assert isinstance(betas, tuple)
    decoupled = bool(hyper["decoupled_weight_decay"])
    keep, coupled = (1.0 - lr * decay, 0.0) if decoupled else (1.0, decay)
    _adam(spans, sums, scale, lr, *betas, _number(hyper, "eps"), keep, coupled)


def _number(hyper: Hyper, name: str) -> float:
    value = hyper[name]
    assert isinstance(value, float)
    return value
