"""K and V in blocks of one pool, and attention over them: how they are written, found and read. Knows no requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.model.quantized import KvScales
from trtlab.model.rope import RotaryTable
from trtlab.ops.quantized import decode_cache, encode_cache

Kernel = Callable[..., Tensor]  # trtlab.ops.paged_triton.paged_attention


class BlockTables:
    """The blocks of every slot in the order of its tokens: int32 ``[slots, blocks]``."""

    def __init__(self, slots: int, blocks: int, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.rows = torch.zeros(slots, blocks, dtype=torch.int32)

    @classmethod
    def apart(cls, slots: int, capacity: int, tokens_per_block: int | None = None) -> BlockTables:
        """Slots of ``capacity`` tokens one after another, in neighbouring blocks; by default one block each."""
        size = tokens_per_block or capacity
        tables = cls(slots, -(-capacity // size), size)
        tables.rows = torch.arange(tables.rows.numel(), dtype=torch.int32).view(slots, -1)
        return tables

    def write(self, slot: int, index: int, blocks: Sequence[int]) -> None:
        """The blocks of a slot from the ``index``-th on."""
        if blocks:
            self.rows[slot, index : index + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def row(self, slot: int, count: int) -> list[int]:
        """The first ``count`` blocks of a slot."""
        row: list[int] = self.rows[slot, :count].tolist()
        return row


class PagedCache:
    """K and V of one rank, ``[kv_heads, num_blocks, tokens_per_block, head_size]`` a layer each.

    With ``scales``, one a layer, they are kept in INT8 or FP8 and read back as ``dtype``.
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
        self.keys = torch.zeros(shape, dtype=stored, device=device)
        self.values = torch.zeros(shape, dtype=stored, device=device)
        self.layers = list(zip(self.keys, self.values, strict=True))  # views, made once
        self._flat = [(k.flatten(1, 2), v.flatten(1, 2)) for k, v in self.layers]  # [kv_heads, places, head_size]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """New K and V ``[tokens, kv_heads, head_size]`` at their places, ``block * tokens_per_block + offset``."""
        if self.scales:
            scales = self.scales[layer]
            k, v = encode_cache(k, scales.keys, scales.dtype), encode_cache(v, scales.values, scales.dtype)
        keys, values = self._flat[layer]
        keys[:, places] = k.transpose(0, 1)
        values[:, places] = v.transpose(0, 1)

    def read(self, layer: int, blocks: Tensor | slice, sequences: int, length: int) -> tuple[Tensor, Tensor]:
        """K and V up to ``length`` tokens, ``[sequences, kv_heads, length, head_size]`` each.

        ``blocks`` are those of one sequence after the other, as numbers, or as a run of neighbours, which is not copied.
        """
        keys, values = (_gather(pool, blocks, sequences)[:, :, :length] for pool in self.layers[layer])
        if self.scales:
            scales = self.scales[layer]
            return decode_cache(keys, scales.keys, self._dtype), decode_cache(values, scales.values, self._dtype)
        return keys, values

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target) one after another, in every layer."""
        for source, target in copies:
            self.keys[:, :, target] = self.keys[:, :, source]
            self.values[:, :, target] = self.values[:, :, source]


def _gather(pool: Tensor, blocks: Tensor | slice, sequences: int) -> Tensor:
    """``[sequences, kv_heads, places, head_size]`` of one layer's pool."""
    found = pool[:, blocks] if isinstance(blocks, slice) else pool.index_select(1, blocks)
    return found.view(pool.shape[0], sequences, -1, pool.shape[-1]).transpose(0, 1)


@dataclass(frozen=True)
class NewTokens:
    """One request's share of a packed batch: ``length`` new tokens after ``past`` cached ones."""

    slot: int
    past: int
    length: int


class PackedBatch:
    """The tokens of several requests one after another: those with a single new token first, then the longer ones.

    What is the same for all layers is worked out here, once a step. With a ``kernel`` attention reads the blocks where
    they lie; without, it works on K and V gathered from them.
    """

    def __init__(
        self,
        sequences: Sequence[NewTokens],
        rotary: RotaryTable,
        tables: BlockTables,
        device: torch.device,
        kernel: Kernel | None = None,
    ) -> None:
        singles = sum(s.length == 1 for s in sequences)
        assert all(s.length == 1 for s in sequences[:singles]), "single tokens come first"
        size = tables.tokens_per_block
        if singles == len(sequences):
            positions = torch.tensor([s.past for s in sequences])
            slots = torch.tensor([s.slot for s in sequences])
            self.last: Tensor | None = (
                None  # [sequences]: the row of each request's last token, unless every row is one
            )
        else:
            positions = torch.tensor([p for s in sequences for p in range(s.past, s.past + s.length)])
            slots = torch.tensor([s.slot for s in sequences for _ in range(s.length)])
            self.last = torch.tensor([s.length for s in sequences]).cumsum(0).sub_(1).to(device)
        blocks = tables.rows[slots, positions // size]
        self.places = (blocks * size + positions % size).to(device)  # [tokens]
        self.positions = positions.to(device)  # [tokens]
        self.cos = rotary.cos.index_select(0, self.positions)[:, None]  # [tokens, 1, head_size]
        self.sin = rotary.sin.index_select(0, self.positions)[:, None]
        make = _Gathered if kernel is None else _InPlace
        parts = [sequences[:singles], *([s] for s in sequences[singles:])]
        if kernel is not None:
            parts = [sequences[:singles], sequences[singles:]]
        self._parts = [make(part, tables, device, kernel) for part in parts if part]

    def attend(self, cache: PagedCache, layer: int, q: Tensor) -> Tensor:
        """``[tokens, heads, head_size]`` to ``[tokens, heads * head_size]``; the new K and V are in the cache."""
        if len(self._parts) == 1:
            return self._parts[0].attend(cache, layer, q)
        found, start = [], 0
        for part in self._parts:
            found.append(part.attend(cache, layer, q[start : start + part.tokens]))
            start += part.tokens
        return torch.cat(found)


class _Gathered:
    """Single tokens of several requests, or several tokens of one: torch's attention over K and V put side by side."""

    def __init__(
        self, sequences: Sequence[NewTokens], tables: BlockTables, device: torch.device, _: Kernel | None
    ) -> None:
        self.tokens = sum(s.length for s in sequences)
        self._single = sequences[0].length == 1
        self._past = sequences[0].past
        ends = [s.past + s.length for s in sequences]
        self._reach = max(ends)
        count = -(-self._reach // tables.tokens_per_block)
        self._sequences = len(sequences)
        numbers = tables.rows[[s.slot for s in sequences], :count].flatten()
        first = int(numbers[0])
        self._blocks: Tensor | slice = slice(first, first + numbers.numel())
        if numbers.numel() > 1 and not bool((numbers.diff() == 1).all()):
            self._blocks = numbers.to(device)
        self._mask: Tensor | None = None
        if self._single and min(ends) != self._reach:
            lengths = torch.tensor(ends)[:, None]
            self._mask = (torch.arange(self._reach) < lengths)[:, None, None].to(device)  # [sequences, 1, 1, reach]
        elif not self._single and self._past:
            rows = torch.arange(self._past, self._reach)[:, None]
            self._mask = (torch.arange(self._reach) <= rows).to(device)  # [tokens, reach]

    def attend(self, cache: PagedCache, layer: int, q: Tensor) -> Tensor:
        keys, values = cache.read(layer, self._blocks, self._sequences, self._reach)
        tokens, heads, size = q.shape
        if self._single:  # one key head serves a group of queries
            grouped = q.reshape(tokens, keys.shape[1], heads // keys.shape[1], size)
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
            return out.reshape(tokens, heads * size)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],  # [1, heads, tokens, head_size]
            keys,
            values,
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=heads != keys.shape[1],
        )
        return out[0].transpose(0, 1).reshape(tokens, heads * size)


class _InPlace:
    """All single tokens, or all longer pieces, by a kernel that walks the block tables."""

    def __init__(
        self, sequences: Sequence[NewTokens], tables: BlockTables, device: torch.device, kernel: Kernel | None
    ) -> None:
        assert kernel is not None, "only with a kernel"
        self._kernel = kernel
        lengths = [s.length for s in sequences]
        self.tokens, self._most = sum(lengths), max(lengths)
        self._longest = max(s.past + s.length for s in sequences)
        count = -(-self._longest // tables.tokens_per_block)
        self._tables = tables.rows[[s.slot for s in sequences], :count].to(device)
        self._pasts = torch.tensor([s.past for s in sequences], dtype=torch.int32).to(device)
        self._starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

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
