"""Every quantization in the network that TensorRT compiles: run by the interpreter against torch, and built."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch

from trtlab import BuildConfig, QuantConfig, SamplingParams
from trtlab.config.mapping import Mapping
from trtlab.errors import EngineError
from trtlab.model.weights import rank_weights
from trtlab.ops.quantized_linear import linear
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.storage.lazy import in_memory
from trtlab.tensorrt import bindings as names
from trtlab.tensorrt.bindings import CACHE_DTYPES
from trtlab.tensorrt.build import plan
from trtlab.tensorrt.build.plan import build_plan
from trtlab.tensorrt.emit.emission import emit
from trtlab.tensorrt.emit.ops import TensorRTOps
from trtlab.tensorrt.run.interpreter_runner import interpreter_backend

from ...models import loud_checkpoint, random_texts, small_config

pytestmark = pytest.mark.tensorrt

CONFIG = small_config(
    vocab_size=97, hidden_size=128, head_size=32, intermediate_size=192, attn_bias=True, dense_bias=True
)
BUILD = BuildConfig(max_batch_size=3, max_input_len=24, max_seq_len=40, max_num_tokens=32)
SOLO = Mapping()
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
CACHES = [
    (None, "INT8", "merged"),
    (None, "INT8", "split"),
    ("W8A16", "INT8", "per_head"),
    ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "INT8", "split"),
    (None, "FP8", "split"),
    ("FP8", "FP8", "split"),
]


@pytest.fixture(scope="module")
def quantized():
    """``quantized(algorithm, cache, dtype, **more)``: a quantized checkpoint, the same for the same question."""
    texts = random_texts((24, 5, 40, 17), CONFIG.vocab_size)
    made = {}

    def make(algorithm, cache=None, dtype="float32", **more):
        quant = QuantConfig(quant_algo=algorithm, kv_cache_quant_algo=cache, group_size=64, **more)
        if (quant, dtype) not in made:
            source = loud_checkpoint(CONFIG.replace(dtype=dtype), channels=(3,), times=8)
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


def rounds_activations(checkpoint):
    quant = checkpoint.config.quantization
    return quant.kv_cache_quant_algo is not None or quant.quant_algo.startswith(("W8A8", "FP8"))


def assert_close(got, expected, checkpoint):
    """Rows of logits agree to 1e-4; where activations are rounded, those rows do that meet no tie.

    Sums in another order differ by 1e-6, which puts one activation in some thousands on the other side of a tie: one
    step of INT8 or E4M3, that every later token of the request sees. Which ones it is depends on the machine. A wrong
    scale, mask or layout would reach every row.
    """
    errors = (got - expected).abs().amax(-1).flatten() / float(expected.abs().max())
    if not rounds_activations(checkpoint):
        assert float(errors.max()) <= 1e-4
    else:
        assert float(errors.max()) <= 0.15
        assert len(errors) < 4 or float(errors.sort().values[len(errors) // 4]) <= 1e-4


def assert_agree(checkpoint, torch_reference, mapping=SOLO):
    engine = checkpoint.build(BUILD, mapping, plan=False)
    config, ranks = engine.config, [engine.weights(rank) for rank in mapping.ranks]
    ours = interpreter_backend(config, BUILD, mapping, ranks).ranks
    theirs = torch_reference(config, ranks, BUILD, mapping)
    pairs = [(ours.run(step), theirs.run(step)) for step in steps()]
    assert_close(*(torch.cat(side) for side in zip(*pairs, strict=True)), checkpoint)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("mapping", [SOLO, Mapping(tp_size=2)])  # two ranks hold 98 of 97 rows, or 100 if packed
@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_a_quantized_head_is_emitted_as_the_other_linears(quantized, torch_reference, algorithm, mapping):
    checkpoint = quantized(algorithm, quantize_lm_head=True, exclude_modules=("transformer.*",))
    assert_agree(checkpoint, torch_reference, mapping)


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_in_float32_the_network_is_torch(quantized, torch_reference, algorithm):
    assert_agree(quantized(algorithm), torch_reference)


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


@pytest.mark.parametrize(("algorithm", "cache", "scales"), CACHES)
def test_with_a_quantized_cache_the_network_is_torch(quantized, torch_reference, algorithm, cache, scales):
    assert_agree(quantized(algorithm, cache, kv_cache_scales=scales), torch_reference)


def test_a_quantized_cache_is_read_and_only_new_tokens_are_written(quantized):
    checkpoint = quantized(None, "INT8", kv_cache_scales="per_head")
    table = emit(checkpoint.config, BUILD, Mapping(), 0, tensors_of(checkpoint)).bindings
    assert {binding.dtype for binding in table.cache_inputs} == {"int8"}
    assert table.caches == {}
    assert table.updates["new_v_1"] == "cache_v_1"
    assert names.MASK not in {binding.name for binding in table.inputs}


@pytest.mark.plans
@pytest.mark.parametrize(
    ("cache", "scales", "dtype"),
    [
        ("INT8", "split", "float32"),
        ("INT8", "split", "bfloat16"),
        ("INT8", "per_head", "float16"),
        ("FP8", "split", "bfloat16"),
    ],
)
def test_a_plan_is_built_for_each_cache(quantized, cache, scales, dtype):
    checkpoint = quantized(None, cache, dtype, kv_cache_scales=scales)
    record = build_plan(checkpoint.config, BUILD, Mapping(), 0, tensors_of(checkpoint), io.BytesIO())
    assert CACHE_DTYPES[cache] in record.dtypes


SESSIONS = [*((algorithm, None) for algorithm in WEIGHTS), *((algorithm, cache) for algorithm, cache, _ in CACHES[1:])]


@pytest.mark.parametrize(("algorithm", "cache"), SESSIONS)
def test_token_by_token_a_session_gives_torchs_tokens(quantized, torch_reference, algorithm, cache):
    checkpoint, params = quantized(algorithm, cache), SamplingParams(max_new_tokens=12)
    prompts = [[5, 9, 2, 40, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
    answers = []
    with checkpoint.build(BUILD, plan=False) as engine:
        for backend in ("interpreter", "torch"):
            with engine.session(backend=backend, device="cpu") as session:
                answers.append([answer.token_ids for answer in session.generate(prompts, params)])
    for prompt, ours, theirs in zip(prompts, *answers, strict=True):
        assert len(set(ours)) > 3  # it does not merely repeat itself
        same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        assert same == len(ours) or rounds_activations(checkpoint)
        if same < len(ours):  # they part where a tie in rounding decides between two tokens that are nearly tied
            config, weights = checkpoint.config, tensors_of(checkpoint)
            step = StepInputs([Chunk(0, 0, [*prompt, *theirs[:same]])])
            logits = torch_reference(config, weights, BUILD).run(step)[0]
            assert float(logits.max() - logits[ours[same]]) < 0.3


@pytest.mark.parametrize(
    ("algorithm", "cache"),
    [("W4A16", "INT8"), ("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", None), ("FP8", "FP8")],
)
def test_ranks_together_are_torch(quantized, torch_reference, algorithm, cache):
    checkpoint = quantized(algorithm, cache, kv_cache_scales="per_head")
    assert_agree(checkpoint, torch_reference, Mapping(tp_size=2, pp_size=2))


@pytest.mark.parametrize(("algorithm", "cache"), [("W8A16", None), ("W8A8_SQ_PER_TENSOR_PLUGIN", "INT8")])
def test_a_comparison_finds_no_difference(quantized, algorithm, cache):
    checkpoint = quantized(algorithm, cache)
    engine = checkpoint.build(BUILD, plan=False)
    comparison = engine.compare(checkpoint, [3, 14, 15, 92, 65, 35], steps=3)
    relative = sorted(difference.relative for difference in comparison.differences)
    assert relative[-1] <= (0.1 if rounds_activations(checkpoint) else 1e-4)
    assert relative[len(relative) // 4] <= 1e-5


@pytest.mark.parametrize(
    "changes", [("W8A16", None), ("FP8", "FP8"), ("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "INT8")]
)
def test_any_checkpoint_of_the_model_can_be_compared(quantized, changes):
    """The distance of the logits is that of two sessions in torch, which share no code with the network."""
    checkpoint, prompt = quantized(*changes), [3, 14, 15, 92, 65, 35]
    source = loud_checkpoint(CONFIG, channels=(3,), times=8)
    engine, plain = checkpoint.build(BUILD, plan=False), source.build(BUILD, plan=False)
    logits = []
    for each in (engine, plain):
        with each.session(backend="torch", device="cpu") as session:
            logits.append(session.logits(prompt))
    expected = float((logits[0] - logits[1]).norm() / logits[1].norm())
    comparison = engine.compare(source, prompt, steps=1)
    # A rounded activation may fall to the other integer in the network, which changes the distance by a few parts.
    assert comparison.step(0)[-1].relative == pytest.approx(expected, rel=0.1)
    assert [layer.name for layer in comparison.layers] == [f"transformer.layers.{n}.mlp.proj" for n in (0, 1)]
    assert all(layer.relative > 0 for layer in comparison.layers)
    assert comparison.start is None and " against plain weights: the layers differ by " in comparison.reading
    back = plain.compare(checkpoint, prompt, steps=1)
    assert back.reading.startswith("plain weights against ")
    assert plain.compare(source, prompt, steps=1).recipes is None


def test_a_comparison_with_another_model_names_what_differs(quantized):
    other = loud_checkpoint(CONFIG.replace(num_hidden_layers=1, rotary_base=500.0))
    with pytest.raises(EngineError, match=r"another model.*got num_hidden_layers=1, rotary_base=500\.0; expected num_"):
        quantized("W8A16", None).build(BUILD, plan=False).compare(other, [3, 4])


class KeyScaleForValues(TensorRTOps):
    """Stores and reads the values by the scale of the keys."""

    def attention(self, layer, q, k, v):
        self._kv_scales = [dataclasses.replace(scales, values=scales.keys) for scales in self._kv_scales]
        return super().attention(layer, q, k, v)


def test_the_scale_of_the_keys_used_for_the_values_is_found(quantized):
    checkpoint = quantized(None, "INT8")
    name = "transformer.layers.0.attention.k_cache_scaling_factor"
    small = {**checkpoint.tensors, name: in_memory(checkpoint.tensors[name].read() / 8)}  # values by it would saturate
    checkpoint = dataclasses.replace(checkpoint, tensors=small)
    with checkpoint.build(BUILD, plan=False) as engine:
        honest = engine.compare(checkpoint, [3, 14, 15, 92, 65, 35], steps=1)
        planted = engine.compare(checkpoint, [3, 14, 15, 92, 65, 35], steps=1, op_set=KeyScaleForValues)
    assert honest.start is None
    assert planted.jumps
    assert planted.start is not None and planted.start.name.endswith("layers.0.attention.qkv:attention")
    assert "KV cache" in planted.reading


def test_w4a8_is_refused_before_the_build_and_runs_in_torch(quantized, monkeypatch):
    checkpoint = quantized("W4A8_AWQ")
    with checkpoint.build(BUILD, plan=False) as engine:
        with pytest.raises(EngineError, match=r'attention\.qkv\.weight is W4A8.*INT4.*backend="torch"'):
            engine.session(backend="interpreter", device="cpu")
        with engine.session(backend="torch", device="cpu") as session:
            assert len(session.generate([5, 9], SamplingParams(max_new_tokens=3)).token_ids) == 3
    monkeypatch.setattr(plan, "emit", None)  # nothing may be emitted
    with pytest.raises(EngineError, match=r"W4A8_AWQ does not become a plan: TensorRT has no.*plan=False"):
        checkpoint.build(BUILD, plan=True)


@pytest.mark.parametrize(("algorithm", "cache"), [("FP8", None), (None, "FP8")])
def test_fp8_is_refused_for_a_gpu_without_it(quantized, monkeypatch, algorithm, cache):
    checkpoint = quantized(algorithm, cache)
    monkeypatch.setattr(plan, "emit", None)
    build = dataclasses.replace(BUILD, compute_capabilities=("8.0",))
    with pytest.raises(EngineError, match=r"FP8 needs compute capability 8\.9"):
        build_plan(checkpoint.config, build, Mapping(), 0, {}, io.BytesIO())


@pytest.mark.plans
@pytest.mark.parametrize(("algorithm", "dtype"), PLANS)
def test_a_plan_is_built_for_each_algorithm_and_its_head(quantized, algorithm, dtype):
    checkpoint = quantized(algorithm, dtype=dtype, quantize_lm_head=True)
    stream = io.BytesIO()
    record = build_plan(checkpoint.config, BUILD, Mapping(), 0, tensors_of(checkpoint), stream)
    assert record.plan_bytes == len(stream.getvalue()) > 0
