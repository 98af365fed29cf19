"""The op set that computes nothing and writes one table row per op: shapes, bytes, FLOPs. Works on meta tensors.

How FLOPs are counted:

- a matrix product: 2 per multiply-add;
- an elementwise op: 1 per element and operation, an activation function counting as one operation;
- attention: its two products over the keys that each query attends to, without the softmax;
- what only moves data (lookup, gather, all-reduce, send): 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from trtlab.card import Shown
from trtlab.model.op_set import Ops
from trtlab.model.quantized_weights import tensor_bytes
from trtlab.model.weights import Embedding, LayerNorm, Linear, Norm

# FLOPs per element.
RMS_NORM_FLOPS = 4  # square, sum for the mean, multiply by the inverse root, multiply by the gain
LAYER_NORM_FLOPS = 7  # sum for the mean, subtract the mean, square, sum for the variance, inverse root, gain, bias
ROTARY_FLOPS = 3  # multiply by the cosine, multiply by the sine, add


class Span(NamedTuple):
    """A request's share of a packed step: ``length`` new tokens after ``past`` cached ones, the same for each."""

    past: int
    length: int
    requests: int = 1

    @property
    def tokens(self) -> int:
        """New tokens of all these requests."""
        return self.requests * self.length

    @property
    def keys_seen(self) -> int:
        """Pairs of a new token and a key that it attends to: the past tokens, the new ones before it, and itself."""
        return self.tokens * self.past + self.tokens * (self.length + 1) // 2


@dataclass(frozen=True)
class Spec:
    """A tensor without data. ``storage`` names the tensor that owns its memory: itself, or the source of a view."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: str

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)

    @property
    def new_bytes(self) -> int:
        """Bytes of memory of its own: 0 for a view."""
        return self.elements * self.dtype.itemsize if self.storage == self.name else 0


@dataclass(frozen=True)
class OpRow:
    """One op: its inputs, its outputs and its cost. ``weight_bytes`` includes the bias."""

    op: str
    weight: str | None
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    weight_bytes: int
    flops: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.outputs[0].shape

    @property
    def activation_bytes(self) -> int:
        """Bytes of the outputs; a view takes none."""
        return sum(out.new_bytes for out in self.outputs)


@dataclass(frozen=True, repr=False)
class OpTable(Shown):
    """The rows of one step of one rank, in the order in which they run."""

    rows: tuple[OpRow, ...]

    @property
    def flops(self) -> int:
        """FLOPs of the step."""
        return sum(row.flops for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that the step reads; a table that is both lookup and head counts once."""
        return sum({row.weight: row.weight_bytes for row in self.rows if row.weight}.values())

    @property
    def live_bytes(self) -> list[int]:
        """Bytes of activations alive while each row runs.

        A tensor is alive from the row that writes it to the last row that reads it or a view of it; the last result
        stays alive. Workspace inside an op is not counted, and token ids are not an activation.
        """
        last = {spec.storage: i for i, row in enumerate(self.rows) for spec in (*row.inputs, *row.outputs)}
        live, alive, total = [], dict[str, int](), 0
        for i, row in enumerate(self.rows):
            outputs = {out.name: out.new_bytes for out in row.outputs if out.new_bytes}
            alive |= outputs
            total += sum(outputs.values())
            live.append(total)
            for name in [name for name in alive if last[name] <= i]:
                total -= alive.pop(name)
        return live

    @property
    def peak_bytes(self) -> int:
        """The most activation bytes alive at once."""
        return max(self.live_bytes, default=0)


class TableOps(Ops[Spec]):
    """The verbs on shapes, over one packed step of a rank; every verb appends to ``rows``.

    The module's docstring says how FLOPs are counted. An op that does nothing writes no row: a sum over one rank, or
    the choice of last tokens where there are no others.

    Args:
        spans: The requests of the step.
        dtype: Of the activations.
        tp_size: Ranks of the tensor-parallel group.
        every_token: Whether every token gets logits, or only the last one of each request.
    """

    def __init__(
        self, spans: Sequence[Span], *, dtype: torch.dtype, tp_size: int = 1, every_token: bool = False
    ) -> None:
        self._spans = tuple(spans)
        self._dtype = dtype
        self._tp_size = tp_size
        self._every_token = every_token
        self.rows: list[OpRow] = []

    @property
    def table(self) -> OpTable:
        """The rows written so far."""
        return OpTable(tuple(self.rows))

    def tokens(self) -> Spec:
        """The step's token ids ``[tokens]``, the decoder's first input."""
        return Spec("tokens", (sum(span.tokens for span in self._spans),), torch.int64, "tokens")

    def embedding(self, tokens: Spec, weight: Embedding) -> Spec:
        shape = (*tokens.shape, weight.weight.shape[1])
        return self._write("embedding", (tokens,), shape, weight=weight)

    def position_embedding(self, tokens: Spec, weight: Embedding) -> Spec:
        shape = (*tokens.shape, weight.weight.shape[1])
        return self._write("position_embedding", (tokens,), shape, weight=weight)

    def rms_norm(self, x: Spec, weight: Norm) -> Spec:
        return self._write("rms_norm", (x,), x.shape, weight=weight, flops=RMS_NORM_FLOPS * x.elements)

    def layer_norm(self, x: Spec, weight: LayerNorm) -> Spec:
        return self._write("layer_norm", (x,), x.shape, weight=weight, flops=LAYER_NORM_FLOPS * x.elements)

    def linear(self, x: Spec, weight: Linear) -> Spec:
        rows, columns = weight.shape
        shape = (*x.shape[:-1], rows)
        flops = 2 * x.elements * rows + (prod(shape) if weight.bias is not None else 0)
        assert x.shape[-1] == columns, (weight.name, x.shape, columns)
        return self._write("linear", (x,), shape, weight=weight, flops=flops)

    def split_heads(self, qkv: Spec, heads: int, kv_heads: int) -> tuple[Spec, Spec, Spec]:
        # Three views of one tensor.
        size = qkv.shape[-1] // (heads + 2 * kv_heads)
        parts = [(*qkv.shape[:-1], n, size) for n in (heads, kv_heads, kv_heads)]  # [tokens, heads, head_size]
        q, k, v = self._write_many("split_heads", (qkv,), parts, view_of=qkv)
        return q, k, v

    def rotary(self, q: Spec, k: Spec) -> tuple[Spec, Spec]:
        flops = ROTARY_FLOPS * (q.elements + k.elements)
        q, k = self._write_many("rotary", (q, k), [q.shape, k.shape], flops=flops)
        return q, k

    def attention(self, layer: int, q: Spec, k: Spec, v: Spec) -> Spec:
        # The cache is not an activation, so its bytes are not counted here.
        tokens, heads, size = q.shape
        products = 2  # queries by keys, then probabilities by values
        flops = products * 2 * heads * size * sum(span.keys_seen for span in self._spans)
        return self._write("attention", (q, k, v), (tokens, heads * size), flops=flops)

    def activation(self, kind: str, x: Spec) -> Spec:
        return self._write(kind, (x,), x.shape, flops=x.elements)

    def multiply(self, a: Spec, b: Spec) -> Spec:
        return self._write("multiply", (a, b), a.shape, flops=a.elements)

    def add(self, a: Spec, b: Spec) -> Spec:
        return self._write("add", (a, b), a.shape, flops=a.elements)

    def all_reduce(self, x: Spec) -> Spec:
        return x if self._tp_size == 1 else self._write("all_reduce", (x,), x.shape)

    def all_gather(self, x: Spec) -> Spec:
        shape = (*x.shape[:-1], x.shape[-1] * self._tp_size)
        return x if self._tp_size == 1 else self._write("all_gather", (x,), shape)

    def receive(self, tokens: Spec, hidden_size: int) -> Spec:
        return self._write("receive", (tokens,), (*tokens.shape, hidden_size))

    def send(self, x: Spec) -> Spec:
        return self._write("send", (x,), x.shape, view_of=x)

    def last_tokens(self, x: Spec) -> Spec:
        wanted = sum(span.requests for span in self._spans)
        if self._every_token or x.shape[0] == wanted:
            return x
        return self._write("last_tokens", (x,), (wanted, *x.shape[1:]))

    def logits(self, x: Spec, vocab_size: int) -> Spec:
        # Logits that are float32 already are a view.
        shape = (*x.shape[:-1], vocab_size)
        view_of = x if x.dtype == torch.float32 else None
        (out,) = self._write_many("logits", (x,), [shape], dtype=torch.float32, view_of=view_of)
        return out

    def _write(
        self,
        op: str,
        inputs: tuple[Spec, ...],
        shape: tuple[int, ...],
        *,
        weight: Embedding | Norm | Linear | None = None,
        flops: int = 0,
        view_of: Spec | None = None,
    ) -> Spec:
        (out,) = self._write_many(op, inputs, [shape], weight=weight, flops=flops, view_of=view_of)
        return out

    def _write_many(
        self,
        op: str,
        inputs: tuple[Spec, ...],
        shapes: Sequence[tuple[int, ...]],
        *,
        weight: Embedding | Norm | Linear | None = None,
        dtype: torch.dtype | None = None,
        flops: int = 0,
        view_of: Spec | None = None,
    ) -> list[Spec]:
        outputs = []
        for place, shape in enumerate(shapes):
            name = f"{op}_{len(self.rows)}" + (f".{place}" if len(shapes) > 1 else "")
            outputs.append(Spec(name, shape, dtype or self._dtype, view_of.storage if view_of else name))
        row = OpRow(op, weight.name if weight else None, inputs, tuple(outputs), _weight_bytes(weight), flops)
        self.rows.append(row)
        return outputs


def _weight_bytes(weight: Embedding | Norm | Linear | None) -> int:
    if weight is None:
        return 0
    return tensor_bytes(weight)
