"""The two forms of a weight-only folder: unquantized weights for TensorRT-LLM to quantize, and our integers."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtlab import (
    Checkpoint,
    CheckpointError,
    ConfigError,
    Engine,
    Mapping,
    QuantConfig,
    QuantizedCheckpoint,
    QuantizeError,
)
from trtlab.model.scales import pack_int4
from trtlab.quantize.weight_only import weight_only

from ..models import loud_checkpoint, random_texts, small_config

ALGORITHMS = ["W8A16", "W4A16"]
TEXTS = random_texts((24, 5))
MAPPINGS = [Mapping(), Mapping(tp_size=2), Mapping(tp_size=4), Mapping(tp_size=2, pp_size=2)]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def checkpoint(request) -> Checkpoint:
    return loud_checkpoint(small_config(dtype=request.param))


def quantize(checkpoint: Checkpoint, algorithm: str, **more) -> QuantizedCheckpoint:
    quant = QuantConfig(quant_algo=algorithm, **more)
    return checkpoint.quantize(quant, calibration=TEXTS if quant.reads_texts else None)


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert left.config == right.config
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        a, b = tensor.read(), right.tensors[name].read()
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def tokens(checkpoint: Checkpoint) -> list[int]:
    with checkpoint.build(plan=False).session(backend="torch", device="cpu") as session:
        return list(session.generate(TEXTS[0]).token_ids)


def edit_config(folder, change) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_plain_folder_gives_the_integers_and_scales_of_the_quantizer(checkpoint, tmp_path, algorithm, mapping):
    quantized = quantize(checkpoint, algorithm)
    loaded = Checkpoint.load(quantized.save(tmp_path / "ckpt", mapping, weight_only="plain"))
    assert isinstance(loaded, QuantizedCheckpoint)
    assert_same(quantized, loaded)
    assert loaded.report == quantized.report


@pytest.mark.parametrize(
    "more",
    [
        {"kv_cache_quant_algo": "INT8", "kv_cache_scales": "per_head"},
        {"kv_cache_quant_algo": "FP8"},
        {"exclude_modules": ("*.mlp.gate", "*.0.attention.*")},
    ],
)
def test_a_quantized_cache_and_excluded_linears_survive_the_plain_form(checkpoint, tmp_path, more):
    quantized = quantize(checkpoint, "W4A16", **more)
    assert_same(quantized, Checkpoint.load(quantized.save(tmp_path / "ckpt", Mapping(tp_size=2), weight_only="plain")))


@pytest.mark.parametrize("form", ["plain", "integers"])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_is_loaded_is_saved_in_the_form_that_it_had(checkpoint, tmp_path, files_of, form, mapping):
    quantized = quantize(checkpoint, "W8A16", kv_cache_quant_algo="INT8")
    first = quantized.save(tmp_path / "first", mapping, weight_only=form)
    loaded = Checkpoint.load(first)
    assert files_of(loaded.save(tmp_path / "second", mapping)) == files_of(first)
    assert json.loads((first / "config.json").read_text())["trtlab"]["weight_only"] == form
    assert tokens(loaded) == tokens(quantized)


def test_integers_are_the_form_of_a_new_one(checkpoint, tmp_path, files_of):
    quantized = quantize(checkpoint, "W8A16")
    expected = files_of(quantized.save(tmp_path / "told", weight_only="integers"))
    assert files_of(quantized.save(tmp_path / "default")) == expected
    on_disk = checkpoint.quantize(QuantConfig(quant_algo="W8A16"), output_dir=tmp_path / "on_disk")
    assert on_disk.tensors.keys() == quantized.tensors.keys()
    assert files_of(on_disk.save(tmp_path / "again")) == expected


def test_the_plain_form_holds_the_weights_of_the_source(checkpoint, tmp_path):
    quantized = checkpoint.quantize(QuantConfig(quant_algo="W4A16"), output_dir=tmp_path / "integers")
    folder = quantized.save(tmp_path / "plain", weight_only="plain")
    stored = load_file(folder / "rank0.safetensors")
    assert stored.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(tensor, checkpoint.tensors[name].read()) for name, tensor in stored.items())
    assert json.loads((folder / "config.json").read_text())["quantization"]["quant_algo"] == "W4A16"


def test_without_the_source_the_plain_form_is_refused_and_the_remedy_works(checkpoint, tmp_path):
    loaded = Checkpoint.load(quantize(checkpoint, "W8A16").save(tmp_path / "integers"))
    with pytest.raises(CheckpointError, match="needs the unquantized weights") as caught:
        loaded.save(tmp_path / "plain", weight_only="plain")
    assert "quantize the source again" in caught.value.remedy
    assert not (tmp_path / "plain").exists()
    assert quantize(checkpoint, "W8A16").save(tmp_path / "plain", weight_only="plain").is_dir()


@pytest.mark.parametrize("form", ["plain", "integers"])
def test_other_weights_have_no_two_forms(checkpoint, tmp_path, form):
    smoothed = checkpoint.quantize(QuantConfig(quant_algo="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"), calibration=TEXTS)
    for other, words in ((checkpoint, "unquantized weights"), (smoothed, "W8A8_SQ")):
        with pytest.raises(ConfigError, match=f"weight_only chooses how W8A16.*{words}.*leave weight_only out"):
            other.save(tmp_path / "ckpt", weight_only=form)
    with pytest.raises(ConfigError, match="weight_only"):
        quantize(checkpoint, "W8A16").save(tmp_path / "ckpt", weight_only="device")


@pytest.mark.parametrize("mapping", [Mapping(tp_size=2), Mapping(tp_size=2, pp_size=2)])
def test_one_rank_of_a_plain_folder_has_the_tensors_of_one_rank_of_integers(checkpoint, tmp_path, mapping):
    quantized = quantize(checkpoint, "W8A16")
    plain = quantized.save(tmp_path / "plain", mapping, weight_only="plain")
    integers = quantized.save(tmp_path / "integers", mapping)
    for rank in mapping.ranks:
        assert_same(Checkpoint.load(integers, rank=rank), Checkpoint.load(plain, rank=rank))


def test_a_plain_folder_of_tensorrt_llm_is_quantized_and_stays_plain(checkpoint, tmp_path, files_of):
    quantized = quantize(checkpoint, "W8A16")
    folder = checkpoint.save(tmp_path / "theirs")
    edit_config(folder, lambda raw: (raw.pop("trtlab"), raw["quantization"].update(quant_algo="W8A16")))
    loaded = Checkpoint.load(folder)
    assert_same(quantized, loaded)
    assert tokens(loaded) == tokens(quantized)
    saved = loaded.save(tmp_path / "ours")
    assert files_of(saved)["rank0.safetensors"] == files_of(folder)["rank0.safetensors"]


def test_a_pickle_of_a_plain_checkpoint_opens_the_folder_again(checkpoint, tmp_path):
    loaded = Checkpoint.load(quantize(checkpoint, "W8A16").save(tmp_path / "ckpt", weight_only="plain"))
    assert_same(loaded, pickle.loads(pickle.dumps(loaded)))


@pytest.mark.parametrize("link", ["link", "copy"])
def test_an_engine_of_a_plain_folder_stores_integers(checkpoint, tmp_path, link):
    folder = quantize(checkpoint, "W8A16").save(tmp_path / "ckpt", weight_only="plain")
    with Checkpoint.load(folder).build(plan=False) as engine:
        engine.save(tmp_path / "engine", weights=link)
    assert (
        load_file(tmp_path / "engine" / "rank0.safetensors")["transformer.layers.0.mlp.fc.weight"].dtype == torch.int8
    )
    with (
        Engine.load(tmp_path / "engine", verify=True) as engine,
        engine.session(backend="torch", device="cpu") as session,
    ):
        assert list(session.generate(TEXTS[0]).token_ids) == tokens(quantize(checkpoint, "W8A16"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {n: t.view(torch.uint8) if t.dtype == torch.int8 else t for n, t in tensors.items()},
        lambda tensors: {**tensors, "rotary_inv_freq": 10000.0 ** -(torch.arange(0, 8, 2) / 8)},
    ],
    ids=["another dtype of the same bytes", "a buffer"],
)
def test_an_engine_does_not_link_files_that_hold_other_tensors(tmp_path, change):
    checkpoint = loud_checkpoint(small_config())
    folder = quantize(checkpoint, "W4A16").save(tmp_path / "ckpt")
    tensors = load_file(folder / "rank0.safetensors")
    save_file(change(tensors), folder / "rank0.safetensors")
    with Checkpoint.load(folder).build(plan=False) as engine:
        engine.save(tmp_path / "engine")
    with Engine.load(tmp_path / "engine", verify=True) as engine:
        assert engine.ranks[0].keys() == tensors.keys()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integers_in_the_layout_of_a_gpu_are_refused_by_name(checkpoint, tmp_path, algorithm):
    """TensorRT-LLM stores int8 ``[in, out]``, or ``[in, out / 2]`` with two INT4 a byte.

    A square one of INT8 has our shape and dtype, so it is the missing announcement that tells.
    """
    folder = quantize(checkpoint, algorithm).save(tmp_path / "ckpt")
    edit_config(folder, lambda raw: raw.pop("trtlab"))
    with pytest.raises(CheckpointError, match=f"integers of {algorithm} in the layout of one GPU's kernels") as caught:
        Checkpoint.load(folder)
    assert "unquantized weights" in caught.value.remedy


def test_weights_that_overflow_are_named_when_they_are_read(tmp_path):
    folder = quantize(loud_checkpoint(small_config()), "W8A16").save(tmp_path / "ckpt", weight_only="plain")
    tensors = load_file(folder / "rank0.safetensors")
    tensors["transformer.layers.1.mlp.fc.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "rank0.safetensors")
    loaded = Checkpoint.load(folder)
    with pytest.raises(QuantizeError, match=r"layers.1.mlp.fc.weight holds 1 values that are NaN or infinite"):
        loaded.tensors["transformer.layers.1.mlp.fc.per_channel_scale"].read()


# --- scales of each rank


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("form", ["plain", "integers"])
def test_scales_of_two_ranks_are_those_of_the_parts_that_the_ranks_hold(checkpoint, tmp_path, algorithm, form):
    """TensorRT-LLM quantizes the part of each rank, also where a rank holds some of the columns."""
    quantized = quantize(checkpoint, algorithm, scale_ranks=2)
    loaded = Checkpoint.load(quantized.save(tmp_path / form, Mapping(tp_size=2), weight_only=form))
    assert_same(quantized, loaded)
    parts = checkpoint.save(tmp_path / "parts", Mapping(tp_size=2))
    bits = 8 if algorithm == "W8A16" else 4
    with loaded.build(mapping=Mapping(tp_size=2), plan=False) as engine:
        for rank in (0, 1):
            weights, stored = load_file(parts / f"rank{rank}.safetensors"), engine.weights(rank)
            for name in (n.removesuffix(".weight") for n in weights if ".layers." in n and "norm" not in n):
                q, scale = weight_only(weights[f"{name}.weight"].float(), bits)
                expected = pack_int4(q).view(torch.int8) if bits == 4 else q
                assert torch.equal(stored[f"{name}.weight"], expected), name
                own = stored[f"{name}.per_channel_scale"].flatten()
                assert torch.equal(own, scale.stored(checkpoint.config.torch_dtype)), name


def test_scales_of_two_ranks_err_less_and_run_on_two_ranks_alone(tmp_path):
    checkpoint = loud_checkpoint(small_config(hidden_size=128, head_size=32, intermediate_size=256))
    whole, cut = quantize(checkpoint, "W4A16"), quantize(checkpoint, "W4A16", scale_ranks=2)
    noise = {
        name: {row.name: row.snr_db for row in one.report.linears} for name, one in (("whole", whole), ("cut", cut))
    }
    for name, snr in noise["whole"].items():
        if name.endswith(("dense", "proj")):
            assert noise["cut"][name] > snr, name
        else:
            assert noise["cut"][name] == snr, name
    with cut.build(mapping=Mapping(tp_size=2), plan=False).session(backend="torch", device="cpu") as session:
        assert torch.isfinite(session.logits(TEXTS[0])).all()
    for refused in (lambda: cut.build(plan=False), lambda: cut.save(tmp_path / "ckpt", Mapping(tp_size=4))):
        with pytest.raises(ConfigError, match=r"scales are those of 2 ranks.*use tp_size=2"):
            refused()


def test_ranks_that_do_not_divide_a_row_are_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"attention.dense has 32 inputs, which scale_ranks=3 does not divide"):
        quantize(checkpoint, "W8A16", scale_ranks=3)
