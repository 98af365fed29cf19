"""The tensors of a quantized checkpoint, the same after saving, splitting over ranks and both ways of writing."""

import ast
import json

import pytest
import torch

from trtlab import Checkpoint, ConfigError, Mapping, QuantConfig, QuantizedCheckpoint, TrtlabError
from trtlab.card import card, size
from trtlab.storage.files import TensorFile

from .conftest import CONFIG, EVERY_CONFIG, random_checkpoint

KV_SCALES = ("merged", "split", "per_head")


def recipe(algorithm, cache, **more) -> QuantConfig:
    return QuantConfig(quant_algo=algorithm, kv_cache_quant_algo=cache, group_size=64, **more)


def quantize(checkpoint, texts, quant, **where) -> QuantizedCheckpoint:
    return checkpoint.quantize(quant, calibration=texts if quant.reads_texts else None, **where)


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        a, b = tensor.read(), right.tensors[name].read()
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize(("algorithm", "cache"), EVERY_CONFIG)
@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp_size=2), Mapping(tp_size=4), Mapping(tp_size=2, pp_size=2)])
def test_every_algorithm_survives_disk_over_ranks(quantized_by, tmp_path, algorithm, cache, mapping):
    quantized = quantized_by(recipe(algorithm, cache, kv_cache_scales="per_head"))
    quantized.save(tmp_path / "ckpt", mapping=mapping)
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert isinstance(loaded, QuantizedCheckpoint)
    assert loaded.config.quantization.quant_algo == algorithm
    assert_same(quantized, loaded)


@pytest.mark.parametrize("scales", KV_SCALES)
def test_cache_scales_survive_disk(quantized_by, tmp_path, scales):
    quantized = quantized_by(QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales=scales))
    quantized.save(tmp_path / "ckpt", mapping=Mapping(tp_size=4))
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert loaded.config.quantization == quantized.config.quantization
    assert_same(quantized, loaded)


@pytest.mark.parametrize("algorithm", ["W8A16", "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "W4A16_AWQ", "W4A8_AWQ"])
def test_writing_layer_by_layer_gives_the_same_bytes(checkpoint, texts, tmp_path, algorithm, capsys):
    quant = recipe(algorithm, "INT8")
    in_memory = quantize(checkpoint, texts, quant)
    on_disk = quantize(checkpoint, texts, quant, output_dir=tmp_path / "ckpt")
    assert_same(in_memory, on_disk)
    assert on_disk.report == in_memory.report
    assert capsys.readouterr() == ("", ""), "quantize is quiet: its card shows the memory that it took"
    for quantized in (in_memory, on_disk):
        peak = quantized.made_by.peak(in_memory=quantized is in_memory)
        shown = f"{size(peak.total)} while it was quantized; with the whole model in both forms {size(peak.at_once)}"
        assert dict(card(quantized).facts)["memory"] == shown
        assert peak.total < peak.at_once
    assert "memory" not in dict(card(Checkpoint.load(tmp_path / "ckpt")).facts)


def test_a_tied_model_is_written_with_one_table(texts, tmp_path):
    tied = random_checkpoint(CONFIG.replace(tie_word_embeddings=True))
    quantized = quantize(tied, texts, recipe("FP8", None), output_dir=tmp_path / "ckpt")
    assert "lm_head.weight" not in quantized.tensors
    assert_same(quantized, quantize(tied, texts, recipe("FP8", None)))


def test_the_names_are_those_of_tensorrt_llm(checkpoint, texts, tmp_path):
    quant = recipe("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "INT8", kv_cache_scales="merged")
    quantize(checkpoint, texts, quant).save(tmp_path / "ckpt")
    stored = Checkpoint.load(tmp_path / "ckpt").tensors
    layer = {n.removeprefix("transformer.layers.1."): t for n, t in stored.items() if ".layers.1." in n}
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in layer.items() if "weight" not in name}
    f32 = torch.float32
    assert shapes == {
        "input_layernorm.scale_to_int": ([1], f32),
        "attention.qkv.per_channel_scale": ([1, 512], f32),
        "attention.qkv.act_scale": ([1, 1], f32),
        "attention.quantization_scaling_factor": ([1], f32),
        "attention.dense.per_channel_scale": ([1, 256], f32),
        "attention.dense.act_scale": ([1, 1], f32),
        "attention.dense.smoother": ([1, 256], f32),
        "attention.kv_cache_scaling_factor": ([1], f32),
        "post_layernorm.scale_to_int": ([1], f32),
        "mlp.fc.per_channel_scale": ([1, 256], f32),
        "mlp.fc.act_scale": ([1, 1], f32),
        "mlp.gate.per_channel_scale": ([1, 256], f32),
        "mlp.gate.act_scale": ([1, 1], f32),
        "mlp.quantization_scaling_factor": ([1], f32),
        "mlp.proj.per_channel_scale": ([1, 256], f32),
        "mlp.proj.act_scale": ([1, 1], f32),
        "mlp.proj.smoother": ([1, 256], f32),
    }
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"
    assert config["quantization"]["kv_cache_quant_algo"] == "INT8"


def test_per_token_scales_leave_dummies_of_1_and_per_tensor_ones_a_single_number(checkpoint, texts):
    quantized = quantize(checkpoint, texts, recipe("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", None)).tensors
    prefix = "transformer.layers.0."
    assert quantized[f"{prefix}post_layernorm.scale_to_int"].read().tolist() == [1.0]
    assert quantized[f"{prefix}mlp.fc.per_channel_scale"].shape == (1, 1)
    assert quantized[f"{prefix}attention.qkv.per_channel_scale"].shape == (1, 512)
    assert f"{prefix}mlp.fc.act_scale" not in quantized


def test_excluded_modules_keep_their_weight_and_the_function(checkpoint, texts):
    quant = recipe("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", None, exclude_modules=("*.mlp.gate", "*.0.attention.*"))
    quantized = quantize(checkpoint, texts, quant)
    gate, fc = "transformer.layers.0.mlp.gate.weight", "transformer.layers.0.mlp.fc.weight"
    assert quantized.tensors[gate].dtype == torch.float32
    assert quantized.tensors[fc].dtype == torch.int8
    assert torch.equal(
        quantized.tensors["transformer.layers.0.attention.qkv.weight"].read(),
        checkpoint.tensors["transformer.layers.0.attention.qkv.weight"].read(),
    )
    assert {row.name for row in quantized.report.linears}.isdisjoint({gate.removesuffix(".weight")})
    with (
        quantized.build(plan=False).session(backend="torch", device="cpu") as ours,
        checkpoint.build(plan=False).session(device="cpu") as plain,
    ):
        expected = plain.logits(texts[0])
        assert (ours.logits(texts[0]) - expected).norm() < 0.05 * expected.norm()


def test_groups_that_do_not_divide_over_ranks_name_what_would(checkpoint, texts, tmp_path):
    quantized = quantize(checkpoint, texts, QuantConfig(quant_algo="W4A16_AWQ", group_size=128))
    with pytest.raises(
        ConfigError, match="64 inputs on each of 4 ranks, which groups of 128 do not divide; use group_size=32 or 64"
    ):
        quantized.save(tmp_path / "ckpt", mapping=Mapping(tp_size=4))


def test_groups_that_do_not_divide_are_refused_before_anything_runs(texts):
    odd = random_checkpoint(CONFIG.replace(intermediate_size=172))
    with pytest.raises(ConfigError, match=r"mlp\.proj has 172 inputs, which groups of 64 do not divide"):
        odd.quantize(recipe("W4A16_AWQ", None), calibration=texts)


@pytest.mark.parametrize("exclude", [(), ("*.0.mlp.fc",)])
def test_the_pattern_that_is_proposed_for_a_width_without_groups_works(texts, exclude):
    odd = random_checkpoint(CONFIG.replace(intermediate_size=172))
    with pytest.raises(ConfigError) as caught:
        odd.quantize(recipe("W4A16_AWQ", None, exclude_modules=exclude), calibration=texts)
    proposed = caught.value.remedy.partition("exclude_modules=")[2].partition(", or W8A16")[0]
    assert ast.literal_eval(proposed) == (*exclude, "*.mlp.proj")
    quant = recipe("W4A16_AWQ", None, exclude_modules=ast.literal_eval(proposed))
    rows = odd.quantize(quant, calibration=texts).report.linears
    assert rows and not [row.name for row in rows if row.name.endswith("mlp.proj")]


def test_where_groups_divide_no_width_another_algorithm_is_proposed(texts):
    odd = random_checkpoint(CONFIG.replace(hidden_size=40, head_size=10, intermediate_size=172))
    words = r"attention\.qkv has 40 inputs.*do not divide; use W8A16, which has no groups$"
    with pytest.raises(ConfigError, match=words):
        odd.quantize(recipe("W4A16_AWQ", None), calibration=texts)
    assert odd.quantize(recipe("W8A16", None)).report.linears


def test_an_interrupted_quantization_leaves_the_old_folder(checkpoint, texts, tmp_path, monkeypatch):
    quantized = quantize(checkpoint, texts, recipe("W8A16", None), output_dir=tmp_path / "ckpt")
    put, count = TensorFile.put, []

    def fail(self, name, value):
        count.append(name)
        if len(count) > 9:
            raise KeyboardInterrupt
        put(self, name, value)

    monkeypatch.setattr(TensorFile, "put", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, texts, recipe("W4A16", None), output_dir=tmp_path / "ckpt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]
    assert_same(quantized, Checkpoint.load(tmp_path / "ckpt"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_algo", "W4A16_GPTQ", "W4A16_GPTQ is not supported"),
        ("has_zero_point", True, "has_zero_point"),
        ("surprise", 3, "surprise"),
    ],
)
def test_a_stored_recipe_that_is_not_understood_is_refused(checkpoint, tmp_path, key, value, message):
    checkpoint.save(tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "config.json"
    config = json.loads(file.read_text())
    config["quantization"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(TrtlabError, match=message):
        Checkpoint.load(tmp_path / "ckpt")
