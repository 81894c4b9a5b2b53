"""Values of entries, six ways to write them.

    fp32, fp16, bf16   the number, rounded to nearest; what is too large becomes the largest
    int8, int4, 2bit   a sign and a level: lo + step * LEVELS[code]

`lo` and `step` are bfloat16, two for a group of entries. Eight bits of `step` times at most nine of a level are
exact in float32, so that a level is one rounded sum, with or without fused multiply-add: every machine decodes
the same bits. Kept entries are never near zero; so their levels start at `lo`. Where all elements are sent
they are, and levels are multiples of `step`.
"""

from typing import Any

import numpy as np
from numba import njit

from . import reasons
from .bits import bits_of, float_of

FP32, FP16, BF16, INT8, INT4, BIT2 = range(6)
BITS = (32, 16, 16, 8, 4, 2)
GROUP = 512  # entries; a chunk of 65,536 elements has 655 at 1 %
GROUP_DENSE = 256

# 8 levels over [lo, lo + SPAN * step]: Lloyd (1982) on kept entries of Student-t, normal and Laplace. Of the energy of
# 1 % of Student-t(3) they lose 0.8 %, equidistant ones 4.5 %.
SPAN = 255
LLOYD = 6  # rounds for the two levels of a group
CURVE = np.array([2, 11, 23, 41, 66, 103, 157, 247], dtype=np.int64)

_VALUE, _SCALE, _LEVELS, _PADDING = reasons.VALUE, reasons.SCALE, reasons.LEVELS, reasons.PADDING
_INFINITE = 0x7F80_0000
_LEAST_STEP = np.float32(2.0**-100)  # below, products would not be exact: such groups have one level


@njit
def bf16_bits(bits: int) -> int:
    """The bfloat16 nearest to a finite float32, ties to even, never infinite; bits to bits."""
    sign = (bits >> 31) << 15
    bits &= 0x7FFF_FFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return sign | min(rounded, 0x7F7F)


@njit
def fp16_bits(bits: int) -> int:
    """The same for IEEE half precision, with its denormals."""
    sign = (bits >> 31) << 15
    bits &= 0x7FFF_FFFF
    exponent = (bits >> 23) - 112
    if exponent >= 31:
        return sign | 0x7BFF
    mantissa = bits & 0x7F_FFFF
    if exponent <= 0:
        shift = 14 - exponent  # of the mantissa with its leading one
        if shift > 24:
            return sign
        mantissa |= 0x80_0000
        half = (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)
        return sign | ((mantissa + half) >> shift)
    rounded = ((exponent << 10) | (mantissa >> 13)) + (
        ((mantissa & 0x1FFF) + 0xFFF + ((mantissa >> 13) & 1)) >> 13
    )
    return sign | min(rounded, 0x7BFF)


@njit
def fp16_float(half: int) -> Any:
    """A finite half as float32."""
    sign = (half >> 15) << 31
    exponent, mantissa = (half >> 10) & 31, half & 1023
    if exponent == 0:
        small = np.float32(mantissa) * np.float32(2.0**-24)  # exact
        return float_of(bits_of(small) | sign)
    return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13))


@njit
def groups_of(n: int, dense: bool) -> int:
    return max(1, n // (GROUP_DENSE if dense else GROUP))


@njit
def value_bytes(coding: int, n: int, dense: bool) -> int:
    """Bytes of the section, without slack."""
    if coding < INT8:
        return n * (4 if coding == FP32 else 2)
    codes = n if coding == INT8 else (n + 1) // 2 if coding == INT4 else (n + 3) // 4
    return 4 * groups_of(n, dense) + codes


@njit
def _levels(coding: int, dense: bool, lo: Any, step: Any, table: Any) -> int:
    """Fill `table` with the levels of a group; how many they are."""
    if coding == INT4:
        for i in range(8):
            table[i] = lo + step * np.float32(i if dense else CURVE[i])
        return 8
    many = 128 if coding == INT8 else 2
    for i in range(many):
        table[i] = lo + step * np.float32(i)
    return many


@njit
def _put16(out: Any, at: int, bits: int) -> None:
    out[at] = bits & 255
    out[at + 1] = bits >> 8


@njit
def _extremes(val: Any) -> Any:
    """The smallest and the largest magnitude; as integers, which order in the same way and can be vectors."""
    least, most = 0x7F80_0000, 0
    for i in range(len(val)):
        bits = bits_of(val[i]) & 0x7FFF_FFFF
        least = min(least, bits)
        most = max(most, bits)
    return float_of(least), float_of(most)


@njit
def _signed(size: Any, like: Any) -> Any:
    return float_of(bits_of(size) | (bits_of(like) & 0x8000_0000))


@njit
def _quantise_eight(val: Any, table: Any, codes: Any) -> None:
    """The nearest of eight levels. Without a branch or a look-up, so that sixteen elements go at a time."""
    half = np.float32(0.5)
    l0, l1, l2, l3, l4, l5, l6, l7 = (
        table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7],
    )  # fmt: skip
    m0, m1, m2, m3 = (
        l0 + (l1 - l0) * half,
        l1 + (l2 - l1) * half,
        l2 + (l3 - l2) * half,
        l3 + (l4 - l3) * half,
    )
    m4, m5, m6 = l4 + (l5 - l4) * half, l5 + (l6 - l5) * half, l6 + (l7 - l6) * half
    for i in range(len(val)):
        size = abs(val[i])
        code = (size > m0) + (size > m1) + (size > m2) + (size > m3) + (size > m4) + (size > m5) + (size > m6)
        codes[i] = code | (bits_of(val[i]) >> 31) << 3
        level = l1 if size > m0 else l0
        level = l2 if size > m1 else level
        level = l3 if size > m2 else level
        level = l4 if size > m3 else level
        level = l5 if size > m4 else level
        level = l6 if size > m5 else level
        level = l7 if size > m6 else level
        val[i] = _signed(level, val[i])


@njit
def _quantise_two(val: Any, table: Any, codes: Any) -> None:
    lo, hi = table[0], table[1]
    middle = lo + (hi - lo) * np.float32(0.5)
    for i in range(len(val)):
        size = abs(val[i])
        codes[i] = (size > middle) | (bits_of(val[i]) >> 31) << 1
        val[i] = _signed(hi if size > middle else lo, val[i])


@njit
def _quantise_linear(val: Any, lo: Any, step: Any, codes: Any) -> None:
    """The nearest of the 128 levels lo + step * code, in the operations of `_levels`."""
    scale = np.float32(1) / step if step > np.float32(0) else np.float32(0)
    most, half = np.float32(127.0), np.float32(0.5)
    for i in range(len(val)):
        place = (abs(val[i]) - lo) * scale + half
        place = place if place > np.float32(0) else np.float32(0)
        code = np.int32(place if place < most else most)
        codes[i] = code | (bits_of(val[i]) >> 31) << 7
        val[i] = _signed(lo + step * np.float32(code), val[i])


@njit(fastmath={"reassoc", "nsz"})  # sums in lanes: their order is nobody's business, the centroids travel
def _centroids(val: Any, dense: bool) -> Any:
    """Two levels for 2bit, the means of what is nearer to each (Lloyd); the lower is 0 where all elements are sent."""
    zero = np.float32(0)
    total = zero
    for i in range(len(val)):
        total += abs(val[i])
    lo, hi = zero, total / np.float32(len(val))
    split = hi
    for _ in range(LLOYD):
        above, many = zero, np.int32(0)
        for i in range(len(val)):
            size = abs(val[i])
            above += size if size > split else zero
            many += np.int32(1) if size > split else np.int32(0)
        if many == 0 or not above < np.float32(np.inf):
            break
        hi = above / np.float32(many)
        if not dense and many < len(val):
            lo = max(zero, (total - above) / np.float32(len(val) - many))
        split = lo + (hi - lo) * np.float32(0.5)
    if not hi < np.float32(np.inf):  # a sum that overflowed: any levels do
        hi = np.float32(1e38)
    return (zero if dense else min(lo, hi)), hi


@njit
def put_values(coding: int, dense: bool, val: Any, n: int, out: Any, at: int, codes: Any) -> int:
    """Write val[:n], and replace it by what a reader will find. `codes` is scratch. Where it ends."""
    if coding == FP32:
        for i in range(n):
            bits = bits_of(val[i])
            _put16(out, at, bits & 0xFFFF)
            _put16(out, at + 2, bits >> 16)
            at += 4
        return at
    if coding < INT8:
        for i in range(n):
            if coding == BF16:
                short = bf16_bits(bits_of(val[i]))
                val[i] = float_of(short << 16)
            else:
                short = fp16_bits(bits_of(val[i]))
                val[i] = fp16_float(short)
            _put16(out, at, short)
            at += 2
        return at
    table = np.empty(128, np.float32)
    groups = groups_of(n, dense)
    length = (n + groups - 1) // groups
    many = 8 if coding == INT4 else 128 if coding == INT8 else 2
    reach = np.float32(many - 1 if dense or coding != INT4 else SPAN)  # steps from lo to the largest
    for group in range(groups):
        a, b = min(n, group * length), min(n, (group + 1) * length)
        lo, hi = np.float32(0), np.float32(0)
        if a < b:
            if coding == BIT2:
                lo, hi = _centroids(val[a:b], dense)
            else:
                lo, hi = _extremes(val[a:b])
                if dense:
                    lo = np.float32(0)
        low = bf16_bits(bits_of(lo))
        lo = float_of(low << 16)
        step = max(hi - lo, np.float32(0)) / reach
        wide = bf16_bits(bits_of(step)) if step >= _LEAST_STEP else 0
        step = float_of(wide << 16)
        _levels(coding, dense, lo, step, table)
        while not table[many - 1] < np.float32(np.inf):  # rounded beyond the largest number
            wide -= 1
            step = float_of(wide << 16)
            _levels(coding, dense, lo, step, table)
        _put16(out, at + 4 * group, low)
        _put16(out, at + 4 * group + 2, wide)
        if coding == INT8:
            _quantise_linear(val[a:b], lo, step, codes[a:b])
        elif coding == INT4:
            _quantise_eight(val[a:b], table, codes[a:b])
        else:
            _quantise_two(val[a:b], table, codes[a:b])
    at += 4 * groups
    end = at + (n if coding == INT8 else (n + 1) // 2 if coding == INT4 else (n + 3) // 4)
    _join(coding, codes[:n], out[at:end])
    return end


@njit
def _join(coding: int, codes: Any, out: Any) -> None:
    """Codes of 8, 4 or 2 bits next to one another, low bits first."""
    n = len(codes)
    if coding == INT8:
        for i in range(n):
            out[i] = codes[i]
    elif coding == INT4:
        for i in range(n // 2):
            out[i] = codes[2 * i] | (codes[2 * i + 1] << 4)
        if n & 1:
            out[n // 2] = codes[n - 1]
    else:
        for i in range(n // 4):
            out[i] = codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6
        if n & 3:
            last = 0
            for i in range(n & ~3, n):
                last |= np.int64(codes[i]) << (2 * (i & 3))
            out[n // 4] = last


@njit
def get_values(coding: int, dense: bool, data: Any, at: int, n: int, val: Any) -> int:
    """Read a section that is `value_bytes` long into val[:n]: 0, or the negative of a reason."""
    if coding == FP32:
        for i in range(n):
            bits = (
                np.int64(data[at])
                | (np.int64(data[at + 1]) << 8)
                | (np.int64(data[at + 2]) << 16)
                | (np.int64(data[at + 3]) << 24)
            )
            if bits & _INFINITE == _INFINITE:
                return -_VALUE
            val[i] = float_of(bits)
            at += 4
        return 0
    if coding < INT8:
        for i in range(n):
            short = np.int64(data[at]) | (np.int64(data[at + 1]) << 8)
            if coding == BF16:
                if short & 0x7F80 == 0x7F80:
                    return -_VALUE
                val[i] = float_of(short << 16)
            else:
                if short & 0x7C00 == 0x7C00:
                    return -_VALUE
                val[i] = fp16_float(short)
            at += 2
        return 0
    table = np.empty(256, np.float32)
    groups = groups_of(n, dense)
    length = (n + groups - 1) // groups
    codes = at + 4 * groups
    for group in range(groups):
        low = np.int64(data[at]) | (np.int64(data[at + 1]) << 8)
        wide = np.int64(data[at + 2]) | (np.int64(data[at + 3]) << 8)
        at += 4
        if low >= 0x7F80 or wide >= 0x7F80:  # also where the sign is set
            return -_SCALE
        many = _levels(coding, dense, float_of(low << 16), float_of(wide << 16), table)
        if not table[many - 1] < np.float32(np.inf):
            return -_LEVELS
        for i in range(many):
            table[many + i] = -table[i]
        a, b = min(n, group * length), min(n, (group + 1) * length)
        if coding == INT8:
            for i in range(a, b):
                val[i] = table[data[codes + i]]
        elif coding == INT4:
            for i in range(a, b):
                val[i] = table[(data[codes + (i >> 1)] >> (4 * (i & 1))) & 15]
        else:
            for i in range(a, b):
                val[i] = table[(data[codes + (i >> 2)] >> (2 * (i & 3))) & 3]
    if (coding == INT4 and n & 1 and data[codes + n // 2] >> 4) or (
        coding == BIT2 and n & 3 and data[codes + n // 4] >> (2 * (n & 3))
    ):
        return -_PADDING
    return 0
