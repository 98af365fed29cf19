"""One decoder for all model families, written in the verbs of an op set that runs, emits, tabulates or observes it."""

from __future__ import annotations

from trtlab.config.model import ModelConfig
from trtlab.interrupts import deliver_interrupt
from trtlab.model.op_set import Ops, T
from trtlab.model.weights import LayerWeights, ModelWeights


def decoder(ops: Ops[T], config: ModelConfig, weights: ModelWeights, tokens: T) -> T:
    """Token ids ``[...]`` to logits ``[..., vocab]`` in float32, for the rows that ``ops.last_tokens`` selects.

    A rank before the last pipeline stage returns its hidden states instead.
    """
    x = residual_stream(ops, config, weights, _embed(ops, config, weights, tokens))
    if weights.final_norm is None or weights.lm_head is None:
        return ops.send(x)
    x = ops.norm(ops.last_tokens(x), weights.final_norm)
    return ops.logits(ops.all_gather(ops.linear(x, weights.lm_head)), config.vocab_size)


def residual_stream(ops: Ops[T], config: ModelConfig, weights: ModelWeights, x: T) -> T:
    """The hidden states ``[..., hidden]`` after all layers of a rank; each block adds its output to the stream."""
    delta: T | None = None
    for index, layer in enumerate(weights.layers):
        deliver_interrupt()
        x, normed = ops.add_norm(x, delta, layer.input_layernorm)
        del delta  # free it before the block runs: it would add to the peak
        x, normed = ops.add_norm(x, attention(ops, config, weights, index, layer, normed), layer.post_layernorm)
        delta = mlp(ops, config, layer, normed)
    assert delta is not None, f"a rank needs at least one layer, got {len(weights.layers)}"
    return ops.add(x, delta)


def attention(ops: Ops[T], config: ModelConfig, weights: ModelWeights, index: int, layer: LayerWeights, normed: T) -> T:
    """Attention's addition to the residual stream, from the normalized stream ``[..., hidden]``."""
    norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
    heads = (weights.heads, weights.kv_heads)
    context = ops.self_attention(index, ops.linear(normed, layer.qkv), heads, norms, rotary=config.uses_rotary)
    return ops.all_reduce(ops.linear(context, layer.dense))


def mlp(ops: Ops[T], config: ModelConfig, layer: LayerWeights, normed: T) -> T:
    """The MLP's addition to the residual stream, from the normalized stream ``[..., hidden]``."""
    if layer.gate is None:
        inner = ops.activation(config.hidden_act, ops.linear(normed, layer.fc))
    else:
        inner = ops.gated(config.hidden_act, normed, layer.fc, layer.gate)
    return ops.all_reduce(ops.linear(inner, layer.proj))


def _embed(ops: Ops[T], config: ModelConfig, weights: ModelWeights, tokens: T) -> T:
    if weights.embedding is None:
        return ops.receive(tokens, config.hidden_size)
    x = ops.embedding(tokens, weights.embedding)
    if weights.gather_embedding:
        x = ops.all_gather(x)
    elif weights.reduce_embedding:
        x = ops.all_reduce(x)
    return x if weights.positions is None else ops.add(x, ops.position_embedding(tokens, weights.positions))
