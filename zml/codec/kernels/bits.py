"""What numba does not say by itself: bits of floats, and sixteen elements at a time, in portable LLVM.

Vectors of 16 floats become AVX-512, two AVX, or four SSE or NEON registers: LLVM splits them as the machine needs.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

LANES = 16
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
BYTES = ir.IntType(8).as_pointer()
VECTOR = ir.VectorType(F32, LANES)
INTEGERS = ir.VectorType(I32, LANES)


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """The 32 bits of a float32, as int64."""

    def codegen(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], I32), I64)

    return types.int64(types.float32), codegen


@intrinsic
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 with these bits, given as int64."""

    def codegen(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


@intrinsic
def trailing_zeros(_context: Any, mask: Any) -> Any:
    """Of a uint64, as int64; 64 for zero."""

    def codegen(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), codegen


@intrinsic
def ones(_context: Any, mask: Any) -> Any:
    """How many bits of a uint64 are set, as int64."""

    def codegen(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTEGERS, [0] * LANES))


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _load(builder: Any, pointer: Any, lane: int) -> Any:
    address = builder.gep(pointer, [ir.Constant(I64, lane)])
    return builder.load(builder.bitcast(address, VECTOR.as_pointer()), align=4)


def _store(builder: Any, pointer: Any, lane: int, vector: Any) -> None:
    address = builder.gep(pointer, [ir.Constant(I64, lane)])
    builder.store(vector, builder.bitcast(address, VECTOR.as_pointer()), align=4)


def _magnitude(builder: Any, vector: Any) -> Any:
    plain = ir.Constant(INTEGERS, [0x7FFFFFFF] * LANES)
    return builder.bitcast(builder.and_(builder.bitcast(vector, INTEGERS), plain), VECTOR)


@intrinsic
def above16(_context: Any, e: Any, g: Any, at: Any, decay: Any, floor: Any) -> Any:
    """Which of 16 elements have |decay * e + g| >= floor, or are not a number: a bit each, as uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before, value = (_at(context, builder, signature.args[i], args[i], args[2]) for i in (0, 1))
        decayed = builder.fmul(_load(builder, before, 0), _splat(builder, args[3]))
        total = _magnitude(builder, builder.fadd(decayed, _load(builder, value, 0)))
        chosen = builder.fcmp_unordered(">=", total, _splat(builder, args[4]))
        return builder.zext(builder.bitcast(chosen, I16), I64)

    return types.uint64(e, g, types.int64, types.float32, types.float32), codegen


@intrinsic
def fetch(_context: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of array[at], which may lie anywhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(_at(context, builder, signature.args[0], args[0], args[1]), BYTES)
        kind = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [BYTES], kind)
        builder.call(prefetch, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def sweep64(
    _context: Any, out: Any, e: Any, g: Any, at: Any, decay: Any, floor: Any, masks: Any, slot: Any
) -> Any:
    """out = decay * e + g for 64 elements, and in masks[slot] a bit for each with |out| >= floor.

    Returns True, and has written no element, if one of them would be infinite or not a number.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, before, value = (_at(context, builder, signature.args[i], args[i], args[3]) for i in range(3))
        factor, least = _splat(builder, args[4]), _splat(builder, args[5])
        infinite = _splat(builder, ir.Constant(F32, float("inf")))
        totals, mask, bad = (
            [],
            ir.Constant(I64, 0),
            ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES),
        )
        for lane in range(0, 64, LANES):
            decayed = builder.fmul(_load(builder, before, lane), factor)
            total = builder.fadd(decayed, _load(builder, value, lane))
            size = _magnitude(builder, total)
            bits = builder.zext(builder.bitcast(builder.fcmp_ordered(">=", size, least), I16), I64)
            mask = builder.or_(mask, builder.shl(bits, ir.Constant(I64, lane)))
            bad = builder.or_(bad, builder.fcmp_unordered(">=", size, infinite))
            totals.append(total)
        builder.store(mask, _at(context, builder, signature.args[6], args[6], args[7]))
        refused = builder.icmp_unsigned("!=", builder.bitcast(bad, I16), ir.Constant(I16, 0))
        with builder.if_then(builder.not_(refused), likely=True):
            for index, total in enumerate(totals):
                _store(builder, target, index * LANES, total)
        return refused

    arguments = (out, e, g, types.int64, types.float32, types.float32, masks, types.int64)
    return types.boolean(*arguments), codegen
