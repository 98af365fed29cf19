"""The op set that runs now, on CPU or CUDA: packed tokens, and a cache of one slot a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.errors import ConfigError
from trtlab.model.rope import RotaryTable
from trtlab.model.weights import Dense, Embedding, Norm
from trtlab.parallel.comm import Comm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class SlotCache:
    """K and V of one rank, ``[slots, kv_heads, capacity, head_size]`` a layer; a slot belongs to one request."""

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
    ) -> None:
        shape = (layers, slots, kv_heads, capacity, head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)


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
        self.slots = torch.tensor(slots, device=device)  # [tokens]
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
        # All at one position, in neighbouring slots: K and V go to the cache as one block.
        self.level = self.dense and not self.longer and min(pasts) == max(pasts)
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


PACKED_ELEMENTS = 2**20  # below this, laying a weight out saves less than the call costs


def packed(weight: Dense) -> Dense:
    """The same linear layer with its weight laid out for oneDNN, where that is faster: large, float32, on a CPU.

    At 8 tokens and 768 x 3072 the product takes less than half the time, because nothing is laid out at each call.
    """
    tensor = weight.weight
    fits = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() >= PACKED_ELEMENTS
    if not (fits and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return weight
    with torch.inference_mode(False), torch.no_grad():
        return replace(weight, weight=torch.ops.mkldnn._reorder_linear_weight(tensor))


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
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + weight.epsilon)
        return weight.weight * wide.to(x.dtype)

    def linear(self, x: Tensor, weight: Dense) -> Tensor:
        """See Ops. A weight from ``packed`` goes to oneDNN, which laid it out for its own product."""
        if weight.weight.is_mkldnn:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
            return product
        return F.linear(x, weight.weight, weight.bias)

    def split_heads(self, qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """See Ops."""
        rows = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)  # [tokens, heads + 2 kv_heads, head_size]
        q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See Ops."""
        half = q.shape[-1] // 2
        cos, sin = self._batch.cos, self._batch.sin
        return (
            torch.addcmul(q * cos, q.roll(half, -1), sin),
            torch.addcmul(k * cos, k.roll(half, -1), sin),
        )

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Ops. Scaled dot products by torch's own kernel, scale ``head_size ** -0.5``."""
        batch = self._batch
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for cache, new in ((keys, k), (values, v)):
            if batch.singles and batch.level:
                cache[batch.first : batch.stop, :, batch.reach - 1] = new
            else:
                cache[batch.slots, :, batch.positions] = new
        parts = []
        start = len(batch.singles)
        if start:
            parts.append(self._attend_singles(q[:start], keys, values))
        for sequence in batch.longer:
            stop = start + sequence.length
            parts.append(_attend_one(sequence, q[start:stop], keys, values))
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_singles(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch = self._batch
        tokens, heads, size = q.shape
        kv_heads = keys.shape[1]
        grouped = q.reshape(tokens, kv_heads, heads // kv_heads, size)  # one key head serves a group of queries
        if not batch.dense:
            wide = grouped.new_zeros((batch.stop - batch.first, *grouped.shape[1:]))
            wide[batch.rows] = grouped
            grouped = wide
        out = F.scaled_dot_product_attention(
            grouped,
            keys[batch.first : batch.stop, :, : batch.reach],
            values[batch.first : batch.stop, :, : batch.reach],
            attn_mask=batch.mask,
        )
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
        keys[sequence.slot : sequence.slot + 1, :, :total],
        values[sequence.slot : sequence.slot + 1, :, :total],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads != keys.shape[1],
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * size)
