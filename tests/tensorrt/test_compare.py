"""An honest network agrees layer by layer; a planted error is found where it was planted."""

from __future__ import annotations

import pytest
import torch

from trtlab.config.mapping import Mapping
from trtlab.errors import EngineError, RequestError
from trtlab.tensorrt import bindings as io
from trtlab.tensorrt.compare import compare
from trtlab.tensorrt.emit.emission import emit
from trtlab.tensorrt.emit.ops import TensorRTOps

pytestmark = pytest.mark.tensorrt

PROMPT = [3, 14, 15, 92, 65, 35]


class NoScale(TensorRTOps):
    """Forgets the softmax scale, which the attention layer does not have."""

    def attention(self, layer, q, k, v):
        wide = self._scalar("undo", q.shape[-1] ** 0.5, 4, torch.float32)
        return super().attention(layer, self._elementwise("unscale", "PROD", q, wide), k, v)


class UpperLeft(TensorRTOps):
    """Lets a decoded token see the first key alone, as a causal mask aligned to the upper left would."""

    def attention(self, layer, q, k, v):
        first = self._constant("first_key", torch.arange(40).eq(0).reshape(1, 1, 1, 40), (1, 1, 1, 40))
        position = self._reshape("position", self._inputs[io.POSITION_IDS], (0, 1, -1, 1))
        last = self._scalar("prompt", len(PROMPT) - 1, 4, torch.int32)
        decoding = self._elementwise("decoding", "GREATER", position, last)
        seen = self._elementwise("seen", "AND", self._inputs[io.MASK], first)
        layer_mask = self._network.add_select(decoding, seen, self._inputs[io.MASK])
        honest, self._inputs = self._inputs, {**self._inputs, io.MASK: self._add("mask", layer_mask)}
        try:
            return super().attention(layer, q, k, v)
        finally:
            self._inputs = honest


class RotaryOffByOne(TensorRTOps):
    """Turns queries by the next token's position."""

    def rotary(self, q, k):
        one = self._scalar("one", 1, 2, torch.int32)
        honest = self._inputs
        self._inputs = {**honest, io.POSITION_IDS: self._elementwise("next", "SUM", honest[io.POSITION_IDS], one)}
        q, _ = super().rotary(q, k)
        self._inputs = honest
        return q, super().rotary(q, k)[1]


class KeysForValues(TensorRTOps):
    """Stores the keys where the values belong."""

    def attention(self, layer, q, k, v):
        return super().attention(layer, q, k, k)


@pytest.mark.parametrize("tied", [False, True])
def test_an_honest_network_agrees(small, bounds, weights_of, tied):
    config = small.replace(tie_word_embeddings=tied, qk_layernorm=True)
    weights = weights_of(config)
    comparison = compare(emit(config, bounds, Mapping(), 0, weights), config, weights, PROMPT)
    assert comparison.start is None
    assert all(comparison.same_token)
    assert comparison.reading == "torch and the network agree within 0.0001, and every next token agrees"
    names = [d.name for d in comparison.step(0)]
    assert names[0] == "transformer.vocab_embedding"
    assert names[-1].endswith(":logits")
    assert names == [d.name for d in comparison.step(4)]
    attention = "transformer.layers.1.attention"
    assert {f"{attention}.k_layernorm:rotary_q", f"{attention}.k_layernorm:attention", f"{attention}.dense"} <= {*names}


@pytest.mark.parametrize(
    ("op_set", "step", "name", "words"),
    [
        (NoScale, 0, "transformer.layers.0.attention.qkv:attention", "softmax scale"),
        (UpperLeft, 1, "transformer.layers.0.attention.qkv:attention", "the mask, the positions or the KV cache"),
        (RotaryOffByOne, 0, "transformer.layers.0.attention.qkv:rotary_q", "rotary embedding"),
        (KeysForValues, 0, "transformer.layers.0.attention.qkv:attention", "the KV cache"),
    ],
)
def test_a_planted_operation_is_found(small, bounds, weights_of, op_set, step, name, words):
    weights = weights_of(small)
    comparison = compare(emit(small, bounds, Mapping(), 0, weights, op_set=op_set), small, weights, PROMPT)
    assert (comparison.start.step, comparison.start.name) == (step, name)
    assert comparison.jumps
    assert words in comparison.reading


def test_swapped_gate_and_up_are_found(small, bounds, weights_of):
    weights = weights_of(small)
    fc, gate = "transformer.layers.1.mlp.fc.weight", "transformer.layers.1.mlp.gate.weight"
    swapped = {**weights, fc: weights[gate], gate: weights[fc]}
    comparison = compare(emit(small, bounds, Mapping(), 0, swapped), small, weights, PROMPT)
    assert (comparison.start.step, comparison.start.name) == (0, "transformer.layers.1.mlp.fc")
    assert "weights" in comparison.reading


def test_low_precision_grows_and_does_not_jump(small, bounds, weights_of):
    config = small.replace(dtype="bfloat16")
    weights = weights_of(config)
    comparison = compare(emit(config, bounds, Mapping(), 0, weights), config, weights, PROMPT, tolerance=6e-3)
    assert comparison.start is not None
    assert not comparison.jumps
    assert comparison.reading.endswith("precision")


def test_what_cannot_be_compared_is_refused(small, bounds, weights_of):
    weights = weights_of(small)
    whole = emit(small, bounds, Mapping(), 0, weights)
    with pytest.raises(RequestError, match="do not fit max_seq_len 40"):
        compare(whole, small, weights, [1] * 37)
    first = {name: w for name, w in weights.items() if ".1." not in name and "head" not in name and "ln_f" not in name}
    with pytest.raises(EngineError, match="the whole model"):
        compare(emit(small, bounds, Mapping(pp_size=2), 0, first), small, weights, PROMPT)
