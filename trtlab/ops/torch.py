"""The op set that runs now, on CPU or CUDA: packed tokens, and a cache of one slot a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.errors import ConfigError
from trtlab.model.quantized import KvScales
from trtlab.model.rope import RotaryTable
from trtlab.model.weights import Dense, Embedding, Linear, Norm
from trtlab.ops.quantized import decode_cache, encode_cache, linear
from trtlab.parallel.comm import Comm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


Places = tuple[Tensor | slice, slice, Tensor | int]  # slots, heads and positions, as an index of one layer's cache


class SlotCache:
    """K and V of one rank, ``[slots, kv_heads, capacity, head_size]`` a layer; a slot belongs to one request.

    With ``scales``, one a layer, they are kept in INT8 or FP8 and read back as ``dtype``.
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[KvScales] = (),
    ) -> None:
        shape = (layers, slots, kv_heads, capacity, head_size)
        self._scales = scales
        self._dtype = dtype
        stored = scales[0].dtype if scales else dtype
        self.keys = torch.zeros(shape, dtype=stored, device=device)
        self.values = torch.zeros(shape, dtype=stored, device=device)
        self._layers = list(zip(self.keys, self.values, strict=True))  # views, made once

    def write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> None:
        """New K and V ``[tokens, kv_heads, head_size]`` at their places."""
        if self._scales:
            scales = self._scales[layer]
            k, v = encode_cache(k, scales.keys, scales.dtype), encode_cache(v, scales.values, scales.dtype)
        keys, values = self._layers[layer]
        keys[places] = k
        values[places] = v

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """K and V of neighbouring slots up to ``length`` tokens: ``[slots, kv_heads, length, head_size]`` each."""
        keys, values = self._layers[layer]
        k, v = keys[slots, :, :length], values[slots, :, :length]
        if self._scales:
            scales = self._scales[layer]
            return decode_cache(k, scales.keys, self._dtype), decode_cache(v, scales.values, self._dtype)
        return k, v


@dataclass(frozen=True)
class NewTokens:
    """One request's share of a packed batch: ``length`` new tokens after ``past`` cached ones."""

    slot: int
    past: int
    length: int


class PackedBatch:
    """The tokens of several requests one after another: those with a single new token first, then the longer ones."""

    def __init__(self, sequences: Sequence[NewTokens], rotary: RotaryTable, device: torch.device) -> None:
        self.singles = [s for s in sequences if s.length == 1]
        self.longer = [s for s in sequences if s.length > 1]
        assert list(sequences) == self.singles + self.longer, "single tokens come first"
        positions = [p for s in sequences for p in range(s.past, s.past + s.length)]
        slots = [s.slot for s in sequences for _ in range(s.length)]
        self.positions = torch.tensor(positions, device=device)  # [tokens]
        self.places: Places = (torch.tensor(slots, device=device), slice(None), self.positions)
        self.cos = rotary.cos.index_select(0, self.positions)[:, None]  # [tokens, 1, head_size]
        self.sin = rotary.sin.index_select(0, self.positions)[:, None]
        self.last: Tensor | None = None  # [sequences]: the row of each request's last token, when not every row is one
        if self.longer:
            self.last = torch.tensor([s.length for s in sequences]).cumsum(0).sub(1).to(device)
        self._plan_singles(device)

    def _plan_singles(self, device: torch.device) -> None:
        """Single tokens attend in one call over the range of their slots; a slot between that sits out sees one key."""
        if not self.singles:
            return
        slots, pasts = [s.slot for s in self.singles], [s.past for s in self.singles]
        self.first, self.stop = min(slots), max(slots) + 1
        self.reach = max(pasts) + 1
        self.dense = slots == list(range(self.first, self.stop))
        if self.dense and not self.longer and min(pasts) == max(pasts):  # K and V go to the cache as one block
            self.places = (slice(self.first, self.stop), slice(None), pasts[0])
        self.mask: Tensor | None = None
        if not self.dense:
            self.rows = torch.tensor([s - self.first for s in slots], device=device)
        if not self.dense or min(pasts) != max(pasts):
            lengths = torch.ones(self.stop - self.first, dtype=torch.int64)
            lengths[[s - self.first for s in slots]] = torch.tensor(pasts) + 1
            self.mask = (torch.arange(self.reach) < lengths[:, None])[:, None, None].to(device)  # [slots, 1, 1, reach]


def spread(table: RotaryTable, dtype: torch.dtype, device: torch.device) -> RotaryTable:
    """The table over whole heads ``[positions, head_size]``, the sine negative where the second half comes in."""
    return RotaryTable(
        torch.cat([table.cos, table.cos], -1).to(device, dtype),
        torch.cat([-table.sin, table.sin], -1).to(device, dtype),
    )


class TorchOps:
    """``Ops[Tensor]`` over one packed batch. ``rotary`` tables come from ``spread``."""

    def __init__(self, batch: PackedBatch, cache: SlotCache, comm: Comm, *, every_token: bool = False) -> None:
        self._batch = batch
        self._cache = cache
        self._comm = comm
        self._every_token = every_token

    def embedding(self, tokens: Tensor, weight: Embedding) -> Tensor:
        """See Ops."""
        if weight.first_row is None:
            return F.embedding(tokens, weight.weight)
        local = tokens - weight.first_row
        held = (local >= 0) & (local < weight.weight.shape[0])
        return F.embedding(local * held, weight.weight) * held[:, None].to(weight.weight.dtype)

    def rms_norm(self, x: Tensor, weight: Norm) -> Tensor:
        """See Ops."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight.weight, weight.epsilon)
        wide = x.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(weight.epsilon).rsqrt_()
        return weight.weight * (wide * scale).to(x.dtype)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """See Ops."""
        if type(weight) is Dense:  # the common case, without the dispatch
            return F.linear(x, weight.weight, weight.bias)
        return linear(weight, x)

    def split_heads(self, qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """See Ops."""
        rows = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)  # [tokens, heads + 2 kv_heads, head_size]
        q, k, v = rows.split_with_sizes([heads, kv_heads, kv_heads], 1)
        return q, k, v

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See Ops."""
        heads = q.shape[1]
        same = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        if same and k.storage_offset() == q.storage_offset() + heads * q.stride(1):  # parts of one projection: one turn
            both = self._turn(q.as_strided((q.shape[0], heads + k.shape[1], q.shape[2]), q.stride()))
            return both[:, :heads], both[:, heads:]
        return self._turn(q), self._turn(k)

    def _turn(self, x: Tensor) -> Tensor:
        return torch.addcmul(x * self._batch.cos, x.roll(x.shape[-1] // 2, -1), self._batch.sin)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Ops. Scaled dot products by torch's own kernel, scale ``head_size ** -0.5``."""
        batch = self._batch
        self._cache.write(layer, batch.places, k, v)
        parts = []
        start = len(batch.singles)
        if start:
            parts.append(self._attend_singles(layer, q[:start]))
        for sequence in batch.longer:
            stop = start + sequence.length
            slot = slice(sequence.slot, sequence.slot + 1)
            keys, values = self._cache.read(layer, slot, sequence.past + sequence.length)
            parts.append(_attend_one(sequence, q[start:stop], keys, values))
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_singles(self, layer: int, q: Tensor) -> Tensor:
        batch = self._batch
        keys, values = self._cache.read(layer, slice(batch.first, batch.stop), batch.reach)
        tokens, heads, size = q.shape
        kv_heads = keys.shape[1]
        grouped = q.reshape(tokens, kv_heads, heads // kv_heads, size)  # one key head serves a group of queries
        if not batch.dense:
            wide = grouped.new_zeros((batch.stop - batch.first, *grouped.shape[1:]))
            wide[batch.rows] = grouped
            grouped = wide
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=batch.mask)
        return (out if batch.dense else out[batch.rows]).reshape(tokens, heads * size)

    def activation(self, kind: str, x: Tensor) -> Tensor:
        """See Ops."""
        if kind not in ACTIVATIONS:
            raise ConfigError("unknown activation", got=repr(kind), expected=" | ".join(ACTIVATIONS))
        return ACTIVATIONS[kind](x)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """See Ops."""
        return a * b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See Ops."""
        return a + b

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Ops."""
        return self._comm.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See Ops."""
        return self._comm.all_gather(x)

    def receive(self, tokens: Tensor, hidden_size: int) -> Tensor:
        """See Ops."""
        return self._comm.receive()

    def send(self, x: Tensor) -> Tensor:
        """See Ops."""
        self._comm.send(x)
        return x

    def last_tokens(self, x: Tensor) -> Tensor:
        """See Ops."""
        return x if self._every_token or self._batch.last is None else x[self._batch.last]

    def logits(self, x: Tensor, vocab_size: int) -> Tensor:
        """See Ops."""
        return x[..., :vocab_size].float()


def _attend_one(sequence: NewTokens, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Several new tokens of one request: each sees the cached past and the new tokens up to itself."""
    tokens, heads, size = q.shape
    total = sequence.past + sequence.length
    mask = None
    if sequence.past:
        rows = torch.arange(sequence.past, total, device=q.device)[:, None]
        mask = torch.arange(total, device=q.device) <= rows  # [tokens, total]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, heads, tokens, head_size]
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads != keys.shape[1],
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * size)
