"""Loops that a CPU runs for a step of generation, compiled by Numba. Knows arrays, no tensors.

Products and sums are float32 for every type of stored K, V and weights: only the order of a sum differs from torch's.
A division by zero gives infinity or NaN, as in torch: a loop that could raise there could not be vectorized.
Compiled code is kept beside this file (or in Numba's cache folder). The first run on a machine takes some seconds, and
so does the first run after a change of any file of loops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

Array = NDArray[Any]
Loop = Callable[..., Any]

F32, I32 = np.float32, np.int32
SUMS_IN_ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}  # the parts of fast math that keep infinities and NaN
# Tasks run on OpenMP, whose threads torch's kernels use too; a second pool of threads would compete for the cores.
PARALLEL = find_spec("numba.np.ufunc.omppool") is not None


# Numba compiles a loop again when the loop's own file changes, but not when a function that it calls in another file
# does. Its cache files are named after the loop's qualified name, so that name ends in a digest of all the source.
SOURCE_FILES = ("loops.py", "products.py", "vectors.py")
SOURCE_DIGEST = hashlib.sha256(
    b"\0".join(Path(__file__).with_name(name).read_bytes() for name in SOURCE_FILES)
).hexdigest()[:12]


def _njit(loop: Loop, **options: Any) -> Loop:
    loop.__qualname__ = f"{loop.__qualname__}_{SOURCE_DIGEST}"
    dispatcher: Loop = numba.njit(error_model="numpy", nogil=True, cache=True, **options)(loop)
    return dispatcher


def compiled(loop: Loop) -> Loop:
    """Compile a loop of one thread, whose sums may be added in any order."""
    return _njit(loop, fastmath=SUMS_IN_ANY_ORDER)


def in_tasks(loop: Loop) -> Loop:
    """Compile a loop of several threads, whose ``prange`` counts tasks and whose sums may be added in any order."""
    return _njit(loop, fastmath=SUMS_IN_ANY_ORDER, parallel=PARALLEL)


def to_the_bit(loop: Loop) -> Loop:
    """Compile a loop without reordering arithmetic, so that it gives the bits of torch's single operations."""
    return _njit(loop)


def run_on(threads: int) -> None:
    """Let tasks that this thread starts use ``threads`` threads, or as many as there are."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def value(stored: Any) -> Any:
    """Convert a stored number to float32: float32 and INT8 by value, uint16 as BF16, uint8 as E4M3."""
    raise NotImplementedError("value() can be called from compiled code only")


def _from_half(typingctx: Any, bits: Any) -> tuple[Any, Any]:
    """Convert the bits of a float16 to float32; Numba lacks the type, and processors have it."""

    def emit(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return build.fpext(build.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return numba.types.float32(numba.types.uint16), emit


_half: Any = intrinsic(_from_half)


def _float8(stored: Any) -> Any:
    """Convert the bits of an E4M3 number to float32, by way of float16.

    E4M3's exponent has a bias of 7, float16's a bias of 15 and one bit more: shifted left by 7, the bits are a float16
    of 1/256 of the value. The shift also copies the sign into the exponent's first bit, which is cleared.
    """
    shifted = np.int16(np.int16(np.int8(stored)) << np.int16(7)) & np.int16(~(1 << 14))
    return _half(np.uint16(shifted)) * F32(256)


@overload(value, strict=False)
def _value_by_type(stored: Any) -> Callable[[Any], Any]:
    if stored == numba.types.uint16:  # BF16 is the upper half of a float32
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    if stored == numba.types.uint8:
        return _float8
    return lambda stored: F32(stored)


@compiled
def _exp(x: Any) -> Any:
    """``e ** x`` of a number that is not positive, by operations that can be vectorized.

    ``x = n ln 2 + r`` with ``|r| <= ln 2 / 2``: ``2 ** n`` is an exponent's bits, ``e ** r`` a short series.
    """
    n = np.floor(x * F32(1.4426950408889634) + F32(0.5))
    r = x - n * F32(0.6931471805599453)
    series = F32(1 / 120) + r * F32(1 / 720)
    for factor in (F32(1 / 24), F32(1 / 6), F32(1 / 2), F32(1), F32(1)):
        series = factor + r * series
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return F32(0) if x < F32(-87) else series * power


@compiled
def silu(x: Array, out: Array) -> None:
    """``x / (1 + e ** -x)`` of ``[rows, width]``."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            e = _exp(-abs(x[row, i]))
            out[row, i] = x[row, i] * (F32(1) if x[row, i] > 0 else e) / (F32(1) + e)


@compiled
def rms_norm(x: Array, gain: Array, epsilon: float, out: Array) -> None:
    """RMSNorm of ``x`` ``[rows, width]`` with ``gain`` ``[width]``; ``out`` has the shape of ``x``."""
    width = x.shape[1]
    for row in range(x.shape[0]):
        total = F32(0)
        for i in range(width):
            total += x[row, i] * x[row, i]
        scale = F32(1) / np.sqrt(total / F32(width) + F32(epsilon))
        for i in range(width):
            out[row, i] = x[row, i] * scale * gain[i]


@compiled
def rotate(x: Array, cos: Array, sin: Array, positions: Array, out: Array) -> None:
    """Rotary position embedding of ``x`` ``[tokens, heads, size]``; ``cos`` and ``sin`` are ``[all positions, size]``.

    The sine of a head's first half is negative: there the second half is subtracted.
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


@compiled
def store(pool: Array, tables: Array, slots: Array, positions: Array, new: Array) -> None:
    """Write ``new`` ``[tokens, kv_heads, size]`` into ``pool`` ``[kv_heads, blocks, block, size]``.

    ``tables`` ``[slots, blocks]`` are each slot's blocks; ``slots`` and ``positions`` are ``[tokens]``.
    """
    block = pool.shape[2]
    for token in range(new.shape[0]):
        number, at = tables[slots[token], positions[token] // block], positions[token] % block
        for head in range(new.shape[1]):
            pool[head, number, at] = new[token, head]


@in_tasks
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
    """Attention of one new token of each sequence; K and V are read in place, from the pool's blocks.

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
            stored = keys[kv, blocks[start // block]]
            for g in range(group):
                query = q[sequence, kv * group + g]
                for at in range(min(block, tokens - start)):
                    dot = F32(0)
                    for i in range(size):
                        dot += query[i] * value(stored[at, i])
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
                stored = values[kv, blocks[start // block]]
                for at in range(min(block, tokens - start)):
                    weight = scores[g, start + at]
                    for i in range(size):
                        row[i] += weight * value(stored[at, i])
            for i in range(size):
                row[i] *= value_scale[kv] / total
