"""Hugging Face folders: their tensors are read correctly, and a key that is not supported is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trtlab import BuildConfig, Checkpoint, CheckpointError, ConfigError, TrtlabError
from trtlab.convert.hugging_face_config import REMEDY, HuggingFaceConfig
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.storage.json_files import parse_model

# config.json as published, without what names people or files
PUBLISHED = {
    "Llama 2 7B": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama 3.2 1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Mistral 7B": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2.5 0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3 0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
PARAMETERS = {
    "Llama 2 7B": 6_738_415_616,
    "Llama 3.2 1B": 1_235_814_400,
    "Mistral 7B": 7_241_732_096,
    "Qwen2.5 0.5B": 494_032_768,
    "Qwen3 0.6B": 596_049_920,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_give_the_published_parameter_count(name):
    from trtlab.model.tensor_specs import tensor_specs

    config = parse_model(PUBLISHED[name], HuggingFaceConfig, "config.json", remedy=REMEDY).to_model_config("bfloat16")
    assert sum(torch.Size(spec.shape).numel() for spec in tensor_specs(config).values()) == PARAMETERS[name]
    assert config.sliding_window == (4096 if name == "Mistral 7B" else None)
    BuildConfig().resolve(config)


def test_tensors_are_hugging_faces_bit_for_bit(random_model):
    for dtype in ("float32", "float16", "bfloat16"):
        folder = random_model("Qwen2ForCausalLM", dtype=dtype)
        theirs = load_file(folder / "model.safetensors")
        ours = {name: tensor.read() for name, tensor in Checkpoint.from_hugging_face(folder).tensors.items()}
        parts = [theirs[f"model.layers.1.self_attn.{x}_proj.bias"] for x in "qkv"]
        assert torch.equal(ours["transformer.layers.1.attention.qkv.bias"], torch.cat(parts))
        assert torch.equal(ours["transformer.layers.0.mlp.fc.weight"], theirs["model.layers.0.mlp.gate_proj.weight"])
        assert torch.equal(ours["transformer.layers.0.mlp.gate.weight"], theirs["model.layers.0.mlp.up_proj.weight"])
        assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in theirs.values())
        assert {t.dtype for t in ours.values()} == {getattr(torch, dtype)}


def test_dtype_auto_keeps_the_sources_and_a_name_casts(random_model, edited):
    folder = random_model("LlamaForCausalLM", dtype="bfloat16")
    assert Checkpoint.from_hugging_face(folder).config.dtype == "bfloat16"
    silent = edited(folder, dtype=...)
    assert Checkpoint.from_hugging_face(silent).config.dtype == "bfloat16"
    cast = Checkpoint.from_hugging_face(folder, dtype="float16")
    assert cast.config.dtype == "float16"
    assert {tensor.read().dtype for tensor in cast.tensors.values()} == {torch.float16}
    with pytest.raises(ConfigError, match=r"float32 \| float16 \| bfloat16"):
        Checkpoint.from_hugging_face(folder, dtype="int8")


def test_a_tied_folder_with_two_tables_is_read_as_transformers_reads_it(
    random_model, hugging_face, open_session, edited
):
    folder = edited(random_model("LlamaForCausalLM"), tie_word_embeddings=True)
    ids = [1, 2, 3, 50]
    with torch.inference_mode():
        expected = hugging_face(folder)(torch.tensor([ids])).logits[0]
    session = open_session(folder, max_seq_len=32, max_input_len=32)
    torch.testing.assert_close(session.logits(ids), expected, atol=1e-4, rtol=0)


def test_a_tied_folder_that_stores_its_table_twice_stays_tied(random_model, edited):
    folder = edited(random_model("LlamaForCausalLM", tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.from_hugging_face(folder)
    assert checkpoint.config.tie_word_embeddings and "lm_head.weight" not in checkpoint.tensors


def test_stored_rotary_frequencies_are_left_aside(random_model, edited):
    folder = edited(random_model("LlamaForCausalLM"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    Checkpoint.from_hugging_face(folder)


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CONFIGS = {
    "unknown architecture": (
        {"architectures": ["GemmaForCausalLM"]},
        r"GemmaForCausalLM.*LlamaForCausalLM \| MistralF",
    ),
    "no architecture": ({"architectures": None, "model_type": None}, "neither architectures nor model_type"),
    "a quantized folder": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    "a scale on the logits": ({"logit_scale": 0.5}, "logit_scale=0.5"),
    "a soft cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "a multiplier": (
        {"residual_multiplier": 0.2, "embedding_multiplier": 12},
        r"change the model's numbers and are not supported: residual_multiplier=0\.2; embedding_multiplier=12",
    ),
    "code of its own": ({"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
    "dynamic rope": (rope(rope_type="dynamic", factor=2.0), r"dynamic.*linear \| llama3 \| yarn"),
    "longrope": (rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]), "long_factor"),
    "an unknown rope": (rope(rope_type="spiral", factor=2.0), "spiral"),
    "a rope key of another kind": (rope(rope_type="linear", factor=2.0, mrope_section=[1]), r"mrope_section=\[1\]"),
    "half a rope": (rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "half a rope at the top": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "linear without factor": (rope(rope_type="linear"), "factor"),
    "llama3 without its bounds": (rope(rope_type="llama3", factor=8.0), "low_freq_factor"),
    "two ropes": (
        {**rope(rope_type="default"), "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "contradict each other",
    ),
    "no base": ({"rope_parameters": {"rope_theta": None}}, "rope_theta"),
    "an unknown activation": ({"hidden_act": "xielu"}, "xielu.*silu"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "words for numbers": ({"hidden_size": "64"}, "hidden_size is '64', expected an int of at least 1"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "infinity": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads in no groups": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "key/value heads"),
    "odd heads": ({"head_dim": 15}, "even head_size"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "1000000000 layers"),
    "more layers than weights": ({"num_hidden_layers": 3}, "missing model.layers.2"),
    "another width": ({"intermediate_size": 97}, r"mlp.gate_proj.weight is \[96, 64\], expected \[97, 64\]"),
    "biases that are not there": ({"attention_bias": True}, r"missing model.layers.0.self_attn.q_proj.bias \[64\]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_handled_is_refused_by_name(name, random_model, edited):
    changes, words = CONFIGS[name]
    with pytest.raises(TrtlabError, match=words) as caught:
        Checkpoint.from_hugging_face(edited(random_model("LlamaForCausalLM"), **changes))
    assert caught.value.remedy or caught.value.expected or caught.value.got


def test_what_the_config_forbids_is_said_before_the_weights_are_opened(random_model, edited):
    folder = edited(random_model("LlamaForCausalLM"), quantization_config={"quant_method": "fp8"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="quantization_config"):
        Checkpoint.from_hugging_face(folder)


def test_keys_that_change_no_number_pass(random_model, edited):
    folder = edited(
        random_model("LlamaForCausalLM"), use_cache=False, eos_token_id=[1, 2], attention_dropout=0.5, logit_scale=None
    )
    Checkpoint.from_hugging_face(folder)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("MistralForCausalLM", {"sliding_window": 40}),
        ("Qwen2ForCausalLM", {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 0}),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
        ),
    ],
)
def test_a_window_shorter_than_the_build_is_refused_and_one_that_holds_it_is_exact(
    architecture, changes, random_model, hugging_face, open_session
):
    folder = random_model(architecture, **changes)
    checkpoint = Checkpoint.from_hugging_face(folder)
    for bounds in ({}, {"max_seq_len": 41, "max_input_len": 41}):
        with pytest.raises(ConfigError, match=r"window of 40.*max_seq_len=40"):
            checkpoint.build(BuildConfig(**bounds), plan=False)
    ids = list(range(40))
    with torch.inference_mode():
        expected = hugging_face(folder)(torch.tensor([ids])).logits[0]
    session = open_session(folder, max_seq_len=40, max_input_len=40)
    torch.testing.assert_close(session.logits(ids), expected, atol=1e-4, rtol=0)


def test_a_window_that_config_json_leaves_out_is_the_familys_default(random_model, edited):
    folder = random_model("Qwen2ForCausalLM")
    on = edited(folder, use_sliding_window=True, sliding_window=..., layer_types=..., max_window_layers=0)
    assert Checkpoint.from_hugging_face(on).config.sliding_window == 4096
    assert (
        Checkpoint.from_hugging_face(
            edited(random_model("MistralForCausalLM"), sliding_window=...)
        ).config.sliding_window
        == 4096
    )


# --- folders

EMBEDDING = "model.embed_tokens.weight"


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def cut(file: Path, size: int | None = None) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if size is None else size])


FOLDERS = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "not a folder"),
    "a file": (lambda f: (f.rename(f.with_name("gone")), f.write_text("x")), "not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "not JSON"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "config is nested beyond reason": (lambda f: (f / "config.json").write_text("[" * 100000), "not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not hold a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights.*from_meta_ckpt"),
    "cut in the data": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read.*truncated"),
    "cut in the header": (lambda f: cut(f / "model.safetensors", 100), "model.safetensors cannot be read"),
    "cut in the length": (lambda f: cut(f / "model.safetensors", 3), "model.safetensors cannot be read"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors cannot be read"),
    "a missing tensor": (
        lambda f: change(f, lambda t: t.pop("model.norm.weight")),
        r"missing model.norm.weight \[64\]",
    ),
    "a mis-shaped tensor": (
        lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(65)})),
        r"model.norm.weight is \[65\], expected \[64\]",
    ),
    "all three at once": (
        lambda f: change(
            f, lambda t: (t.pop(EMBEDDING), t.update({"x": torch.ones(2), "model.norm.weight": torch.ones(2)}))
        ),
        "missing model.embed_tokens.weight.*surplus x.*model.norm.weight is",
    ),
    "integers": (
        lambda f: change(f, lambda t: t.update({"lm_head.weight": torch.ones(99, 64, dtype=torch.int8)})),
        "quantized weights: lm_head.weight is torch.int8",
    ),
    "an index without its shards": (
        lambda f: write_index(f, {"model.norm.weight": "model-00001-of-00002.safetensors"}),
        "model-00001-of-00002.safetensors is missing",
    ),
    "an index that leaves the folder": (
        lambda f: write_index(f, {"a": "../model.safetensors"}),
        "weight_map.a is .*expected the name of a file",
    ),
    "an index of numbers": (lambda f: write_index(f, {"a": 3}), "weight_map.a is 3, expected a str"),
    "an index without a map": (
        lambda f: (write_index(f, {}), (f / "model.safetensors.index.json").write_text("{}")),
        "weight_map is missing",
    ),
}


def write_index(folder: Path, weight_map) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_faulty_folder_is_named_with_what_to_do(name, random_model, edited):
    fault, words = FOLDERS[name]
    folder = edited(random_model("LlamaForCausalLM"))
    fault(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.from_hugging_face(folder)
    assert caught.value.remedy


class Exploit:
    """The content of a hostile pickle: a call that loading would make."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(protocol, random_model, edited, tmp_path):
    import pickle

    folder = edited(random_model("LlamaForCausalLM"))
    (folder / "model.safetensors").unlink()
    payload = {"model.norm.weight": Exploit(tmp_path / "owned")}
    if protocol == "bare pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as caught:
        Checkpoint.from_hugging_face(folder)
    assert caught.value.remedy
    assert not (tmp_path / "owned").exists()


# --- links


@pytest.fixture
def cached(talking_model, tmp_path):
    """The talking model in Hugging Face's cache, where every file of a snapshot is a link to a blob."""
    model = tmp_path / "models--org--talking"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(talking_model.iterdir())):
        (model / "blobs" / f"{number:040}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_a_folder_of_hugging_faces_cache_is_read_and_saved_as_files(cached, talking_model, tmp_path):
    checkpoint = Checkpoint.from_hugging_face(cached)
    plain = Checkpoint.from_hugging_face(talking_model)
    assert all(torch.equal(checkpoint.tensors[name].read(), tensor.read()) for name, tensor in plain.tensors.items())
    checkpoint.save(tmp_path / "saved")
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert "tokenizer.json" in saved and not any(path.is_symlink() for path in (tmp_path / "saved").iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_not_followed(name, cached, tmp_path):
    secret = tmp_path / name
    secret.write_bytes((cached / name).read_bytes() if (cached / name).exists() else b"{}")
    (cached / name).unlink(missing_ok=True)
    (cached / name).symlink_to(secret)
    if "index" in name:
        (cached / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="outside of the model's folder") as caught:
        Checkpoint.from_hugging_face(cached)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"])
def test_what_a_tokenizers_link_leads_to_is_neither_read_nor_copied(name, cached, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (cached / name).unlink(missing_ok=True)
    (cached / name).symlink_to(secret)
    checkpoint = Checkpoint.from_hugging_face(cached)
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        checkpoint.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(TrtlabError, match="outside of the model's folder"):
        Tokenizer(cached).encode("text")


# --- anything at all


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
CONFIG_KEYS = """architectures vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
intermediate_size hidden_act rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters
tie_word_embeddings torch_dtype dtype sliding_window use_sliding_window layer_types attention_bias mlp_bias
quantization_config partial_rotary_factor model_type""".split()
ROPE_KEYS = """rope_type type truncate rope_theta factor original_max_position_embeddings low_freq_factor
high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim partial_rotary_factor""".split()
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "default"])},
    optional={key: st.integers(-1, 64) | st.floats(0, 40) | values for key in ROPE_KEYS[1:]},
)


def opens_or_explains(folder: Path) -> None:
    """A config that is accepted must also run."""
    try:
        checkpoint = Checkpoint.from_hugging_face(folder)
        bounds = BuildConfig(max_seq_len=16, max_input_len=16)
        with checkpoint.build(bounds, plan=False).session(backend="torch", device="cpu") as session:
            assert session.logits([1, 2]).shape == (2, 99)
    except TrtlabError as error:
        assert str(error)


@given(
    st.dictionaries(st.sampled_from(CONFIG_KEYS) | st.text(max_size=4), values, max_size=3),
    st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
    st.none() | ropes,
)
def test_no_config_json_raises_anything_but_a_trtlab_error(fuzzed, changes, architecture, rope_parameters):
    folder, good = fuzzed
    raw = {**good, "architectures": [architecture], "rope_parameters": rope_parameters, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    opens_or_explains(folder)


@given(
    st.dictionaries(st.sampled_from(["model.norm.weight", "lm_head.weight", "__metadata__", "x"]), values),
    st.binary(max_size=40),
)
def test_no_safetensors_header_raises_anything_but_a_trtlab_error(fuzzed, header, data):
    folder, good = fuzzed
    encoded = json.dumps(header).encode()
    write_both(folder, good, struct.pack("<Q", len(encoded)) + encoded + data)


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=12))
def test_no_damage_to_a_safetensors_file_raises_anything_but_a_trtlab_error(fuzzed, place, junk):
    folder, good = fuzzed
    whole = (folder / "whole").read_bytes()
    write_both(folder, good, whole[:place] + junk + whole[place + len(junk) :])


def write_both(folder: Path, config, weights: bytes) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    try:
        (folder / "model.safetensors").write_bytes(weights)
        opens_or_explains(folder)
    finally:
        (folder / "model.safetensors").write_bytes((folder / "whole").read_bytes())


@pytest.fixture(scope="module")
def fuzzed(random_model, tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("fuzz"), random_model("LlamaForCausalLM")
    for name in ("model.safetensors", "whole"):
        (folder / name).write_bytes((source / "model.safetensors").read_bytes())
    return folder, json.loads((source / "config.json").read_text())
