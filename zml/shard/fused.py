"""The update of a chunk in one pass over memory: w and the optimizer's state, from the sum of a step's gradients.

The rule: what torch.optim's SGD, Adam and AdamW do, element by element (their single-tensor forms), on the very
tensors that torch's optimizer object keeps, so that its own step may come next. Only the rounding differs, and a
moment too small for a normal float32 becomes zero: arithmetic with the others is slow on many processors.

A *span* is a run of elements with one history, mostly a whole chunk. A call takes any number of them, as rows of
int64: its first element in the sums, how many elements it has, and the addresses of its w, of its state (momentum
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
from numpy.typing import NDArray

from ..codec.compiled import carray, floats, inline, types
from ..hyper import Hyper
from ..layout import CHUNK

AT, SIZE, W, FIRST, SECOND, STEP = range(6)
COLUMNS = 6

LINE = 16  # elements of a cache line
AHEAD = 16  # touched lines between asking memory for one and using it
SPARSE = 0.4  # of the lines touched; above, streaming all of w is faster
TINY = np.float32(np.finfo(np.float32).tiny)

Spans = NDArray[np.int64]
Sums = NDArray[np.float32]
Counts = NDArray[np.int64]
Update = Callable[[Spans, Sums, Counts], None]

_f = np.float32
_numba: Any = numba  # its own annotations stop where the compiler begins


def _kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    # Division as numpy does it: Python's raises, and a loop that may raise does not become vectors.
    compiled: Any = _numba.njit(signature, nogil=True, cache=True, error_model="numpy")
    return lambda function: compiled(function)


# -- vectors ---------------------------------------------------------------------------------------------

_VECTOR = ir.VectorType(ir.FloatType(), LINE)
_BITS = ir.VectorType(ir.IntType(32), LINE)


@inline
def _any_set(_typing: Any, _address: Any) -> Any:
    """1 if one of the LINE elements there is not zero, else 0."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = builder.load(builder.inttoptr(arguments[0], _VECTOR.as_pointer()), align=4)
        mask = builder.bitcast(
            builder.fcmp_unordered("!=", line, ir.Constant(_VECTOR, None)), ir.IntType(LINE)
        )
        found = builder.icmp_unsigned("!=", mask, ir.Constant(ir.IntType(LINE), 0))
        return builder.zext(found, ir.IntType(64))

    return types.int64(types.int64), code


@inline
def _prefetch(_typing: Any, _address: Any) -> Any:
    """Ask memory for the line that holds this address, to write there soon. Any address will do."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        get: Any = cgutils.get_or_insert_function
        function = get(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [builder.inttoptr(arguments[0], byte), number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@inline
def _add_line(_typing: Any, _w: Any, _sums: Any, _factor: Any) -> Any:
    """w += factor * sums for the LINE elements at two addresses."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        w, sums = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in arguments[:2])
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[2], ir.IntType(32)(0))
        factor = builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_BITS, None))
        product = builder.fmul(factor, builder.load(sums, align=4))
        builder.store(builder.fadd(builder.load(w, align=4), product), w, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), code


# -- kernels ---------------------------------------------------------------------------------------------


@_kernel("void(int64[:,::1],float32[::1],int64[::1],float32,int64[::1])")
def _add(spans: Any, sums: Any, entries: Any, factor: Any, touched: Any) -> None:
    """w += factor * sums. Where few lines of w change, the others are not even read."""
    for row in range(spans.shape[0]):
        at, size, w_at = spans[row, AT], spans[row, SIZE], spans[row, W]
        w, g = carray(floats(w_at), size), sums[at : at + size]
        lines, count = size // LINE, 0
        if entries[row] > SPARSE * lines:
            for i in range(size):
                w[i] += factor * g[i]
            continue
        sums_at = sums.ctypes.data + 4 * at
        for line in range(lines):
            touched[count] = line
            count += _any_set(sums_at + 4 * LINE * line)
        for index in range(count):
            _prefetch(w_at + 4 * LINE * touched[index + AHEAD])  # the last ones are of no use, and no harm
            line = touched[index]
            _add_line(w_at + 4 * LINE * line, sums_at + 4 * LINE * line, factor)
        for i in range(lines * LINE, size):
            w[i] += factor * g[i]


@_kernel("void(int64[:,::1],float32[::1],float32,float32)")
def _decay_add(spans: Any, sums: Any, keep: Any, factor: Any) -> None:
    """w = keep * w + factor * sums."""
    for row in range(spans.shape[0]):
        at, size = spans[row, AT], spans[row, SIZE]
        w, g = carray(floats(spans[row, W]), size), sums[at : at + size]
        for i in range(size):
            w[i] = keep * w[i] + factor * g[i]


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
        w, g = carray(floats(spans[row, W]), size), sums[at : at + size]
        b = carray(floats(spans[row, FIRST]), size)
        for i in range(size):
            x = scale * g[i] + decay * w[i]
            y = momentum * b[i] + fresh * x
            y = _f(0) if abs(y) < TINY else y
            b[i] = y
            w[i] -= lr * (direct * x + through * y)


@_kernel("void(int64[:,::1],float32[::1],float32,float64,float64,float64,float32,float32,float32)")
def _adam(
    spans: Any,
    sums: Any,
    scale: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    keep: Any,
    decay: Any,
) -> None:
    """g = scale * sums + decay * w;  w *= keep;  then Kingma & Ba 2015, Alg. 1, with torch's place of eps."""
    old2, fresh1, fresh2 = _f(beta2), _f(1.0 - beta1), _f(1.0 - beta2)
    for row in range(spans.shape[0]):
        at, size = spans[row, AT], spans[row, SIZE]
        w, g = carray(floats(spans[row, W]), size), sums[at : at + size]
        m = carray(floats(spans[row, FIRST]), size)
        v = carray(floats(spans[row, SECOND]), size)
        step = carray(floats(spans[row, STEP]), 1)
        step[0] += _f(1)
        rate = _f(lr / (1.0 - beta1 ** float(step[0])))
        widen = _f(1.0 / math.sqrt(1.0 - beta2 ** float(step[0])))
        for i in range(size):
            x = scale * g[i] + decay * w[i]
            m_i = m[i] + fresh1 * (x - m[i])
            v_i = old2 * v[i] + fresh2 * x * x
            m_i = _f(0) if abs(m_i) < TINY else m_i
            v_i = _f(0) if v_i < TINY else v_i
            m[i] = m_i
            v[i] = v_i
            w[i] = keep * w[i] - rate * m_i / (widen * math.sqrt(v_i) + eps)


# -- optimizers ------------------------------------------------------------------------------------------


def update(optimizer: str, hyper: Hyper, workers: int) -> Update:
    """One step of spans with the sums of so many workers' gradients, divided by their number.

    The optimizer is one of which `optim.fused_state` says what state the spans must have. What comes back changes
    w and the state in place, and only reads the sums. With each span it is told about how many of the sums are not
    zero: where few are, a plain addition does not read all of w.
    """
    scale = (-1.0 if hyper["maximize"] else 1.0) / workers
    lr, decay = _number(hyper, "lr"), _number(hyper, "weight_decay")
    if optimizer == "SGD":
        momentum = _number(hyper, "momentum")
        if momentum:
            direct, through = (1.0, momentum) if hyper["nesterov"] else (0.0, 1.0)
            fresh = 1.0 - _number(hyper, "dampening")
            return _dense(_momentum, scale, decay, momentum, fresh, direct, through, lr)
        if decay:
            return _dense(_decay_add, 1.0 - lr * decay, -lr * scale)
        return _sparse(-lr * scale)
    betas = hyper["betas"]
    assert isinstance(betas, tuple)
    decoupled = bool(hyper["decoupled_weight_decay"])
    keep, coupled = (1.0 - lr * decay, 0.0) if decoupled else (1.0, decay)
    return _dense(_adam, scale, lr, *betas, _number(hyper, "eps"), keep, coupled)


def _dense(kernel: Any, *numbers: float) -> Update:
    return lambda spans, sums, entries: kernel(spans, sums, *numbers)


def _sparse(factor: float) -> Update:
    touched = np.zeros(CHUNK // LINE + AHEAD, dtype=np.int64)
    return lambda spans, sums, entries: _add(spans, sums, entries, factor, touched)


def _number(hyper: Hyper, name: str) -> float:
    value = hyper[name]
    assert isinstance(value, float)
    return value
