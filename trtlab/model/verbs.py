"""The verbs that a decoder is written in; each op set gives them another meaning. Knows tensors, not models."""

from __future__ import annotations

from typing import Protocol, TypeVar

from trtlab.model.weights import Embedding, Linear, Norm

T = TypeVar("T")


class Ops(Protocol[T]):
    """What a decoder may ask for, in the tensor type ``T``.

    ``...`` in a shape stands for the op set's own token dimensions: ``[tokens]`` packed in torch, ``[batch, tokens]``
    padded in TensorRT. Head tensors are the op set's own affair between ``split_heads`` and ``attention``. Positions,
    masks and the KV cache belong to the op set too; a decoder never sees them.
    """

    def embedding(self, tokens: T, weight: Embedding) -> T:
        """Token ids ``[...]`` to rows of the table ``[..., hidden]``, in the table's dtype.

        A table cut by rows (``weight.first_row``) gives zero rows for ids it does not hold.
        """
        ...

    def rms_norm(self, x: T, weight: Norm) -> T:
        """``x / sqrt(mean(x^2) + epsilon) * gain`` over the last dimension, computed in float32 (arXiv:1910.07467).

        The normalized value is rounded to the storage dtype before the gain multiplies it, as Hugging Face does.
        """
        ...

    def linear(self, x: T, weight: Linear) -> T:
        """``x W^T + b``: ``[..., in]`` to ``[..., out]``, by the type of the weight."""
        ...

    def split_heads(self, qkv: T, heads: int, kv_heads: int) -> tuple[T, T, T]:
        """One fused projection ``[..., (heads + 2 kv_heads) head_size]`` to query, key and value heads."""
        ...

    def rotary(self, q: T, k: T) -> tuple[T, T]:
        """Queries and keys turned by their positions: the half-split rotation of Hugging Face (arXiv:2104.09864)."""
        ...

    def attention(self, layer: int, q: T, k: T, v: T) -> T:
        """Keys and values join the cache of ``layer``; each query sees its own past. Gives ``[..., heads head_size]``.

        ``layer`` counts from 0 within the rank's own layers.
        """
        ...

    def activation(self, kind: str, x: T) -> T:
        """The MLP's activation function, by Hugging Face's name (``silu``, ``gelu``, ...)."""
        ...

    def multiply(self, a: T, b: T) -> T:
        """The elementwise product."""
        ...

    def add(self, a: T, b: T) -> T:
        """The elementwise sum."""
        ...

    def all_reduce(self, x: T) -> T:
        """The sum over the tensor-parallel group; ``x`` itself when the group is one rank."""
        ...

    def all_gather(self, x: T) -> T:
        """The parts of the tensor-parallel group side by side along the last dimension, by rank."""
        ...

    def receive(self, tokens: T, hidden_size: int) -> T:
        """The hidden states ``[..., hidden]`` that the stage before sent for these tokens."""
        ...

    def send(self, x: T) -> T:
        """Hidden states to the next stage; what it returns is the rank's output."""
        ...

    def last_tokens(self, x: T) -> T:
        """Those rows of ``[..., hidden]`` whose logits are wanted."""
        ...

    def logits(self, x: T, vocab_size: int) -> T:
        """The first ``vocab_size`` columns, in float32: the padding of a split vocabulary goes."""
        ...
