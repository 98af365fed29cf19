"""Loops that multiply few tokens with the weights of a linear layer, read as they are stored. See ``loops``.

For many tokens they only widen the weights, in one pass; the product is torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trtlab.ops.cpu.loops import F32, I32, Array, compiled, in_tasks, to_the_bit, value
from trtlab.ops.cpu.vectors import (
    BYTES,
    CENTRE,
    HAS_TABLES,
    LANES,
    ORDER,
    STEP,
    TABLE_BYTES,
    TABLE_ORDER,
    WORD_ORDER,
    WORDS,
    dot_bf16,
    dot_int8,
    two_dots,
    two_dots_by_table,
    widen_two_by_table,
)

ROWS = 4  # outputs that one task computes together when there are several tokens
WIDTH = 512  # inputs that a task converts at a time: ROWS * WIDTH * 4 bytes stay in the first-level cache


@in_tasks
def linear(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """``out`` ``[tokens, rows]``: ``x`` ``[tokens, in]`` times ``weight`` ``[rows, in]`` times ``scale`` ``[rows]``."""
    (tokens, width), rows = x.shape, weight.shape[0]
    if tokens == 1:
        for row in prange(rows):
            dot = F32(0)
            for i in range(width):
                dot += value(weight[row, i]) * x[0, i]
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


@in_tasks
def linear_bf16(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """As ``linear``, for BF16 weights, stored as uint16 ``[rows, in]``."""
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


@in_tasks
def linear_w8(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """As ``linear``, for int8 weights that are not multiplied as integers."""
    (tokens, width), rows = x.shape, weight.shape[0]
    if tokens > 1 or width % (4 * LANES):
        linear(x, weight, scale, out)
        return
    for row in prange(rows):
        out[0, row] = dot_int8(weight[row], x[0]) * scale[row]


@to_the_bit
def int8_rows(x: Array, out: Array, scale: Array) -> None:
    """Quantize ``x`` ``[tokens, in]`` to INT8 numbers in float32; ``scale`` ``[tokens, 1]`` leads back to ``x``."""
    for token in range(x.shape[0]):
        largest = _largest(x[token])
        if largest < F32(1e-6):
            largest = F32(1e-6)
        _round_to_int8(x[token], F32(127) / largest, out[token])
        scale[token, 0] = largest / F32(127)


@to_the_bit
def int8_by(x: Array, scale: float, divides: bool, out: Array, row_scale: Array) -> None:
    """Quantize ``x`` ``[tokens, in]`` to INT8 numbers in float32: multiplied by ``scale``, or divided by it.

    ``row_scale`` ``[tokens, 1]`` becomes 1, or NaN for a token with infinity or NaN, which INT8 does not have.
    """
    for token in range(x.shape[0]):
        row_scale[token, 0] = F32(1) + F32(0) * _largest(x[token])
        if divides:
            for i in range(x.shape[1]):
                out[token, i] = x[token, i] / F32(scale)
            _round_to_int8(out[token], F32(1), out[token])
        else:
            _round_to_int8(x[token], F32(scale), out[token])


@to_the_bit
def _largest(x: Array) -> Any:
    """The largest magnitude, NaN if there is one."""
    bits = I32(0)  # the bits of a float without sign compare as integers, and NaN is the largest
    for i in range(len(x)):
        bits = max(bits, I32(F32(x[i]).view(I32) & I32(0x7FFFFFFF)))
    return I32(bits).view(F32)


@to_the_bit
def _round_to_int8(x: Array, factor: float, out: Array) -> None:
    for i in range(len(x)):
        out[i] = min(max(np.rint(x[i] * factor), F32(-128)), F32(127))


@in_tasks
def linear_int8(x: Array, weight: Array, out: Array) -> None:
    """Exact product of ``x`` ``[tokens, in]`` and int8 ``weight`` ``[rows, in]``: ``out``, int32 ``[tokens, rows]``.

    ``x`` has INT8 numbers in float32, which holds the sum of WIDTH products exactly; those sums are added as integers.
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


@in_tasks
def linear_int4(x: Array, weight: Array, scale: Array, out: Array) -> None:
    """As ``linear``, for INT4: int8 ``[ceil(rows / 2), in]``, two rows per byte, with ``scale`` ``[rows, groups]``."""
    (tokens, width), rows, groups = x.shape, scale.shape[0], scale.shape[1]
    size = width // groups
    if HAS_TABLES and tokens == 1 and size % TABLE_BYTES == 0:
        ordered = _ordered(x)
        for task in prange(weight.shape[0]):
            low, high = 2 * task, min(2 * task + 1, rows - 1)  # an odd last row is both; the value written last stays
            low_sum, high_sum = two_dots_by_table(weight[task], ordered[0], scale[low], scale[high], size)
            out[0, high], out[0, low] = high_sum, low_sum
        return
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
            low, high = 2 * task, min(2 * task + 1, rows - 1)  # an odd last row is both; the value written last stays
            low_sum, high_sum = two_dots(weight[task], ordered, starts, scale[low], scale[high], size)
            out[0, high] = high_sum / F32(STEP)
            out[0, low] = low_sum / F32(STEP)
        return
    by_table = HAS_TABLES and size % TABLE_BYTES == 0
    inputs = _ordered(x) if by_table else x
    for task in prange((rows + ROWS - 1) // ROWS):
        top = task * ROWS
        held = min(ROWS, rows - top)
        tile, sums = np.zeros((ROWS, WIDTH), F32), np.zeros((tokens + 1, ROWS), F32)
        for first in range(0, width, WIDTH):
            last, start = min(first + WIDTH, width), first
            while start < last:
                group = start // size
                stop = min(group * size + size, last)
                for row in range(0, held, 2):
                    stored, upper = weight[(top + row) // 2, start:stop], min(top + row + 1, rows - 1)
                    even, odd = tile[row, start - first : stop - first], tile[row + 1, start - first : stop - first]
                    low_scale, high_scale = scale[top + row, group], scale[upper, group]
                    if HAS_TABLES and by_table:
                        widen_two_by_table(stored, even, odd, low_scale, high_scale)
                    else:
                        for i in range(stop - start):  # the lower half is shifted to the top first, for its sign
                            both = I32(stored[i])
                            even[i] = F32(I32(I32(both << I32(28)) >> I32(28))) * low_scale
                            odd[i] = F32(I32(both >> I32(4))) * high_scale
                start = stop
            _add_tile(inputs, first, last - first, tile, sums)
        for token in range(tokens):
            for row in range(held):
                out[token, top + row] = sums[token, row]


@in_tasks
def widen_w8(weight: Array, scale: Array, out: Array) -> None:
    """``out`` ``[rows, in]`` in float32: int8 ``weight`` ``[rows, in]`` times ``scale`` ``[rows]``."""
    for row in prange(weight.shape[0]):
        for i in range(weight.shape[1]):
            out[row, i] = F32(weight[row, i]) * scale[row]


@in_tasks
def widen_int4(weight: Array, scale: Array, out: Array) -> None:
    """As ``widen_w8``, for INT4: int8 ``[ceil(rows / 2), in]``, two rows per byte; ``scale`` ``[rows, groups]``."""
    rows, groups = scale.shape
    size = weight.shape[1] // groups
    for task in prange(weight.shape[0]):
        low, high = 2 * task, min(2 * task + 1, rows - 1)  # an odd last row is both; the value written last stays
        for group in range(groups):
            part = slice(group * size, group * size + size)
            stored, low_out, high_out = weight[task, part], out[low, part], out[high, part]
            low_scale, high_scale = scale[low, group], scale[high, group]
            for i in range(size):
                both = I32(stored[i])
                high_out[i] = F32(I32(both >> I32(4))) * high_scale
                low_out[i] = F32(I32(I32(both << I32(28)) >> I32(28))) * low_scale


@compiled
def _ordered(x: Array) -> Array:
    """The inputs ``[tokens, in]``, each TABLE_BYTES in TABLE_ORDER."""
    ordered = np.empty(x.shape, F32)
    for token in range(x.shape[0]):
        for first in range(0, x.shape[1], TABLE_BYTES):
            for at in range(TABLE_BYTES):
                ordered[token, first + at] = x[token, first + TABLE_ORDER[at]]
    return ordered


@compiled
def _add_rows(x: Array, weight: Array, sums: Array) -> None:
    """Add the products of ``x`` ``[tokens, in]`` with up to ROWS rows ``[rows, in]`` to ``sums``, see ``_add_tile``."""
    (rows, width), tile = weight.shape, np.zeros((ROWS, WIDTH), F32)
    for first in range(0, width, WIDTH):
        count = min(WIDTH, width - first)
        for row in range(rows):
            stored, wide = weight[row, first : first + count], tile[row]
            for i in range(count):
                wide[i] = value(stored[i])
        _add_tile(x, first, count, tile, sums)


@compiled
def _add_tile(x: Array, first: int, width: int, tile: Array, sums: Array) -> None:
    """Add the products of ``x[:, first : first + width]`` with ``tile`` ``[ROWS, width]`` to ``sums``.

    It takes two tokens and four rows at a time, so that each loaded number is used in several products. ``sums``
    ``[tokens + 1, ROWS]`` has one row more than needed: an odd last token is computed twice.
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
