"""Products of one input and rows of BF16, INT8 or INT4, by vector instructions that a compiler does not find by itself.

On most processors such a product is bound by the conversion of numbers to floats, so nothing is converted. A BF16 is
the upper half of a float: interleaving it with zeros makes a float. Four bits in the upper mantissa of 2.0 make
``2 + n / 8``: a byte with these bits is interleaved with the exponent's upper byte. Bit 3 is inverted first, so that
``n`` is the signed number plus 8, from 0 to 15. With AVX-512 a table of the 16 floats fits a register, and one
instruction looks up 16 of them by the lowest four bits of 16 integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

WORDS, BYTES = 16, 32  # numbers that are loaded at a time: a vector of 256 bits, in lanes of 128
# Interleaving stays within the lanes, so it leaves the inputs of 16 words or 32 bytes in this order, 8 per vector.
WORD_ORDER = np.arange(WORDS).reshape(2, 2, 4).transpose(1, 0, 2).ravel()
ORDER = np.arange(BYTES).reshape(2, 2, 2, 4).transpose(1, 2, 0, 3).ravel()
CENTRE = 3.0  # the float of the number 0: 2 + 8 / 8
STEP = 0.125  # the difference between the floats of n and n + 1

INT8, INT16, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS = ir.VectorType(FLOAT, 8)
HAS_TABLES = "+avx512f" in (config.CPU_FEATURES or get_host_cpu_features())  # type: ignore[attr-defined]
LANES = 16  # floats of a vector of 512 bits
TABLE_BYTES = 4 * LANES  # that are loaded at a time for a look-up: as LANES integers of 4 inputs each
TABLE_ORDER = np.arange(TABLE_BYTES).reshape(LANES, 4).T.ravel()


def _all(kind: ir.Type, count: int, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _shuffled(build: ir.IRBuilder, a: ir.Value, b: ir.Value, places: list[int]) -> ir.Value:
    """Elements of two vectors by index; those of the second follow the first's."""
    return build.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(places)), places))


def _interleaved(build: ir.IRBuilder, a: ir.Value, b: ir.Value, half: int) -> ir.Value:
    """Elements of ``a`` and ``b`` in alternation, from the lower or the upper half of each lane."""
    count = a.type.count
    lane = count // 2
    starts = [first + half * lane // 2 for first in (0, lane)]
    return _shuffled(build, a, b, [p + at for s in starts for at in range(s, s + lane // 2) for p in (0, count)])


def _floats(build: ir.IRBuilder, bits: ir.Value) -> list[ir.Value]:
    """``2 + n / 8`` for 32 bytes with ``n`` in bits 3 to 6: four vectors, their inputs in ORDER."""
    floats = []
    for half in (0, 1):
        words = _interleaved(build, bits, _all(INT8, BYTES, 0x40), half)
        floats += _from_upper_halves(build, build.bitcast(words, ir.VectorType(INT16, WORDS)))
    return floats


def _from_upper_halves(build: ir.IRBuilder, words: ir.Value) -> list[ir.Value]:
    """The floats whose upper halves are these 16 words: two vectors, their inputs in WORD_ORDER."""
    zeros = _all(INT16, WORDS, 0)
    return [build.bitcast(_interleaved(build, zeros, words, half), FLOATS) for half in (0, 1)]


def _add_product(build: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
    """Add ``a * b`` to the vector stored at ``total``, in one instruction where the processor has it."""
    product = build.fmul(a, b, flags=("contract",))
    build.store(build.fadd(build.load(total), product, flags=("contract",)), total)


def _sum(build: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    lanes = width = vector.type.count
    while width > 1:
        width //= 2
        upper = _shuffled(build, vector, vector, [(at + width) % lanes for at in range(lanes)])
        vector = build.fadd(vector, upper)
    return build.extract_element(vector, ir.Constant(INT32, 0))


def _dot_bf16(typingctx: Any, stored: Any, inputs: Any) -> tuple[Any, Any]:
    """Dot product of BF16 numbers (uint16 ``[in]``, a multiple of 32) and float32 ``[in]``, each 16 in WORD_ORDER."""
    return types.float32(stored, inputs), _emit_bf16


dot_bf16: Any = intrinsic(_dot_bf16)


def _emit_bf16(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    stored, inputs = (
        context.make_array(kind)(context, build, value) for kind, value in zip(signature.args, arguments, strict=True)
    )
    width = cgutils.unpack_tuple(build, stored.shape)[0]
    chains = [cgutils.alloca_once_value(build, _all(FLOAT, 8, 0.0)) for _ in range(4)]
    with cgutils.for_range(build, build.udiv(width, INT64(2 * WORDS))) as step:
        at = build.mul(step.index, INT64(2 * WORDS))
        for number in (0, 1):
            first = build.add(at, INT64(number * WORDS))
            place = build.bitcast(build.gep(stored.data, [first]), ir.VectorType(INT16, WORDS).as_pointer())
            x = build.bitcast(build.gep(inputs.data, [first]), FLOATS.as_pointer())
            for half, floats in enumerate(_from_upper_halves(build, build.load(place, align=2))):
                factor = build.load(build.gep(x, [INT64(half)]), align=4)
                _add_product(build, chains[2 * number + half], floats, factor)
    a, b, c, d = (build.load(chain) for chain in chains)
    return _sum(build, build.fadd(build.fadd(a, b), build.fadd(c, d)))


def _dot_int8(typingctx: Any, stored: Any, inputs: Any) -> tuple[Any, Any]:
    """Dot product of int8 ``[in]``, a multiple of 64, and float32 ``[in]``, in longer vectors than a compiler's."""
    return types.float32(stored, inputs), _emit_int8


dot_int8: Any = intrinsic(_dot_int8)


def _emit_int8(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    stored, inputs = (
        context.make_array(kind)(context, build, value) for kind, value in zip(signature.args, arguments, strict=True)
    )
    width = cgutils.unpack_tuple(build, stored.shape)[0]
    floats, integers = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
    chains = [cgutils.alloca_once_value(build, _all(FLOAT, LANES, 0.0)) for _ in range(4)]
    with cgutils.for_range(build, build.udiv(width, INT64(4 * LANES))) as step:
        for number, chain in enumerate(chains):
            first = build.add(build.mul(step.index, INT64(4 * LANES)), INT64(number * LANES))
            place = build.bitcast(build.gep(stored.data, [first]), ir.VectorType(INT8, LANES).as_pointer())
            x = build.load(build.bitcast(build.gep(inputs.data, [first]), floats.as_pointer()), align=4)
            numbers = build.sext(build.load(place, align=1), integers)
            _add_product(build, chain, build.sitofp(numbers, floats), x)
    a, b, c, d = (build.load(chain) for chain in chains)
    return _sum(build, build.fadd(build.fadd(a, b), build.fadd(c, d)))


def _two_dots(
    typingctx: Any, stored: Any, inputs: Any, starts: Any, low_scale: Any, high_scale: Any, size: Any
) -> tuple[Any, Any]:
    """For the lower and the upper row: ``sum over groups of scale * (start + sum of x (2 + n / 8))``.

    With a group's start at ``-CENTRE`` times the sum of its inputs, this is STEP times the row's dot product.

    ``stored`` int8 ``[in]``; ``inputs`` float32 ``[in]``, each 32 in ORDER; ``starts`` and the scales ``[groups]``, of
    ``size`` inputs each, a multiple of 32.
    """
    signature = types.UniTuple(types.float32, 2)(stored, inputs, starts, low_scale, high_scale, types.intp)
    return signature, _emit_two_dots


two_dots: Any = intrinsic(_two_dots)


def _emit_two_dots(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    kinds = signature.args[:-1]
    arrays = [context.make_array(kind)(context, build, value) for kind, value in zip(kinds, arguments, strict=False)]
    stored, inputs, starts, *scales = (array.data for array in arrays)
    groups, size, zeros = cgutils.unpack_tuple(build, arrays[2].shape)[0], arguments[-1], _all(FLOAT, 8, 0.0)
    totals = [cgutils.alloca_once_value(build, zeros) for _ in scales]
    sums = [[cgutils.alloca_once_value(build, zeros) for _ in range(2)] for _ in scales]  # two chains per row
    with cgutils.for_range(build, groups) as group:
        start = build.load(build.gep(starts, [group.index]))
        for chains in sums:
            build.store(build.insert_element(zeros, start, INT32(0)), chains[0])
            build.store(zeros, chains[1])
        first = build.mul(group.index, size)
        with cgutils.for_range(build, build.udiv(size, INT64(BYTES))) as step:
            at = build.add(first, build.mul(step.index, INT64(BYTES)))
            _add_32(build, build.gep(stored, [at]), build.gep(inputs, [at]), sums)
        for total, chains, scale in zip(totals, sums, scales, strict=True):
            first_only = build.insert_element(zeros, build.load(build.gep(scale, [group.index])), INT32(0))
            factors = _shuffled(build, first_only, first_only, [0] * 8)
            _add_product(build, total, build.fadd(*map(build.load, chains)), factors)
    return context.make_tuple(build, signature.return_type, [_sum(build, build.load(total)) for total in totals])


def _two_dots_by_table(
    typingctx: Any, stored: Any, inputs: Any, low_scale: Any, high_scale: Any, size: Any
) -> tuple[Any, Any]:
    """For the lower and the upper row: ``sum over groups of scale * (sum of x n)``, for processors with HAS_TABLES.

    As ``two_dots``, with ``inputs`` each TABLE_BYTES in TABLE_ORDER, and ``size`` a multiple of TABLE_BYTES.
    """
    signature = types.UniTuple(types.float32, 2)(stored, inputs, low_scale, high_scale, types.intp)
    return signature, _emit_two_dots_by_table


two_dots_by_table: Any = intrinsic(_two_dots_by_table)


def _emit_two_dots_by_table(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    kinds = signature.args[:-1]
    arrays = [context.make_array(kind)(context, build, value) for kind, value in zip(kinds, arguments, strict=False)]
    stored, inputs, *scales = (array.data for array in arrays)
    groups, size, zeros = cgutils.unpack_tuple(build, arrays[2].shape)[0], arguments[-1], _all(FLOAT, LANES, 0.0)
    totals = [cgutils.alloca_once_value(build, zeros) for _ in scales]
    sums = [[cgutils.alloca_once_value(build, zeros) for _ in range(4)] for _ in scales]  # four chains per row
    with cgutils.for_range(build, groups) as group:
        for chain in (*sums[0], *sums[1]):
            build.store(zeros, chain)
        first = build.mul(group.index, size)
        with cgutils.for_range(build, build.udiv(size, INT64(TABLE_BYTES))) as step:
            at = build.add(first, build.mul(step.index, INT64(TABLE_BYTES)))
            _add_looked_up(build, build.gep(stored, [at]), build.gep(inputs, [at]), sums)
        for total, chains, scale in zip(totals, sums, scales, strict=True):
            a, b, c, d = map(build.load, chains)
            first_only = build.insert_element(zeros, build.load(build.gep(scale, [group.index])), INT32(0))
            factors = _shuffled(build, first_only, first_only, [0] * LANES)
            _add_product(build, total, build.fadd(build.fadd(a, b), build.fadd(c, d)), factors)
    return context.make_tuple(build, signature.return_type, [_sum(build, build.load(total)) for total in totals])


def _widen_two_by_table(
    typingctx: Any, stored: Any, low: Any, high: Any, low_scale: Any, high_scale: Any
) -> tuple[Any, Any]:
    """Write the numbers of the lower and the upper row, times a scale each: float32 ``[in]``, in TABLE_ORDER.

    ``stored`` int8 ``[in]``, a multiple of TABLE_BYTES, for processors with HAS_TABLES.
    """
    return types.void(stored, low, high, types.float32, types.float32), _emit_widen_two_by_table


widen_two_by_table: Any = intrinsic(_widen_two_by_table)


def _emit_widen_two_by_table(context: Any, build: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    kinds = signature.args[:3]
    stored, *rows = (context.make_array(kind)(context, build, v) for kind, v in zip(kinds, arguments, strict=False))
    floats = ir.VectorType(FLOAT, LANES)
    factors = []
    for scale in arguments[3:]:
        first_only = build.insert_element(_all(FLOAT, LANES, 0.0), scale, INT32(0))
        factors.append(_shuffled(build, first_only, first_only, [0] * LANES))
    width = cgutils.unpack_tuple(build, stored.shape)[0]
    with cgutils.for_range(build, build.udiv(width, INT64(TABLE_BYTES))) as step:
        at = build.mul(step.index, INT64(TABLE_BYTES))
        looked_up = _looked_up(build, build.gep(stored.data, [at]))
        for row, factor, numbers in zip(rows, factors, looked_up, strict=True):
            place = build.bitcast(build.gep(row.data, [at]), floats.as_pointer())
            for number, values in enumerate(numbers):
                build.store(build.fmul(values, factor), build.gep(place, [INT64(number)]), align=4)
    return context.get_dummy_value()


def _looked_up(build: ir.IRBuilder, stored: ir.Value) -> list[list[ir.Value]]:
    """The floats of TABLE_BYTES bytes in TABLE_ORDER: for the lower and the upper row four vectors each."""
    integers, floats = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT, LANES)
    look_up = cgutils.get_or_insert_function(
        build.module, ir.FunctionType(floats, [floats, integers]), "llvm.x86.avx512.permvar.sf.512"
    )
    table = ir.Constant(floats, [float(n if n < 8 else n - 16) for n in range(LANES)])
    bits = build.load(build.bitcast(stored, integers.as_pointer()), align=1)

    def row(shift: int) -> list[ir.Value]:  # higher bits are not looked at
        places = [build.lshr(bits, _all(INT32, LANES, 8 * number + shift)) for number in range(4)]
        return [build.call(look_up, [table, place]) for place in places]

    return [row(0), row(4)]


def _add_looked_up(build: ir.IRBuilder, stored: ir.Value, inputs: ir.Value, sums: list[list[ir.Value]]) -> None:
    """Add the products of TABLE_BYTES bytes, each with one number of both rows, and as many inputs."""
    place = build.bitcast(inputs, ir.VectorType(FLOAT, LANES).as_pointer())
    for chains, numbers in zip(sums, _looked_up(build, stored), strict=True):
        for number, values in enumerate(numbers):
            x = build.load(build.gep(place, [INT64(number)]), align=4)
            _add_product(build, chains[number], values, x)


def _add_32(build: ir.IRBuilder, stored: ir.Value, inputs: ir.Value, sums: list[list[ir.Value]]) -> None:
    """Add the products of 32 bytes, each with one number of both rows, and 32 inputs."""
    both = build.load(build.bitcast(stored, ir.VectorType(INT8, BYTES).as_pointer()), align=1)
    biased = build.xor(both, _all(INT8, BYTES, -0x78))  # inverts bit 3 of both numbers
    low = build.and_(build.shl(biased, _all(INT8, BYTES, 3)), _all(INT8, BYTES, 0x78))
    high = build.and_(build.lshr(biased, _all(INT8, BYTES, 1)), _all(INT8, BYTES, 0x78))
    place = build.bitcast(inputs, FLOATS.as_pointer())
    x = [build.load(build.gep(place, [INT64(number)]), align=4) for number in range(BYTES // 8)]
    for chains, bits in zip(sums, (low, high), strict=True):
        for number, floats in enumerate(_floats(build, bits)):
            _add_product(build, chains[number % 2], floats, x[number])
