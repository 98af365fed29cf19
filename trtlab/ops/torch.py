"""The op set that computes with torch, on CPU or CUDA: packed tokens, and K and V in blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.errors import ConfigError
from trtlab.model.op_set import Ops
from trtlab.model.rope import RotaryTable
from trtlab.model.weights import Dense, Embedding, LayerNorm, Linear, Norm
from trtlab.ops.paged import PackedBatch, PagedCache
from trtlab.ops.quantized_linear import linear
from trtlab.parallel.comm import Comm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def spread(table: RotaryTable, dtype: torch.dtype, device: torch.device) -> RotaryTable:
    """Widen a table of half heads to whole heads, ``[positions, head_size]``.

    The sine of a head's first half is negative: there the second half is subtracted.
    """
    return RotaryTable(
        torch.cat([table.cos, table.cos], -1).to(device, dtype),
        torch.cat([-table.sin, table.sin], -1).to(device, dtype),
    )


class TorchOps(Ops[Tensor]):
    """The verbs on tensors, over one packed batch.

    Args:
        batch: The step's tokens; its rotary tables come from ``spread``.
        cache: Where attention keeps K and V.
        comm: The other ranks.
        every_token: Whether every token gets logits, or only the last one of each request.
    """

    def __init__(self, batch: PackedBatch, cache: PagedCache, comm: Comm, *, every_token: bool = False) -> None:
        self._batch = batch
        self._cache = cache
        self._comm = comm
        self._every_token = every_token

    def embedding(self, tokens: Tensor, weight: Embedding) -> Tensor:
        if weight.first_row is None:
            return F.embedding(tokens, weight.weight)
        local = tokens - weight.first_row
        inside = (local >= 0) & (local < weight.weight.shape[0])  # the other rows are on other ranks
        return F.embedding(local * inside, weight.weight) * inside[:, None].to(weight.weight.dtype)

    def position_embedding(self, tokens: Tensor, weight: Embedding) -> Tensor:
        return F.embedding(self._batch.positions, weight.weight)

    def rms_norm(self, x: Tensor, weight: Norm) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(weight.epsilon).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(weight.weight)

    def layer_norm(self, x: Tensor, weight: LayerNorm) -> Tensor:
        gain, bias = weight.weight.float(), weight.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], gain, bias, weight.epsilon).to(x.dtype)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        if type(weight) is Dense:  # the common case, without the cost of the dispatch
            return F.linear(x, weight.weight, weight.bias)
        return linear(weight, x)

    def split_heads(self, qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)  # [tokens, heads + 2 kv_heads, head_size]
        q, k, v = rows.split_with_sizes([heads, kv_heads, kv_heads], 1)
        return q, k, v

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        heads = q.shape[1]
        same = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        if same and k.storage_offset() == q.storage_offset() + heads * q.stride(1):  # neighbours: rotate them together
            both = self._rotated(q.as_strided((q.shape[0], heads + k.shape[1], q.shape[2]), q.stride()))
            return both[:, :heads], both[:, heads:]
        return self._rotated(q), self._rotated(k)

    def _rotated(self, x: Tensor) -> Tensor:
        return torch.addcmul(x * self._batch.cos, x.roll(x.shape[-1] // 2, -1), self._batch.sin)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Scaled dot products by torch's own kernel, scale ``head_size ** -0.5``.
        self._cache.write(layer, self._batch.places, k, v)
        return self._batch.attend(self._cache, layer, q)

    def activation(self, kind: str, x: Tensor) -> Tensor:
        if kind not in ACTIVATIONS:
            raise ConfigError("unknown activation", got=repr(kind), expected=" | ".join(ACTIVATIONS))
        return ACTIVATIONS[kind](x)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._comm.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._comm.all_gather(x)

    def receive(self, tokens: Tensor, hidden_size: int) -> Tensor:
        return self._comm.receive()

    def send(self, x: Tensor) -> Tensor:
        self._comm.send(x)
        return x

    def last_tokens(self, x: Tensor) -> Tensor:
        return x if self._every_token or self._batch.last is None else x[self._batch.last]

    def logits(self, x: Tensor, vocab_size: int) -> Tensor:
        return x[..., :vocab_size].float()
