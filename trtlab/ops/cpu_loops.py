"""The loops that a CPU runs for a step of generation, compiled by Numba. Knows arrays, no tensors.

Whatever K, V and weights are stored in, products and sums are float32: only the order of a sum differs from torch's.
A division by zero gives infinity or NaN, as torch's does: a loop that could end there would take one number at a time.
Compiled code is kept beside this file (or in Numba's cache folder); the first run on a machine takes some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from trtlab.ops.cpu_vectors import BYTES, CENTRE, ORDER, STEP, WORD_ORDER, WORDS, dot_bf16, two_dots

Array = NDArray[Any]
Loop = Callable[..., Any]

F32, I32 = np.float32, np.int32
ROWS = 4  # outputs that one task computes together when there are several tokens
WIDTH = 512  # inputs that it widens at a time: ROWS * WIDTH * 4 bytes stay in the first cache
SUMS_IN_ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}  # all of fast math that keeps infinities and NaN
# Tasks run on OpenMP, whose threads torch's own kernels use too; a pool of their own would fight for the cores.
PARALLEL = find_spec("numba.np.ufunc.omppool") is not None


def _compiled(loop: Loop) -> Loop:
    return numba.njit(fastmath=SUMS_IN_ANY_ORDER, error_model="numpy", nogil=True, cache=True)(loop)


def _in_tasks(loop: Loop) -> Loop:
    return numba.njit(fastmath=SUMS_IN_ANY_ORDER, error_model="numpy", nogil=True, cache=True, parallel=PARALLEL)(loop)


def _to_the_bit(loop: Loop) -> Loop:
    """No arithmetic is moved: what comes out is what torch's operations give, one after the other."""
    return numba.njit(error_model="numpy", nogil=True, cache=True)(loop)


def run_on(threads: int) -> None:
    """Let tasks that this thread starts use so many threads, or as many as there are."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def _value(stored: Any) -> Any:
    """The float32 number that a stored one stands for: float32 and INT8 themselves, uint16 as BF16, uint8 as E4M3."""
    raise NotImplementedError("compiled code only")


def _from_half(typingctx: Any, bits: Any) -> tuple[Any, Any]:
    """The number that the bits of a float16 stand for; Numba knows no such type, processors do."""

    def emit(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return build.fpext(build.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return numba.types.float32(numba.types.uint16), emit


_half: Any = intrinsic(_from_half)


def _float8(stored: Any) -> Any:
    """E4M3's exponent counts from 7, float16's from 15 and is a bit longer: moved up by 7, the bits are a 256th of it.

    The sign comes along as they move, and is taken off where it fills the exponent's first bit.
    """
    moved = np.int16(np.int16(np.int8(stored)) << np.int16(7)) & np.int16(~(1 << 14))
    return _half(np.uint16(moved)) * F32(256)


@overload(_value, strict=False)
def _value_by_type(stored: Any) -> Callable[[Any], Any]:
    if stored == numba.types.uint16:  # BF16 is the upper half of a float32
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    if stored == numba.types.uint8:
        return _float8
    return lambda stored: F32(stored)


@_compiled
def _exp(x: Any) -> Any:
    """``e ** x`` of a number that is not positive, in steps that a processor does for several numbers at once.

    ``x = n ln 2 + r`` with ``|r| <= ln 2 / 2``: two to the n is an exponent, e to the r a short series.
    """
    n = np.floor(x * F32(1.4426950408889634) + F32(0.5))
    r = x - n * F32(0.6931471805599453)
    series = F32(1 / 120) + r * F32(1 / 720)
    for factor in (F32(1 / 24), F32(1 / 6), F32(1 / 2), F32(1), F32(1)):
        series = factor + r * series
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return F32(0) if x < F32(-87) else series * power


@_compiled
def silu(x: Array, out: Array) -> None:
    """``x / (1 + e ** -x)`` of ``[rows, width]``."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            e = _exp(-abs(x[row, i]))
            out[row, i] = x[row, i] * (F32(1) if x[row, i] > 0 else e) / (F32(1) + e)


@_compiled
def rms_norm(x: Array, gain: Array, epsilon: float, out: Array) -> None:
    """``x`` and ``out`` ``[rows, width]``, ``gain`` ``[width]``."""
    width = x.shape[1]
    for row in range(x.shape[0]):
        total = F32(0)
        for i in range(width):
            total += x[row, i] * x[row, i]
        scale = F32(1) / np.sqrt(total / F32(width) + F32(epsilon))
        for i in range(width):
            out[row, i] = x[row, i] * scale * gain[i]


@_compiled
def rotate(x: Array, cos: Array, sin: Array, positions: Array, out: Array) -> None:
    """Rotary position embedding of ``x`` ``[tokens, heads, size]``; ``cos`` and ``sin`` ``[all positions, size]``.

    The sine is negative where the second half of a head comes in.
    """
    tokens, heads, size = x.shape
    half = size // 2
    for token in range(tokens):
        near, far = cos[positions[token]], sin[positions[token]]
        for head in range(heads):
            for i in range(half):
                a, b = x[token, head, i], x[token, head, i + half]
                out[token, head, i] = a * near[i] + b * far[i]
                out[token, head, i + half] = b * near[i + half] + a * far[i + half]


@_compiled
def store(pool: Array, tables: Array, slots: Array, positions: Array, new: Array) -> None:
    """Put ``new`` ``[tokens, kv_heads, size]`` into ``pool`` ``[kv_heads, blocks, block, size]``.

    ``tables`` ``[slots, blocks]`` hold each slot's blocks; ``slots`` and ``positions`` are ``[tokens]``.
    """
    block = pool.shape[2]
    for token in range(new.shape[0]):
        held, at = tables[slots[token], positions[token] // block], positions[token] % block
        for head in range(new.shape[1]):
            pool[head, held, at] = new[token, head]


@_in_tasks
def attend(
    q: Array,
    keys: Array,
    values: Array,
    key_scale: Array,
    value_scale: Array,
    tables: Array,
    slots: Array,
    pasts: Array,
    out: Array,
) -> None:
    """One new token of each sequence over the blocks that hold its K and V, read where they lie.

    ``q`` and ``out`` ``[sequences, heads, size]``; ``keys`` and ``values`` ``[kv_heads, blocks, block, size]`` with
    scales ``[kv_heads]`` to the original; ``tables`` ``[slots, blocks]``; ``slots`` and ``pasts`` ``[sequences]``.
    """
    sequences, heads, size = q.shape
    kv_heads, _, block, _ = keys.shape
    group = heads // kv_heads
    for task in prange(sequences * kv_heads):
        sequence, kv = task // kv_heads, task % kv_heads
        tokens, blocks = pasts[sequence] + 1, tables[slots[sequence]]
        scores = np.empty((group, tokens), F32)
        scale = key_scale[kv] / np.sqrt(F32(size))
        for start in range(0, tokens, block):
            held = keys[kv, blocks[start // block]]
            for g in range(group):
                query = q[sequence, kv * group + g]
                for at in range(min(block, tokens - start)):
                    dot = F32(0)
                    for i in range(size):
                        dot += query[i] * _value(held[at, i])
                    scores[g, start + at] = dot * scale
        for g in range(group):
            top = scores[g, 0]
            for at in range(tokens):
                top = max(top, scores[g, at])
            total = F32(0)
            for at in range(tokens):
                scores[g, at] = _exp(scores[g, at] - top)
                total += scores[g, at]
            row = out[sequence, kv * group + g]
            row[:] = F32(0)
            for start in range(0, tokens, block):
                held = values[kv, blocks[start // block]]
                for at in range(min(block, tokens - start)):
                    weight = scores[g, start + at]
                    for i in range(size):
                        row[i] += weight * _value(held[at, i])
            for i in range(size):
                row[i] *= value_scale[kv] / total


@_in_tasks
def linear(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """``x`` ``[tokens, in]`` times ``weight`` ``[rows, in]`` times ``scale`` ``[rows]``: ``out`` ``[tokens, rows]``."""
    (tokens, width), rows = x.shape, weight.shape[0]
    if tokens == 1:
        for row in prange(rows):
            dot = F32(0)
            for i in range(width):
                dot += _value(weight[row, i]) * x[0, i]
            out[0, row] = dot * scale[row]
        return
    for task in prange((rows + ROWS - 1) // ROWS):
        top = task * ROWS
        held = min(ROWS, rows - top)
        sums = np.zeros((tokens + 1, ROWS), F32)
        _add_rows(x, weight[top : top + held], sums)
        for token in range(tokens):
            for row in range(held):
                out[token, top + row] = sums[token, row] * scale[top + row]


@_in_tasks
def linear_bf16(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """As ``linear``, from BF16 numbers as uint16 ``[rows, in]``."""
    (tokens, width), rows = x.shape, weight.shape[0]
    if tokens > 1 or width % (2 * WORDS):
        linear(x, weight, scale, out)
        return
    ordered = np.empty(width, F32)
    for first in range(0, width, WORDS):
        for at in range(WORDS):
            ordered[first + at] = x[0, first + WORD_ORDER[at]]
    for row in prange(rows):
        out[0, row] = dot_bf16(weight[row], ordered) * scale[row]


@_to_the_bit
def int8_rows(x: Array, out: Array, scale: Array) -> None:
    """``x`` ``[tokens, in]`` as INT8 numbers in float32, with a ``scale`` to the original a token, ``[tokens, 1]``."""
    for token in range(x.shape[0]):
        bits = I32(0)  # a float without its sign compares as an integer; NaN is the largest, and is found
        for i in range(x.shape[1]):
            bits = max(bits, I32(F32(x[token, i]).view(I32) & I32(0x7FFFFFFF)))
        largest = I32(bits).view(F32)
        if largest < F32(1e-6):
            largest = F32(1e-6)
        _round_to_int8(x[token], F32(127) / largest, out[token])
        scale[token, 0] = largest / F32(127)


@_to_the_bit
def int8_by(x: Array, scale: float, divides: bool, out: Array) -> None:
    """``x`` ``[tokens, in]`` times ``scale``, or divided by it, as INT8 numbers in float32."""
    for token in range(x.shape[0]):
        if divides:
            for i in range(x.shape[1]):
                out[token, i] = x[token, i] / F32(scale)
            _round_to_int8(out[token], F32(1), out[token])
        else:
            _round_to_int8(x[token], F32(scale), out[token])


@_to_the_bit
def _round_to_int8(x: Array, factor: float, out: Array) -> None:
    for i in range(len(x)):
        out[i] = min(max(np.rint(x[i] * factor), F32(-128)), F32(127))


@_in_tasks
def linear_int8(x: Array, weight: Array, out: Array) -> None:
    """``x`` ``[tokens, in]`` times int8 ``weight`` ``[rows, in]``, exactly: ``out`` is int32 ``[tokens, rows]``.

    ``x`` holds INT8 numbers as float32, which has room for the sum of WIDTH products; those sums are added as integers.
    """
    (tokens, width), rows = x.shape, weight.shape[0]
    if tokens == 1:
        for row in prange(rows):
            total = I32(0)
            for first in range(0, width, WIDTH):
                stored, part = weight[row, first : first + WIDTH], x[0, first : first + WIDTH]
                dot = F32(0)
                for i in range(len(stored)):
                    dot += F32(stored[i]) * part[i]
                total += I32(dot)
            out[0, row] = total
        return
    for task in prange((rows + ROWS - 1) // ROWS):
        top = task * ROWS
        held = min(ROWS, rows - top)
        sums = np.zeros((tokens + 1, ROWS), I32)
        _add_rows(x, weight[top : top + held], sums)
        out[:, top : top + held] = sums[:tokens, :held]


@_in_tasks
def linear_int4(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """As ``linear``, from INT4: int8 ``[ceil(rows / 2), in]``, two rows a byte, with ``scale`` ``[rows, groups]``."""
    (tokens, width), rows, groups = x.shape, scale.shape[0], scale.shape[1]
    size = width // groups
    if tokens == 1 and size % BYTES == 0:
        ordered, starts = np.empty(width, F32), np.empty(groups, F32)
        for first in range(0, width, BYTES):
            for at in range(BYTES):
                ordered[first + at] = x[0, first + ORDER[at]]
        for group in range(groups):
            part, total = x[0, group * size : group * size + size], F32(0)
            for i in range(size):
                total += part[i]
            starts[group] = -F32(CENTRE) * total
        for task in prange(weight.shape[0]):
            low, high = 2 * task, min(2 * task + 1, rows - 1)  # an odd last row is both; what is written last counts
            low_sum, high_sum = two_dots(weight[task], ordered, starts, scale[low], scale[high], size)
            out[0, high] = high_sum / F32(STEP)
            out[0, low] = low_sum / F32(STEP)
        return
    for task in prange((rows + ROWS - 1) // ROWS):
        top = task * ROWS
        held = min(ROWS, rows - top)
        tile, sums = np.zeros((ROWS, WIDTH), F32), np.zeros((tokens + 1, ROWS), F32)
        for group in range(groups):
            for first in range(group * size, group * size + size, WIDTH):
                count = min(WIDTH, group * size + size - first)
                for row in range(held):
                    stored, wide = weight[(top + row) // 2, first : first + count], tile[row]
                    one, up = scale[top + row, group], I32(28 - 28 * (row % 2))
                    for i in range(count):  # the lower half is shifted to the top first, so that its sign comes along
                        shifted = I32(I32(I32(stored[i]) << up) >> up)
                        wide[i] = F32(shifted if up else shifted >> 4) * one
                _add_tile(x, first, count, tile, sums)
        for token in range(tokens):
            for row in range(held):
                out[token, top + row] = sums[token, row]


@_compiled
def _add_rows(x: Array, weight: Array, sums: Array) -> None:
    """Add the products of ``x`` ``[tokens, in]`` with up to ROWS rows ``[rows, in]`` to ``sums``, see ``_add_tile``."""
    (rows, width), tile = weight.shape, np.zeros((ROWS, WIDTH), F32)
    for first in range(0, width, WIDTH):
        count = min(WIDTH, width - first)
        for row in range(rows):
            stored, wide = weight[row, first : first + count], tile[row]
            for i in range(count):
                wide[i] = _value(stored[i])
        _add_tile(x, first, count, tile, sums)


@_compiled
def _add_tile(x: Array, first: int, width: int, tile: Array, sums: Array) -> None:
    """Add the products of ``x[:, first : first + width]`` with ``tile`` ``[ROWS, width]`` to ``sums``.

    Two tokens and four rows at a time, so that each number that is loaded serves several products. ``sums``
    ``[tokens + 1, ROWS]`` has a row to spare: an odd last token is taken twice.
    """
    w0, w1, w2, w3 = tile[0], tile[1], tile[2], tile[3]
    last = x.shape[0] - 1
    for token in range(0, last + 1, 2):
        one, two = x[token, first : first + width], x[min(token + 1, last), first : first + width]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = F32(0)
        for i in range(width):
            a, b = one[i], two[i]
            a0 += w0[i] * a
            a1 += w1[i] * a
            a2 += w2[i] * a
            a3 += w3[i] * a
            b0 += w0[i] * b
            b1 += w1[i] * b
            b2 += w2[i] * b
            b3 += w3[i] * b
        sums[token, 0] += a0
        sums[token, 1] += a1
        sums[token, 2] += a2
        sums[token, 3] += a3
        sums[token + 1, 0] += b0
        sums[token + 1, 1] += b1
        sums[token + 1, 2] += b2
        sums[token + 1, 3] += b3
