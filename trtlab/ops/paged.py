"""Stores K and V in the blocks of one pool, and computes attention over them. Knows slots, not requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.errors import RequestError
from trtlab.model.quantized_weights import KvScales
from trtlab.model.rope import RotaryTable
from trtlab.model.scales import all_finite
from trtlab.ops.quantized_linear import decode_cache, encode_cache

Kernel = Callable[..., Tensor]  # trtlab.ops.cuda.paged_attention.paged_attention


class BlockTables:
    """The blocks of every slot in the order of its tokens: int32 ``[slots, blocks]``."""

    def __init__(self, slots: int, blocks: int, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.rows = torch.zeros(slots, blocks, dtype=torch.int32)
        self.array = self.rows.numpy()  # the same memory
        self._lists = [[0] * blocks for _ in range(slots)]  # the same numbers, faster to read one at a time

    @classmethod
    def apart(cls, slots: int, capacity: int, tokens_per_block: int | None = None) -> BlockTables:
        """Tables in which each slot has ``capacity`` tokens in neighbouring blocks; by default one block per slot."""
        size = tokens_per_block or capacity
        tables = cls(slots, -(-capacity // size), size)
        count = tables.rows.shape[1]
        for slot in range(slots):
            tables.write(slot, 0, range(slot * count, (slot + 1) * count))
        return tables

    def write(self, slot: int, index: int, blocks: Sequence[int]) -> None:
        """Set the blocks of a slot from the ``index``-th on."""
        if blocks:
            self._lists[slot][index : index + len(blocks)] = blocks
            self.rows[slot, index : index + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def row(self, slot: int, count: int) -> list[int]:
        """The first ``count`` blocks of a slot."""
        return self._lists[slot][:count]

    def place(self, slot: int, position: int) -> int:
        """The place of a slot's token in the pool: block number times block size, plus the offset in the block."""
        size = self.tokens_per_block
        return self._lists[slot][position // size] * size + position % size

    def of(self, slots: Sequence[int], count: int) -> Tensor:
        """The first ``count`` blocks of each slot, ``[slots, count]``."""
        if slots[-1] - slots[0] == len(slots) - 1 and all(b - a == 1 for a, b in pairwise(slots)):
            return self.rows[slots[0] : slots[-1] + 1, :count]
        return self.rows[list(slots), :count]

    def run(self, slots: Sequence[int], count: int) -> slice | None:
        """The first ``count`` blocks of all slots as one slice of the pool; None when they are not neighbours in it."""
        first = self._lists[slots[0]][0]
        last = first + len(slots) * count - 1
        if self._lists[slots[-1]][count - 1] != last:
            return None
        for start, slot in zip(range(first, last + 1, count), slots, strict=True):
            if self._lists[slot][:count] != list(range(start, start + count)):
                return None
        return slice(first, last + 1)


class PagedCache:
    """K and V of one rank, each ``[kv_heads, num_blocks, tokens_per_block, head_size]`` per layer.

    With ``scales``, one per layer, they are stored in INT8 or FP8 and read back as ``dtype``.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        num_blocks: int,
        tokens_per_block: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[KvScales] = (),
    ) -> None:
        shape = (layers, kv_heads, num_blocks, tokens_per_block, head_size)
        self.scales = scales
        self._dtype = dtype
        stored = scales[0].dtype if scales else dtype
        self.keys, self.values = _zeros(shape, stored, device), _zeros(shape, stored, device)
        self.layers = list(zip(self.keys, self.values, strict=True))  # views, made once
        self._flat = [(k.flatten(1, 2), v.flatten(1, 2)) for k, v in self.layers]  # [kv_heads, places, head_size]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Write new K and V ``[tokens, kv_heads, head_size]`` to ``places``, ``block * tokens_per_block + offset``."""
        k, v = self.encoded(layer, k, v)
        keys, values = self._flat[layer]
        keys[:, places] = k.transpose(0, 1)
        values[:, places] = v.transpose(0, 1)

    def encoded(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New K and V in the form that this layer stores.

        Raises:
            RequestError: on a CPU, for NaN or infinity where INT8 or E4M3 would store another number. On a GPU, where
                the check would wait for the device, TensorRT-LLM's conversion saturates them.
        """
        if not self.scales:
            return k, v
        if k.device.type == "cpu" and not _finite(k, v):
            raise RequestError(
                f"K or V of layer {layer} is infinite or not a number, and an 8-bit cache cannot store it",
                remedy="look at the weights and the scales of that layer",
            )
        scales = self.scales[layer]
        return encode_cache(k, scales.keys, scales.dtype), encode_cache(v, scales.values, scales.dtype)

    def read(self, layer: int, blocks: Tensor | slice, sequences: int, length: int) -> tuple[Tensor, Tensor]:
        """K and V of the first ``length`` tokens, each ``[sequences, kv_heads, length, head_size]``.

        ``blocks`` are those of one sequence after the other: numbers, or a slice of the pool, which needs no copy.
        """
        keys, values = (_gather(pool, blocks, sequences)[:, :, :length] for pool in self.layers[layer])
        if self.scales:
            scales = self.scales[layer]
            return decode_cache(keys, scales.keys, self._dtype), decode_cache(values, scales.values, self._dtype)
        return keys, values

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, pairs (source, target) in this order, in every layer."""
        for source, target in copies:
            self.keys[:, :, target] = self.keys[:, :, source]
            self.values[:, :, target] = self.values[:, :, source]


def _finite(k: Tensor, v: Tensor) -> bool:
    """Whether all numbers are finite. A finite sum shows it, and is what a step of single tokens has time for."""
    return math.isfinite(k.sum().item() + v.sum().item()) or (all_finite(k) and all_finite(v))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take no memory and no time until a block is written (numpy requests zeroed pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _gather(pool: Tensor, blocks: Tensor | slice, sequences: int) -> Tensor:
    """``[sequences, kv_heads, places, head_size]`` of one layer's pool."""
    rows = pool[:, blocks] if isinstance(blocks, slice) else pool.index_select(1, blocks)
    return rows.view(pool.shape[0], sequences, -1, pool.shape[-1]).transpose(0, 1)


class NewTokens(NamedTuple):
    """One request's share of a packed batch: ``length`` new tokens after ``past`` cached ones."""

    slot: int
    past: int
    length: int


class PackedBatch:
    """The tokens of several requests in a row: requests with a single new token first, then the longer ones.

    What is the same for all layers is computed here, once per step; ``token_ids`` are moved to the device with it. With
    a ``kernel`` attention reads the blocks in place; without, it reads K and V gathered from them.
    """

    def __init__(
        self,
        sequences: Sequence[NewTokens],
        rotary: RotaryTable,
        tables: BlockTables,
        device: torch.device,
        kernel: Kernel | None = None,
        token_ids: Sequence[int] = (),
    ) -> None:
        lengths = [s.length for s in sequences]
        singles = lengths.count(1)
        assert lengths[:singles] == [1] * singles, f"single tokens must come first, got lengths {lengths}"
        if singles == len(sequences):
            positions = [s.past for s in sequences]
            places = [tables.place(s.slot, s.past) for s in sequences]
        else:
            positions = [p for s in sequences for p in range(s.past, s.past + s.length)]
            places = [tables.place(s.slot, p) for s in sequences for p in range(s.past, s.past + s.length)]
        rows = torch.tensor([*positions, *places, *token_ids]).to(device)  # one copy to the device for all
        count = len(positions)
        self.positions, self.places, self.token_ids = rows[:count], rows[count : 2 * count], rows[2 * count :]
        self.cos = rotary.cos.index_select(0, self.positions)[:, None]  # [tokens, 1, head_size]
        self.sin = rotary.sin.index_select(0, self.positions)[:, None]
        self.last: Tensor | None = None  # [sequences]: the row of each request's last token, if not every row is one
        if singles < len(sequences):
            self.last = torch.tensor(lengths).cumsum(0).sub_(1).to(device)
        self._parts: list[Gathered | InPlace] = []
        longer = sequences[singles:]
        for part in (sequences[:singles], *([[s] for s in longer] if kernel is None else [longer])):
            if part:
                start = sum(earlier.tokens for earlier in self._parts)
                own = self.positions[start : start + sum(s.length for s in part)]
                self._parts.append(
                    Gathered(part, tables, own) if kernel is None else InPlace(part, tables, own, kernel)
                )

    def attend(self, cache: PagedCache, layer: int, q: Tensor) -> Tensor:
        """Attention of ``q`` ``[tokens, heads, head_size]``: ``[tokens, heads * head_size]``.

        The new K and V must be in the cache already.
        """
        if len(self._parts) == 1:
            return self._parts[0].attend(cache, layer, q)
        outputs, start = [], 0
        for part in self._parts:
            outputs.append(part.attend(cache, layer, q[start : start + part.tokens]))
            start += part.tokens
        return torch.cat(outputs)


class Gathered:
    """Torch's attention over gathered K and V: of single tokens of several requests, or several tokens of one."""

    def __init__(self, sequences: Sequence[NewTokens], tables: BlockTables, positions: Tensor) -> None:
        self.tokens = len(positions)
        self._positions = positions
        self._single = sequences[0].length == 1
        self._sequences = len(sequences)
        ends = [s.past + s.length for s in sequences]
        self._reach = max(ends)
        slots, count = [s.slot for s in sequences], -(-self._reach // tables.tokens_per_block)
        run = tables.run(slots, count)
        self._blocks: Tensor | slice = run or tables.of(slots, count).flatten().to(positions.device)
        self._mask: Tensor | None = None
        if min(ends) != self._reach or (not self._single and sequences[0].past):
            self._mask = torch.arange(self._reach, device=positions.device) <= positions[:, None]  # [tokens, reach]
            if self._single:
                self._mask = self._mask[:, None, None]  # [sequences, 1, 1, reach]

    def attend(self, cache: PagedCache, layer: int, q: Tensor) -> Tensor:
        keys, values = cache.read(layer, self._blocks, self._sequences, self._reach)
        tokens, heads, size = q.shape
        if self._single:  # one key head serves a group of queries
            if self._mask is not None:  # places past a row's end may hold NaN of other requests, and 0 x NaN is NaN
                beyond = ~self._mask.view(tokens, 1, self._reach, 1)
                keys, values = keys.masked_fill(beyond, 0), values.masked_fill(beyond, 0)
            grouped = q.reshape(tokens, keys.shape[1], heads // keys.shape[1], size)
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
            return self._with_nan(out.reshape(q.shape), q, keys).flatten(1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],  # [1, heads, tokens, head_size]
            keys,
            values,
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=heads != keys.shape[1],
        )
        return self._with_nan(out[0].transpose(0, 1), q, keys).reshape(tokens, heads * size)

    def _with_nan(self, out: Tensor, q: Tensor, keys: Tensor) -> Tensor:
        """``out`` ``[tokens, heads, size]`` with NaN where the softmax is NaN and torch's kernel for a CPU gave zeros.

        It takes a row whose scores are all NaN or minus infinity for one that is masked as a whole. The score of the
        token with itself is among them; other rows of zeros, as from values that are zero, have a finite one.
        """
        if q.device.type != "cpu" or not (out[..., 0] == 0).any():
            return out
        rows = torch.arange(self._sequences if self._single else 1)
        own = keys[rows, :, self._positions]  # [tokens, kv_heads, size]
        scores = (q.view(len(q), own.shape[1], -1, q.shape[2]) * own[:, :, None]).sum(-1)
        lost = (out == 0).all(-1) & ~scores.view(out.shape[:2]).isfinite()  # [tokens, heads]
        return out.masked_fill(lost[..., None], torch.nan)


class InPlace:
    """Attention of all single tokens, or all longer chunks, by a kernel that reads the block tables."""

    def __init__(self, sequences: Sequence[NewTokens], tables: BlockTables, positions: Tensor, kernel: Kernel) -> None:
        self._kernel = kernel
        self.tokens, device = len(positions), positions.device
        self._most = max(s.length for s in sequences)
        self._longest = max(s.past + s.length for s in sequences)
        count = -(-self._longest // tables.tokens_per_block)
        self._tables = tables.of([s.slot for s in sequences], count).to(device)
        lengths = [s.length for s in sequences]
        pasts = [s.past for s in sequences]
        self._pasts = torch.tensor(pasts, dtype=torch.int32).to(device)
        self._starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)

    def attend(self, cache: PagedCache, layer: int, q: Tensor) -> Tensor:
        keys, values = cache.layers[layer]
        scales = cache.scales[layer] if cache.scales else None
        return self._kernel(
            q,
            keys,
            values,
            self._tables,
            self._pasts,
            self._starts,
            self._longest,
            self._most,
            scales.keys.value if scales else None,
            scales.values.value if scales else None,
        )
