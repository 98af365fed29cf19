"""Every quantization in the network that TensorRT compiles: run by the interpreter against torch, and built."""

from __future__ import annotations

import io

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, ModelConfig, QuantConfig
from trtlab.config import Mapping
from trtlab.model.weights import rank_weights, tensor_specs
from trtlab.ops.quantized import linear
from trtlab.runtime.executor import Chunk, StepInputs, TorchExecutor
from trtlab.tensorrt.executor import interpreter_executor
from trtlab.tensorrt.library import library
from trtlab.tensorrt.ops import TensorRTOps
from trtlab.tensorrt.plan import build_plan

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    dtype="float32",
    vocab_size=97,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_size=32,
    intermediate_size=192,
    max_position_embeddings=64,
    attn_bias=True,
    dense_bias=True,
)
BUILD = BuildConfig(max_batch_size=3, max_input_len=24, max_seq_len=40, max_num_tokens=32)
WEIGHTS = [
    "W8A16",
    "W4A16",
    "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL",
    "FP8",
    "W4A16_AWQ",
]
PLANS = list(zip(WEIGHTS, ["bfloat16", "float16", "float32"] * 3, strict=True))
builds = pytest.mark.skipif(not library().builds(None), reason="this TensorRT compiles on a GPU only")


def checkpoint_of(**changes) -> Checkpoint:
    """Random weights with a loud channel in each norm and biases that matter."""
    config, dice = CONFIG.replace(**changes), torch.Generator().manual_seed(0)
    weights = {}
    for name, spec in tensor_specs(config).items():
        noise = torch.randn(spec.shape, generator=dice)
        weights[name] = noise * spec.shape[-1] ** -0.5
        if "norm" in name or "ln_f" in name:
            weights[name] = 1 + 0.1 * noise
            weights[name][3] *= 8
    return Checkpoint.from_weights(config, {name: w.to(config.torch_dtype) for name, w in weights.items()})


@pytest.fixture(scope="module")
def quantized():
    """``quantized(algorithm, cache, dtype, **more)``: a quantized checkpoint, the same for the same question."""
    dice = torch.Generator().manual_seed(7)
    texts = [torch.randint(0, CONFIG.vocab_size, (n,), generator=dice).tolist() for n in (24, 5, 40, 17)]
    made = {}

    def make(algorithm, cache=None, dtype="float32", **more):
        quant = QuantConfig(quant_algo=algorithm, kv_cache_quant_algo=cache, group_size=64, **more)
        if (quant, dtype) not in made:
            source = checkpoint_of(dtype=dtype)
            made[quant, dtype] = source.quantize(quant, calibration=texts if quant.reads_texts else None)
        return made[quant, dtype]

    return make


def tensors_of(checkpoint):
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def steps():
    """Three prompts, then decoding at unlike lengths with a slot that pauses; every token's logits."""
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(0, CONFIG.vocab_size, (40,), generator=dice).tolist()
    yield StepInputs([Chunk(0, 0, ids[:7]), Chunk(1, 0, ids[7:8]), Chunk(2, 0, ids[8:19])], every_token=True)
    for i in range(3):
        middle = [Chunk(1, 1 + i // 2, [ids[20 + i]])] if i % 2 == 0 else []
        yield StepInputs([Chunk(0, 7 + i, [ids[23 + i]]), *middle, Chunk(2, 11 + i, [ids[26 + i]])])
    yield StepInputs([Chunk(0, 10, ids[30:34])], every_token=True)  # several tokens after a cached past


def assert_agree(checkpoint, tolerance, build=BUILD):
    config, weights = checkpoint.config, tensors_of(checkpoint)
    ours = interpreter_executor(config, build, Mapping(), [weights])
    theirs = TorchExecutor(config, build.resolve(config), Mapping(), [weights], torch.device("cpu"))
    for step in steps():
        got, expected = ours.run(step), theirs.run(step)
        scale = float(expected.abs().max())
        assert float((got - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_in_float32_the_network_is_torch(quantized, algorithm):
    assert_agree(quantized(algorithm), 1e-4)


# One rounding of the result, and one of each restored weight where no activation is quantized.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1.6e-2)])
@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_each_linear_is_torchs_linear(new_network, quantized, algorithm, dtype, tolerance):
    checkpoint = quantized(algorithm, dtype=dtype)
    layer = rank_weights(checkpoint.config, Mapping(), 0, tensors_of(checkpoint)).layers[1]
    for weight in (layer.qkv, layer.dense, layer.fc, layer.proj):
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(2)).to(getattr(torch, dtype))
        x[2] = 0
        hand = new_network()
        entering = hand.input("x", dtype, (-1, -1, weight.shape[1]))
        ops = TensorRTOps(hand.trt, hand.net, {}, dtype, (torch.zeros(2, 1), torch.zeros(2, 1)), [0])
        leaving = ops.linear(entering, weight)
        leaving.name = "y"
        hand.net.mark_output(leaving)
        hand.constants = ops.constants
        got, expected = hand.run(x=x[None])[0], linear(weight, x)
        assert got.dtype == expected.dtype
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@builds
@pytest.mark.parametrize(
    ("algorithm", "dtype"), list(zip(WEIGHTS, ["bfloat16", "float16", "float32"] * 3, strict=True))
)
def test_a_plan_is_built_for_each_algorithm(quantized, algorithm, dtype):
    checkpoint = quantized(algorithm, dtype=dtype)
    stream = io.BytesIO()
    record = build_plan(checkpoint.config, BUILD, Mapping(), 0, tensors_of(checkpoint), stream)
    assert record.plan_bytes == len(stream.getvalue()) > 0
