"""One decoder for every family, written once in the verbs of an op set: it runs, emits, tabulates or observes."""

from __future__ import annotations

from trtlab.config.model import ModelConfig
from trtlab.model.verbs import Ops, T
from trtlab.model.weights import LayerWeights, ModelWeights


def decoder(ops: Ops[T], config: ModelConfig, weights: ModelWeights, tokens: T) -> T:
    """Token ids ``[...]`` to logits ``[..., vocab]`` in float32, for the rows whose logits are wanted.

    A rank that is not of the last pipeline stage gives its hidden states instead.
    """
    x = _embed(ops, config, weights, tokens)  # [..., hidden]
    for index, layer in enumerate(weights.layers):
        x = ops.add(x, attention(ops, weights, layer, index, x))
        x = ops.add(x, mlp(ops, config, layer, x))
    if weights.final_norm is None or weights.lm_head is None:
        return ops.send(x)
    x = ops.rms_norm(ops.last_tokens(x), weights.final_norm)
    return ops.logits(ops.all_gather(ops.linear(x, weights.lm_head)), config.vocab_size)


def _embed(ops: Ops[T], config: ModelConfig, weights: ModelWeights, tokens: T) -> T:
    if weights.embedding is None:
        return ops.receive(tokens, config.hidden_size)
    x = ops.embedding(tokens, weights.embedding)
    if weights.gather_embedding:
        return ops.all_gather(x)
    return ops.all_reduce(x) if weights.reduce_embedding else x


def attention(ops: Ops[T], weights: ModelWeights, layer: LayerWeights, index: int, x: T) -> T:
    """What attention adds to the hidden states ``[..., hidden]``."""
    qkv = ops.linear(ops.rms_norm(x, layer.input_layernorm), layer.qkv)
    q, k, v = ops.split_heads(qkv, weights.heads, weights.kv_heads)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = ops.rms_norm(q, layer.q_norm), ops.rms_norm(k, layer.k_norm)
    q, k = ops.rotary(q, k)
    return ops.all_reduce(ops.linear(ops.attention(index, q, k, v), layer.dense))


def mlp(ops: Ops[T], config: ModelConfig, layer: LayerWeights, x: T) -> T:
    """What the MLP adds to the hidden states ``[..., hidden]``."""
    x = ops.rms_norm(x, layer.post_layernorm)
    gated = ops.multiply(ops.activation(config.hidden_act, ops.linear(x, layer.fc)), ops.linear(x, layer.gate))
    return ops.all_reduce(ops.linear(gated, layer.proj))
