"""What an emission says of itself: names, bytes, FLOPs, types and taps; and a whole session on the interpreter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from trtlab import Checkpoint
from trtlab.config.mapping import Mapping
from trtlab.config.sampling import SamplingParams
from trtlab.config.session import SessionConfig
from trtlab.session.session import Session
from trtlab.tensorrt.emit.emission import emit
from trtlab.tensorrt.run.interpreter_runner import interpreter_backend

pytestmark = pytest.mark.tensorrt


def test_layer_names_are_unique_and_bear_their_weights_names(small, bounds, weights_of):
    weights = weights_of(small)
    network = emit(small, bounds, Mapping(), 0, weights).read()
    names = Counter(layer.name for layer in network)
    assert max(names.values()) == 1
    constants = {layer.name for layer in network if layer.kind == "constant"}
    assert set(weights) <= constants
    assert network["transformer.layers.1.mlp.fc:matmul"].kind == "matrix_multiply"


def test_weights_are_handed_over_by_pointer(small, bounds, weights_of):
    weights = weights_of(small)
    network = emit(small, bounds, Mapping(), 0, weights).read()
    for name, tensor in weights.items():
        assert network[name].value.data_ptr() == tensor.data_ptr()


def test_the_table_adds_up(small, bounds, weights_of):
    config = small.replace(dtype="bfloat16")
    weights = weights_of(config)
    rows = emit(config, bounds, Mapping(), 0, weights).table(batch=2, tokens=5)
    assert rows.weight_bytes > sum(tensor.nbytes for tensor in weights.values())  # the rotary tables come on top
    assert rows.mix["matrix_multiply"] == 1 + 5 * config.num_hidden_layers
    own = {row.name: row.weight_bytes for row in rows if row.name in weights}
    assert own == {name: tensor.nbytes for name, tensor in weights.items()}
    linears = [w for name, w in weights.items() if w.dim() == 2 and "vocab" not in name and "lm_head" not in name]
    products = sum(row.flops for row in rows if row.kind == "matrix_multiply")
    head = 2 * 2 * weights["lm_head.weight"].numel()  # two rows ask for one token's logits each
    assert products == sum(2 * 2 * 5 * w.numel() for w in linears) + head
    attention = next(row for row in rows if row.kind == "attention_input")
    assert attention.flops == 2 * 2 * 2 * 5 * 40 * config.num_attention_heads * config.head_size
    assert rows[-1].shape == (2, 1, config.vocab_size)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_network_is_strongly_typed(small, bounds, weights_of, dtype):
    config = small.replace(dtype=dtype)
    network = emit(config, bounds, Mapping(), 0, weights_of(config)).read()
    assert {layer.precision for layer in network if layer.kind == "matrix_multiply"} == {dtype}
    assert {layer.precision for layer in network if layer.kind == "rotary_embedding"} == {"float32"}
    assert {layer.precision for layer in network if layer.kind == "reduce"} == {"float32"}
    assert network["logits"].precision == "float32"
    assert network["present_k_0"].precision == dtype
    scaled = network["transformer.layers.0.attention.qkv:scale_q"]
    assert scaled.precision == "float32"


def test_the_build_type_wins_over_the_weights_type(small, bounds, weights_of):
    weights = weights_of(small)
    half = emit(small, type(bounds)(**{**vars(bounds), "dtype": "float16"}), Mapping(), 0, weights)
    assert half.constants["lm_head.weight"].dtype == torch.float16
    assert weights["lm_head.weight"].dtype == torch.float32


def test_every_tap_is_a_tensor_of_the_network(small, bounds, weights_of):
    emission = emit(small, bounds, Mapping(), 0, weights_of(small))
    network = emission.read()
    assert all(network.tensor_name(tensor) == tensor for tensor in emission.taps.values())
    assert list(emission.taps)[:3] == [
        "transformer.vocab_embedding",
        "transformer.layers.0.input_layernorm",
        "transformer.layers.0.attention.qkv",
    ]


def test_a_session_generates_the_same_tokens_through_the_network(small, bounds, weights_of):
    weights = weights_of(small)
    engine = Checkpoint.from_weights(small, weights).build(bounds, plan=False)
    prompts = [[5, 6, 7], [9], list(range(20)), [44, 2], [60] * 11]  # more than the three slots
    params = SamplingParams(max_new_tokens=8)
    with engine.session(backend="torch", device="cpu") as session:
        expected = [answer.token_ids for answer in session.generate(prompts, params)]
        logits = session.logits(prompts[2])
    backend = interpreter_backend(small, engine.build_config, Mapping(), [weights])
    with Session(engine, backend, SessionConfig(), "the test asks for it") as session:
        assert session.backend == "interpreter"
        assert [answer.token_ids for answer in session.generate(prompts, params)] == expected
        torch.testing.assert_close(session.logits(prompts[2]), logits, atol=1e-4, rtol=1e-4)
