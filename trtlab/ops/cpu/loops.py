"""The loops that a CPU runs for a step of generation, compiled by Numba. Knows arrays, no tensors.

Whatever K, V and weights are stored in, products and sums are float32: only the order of a sum differs from torch's.
A division by zero gives infinity or NaN, as torch's does: a loop that could end there would take one number at a time.
Compiled code is kept beside this file (or in Numba's cache folder); the first run on a machine takes some seconds, and
so does the first after a change of any file of loops.
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
SUMS_IN_ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}  # all of fast math that keeps infinities and NaN
# Tasks run on OpenMP, whose threads torch's own kernels use too; a pool of their own would fight for the cores.
PARALLEL = find_spec("numba.np.ufunc.omppool") is not None


# Numba renews a loop's compiled code when the loop's own file changes, but not when what it calls does (another file's
# ``value`` or intrinsics). Its cache files are named by the loop's qualified name, so that name ends in all the source.
SOURCE_FILES = ("loops.py", "products.py", "vectors.py")
SOURCE_DIGEST = hashlib.sha256(
    b"\0".join(Path(__file__).with_name(name).read_bytes() for name in SOURCE_FILES)
).hexdigest()[:12]


def _njit(loop: Loop, **options: Any) -> Loop:
    loop.__qualname__ = f"{loop.__qualname__}_{SOURCE_DIGEST}"
    dispatcher: Loop = numba.njit(error_model="numpy", nogil=True, cache=True, **options)(loop)
    return dispatcher


def compiled(loop: Loop) -> Loop:
    """A loop of one thread, whose sums may be added in any order."""
    return _njit(loop, fastmath=SUMS_IN_ANY_ORDER)


def in_tasks(loop: Loop) -> Loop:
    """The same on several threads: what ``prange`` counts are tasks."""
    return _njit(loop, fastmath=SUMS_IN_ANY_ORDER, parallel=PARALLEL)


def to_the_bit(loop: Loop) -> Loop:
    """No arithmetic is moved: what comes out is what torch's operations give, one after the other."""
    return _njit(loop)


def run_on(threads: int) -> None:
    """Let tasks that this thread starts use so many threads, or as many as there are."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def value(stored: Any) -> Any:
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


@overload(value, strict=False)
def _value_by_type(stored: Any) -> Callable[[Any], Any]:
    if stored == numba.types.uint16:  # BF16 is the upper half of a float32
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    if stored == numba.types.uint8:
        return _float8
    return lambda stored: F32(stored)


@compiled
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


@compiled
def silu(x: Array, out: Array) -> None:
    """``x / (1 + e ** -x)`` of ``[rows, width]``."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            e = _exp(-abs(x[row, i]))
            out[row, i] = x[row, i] * (F32(1) if x[row, i] > 0 else e) / (F32(1) + e)


@compiled
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


@compiled
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


@compiled
def store(pool: Array, tables: Array, slots: Array, positions: Array, new: Array) -> None:
    """Put ``new`` ``[tokens, kv_heads, size]`` into ``pool`` ``[kv_heads, blocks, block, size]``.

    ``tables`` ``[slots, blocks]`` hold each slot's blocks; ``slots`` and ``positions`` are ``[tokens]``.
    """
    block = pool.shape[2]
    for token in range(new.shape[0]):
        held, at = tables[slots[token], positions[token] // block], positions[token] % block
        for head in range(new.shape[1]):
            pool[head, held, at] = new[token, head]


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
                        dot += query[i] * value(held[at, i])
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
                        row[i] += weight * value(held[at, i])
            for i in range(size):
                row[i] *= value_scale[kv] / total
