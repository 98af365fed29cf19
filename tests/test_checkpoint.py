"""Checkpoints: weights in memory and on disk, TensorRT-LLM's own folders, faulty folders, and the memory they take."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trtlab import (
    BuildConfig,
    Checkpoint,
    CheckpointError,
    ConfigError,
    Engine,
    Mapping,
    ModelConfig,
    QuantConfig,
    QuantizedCheckpoint,
    RotaryScaling,
    TrtlabError,
)
from trtlab.tiny.meta import write_meta_ckpt

from .models import normal_checkpoint, normal_weights, small_config


def model_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": 33, "hidden_size": 16, "head_size": 4, "intermediate_size": 24}
    return small_config(**{**sizes, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    config = model_config()
    return Checkpoint.from_weights(config, normal_weights(config)).save(tmp_path / "ckpt", Mapping(tp_size=2))


# --- weights in memory


def test_weights_in_memory_are_a_checkpoint():
    config = model_config()
    weights = normal_weights(config)
    checkpoint = Checkpoint.from_weights(config, weights)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in weights.values())
    assert checkpoint.nbytes == 4 * checkpoint.parameters
    assert all(torch.equal(checkpoint.tensors[name].read(), tensor) for name, tensor in weights.items())


def test_weights_are_cast_to_the_configs_dtype_and_parameters_are_taken_by_value(tmp_path):
    config = model_config(dtype="bfloat16")
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in normal_weights(model_config()).items()}
    again = Checkpoint.load(Checkpoint.from_weights(config, weights).save(tmp_path / "c"))
    for name, tensor in weights.items():
        assert torch.equal(again.tensors[name].read(), tensor.detach().bfloat16())


def test_everything_that_does_not_fit_is_listed_together():
    config = model_config()
    weights = normal_weights(config)
    del weights["lm_head.weight"]
    weights["lm_head.bias"] = torch.ones(33)
    weights["transformer.ln_f.weight"] = torch.ones(17)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_weights(config, weights)
    message = str(caught.value)
    assert "missing lm_head.weight [33, 16]" in message
    assert "surplus lm_head.bias [33]" in message
    assert "transformer.ln_f.weight is [17], expected [16]" in message
    assert "tensor_specs" in caught.value.remedy


def test_a_long_list_of_faults_is_cut_with_its_count():
    with pytest.raises(CheckpointError, match=r"missing transformer.vocab_embedding.weight.* and 9 more"):
        Checkpoint.from_weights(model_config(), {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype):
    config = model_config()
    weights = normal_weights(config)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is torch"):
        Checkpoint.from_weights(config, weights)


# --- on disk


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RotaryScaling("linear", 2.0),
        RotaryScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0),
        RotaryScaling("yarn", 4.0, 16, beta_fast=24.0, mscale=0.7, mscale_all_dim=0.0, truncate=False),
        RotaryScaling("yarn", 4.0, attention_factor=1.25),
    ],
)
@pytest.mark.parametrize(
    "flags", [{}, {"attn_bias": True, "sliding_window": 48}, {"qk_layernorm": True, "dense_bias": True}]
)
def test_every_setting_survives_the_disk(scaling, flags, tmp_path):
    config = model_config(rotary_scaling=scaling, rotary_base=12345.0, norm_epsilon=3e-7, hidden_act="gelu", **flags)
    folder = Checkpoint.from_weights(config, normal_weights(config)).save(tmp_path / "c", Mapping(tp_size=2, pp_size=2))
    again = Checkpoint.load(folder)
    assert again.config == config
    assert again.mapping == Mapping(4, 2, 2)


def test_config_json_has_tensorrt_llms_names(folder):
    raw = json.loads((folder / "config.json").read_text())
    assert raw["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    expected = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "logits_dtype": "float32",
        "position_embedding_type": "rope_gpt_neox",
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "head_size": 4,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "qk_layernorm": False,
        "attn_bias": False,
        "mlp_bias": False,
    }
    assert expected.items() <= raw.items()
    assert {"quant_algo": None, "kv_cache_quant_algo": None}.items() <= raw["quantization"].items()
    assert raw["producer"]["name"] == "trtlab"


def test_saving_twice_gives_the_same_bytes(folder, tmp_path, files_of):
    config = model_config()
    Checkpoint.from_weights(config, normal_weights(config)).save(tmp_path / "again", Mapping(tp_size=2))
    assert files_of(folder) == files_of(tmp_path / "again")


def test_the_tokenizer_travels_with_checkpoint_and_engine(talking_model, tmp_path, open_session):
    saved = Checkpoint.from_hugging_face(talking_model).save(tmp_path / "ckpt")
    bounds = {"max_seq_len": 48, "max_input_len": 32}
    engine = Checkpoint.load(saved).build(BuildConfig(**bounds), plan=False)
    engine.save(tmp_path / "engine")
    expected = open_session(talking_model, **bounds).generate("the cat")
    from trtlab import Engine

    with (
        engine.session(backend="torch", device="cpu") as a,
        Engine.load(tmp_path / "engine").session(backend="torch", device="cpu") as b,
    ):
        assert a.generate("the cat") == b.generate("the cat") == expected


def test_loading_one_rank_opens_no_other_file(folder):
    (folder / "rank1.safetensors").write_bytes(b"damaged")
    own = Checkpoint.load(folder, rank=0)
    assert own.tensors["lm_head.weight"].shape == (17, 16)
    for use in (lambda: own.save(folder.with_name("x")), lambda: own.build(BuildConfig(), plan=False)):
        with pytest.raises(CheckpointError, match="rank 0 of 2 alone") as caught:
            use()
        assert caught.value.remedy


# config.json as TensorRT-LLM 0.20 writes it for a LLaMA, besides the sizes
UPSTREAM = {
    "logits_dtype": "float32",
    "position_embedding_type": "rope_gpt_neox",
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "share_embedding_table": False,
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "smoothquant_val": 0.5},
    "mapping": {
        "world_size": 2,
        "tp_size": 2,
        "pp_size": 1,
        "cp_size": 1,
        "moe_tp_size": 2,
        "moe_ep_size": 1,
        "gpus_per_node": 8,
    },
    "moe": {"num_experts": 0, "shared_expert_intermediate_size": 0, "top_k": 0, "normalization_mode": 0},
    "residual_mlp": False,
    "disable_weight_only_quant_plugin": False,
    "runtime_defaults": None,
    "kv_dtype": "float32",
    "embedding_multiplier": 1.0,
    "use_last_layernorm": True,
    "fc_after_embed": False,
    "layer_idx_offset": 0,
}


def rewrite(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def test_a_folder_that_tensorrt_llm_wrote_is_read(folder):
    ours = dict.fromkeys(("trtlab", "producer", "dense_bias", "tie_word_embeddings", "sliding_window"), ...)
    rewrite(folder, **UPSTREAM, **ours)
    config = model_config()
    again = Checkpoint.load(folder)
    assert again.config == config
    assert all(torch.equal(again.tensors[n].read(), t) for n, t in normal_weights(config).items())


FAULTS = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no rank": (lambda f: (f / "rank1.safetensors").unlink(), "rank1.safetensors is missing"),
    "a rank cut short": (
        lambda f: (f / "rank1.safetensors").write_bytes((f / "rank1.safetensors").read_bytes()[:500]),
        "rank1.safetensors cannot be read",
    ),
    "a rank of another split": (lambda f: rewrite(f, mapping={"tp_size": 1}), "rank1.*though config.json has one rank"),
    "world sizes that differ": (lambda f: rewrite(f, mapping={"world_size": 4, "tp_size": 2}), "world_size 4"),
    "a split that cannot be": (lambda f: rewrite(f, mapping={"tp_size": 2, "pp_size": 3}), "rank2|pp_size=3"),
    "context parallel": (lambda f: rewrite(f, mapping={"tp_size": 2, "cp_size": 2}), "cp_size=2"),
    "unknown architecture": (lambda f: rewrite(f, architecture="FalconForCausalLM"), "Falcon.*LlamaForCausalLM"),
    "quantized in name alone": (lambda f: rewrite(f, quantization={"quant_algo": "FP8"}), "plain weights.*FP8"),
    "an unknown algorithm": (lambda f: rewrite(f, quantization={"quant_algo": "W9A9"}), "W9A9"),
    "experts": (lambda f: rewrite(f, moe={"num_experts": 8}), "num_experts"),
    "a residual mlp": (lambda f: rewrite(f, residual_mlp=True), "residual_mlp=True"),
    "a multiplier": (lambda f: rewrite(f, logits_scaling=0.5), "logits_scaling=0.5"),
    "another multiplier": (
        lambda f: rewrite(f, embedding_multiplier=12.0),
        "embedding_multiplier is 12.0, expected 1.0",
    ),
    "alibi": (lambda f: rewrite(f, position_embedding_type="alibi"), "alibi"),
    "an unknown rope": (lambda f: rewrite(f, rotary_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
    "a rope without a kind": (lambda f: rewrite(f, rotary_scaling={"factor": 2.0}), "rotary_scaling"),
    "an unknown activation": (lambda f: rewrite(f, hidden_act="xielu"), "xielu"),
    "a format from the future": (lambda f: rewrite(f, trtlab={"format": 99}), "format 99.*upgrade trtlab"),
    "of Hugging Face": (
        lambda f: rewrite(f, architecture=..., architectures=["LlamaForCausalLM"]),
        "is a Hugging Face folder.*from_hugging_face",
    ),
    "of ModelOpt": (lambda f: rewrite(f, rotary_base=..., producer={"name": "modelopt"}), "ModelOpt.*hf_config="),
    "no sizes": (lambda f: rewrite(f, hidden_size=...), "hidden_size is missing"),
    "words for numbers": (lambda f: rewrite(f, hidden_size="16"), "hidden_size is '16'"),
    "a billion layers": (lambda f: rewrite(f, num_hidden_layers=10**9), "1000000000 layers"),
    "another dtype than stored": (lambda f: rewrite(f, dtype="float16"), "is torch.float32, expected torch.float16"),
    "integers": (lambda f: to_dtype(f, torch.int8), "torch.int8"),
    "a missing tensor": (lambda f: change(f, lambda t: t.pop("lm_head.weight")), "missing lm_head.weight"),
    "a surplus tensor": (lambda f: change(f, lambda t: t.update(x=torch.ones(1))), "surplus x"),
}


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "rank0.safetensors")
    edit(tensors)
    save_file(tensors, folder / "rank0.safetensors")


def to_dtype(folder: Path, dtype) -> None:
    change(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_folder_is_named_with_what_to_do(name, folder):
    fault, words = FAULTS[name]
    fault(folder)
    with pytest.raises(TrtlabError, match=words) as caught:
        Checkpoint.load(folder)
    assert caught.value.remedy or caught.value.expected


@pytest.mark.parametrize("rank", [2, -1])
def test_a_rank_that_is_not_there_is_named(rank, folder):
    with pytest.raises(CheckpointError, match=f"no rank {rank}.*0 to 1"):
        Checkpoint.load(folder, rank=rank)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)
KEYS = """architecture dtype vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads
num_key_value_heads head_size hidden_act intermediate_size norm_epsilon rotary_base attn_bias dense_bias mlp_bias
qk_layernorm tie_word_embeddings sliding_window rotary_scaling use_parallel_embedding embedding_sharding_dim
share_embedding_table mapping quantization trtlab producer moe position_embedding_type""".split()
mappings = st.dictionaries(st.sampled_from(["world_size", "tp_size", "pp_size", "cp_size"]), st.integers(0, 4) | values)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), values, max_size=3), st.none() | mappings)
def test_no_config_json_raises_anything_but_a_trtlab_error(fuzzed, changes, mapping):
    folder, good = fuzzed
    (folder / "config.json").write_text(json.dumps(good | ({"mapping": mapping} if mapping else {}) | changes))
    try:
        checkpoint = Checkpoint.load(folder)
        for tensor in checkpoint.tensors.values():
            assert tensor.read().shape == tensor.shape
    except TrtlabError as error:
        assert str(error)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    config = model_config()
    folder = tmp_path_factory.mktemp("fuzz") / "ckpt"
    Checkpoint.from_weights(config, normal_weights(config)).save(folder, Mapping(tp_size=2))
    return folder, json.loads((folder / "config.json").read_text())


def test_a_dtype_that_is_unknown_is_refused_at_once():
    with pytest.raises(ConfigError, match="float8"):
        model_config(dtype="float8")


# --- how much is held

MEASURED = """
import re, sys
from pathlib import Path
import torch
from trtlab import Checkpoint, Mapping
torch.set_num_threads(1)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
def status(key):  # of this process alone: ru_maxrss begins with the peak of the process that started it
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
checkpoint = Checkpoint.from_hugging_face(sys.argv[1], dtype=sys.argv[3])
opened = status("VmHWM")
checkpoint.save(sys.argv[2], Mapping(tp_size=2), use_parallel_embedding=True)
Checkpoint.load(sys.argv[2]).save(sys.argv[2] + "-whole")
print(opened - before, status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak on Linux alone")
def test_converting_holds_less_than_one_shard_and_one_rank(tmp_path):
    source = tmp_path / "source"
    shards, largest, total = write_shards(source)
    assert shards >= 5
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out"), "float16"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    opening, converting = map(int, process.stdout.split())
    assert opening < 8 * 2**20, "opening reads headers alone"
    assert converting < largest + 40 * 2**20 < total / 2, (converting, largest, total)


def write_shards(folder: Path) -> tuple[int, int, int]:
    """A sharded folder with one layer of tens of megabytes in each file, made without a model in memory."""
    folder.mkdir()
    hidden, inner, layers, vocab = 768, 2048, 8, 8000
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (256, hidden),
        "self_attn.v_proj": (256, hidden),
    }
    linear |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    files = {
        f"model-{i}.safetensors": {f"model.layers.{i}.{n}.weight": s for n, s in (linear | norms).items()}
        for i in range(layers)
    }
    files["model-8.safetensors"] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for file, shapes in files.items():
        save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / file)
    index = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [(folder / file).stat().st_size for file in files]
    return len(files), max(sizes), sum(sizes)


# --- pickles


OTHER_PROCESS = """
import hashlib, os, pickle, sys
import torch
os.chdir("/")
checkpoint = pickle.load(sys.stdin.buffer)
print(type(checkpoint).__name__, checkpoint.config.dtype, checkpoint.config.max_position_embeddings, checkpoint.rank)
digest = hashlib.sha256()
for name in sorted(checkpoint.tensors):
    digest.update(checkpoint.tensors[name].read().contiguous().view(torch.uint8).numpy().data)
print(digest.hexdigest())
"""


def opened_in_each_way(random_model, tmp_path):
    """Checkpoints from every kind of folder, each with arguments of its own."""
    whole = Checkpoint.from_hugging_face(random_model())
    yield Checkpoint.from_hugging_face(random_model(), dtype="bfloat16")
    yield Checkpoint.load(whole.save(tmp_path / "one"))
    yield Checkpoint.load(whole.save(tmp_path / "two", Mapping(tp_size=2)), rank=1)
    yield whole.quantize(QuantConfig(quant_algo="W8A16"), output_dir=tmp_path / "quantized")
    yield QuantizedCheckpoint.load(tmp_path / "quantized")


def test_a_pickle_holds_the_path_and_opens_the_same_checkpoint_in_another_process(random_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for checkpoint in opened_in_each_way(random_model, Path()):
        content = pickle.dumps(checkpoint)
        assert len(content) < 3000
        process = subprocess.run([sys.executable, "-c", OTHER_PROCESS], input=content, capture_output=True, check=True)
        words, digest = process.stdout.decode().splitlines()
        config = checkpoint.config
        assert words == f"{type(checkpoint).__name__} {config.dtype} {config.max_position_embeddings} {checkpoint.rank}"
        expected = hashlib.sha256()
        for name in sorted(checkpoint.tensors):
            expected.update(checkpoint.tensors[name].read().contiguous().view(torch.uint8).numpy().data)
        assert digest == expected.hexdigest()


def test_a_pickle_of_a_quantized_checkpoint_keeps_its_report(random_model, tmp_path):
    *_, quantized, _ = opened_in_each_way(random_model, tmp_path)
    again = pickle.loads(pickle.dumps(quantized))
    assert again.report == quantized.report and again.made_by is None


def test_a_pickle_of_a_meta_folder_keeps_its_arguments(random_model, tmp_path):
    write_meta_ckpt(random_model(), tmp_path / "meta")
    checkpoint = Checkpoint.from_meta_ckpt(tmp_path / "meta", dtype="float16", max_position_embeddings=77)
    assert pickle.loads(pickle.dumps(checkpoint)).config == checkpoint.config


def test_a_checkpoint_in_memory_cannot_be_pickled_and_is_its_own_copy(random_model):
    checkpoint = normal_checkpoint(model_config())
    stored = Checkpoint.from_hugging_face(random_model())
    quantized = checkpoint.quantize(QuantConfig(quant_algo="W8A16"))
    for held in (checkpoint, quantized, dataclasses.replace(stored, tensors={})):
        with pytest.raises(CheckpointError, match=rf"a {type(held).__name__} in memory.*; save\(\) it, and pickle"):
            pickle.dumps(held)
        assert copy.copy(held) is held and copy.deepcopy(held) is held


def test_a_pickle_of_a_folder_that_has_changed_or_gone_is_refused(tmp_path):
    folder = normal_checkpoint(model_config()).save(tmp_path / "ckpt")
    content = pickle.dumps(Checkpoint.load(folder))
    assert pickle.loads(content).config == model_config()
    Checkpoint.from_weights(model_config(), normal_weights(model_config(), seed=1)).save(folder)
    with pytest.raises(CheckpointError, match=r"ckpt has changed since.*; open it, and pickle it again"):
        pickle.loads(content)
    folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="ckpt is not a folder: there is nothing of that name"):
        pickle.loads(content)


# --- links


@pytest.mark.parametrize("name", ["config.json", "rank0.safetensors", "rank1.safetensors"])
def test_a_checkpoint_or_engine_follows_no_link_out_of_its_folder(name, folder, tmp_path):
    engine = Checkpoint.load(folder).build(BuildConfig(max_seq_len=32), mapping=Mapping(tp_size=2), plan=False)
    engine.save(tmp_path / "engine", weights="copy")
    for path, load in ((folder, Checkpoint.load), (tmp_path / "engine", Engine.load)):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        with pytest.raises(TrtlabError, match="outside of the model's folder"):
            load(path)
        (path / name).unlink()
        (path / name).symlink_to("gone")
        with pytest.raises(TrtlabError, match="is a link to gone, which is missing"):
            load(path)
