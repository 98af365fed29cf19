"""Attention that reads K and V in place, from the pool's blocks: Triton kernels for CUDA. Writes no cache.

One kernel serves decoding and prefill. A program handles some new tokens of one sequence, all query heads of one KV
head, so that K and V are read once for the group, and a range of the cached positions (flash attention's running
softmax, arXiv:2205.14135). With few programs, the positions are split among several, and a second kernel merges them.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtlab.ops.cuda.launch_shape import LaunchShape, launch_shape, power_of_two, width_of

COMPUTE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    pasts: Tensor,
    starts: Tensor,
    longest: int,
    most: int,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    plan: LaunchShape | None = None,
) -> Tensor:
    """Causal attention of packed new tokens whose K and V are already in the pool. Does not synchronize.

    Args:
        q: ``[tokens, heads, head_size]``, float32, float16 or bfloat16.
        keys, values: One layer's pool, each ``[kv_heads, blocks, tokens_per_block, head_size]``, contiguous; float32,
            float16, bfloat16, int8 or float8_e4m3fn.
        tables: The blocks of each sequence, int32 ``[sequences, max_blocks]``.
        pasts: Tokens cached before the new ones, int32 ``[sequences]``.
        starts: Where each sequence's new tokens begin in ``q``, int32 ``[sequences + 1]``; a sequence may have none.
        longest: About the most tokens of a sequence, past and new. It only decides how the work is split, so a CUDA
            graph stays correct when sequences grow.
        most: An upper bound on the new tokens of a sequence; it must hold.
        key_scale, value_scale: For 8-bit pools, float32 ``[1]`` or ``[kv_heads]``: stored number times scale.
        plan: How the call is split; None to choose it.

    Returns:
        ``[tokens, heads * head_size]``; rows that belong to no sequence are not written.
    """
    tokens, heads, head_size = q.shape
    kv_heads, _, block, _ = keys.shape
    sequences, group = tables.shape[0], heads // kv_heads
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape, (keys.shape, values.shape)
    assert q.stride(2) == 1 and tables.stride(1) == 1 and keys.shape[3] == head_size, (q.stride(), tables.stride())
    plan = plan or launch_shape(q, keys, sequences, longest, most)
    splits = plan.splits
    out = torch.empty(tokens, heads * head_size, dtype=q.dtype, device=q.device)
    # of each split: its weighted values, then the largest scores and the sums, [splits, tokens, heads] each
    parts = out if splits == 1 else q.new_empty(splits * tokens * heads * (head_size + 2), dtype=torch.float32)
    same = keys.dtype == q.dtype or keys.element_size() == 1
    shape = {"HEAD": head_size, "WIDTH": width_of(head_size), "OVERLAP": plan.overlap}
    grid = (-(-most // (plan.rows // group)) * splits, kv_heads, sequences)
    with torch.cuda.device(q.device):  # Triton launches on the current one
        _attend[grid](
            *(q, keys, values, tables, pasts, starts, key_scale, value_scale, parts),
            *(q.stride(0), q.stride(1), tables.stride(0), keys.stride(0), tokens, splits),
            **shape,
            **{"GROUP": group, "ROWS": plan.rows, "BLOCK": block, "TILE": plan.tile, "SPLIT": splits > 1},
            KEY_SCALES=0 if key_scale is None else key_scale.numel(),
            VALUE_SCALES=0 if value_scale is None else value_scale.numel(),
            COMPUTE=COMPUTE[q.dtype if same else torch.float32],
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
        if splits > 1:
            arguments = (parts, pasts, starts, out, tokens, splits, plan.tile)
            _merge[(most, heads, sequences)](*arguments, **shape, SPLITS=power_of_two(splits), launch_pdl=plan.overlap)
    return out


@triton.jit
def _chunk(length: tl.tensor, splits: tl.tensor, tile: tl.tensor) -> tl.tensor:
    """How many positions a split has: whole tiles, computed from the sequence's own length."""
    return tl.cdiv(tl.cdiv(length, splits), tile) * tile


@triton.jit(do_not_specialize=["table_stride", "tokens", "splits"])
def _attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    pasts: tl.tensor,
    starts: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    out: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    pool_stride: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    KEY_SCALES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> None:
    """Attention of some tokens of a sequence, for one KV head and its query heads, over one range of positions."""
    if OVERLAP and SPLIT:
        gdc_launch_dependents()
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - start
    past = tl.load(pasts + sequence)
    PER_TILE: tl.constexpr = ROWS // GROUP
    turn = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits  # the last tokens read the most and start first
    top = turn * PER_TILE  # the first of this program's new tokens
    chunk = _chunk(past + new, splits, TILE)
    first = split * chunk
    last = tl.minimum(first + chunk, past + tl.minimum(top + PER_TILE, new))
    if (top >= new) | (first >= last):
        return

    row = tl.arange(0, ROWS)
    token = top + row // GROUP
    head = kv_head * GROUP + row % GROUP
    alive = (row < PER_TILE * GROUP) & (token < new)
    column = tl.arange(0, WIDTH)
    mask = alive[:, None] & (column < HEAD)[None, :]
    place = (start + token).to(tl.int64) * q_token_stride + head * q_head_stride
    query = tl.load(q + place[:, None] + column[None, :], mask=mask, other=0.0).to(COMPUTE)  # [rows, width]

    scale = HEAD**-0.5 * 1.4426950408889634  # log2(e): powers of two are cheaper
    if KEY_SCALES:
        scale *= tl.load(key_scale + (kv_head if KEY_SCALES > 1 else 0))
    keys += kv_head * pool_stride
    values += kv_head * pool_stride
    table = tables + sequence.to(tl.int64) * table_stride
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    whole = first
    if PER_TILE > 1:  # tiles that every row attends to as a whole need no mask
        whole += tl.maximum(tl.minimum(last, past + top + 1) - first, 0) // TILE * TILE
        peak, total, mixed = _walk(
            query, keys, values, table, first, whole, past + token, peak, total, mixed, scale,
            HEAD, WIDTH, BLOCK, TILE, False,
        )  # fmt: skip
    peak, total, mixed = _walk(
        query, keys, values, table, whole, last, past + token, peak, total, mixed, scale,
        HEAD, WIDTH, BLOCK, TILE, True,
    )  # fmt: skip
    if VALUE_SCALES:
        mixed *= tl.load(value_scale + (kv_head if VALUE_SCALES > 1 else 0))

    heads = tl.num_programs(1) * GROUP
    spot = (split.to(tl.int64) * tokens + start + token) * heads + head  # [rows] of [splits, tokens, heads]
    if SPLIT:
        spots = splits.to(tl.int64) * tokens * heads
        tl.store(out + spots * HEAD + spot, peak, mask=alive)
        tl.store(out + spots * (HEAD + 1) + spot, total, mask=alive)
    else:
        mixed /= total[:, None]
    tl.store(out + spot[:, None] * HEAD + column[None, :], mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _walk(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    limit: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    scale: tl.tensor,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax over positions ``first`` to ``last``; a row attends to those up to its ``limit``.

    A row that attends to none of its first tile becomes NaN here; such a split is past the row, and no merge reads it.
    """
    column = tl.arange(0, WIDTH)
    at = first + tl.arange(0, TILE)
    block = tl.load(table + at // BLOCK, mask=at < last, other=0).to(tl.int64)
    for _ in range(first, last, TILE):
        known = at < last
        place = ((block * BLOCK + at % BLOCK) * HEAD)[:, None] + column[None, :]  # [tile, width]
        key = _fetch(keys + place, known, column, HEAD, WIDTH, MASKED).to(query.dtype)
        scores = tl.dot(query, key.T, input_precision="ieee") * scale  # [rows, tile], in powers of two
        if MASKED:
            scores = tl.where(known[None, :] & (at[None, :] <= limit[:, None]), scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        peak = higher
        total = total * fade + tl.sum(weight, 1)
        value = _fetch(values + place, known, column, HEAD, WIDTH, MASKED).to(query.dtype)
        mixed = tl.dot(weight.to(query.dtype), value, mixed * fade[:, None], input_precision="ieee")
        at += TILE
        block = tl.load(table + at // BLOCK, mask=at < last, other=0).to(tl.int64)  # a tile ahead of K and V
    return peak, total, mixed


@triton.jit
def _fetch(
    pointers: tl.tensor,
    known: tl.tensor,
    column: tl.tensor,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load a tile of K or V; unwritten memory may hold NaN, so it is replaced by zero."""
    if HEAD != WIDTH:
        return tl.load(pointers, mask=known[:, None] & (column < HEAD)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=known[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit(do_not_specialize=["tokens", "splits", "tile"])
def _merge(
    parts: tl.tensor,
    pasts: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    tile: tl.tensor,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Merge a token's splits, one head: ``m = max m_i``, ``l = sum l_i 2^(m_i - m)``, ``sum o_i 2^(m_i - m) / l``."""
    index, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - start
    past = tl.load(pasts + sequence)
    if index >= new:
        return
    used = (past + index) // _chunk(past + new, splits, tile) + 1  # splits that this token sees
    split = tl.arange(0, SPLITS)
    heads = tl.num_programs(1)
    spots = splits.to(tl.int64) * tokens * heads
    spot = (split.to(tl.int64) * tokens + start + index) * heads + head
    seen = split < used
    column = tl.arange(0, WIDTH)
    mask = seen[:, None] & (column < HEAD)[None, :]
    if OVERLAP:
        gdc_wait()
    peak = tl.load(parts + spots * HEAD + spot, mask=seen, other=float("-inf"))
    total = tl.load(parts + spots * (HEAD + 1) + spot, mask=seen, other=0.0)
    mixed = tl.load(parts + spot[:, None] * HEAD + column[None, :], mask=mask, other=0.0)  # [splits, width]
    weight = tl.exp2(peak - tl.max(peak, 0))
    merged = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    row = (start + index).to(tl.int64) * heads + head
    tl.store(out + row * HEAD + column, merged.to(out.dtype.element_ty), mask=column < HEAD)
