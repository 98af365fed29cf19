"""The verbs in which the decoder is written; each op set implements them. Knows tensors and typed weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from trtlab.model.weights import Embedding, LayerNorm, Linear, Norm

T = TypeVar("T")


class Ops(ABC, Generic[T]):
    """The operations that the decoder calls, on the tensor type ``T``.

    ``...`` in a shape stands for the op set's own token dimensions: ``[tokens]`` packed in torch, ``[batch, tokens]``
    padded in TensorRT. Between ``split_heads`` and ``attention`` each op set chooses its own layout of head tensors.
    Positions, masks and the KV cache belong to the op set too; the decoder never sees them.

    An op set must implement the abstract verbs. The others are built from them; an op set with one kernel for several
    verbs overrides these.
    """

    @abstractmethod
    def embedding(self, tokens: T, weight: Embedding) -> T:
        """Token ids ``[...]`` to rows of the table ``[..., hidden]``, in the table's dtype.

        A table cut by rows (``weight.first_row``) gives zero rows for ids that it does not hold.
        """

    @abstractmethod
    def position_embedding(self, tokens: T, weight: Embedding) -> T:
        """The rows of a learned table for the positions of the tokens: ``[..., hidden]``."""

    @abstractmethod
    def rms_norm(self, x: T, weight: Norm) -> T:
        """``x / sqrt(mean(x^2) + epsilon) * gain`` over the last dimension, computed in float32 (arXiv:1910.07467).

        The normalized value is rounded to the storage dtype before the gain multiplies it, as Hugging Face does.
        """

    @abstractmethod
    def layer_norm(self, x: T, weight: LayerNorm) -> T:
        """``(x - mean) / sqrt(variance + epsilon) * gain + bias`` over the last dimension, in float32.

        Source: arXiv:1607.06450.
        """

    @abstractmethod
    def linear(self, x: T, weight: Linear) -> T:
        """``x W^T + b``: ``[..., in]`` to ``[..., out]``; the type of the weight decides the arithmetic."""

    @abstractmethod
    def split_heads(self, qkv: T, heads: int, kv_heads: int) -> tuple[T, T, T]:
        """One fused projection ``[..., (heads + 2 kv_heads) head_size]`` to query, key and value heads."""

    @abstractmethod
    def rotary(self, q: T, k: T) -> tuple[T, T]:
        """Queries and keys rotated by their positions: Hugging Face's half-split rotation (arXiv:2104.09864)."""

    @abstractmethod
    def attention(self, layer: int, q: T, k: T, v: T) -> T:
        """Append keys and values to the cache of ``layer``, then attend causally: ``[..., heads head_size]``.

        The softmax is scaled by ``head_size ** -0.5``. ``layer`` counts from 0 within the rank's own layers.
        """

    @abstractmethod
    def activation(self, kind: str, x: T) -> T:
        """The MLP's activation function, by Hugging Face's name (``silu``, ``gelu``, ...)."""

    @abstractmethod
    def multiply(self, a: T, b: T) -> T:
        """The elementwise product."""

    @abstractmethod
    def add(self, a: T, b: T) -> T:
        """The elementwise sum."""

    @abstractmethod
    def all_reduce(self, x: T) -> T:
        """The sum over the tensor-parallel group; ``x`` itself when the group is one rank."""

    @abstractmethod
    def all_gather(self, x: T) -> T:
        """The parts of all tensor-parallel ranks, concatenated along the last dimension in rank order."""

    @abstractmethod
    def receive(self, tokens: T, hidden_size: int) -> T:
        """The hidden states ``[..., hidden]`` that the previous pipeline stage sent for these tokens."""

    @abstractmethod
    def send(self, x: T) -> T:
        """Send hidden states to the next pipeline stage; the return value is the rank's output."""

    @abstractmethod
    def last_tokens(self, x: T) -> T:
        """The rows of ``[..., hidden]`` whose logits the step asks for."""

    @abstractmethod
    def logits(self, x: T, vocab_size: int) -> T:
        """The first ``vocab_size`` columns in float32, without the padding of a split vocabulary."""

    def norm(self, x: T, weight: Norm) -> T:
        """``rms_norm`` or ``layer_norm``, by the type of the weight."""
        return self.layer_norm(x, weight) if isinstance(weight, LayerNorm) else self.rms_norm(x, weight)

    def add_norm(self, x: T, delta: T | None, weight: Norm) -> tuple[T, T]:
        """The residual stream plus ``delta``, a block's output (None for nothing), and the norm of the sum."""
        total = x if delta is None else self.add(x, delta)
        return total, self.norm(total, weight)

    def self_attention(
        self,
        layer: int,
        qkv: T,
        heads: tuple[int, int],
        norms: tuple[Norm, Norm] | None,
        *,
        rotary: bool,
    ) -> T:
        """From a fused projection to attention: heads, norms of queries and keys, rotary embedding, cache, softmax.

        ``heads`` are the numbers of query and of key/value heads; ``norms`` are the norms of queries and of keys, or
        None.
        """
        q, k, v = self.split_heads(qkv, *heads)
        if norms is not None:
            q, k = self.norm(q, norms[0]), self.norm(k, norms[1])
        if rotary:
            q, k = self.rotary(q, k)
        return self.attention(layer, q, k, v)

    def gated(self, kind: str, x: T, fc: Linear, gate: Linear) -> T:
        """The inner activation of a gated MLP (arXiv:2002.05202): ``activation(fc(x)) * gate(x)``."""
        return self.multiply(self.activation(kind, self.linear(x, fc)), self.linear(x, gate))
