"""A quantized head: against plain torch on the hidden states of transformers, and stored, split and counted truly."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trtlab import BuildConfig, Checkpoint, ConfigError, Mapping, QuantConfig, QuantizeError, estimate
from trtlab.card import card
from trtlab.model.names import EMBEDDING, HEAD
from trtlab.model.scales import unpack_int4
from trtlab.model.tensor_specs import tensor_specs

from ..models import random_texts, small_config, write_random_model
from .conftest import CONFIG, EVERY_CONFIG, random_checkpoint

ALGORITHMS = [algorithm for algorithm, _ in EVERY_CONFIG[:10]]
BOUNDS = BuildConfig(max_batch_size=1, max_seq_len=64)
(IDS,) = random_texts((40,), seed=3)
TIED = CONFIG.replace(tie_word_embeddings=True)


def recipe(algorithm, **more):
    return QuantConfig(quant_algo=algorithm, group_size=64, quantize_lm_head=True, **more)


def quantize(checkpoint, quant, texts, **where):
    return checkpoint.quantize(quant, calibration=texts if quant.reads_texts else None, **where)


def logits(checkpoint, mapping=None, **how):
    with checkpoint.build(BOUNDS, mapping, plan=False).session(device="cpu", **how) as session:
        return session.logits(IDS)


def rms(x):
    return float(x.square().mean().sqrt())


# --- the product, in plain torch


def rounded_float8(x, scale):
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()


def rounded_int8(x, scale):
    return (x / scale).round().clamp(-128, 127)


def integers(head):
    scale = head["weights_scaling_factor" if "weights_scaling_factor" in head else "per_channel_scale"]
    return unpack_int4(head["weight"].view(torch.uint8), len(scale)).float()


def by_channel(head, x):
    q = head["weight"].float() if len(head["weight"]) == len(head["per_channel_scale"]) else integers(head)
    return x @ (q * head["per_channel_scale"][:, None]).T


def awq_weight(head):
    return integers(head) * head["weights_scaling_factor"].repeat_interleave(64, 1)


def smooth(head, x):
    x = x / head["smoother"]
    if "act_scale" not in head:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return rounded_int8(x, scale) @ head["weight"].float().T * scale * head["per_channel_scale"]
    q = rounded_int8(x, 1 / head["quantization_scaling_factor"])
    return q @ head["weight"].float().T * (head["per_channel_scale"] * head["act_scale"])


def smooth_as_modelopt(head, x):
    q = rounded_int8(x * head["prequant_scaling_factor"], head["activation_scaling_factor"])
    return q @ head["weight"].float().T * head["activation_scaling_factor"] * head["weights_scaling_factor"]


def float8(head, x):
    scale = head["activation_scaling_factor"]
    return rounded_float8(x, scale) @ head["weight"].float().T * scale * head["weights_scaling_factor"]


def awq_float8(head, x):
    x_scale, w_scale = head["activation_scaling_factor"], head["weights_scaling_factor_2"]
    q = rounded_float8(x * head["prequant_scaling_factor"], x_scale)
    return q @ rounded_float8(awq_weight(head), w_scale).T * x_scale * w_scale


REFERENCES = {
    **dict.fromkeys(ALGORITHMS, smooth),
    "W8A16": by_channel,
    "W4A16": by_channel,
    "W8A8_SQ_PER_CHANNEL": smooth_as_modelopt,
    "FP8": float8,
    "W4A16_AWQ": lambda head, x: (x * head["prequant_scaling_factor"]) @ awq_weight(head).T,
    "W4A8_AWQ": awq_float8,
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request, tmp_path_factory):
    """A model of 99 tokens, and the states that its head reads, by transformers."""
    folder = tmp_path_factory.mktemp("hf")
    write_random_model(
        folder, "LlamaForCausalLM", vocab_size=99, hidden_size=128, tie_word_embeddings=request.param, seed=5
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    with torch.inference_mode():
        out = model(torch.tensor([IDS]), output_hidden_states=True)
    return Checkpoint.from_hugging_face(folder), out.hidden_states[-1][0], out.logits[0]


@pytest.mark.parametrize("run", ["loops", "torch", pytest.param("interpreter", marks=pytest.mark.tensorrt)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_head_multiplies_by_its_numbers_and_scales(source, texts, monkeypatch, algorithm, run):
    """To a tenth of rounding's error: a state beside a tie may go to the next integer, a wrong scale reaches all."""
    if (algorithm, run) == ("W4A8_AWQ", "interpreter"):
        pytest.skip("TensorRT has no product of INT4 weights with FP8 activations")
    checkpoint, states, exact = source
    quantized = quantize(checkpoint, recipe(algorithm, exclude_modules=("transformer.*",)), texts)
    head = {n.removeprefix("lm_head."): t.read() for n, t in quantized.tensors.items() if n.startswith("lm_head.")}
    assert {name for name in quantized.tensors if not name.startswith("lm_head.")} == set(checkpoint.tensors) - {HEAD}
    expected = REFERENCES[algorithm](head, states)
    monkeypatch.setattr("trtlab.runtime.torch_backend.has_loops", lambda: run == "loops")
    got = logits(quantized, backend="interpreter" if run == "interpreter" else "torch")
    assert rms(expected - exact) > 1e-3 * rms(exact), "rounding changes the logits"
    assert rms(got - expected) < 0.1 * rms(expected - exact)


# --- where it is stored


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_the_head_differs_from_the_recipe_without_it(texts, algorithm):
    checkpoint = random_checkpoint(TIED)
    with_head = quantize(checkpoint, recipe(algorithm), texts).tensors
    without = quantize(checkpoint, QuantConfig(quant_algo=algorithm, group_size=64), texts).tensors
    assert HEAD in with_head
    assert {name for name in with_head if not name.startswith("lm_head.")} == set(without)
    for name, tensor in without.items():
        assert torch.equal(tensor.read().view(torch.uint8), with_head[name].read().view(torch.uint8)), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp_size=2), Mapping(tp_size=4), Mapping(tp_size=2, pp_size=2)])
def test_a_head_survives_disk_over_ranks_that_do_not_divide_it(texts, tmp_path, algorithm, mapping):
    quantized = quantize(random_checkpoint(TIED), recipe(algorithm), texts)
    quantized.save(tmp_path / "ckpt", mapping)
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert loaded.config.quantization.quantizes_head
    assert loaded.report.linears == quantized.report.linears
    assert loaded.tensors.keys() == quantized.tensors.keys()
    for name, tensor in quantized.tensors.items():
        assert torch.equal(tensor.read().view(torch.uint8), loaded.tensors[name].read().view(torch.uint8)), name


@pytest.mark.parametrize("algorithm", ["W8A16", "W4A16", "FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"])
@pytest.mark.parametrize("mapping", [Mapping(tp_size=2), Mapping(tp_size=4)])
def test_ranks_give_the_logits_of_one(texts, algorithm, mapping):
    quantized = quantize(random_checkpoint(TIED), recipe(algorithm, exclude_modules=("transformer.*",)), texts)
    one, ranks = logits(quantized, backend="torch"), logits(quantized, mapping, backend="torch")
    assert ranks.shape == one.shape
    assert rms(ranks - one) < 0.02 * rms(one)  # sums in another order round some activations to the next integer


def test_writing_layer_by_layer_gives_the_same_bytes(texts, tmp_path):
    checkpoint, quant = random_checkpoint(TIED), recipe("W4A16_AWQ")
    in_memory, on_disk = (
        quantize(checkpoint, quant, texts),
        quantize(checkpoint, quant, texts, output_dir=tmp_path / "c"),
    )
    assert in_memory.report == on_disk.report
    for name, tensor in in_memory.tensors.items():
        assert torch.equal(tensor.read(), on_disk.tensors[name].read()), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_form_holds_the_float_head_and_its_list_leaves_lm_head_out(tmp_path, tied):
    checkpoint = random_checkpoint(CONFIG.replace(tie_word_embeddings=tied))
    quantized = checkpoint.quantize(recipe("W4A16"))
    quantized.save(tmp_path / "plain", weight_only="plain")
    stored = load_file(tmp_path / "plain" / "rank0.safetensors")
    assert torch.equal(stored[HEAD], checkpoint.tensors[EMBEDDING if tied else HEAD].read())
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    listed = raw["quantization"]["exclude_modules"]
    assert listed
    assert not any("lm_head" in pattern for pattern in listed), "TensorRT-LLM quantizes what its list does not exclude"
    assert raw["trtlab"]["quantize_lm_head"] is True
    del raw["trtlab"]  # as TensorRT-LLM would write the same
    for own in (True, False):
        if not own:
            (tmp_path / "plain" / "config.json").write_text(json.dumps(raw))
        loaded = Checkpoint.load(tmp_path / "plain")
        assert loaded.config.quantization.quantizes_head
        for name, tensor in quantized.tensors.items():
            assert torch.equal(tensor.read(), loaded.tensors[name].read()), name


def test_without_it_config_json_is_as_before(texts, tmp_path):
    random_checkpoint(TIED).quantize(QuantConfig(quant_algo="W8A16")).save(tmp_path / "ckpt")
    raw = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    assert raw["quantization"]["exclude_modules"] is None
    assert "quantize_lm_head" not in raw["trtlab"]


# --- counted, shown, refused


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_estimate_counts_the_head_apart_from_the_table(texts, algorithm):
    quantized = quantize(random_checkpoint(TIED), recipe(algorithm), texts)
    by_name = estimate(TIED, BOUNDS, quant_algo=algorithm, group_size=64, quantize_lm_head=True)
    assert estimate(quantized, BOUNDS) == by_name
    head = sum(tensor.nbytes for name, tensor in quantized.tensors.items() if name.startswith("lm_head."))
    assert by_name.largest.weights["head"] == head
    assert by_name.largest.weight_bytes == quantized.nbytes
    assert by_name.largest.step_weight_bytes == quantized.nbytes - quantized.tensors[EMBEDDING].nbytes
    assert "with the head" in card(by_name).title


def test_the_report_has_a_row_for_the_head(texts):
    for tied in (True, False):
        config = CONFIG.replace(tie_word_embeddings=tied)
        quantized = quantize(random_checkpoint(config), recipe("W4A16_AWQ"), texts)
        row = quantized.report.linears[-1]
        assert row.name == "lm_head"
        assert row.snr_db > 10
        assert row.bytes_before == (0 if tied else 4 * 99 * 256), "the table of a tied model stays"
        assert dict(card(quantized).facts)["head"].endswith("apart from the table") == tied


def test_the_peak_counts_the_head(texts):
    config = small_config(vocab_size=20000, hidden_size=64, intermediate_size=64, tie_word_embeddings=True)
    checkpoint = random_checkpoint(config)
    with_head = quantize(checkpoint, recipe("W8A16"), texts).made_by.peak(in_memory=False)
    without = checkpoint.quantize(QuantConfig(quant_algo="W8A16")).made_by.peak(in_memory=False)
    assert with_head.layer >= 20000 * 64 * 4 + without.layer - 4 * 20000 * 64


def test_what_cannot_be_is_refused(checkpoint, tmp_path):
    with pytest.raises(QuantizeError, match="quantize_lm_head needs an algorithm"):
        checkpoint.quantize(QuantConfig(kv_cache_quant_algo="FP8", quantize_lm_head=True))
    with pytest.raises(ConfigError, match="quantizes linears of the MLPs alone"):
        tensor_specs(CONFIG.replace(quantization=recipe("FP8_PER_CHANNEL_PER_TOKEN")))
    tied = random_checkpoint(TIED).quantize(recipe("W8A16"))
    with pytest.raises(ConfigError, match="a quantized head is a matrix of its own"):
        tied.save(tmp_path / "ckpt", use_embedding_sharing=True)


def test_a_pattern_may_leave_the_head_out_again(checkpoint, tmp_path):
    quantized = checkpoint.quantize(recipe("W8A16", exclude_modules=("lm_head",)))
    assert quantized.tensors[HEAD].dtype == torch.float32
    quantized.save(tmp_path / "ckpt")
    assert not Checkpoint.load(tmp_path / "ckpt").config.quantization.quantizes_head
