"""An op set that wraps another one and names every result: the same names on torch and on TensorRT."""

from __future__ import annotations

from collections.abc import Callable

from trtlab.model.op_set import Ops, T
from trtlab.model.weights import Embedding, LayerNorm, Linear, Norm


class NamedOps(Ops[T]):
    """The verbs of another op set; ``record(name, result)`` is called after each verb.

    A verb with a weight is named after the weight (``transformer.layers.0.mlp.fc``), any other after the last weight
    and itself (``transformer.layers.0.mlp.fc:activation``). A repeated name gets a number, as with tied embeddings.
    """

    def __init__(self, inner: Ops[T], record: Callable[[str, T], None]) -> None:
        self._inner = inner
        self._record = record
        self._scope = "network"
        self._counts: dict[str, int] = {}  # how often each name was used

    def embedding(self, tokens: T, weight: Embedding) -> T:
        return self._weighted(weight.name, self._inner.embedding(tokens, weight))

    def position_embedding(self, tokens: T, weight: Embedding) -> T:
        return self._weighted(weight.name, self._inner.position_embedding(tokens, weight))

    def rms_norm(self, x: T, weight: Norm) -> T:
        return self._weighted(weight.name, self._inner.rms_norm(x, weight))

    def layer_norm(self, x: T, weight: LayerNorm) -> T:
        return self._weighted(weight.name, self._inner.layer_norm(x, weight))

    def linear(self, x: T, weight: Linear) -> T:
        return self._weighted(weight.name, self._inner.linear(x, weight))

    def split_heads(self, qkv: T, heads: int, kv_heads: int) -> tuple[T, T, T]:
        q, k, v = self._inner.split_heads(qkv, heads, kv_heads)
        return self._named("q", q), self._named("k", k), self._named("v", v)

    def rotary(self, q: T, k: T) -> tuple[T, T]:
        q, k = self._inner.rotary(q, k)
        return self._named("rotary_q", q), self._named("rotary_k", k)

    def attention(self, layer: int, q: T, k: T, v: T) -> T:
        return self._named("attention", self._inner.attention(layer, q, k, v))

    def activation(self, kind: str, x: T) -> T:
        return self._named("activation", self._inner.activation(kind, x))

    def multiply(self, a: T, b: T) -> T:
        return self._named("multiply", self._inner.multiply(a, b))

    def add(self, a: T, b: T) -> T:
        return self._named("add", self._inner.add(a, b))

    def all_reduce(self, x: T) -> T:
        return self._changed("all_reduce", x, self._inner.all_reduce(x))

    def all_gather(self, x: T) -> T:
        return self._changed("all_gather", x, self._inner.all_gather(x))

    def receive(self, tokens: T, hidden_size: int) -> T:
        return self._inner.receive(tokens, hidden_size)

    def send(self, x: T) -> T:
        return self._inner.send(x)

    def last_tokens(self, x: T) -> T:
        return self._inner.last_tokens(x)

    def logits(self, x: T, vocab_size: int) -> T:
        return self._named("logits", self._inner.logits(x, vocab_size))

    def _weighted(self, weight_name: str, result: T) -> T:
        self._scope = weight_name.removesuffix(".weight")
        return self._recorded(self._scope, result)

    def _named(self, verb: str, result: T) -> T:
        return self._recorded(f"{self._scope}:{verb}", result)

    def _changed(self, verb: str, before: T, result: T) -> T:
        """Name the result of a collective; on one rank it returns its input, which has a name already."""
        return result if result is before else self._named(verb, result)

    def _recorded(self, name: str, result: T) -> T:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        self._record(name if count == 1 else f"{name}.{count}", result)
        return result
