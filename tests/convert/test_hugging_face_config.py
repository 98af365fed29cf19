"""config.json of a Hugging Face folder: the logits are transformers', or the key is refused by name."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, CheckpointError, ConfigError, TrtlabError
from trtlab.convert.families import FAMILIES
from trtlab.convert.hugging_face_config import HuggingFaceConfig, read_config
from trtlab.storage.foreign_objects import ForeignObject

from ..models import HUGGING_FACE

PROMPT = list(range(2, 42))
LLAMA = {**HUGGING_FACE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def write(folder: Path, **changes) -> Path:
    """A folder with the config.json of a small LLaMA; ``...`` removes a key."""
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_logits_are_transformers(folder, hugging_face, open_session):
    with torch.inference_mode():
        expected = hugging_face(folder)(torch.tensor([PROMPT])).logits[0]
    session = open_session(folder, max_seq_len=len(PROMPT), max_input_len=len(PROMPT))
    # Sums of up to 96 products in float32, in another order: some 1e-6 of the logits, which are about 1.
    torch.testing.assert_close(session.logits(PROMPT), expected, atol=1e-4, rtol=0)


# --- which class


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("LlamaForCausalLM", {"architectures": ...}),
        ("LlamaForCausalLM", {"architectures": []}),
        ("LlamaForCausalLM", {"architectures": ["LLaMAForCausalLM"]}),
        ("LlamaForCausalLM", {"architectures": ["LlamaModel"]}),
        ("LlamaForCausalLM", {"architectures": ["LlamaForCausalLM"], "model_type": ...}),
        ("MistralForCausalLM", {"architectures": None}),
        ("Qwen2ForCausalLM", {"architectures": None}),
        ("Qwen3ForCausalLM", {"architectures": None}),
    ],
)
def test_the_class_is_found_by_its_name_in_any_spelling_or_by_model_type(architecture, keys, random_model, edited):
    folder = edited(random_model(architecture), **keys)
    assert Checkpoint.from_hugging_face(folder).config.architecture == architecture


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"model_type": "mistral"},
            "architecture LlamaForCausalLM and model_type 'mistral' contradict.*model_type 'llama'",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "unknown architecture 'LlamaForSequenceClassification'",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "unknown model_type 'gpt2'"),
        ({"architectures": None, "model_type": ...}, "neither architectures nor model_type"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list"),
        ({"architectures": None, "model_type": 3}, "model_type is 3, expected a str"),
    ],
)
def test_a_class_that_is_not_known_or_not_certain_is_refused(keys, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_config(write(tmp_path, **keys)).to_model_config("float32")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_defaults_of_a_family_are_those_of_its_class_in_transformers(architecture):
    import transformers

    kind = getattr(transformers, architecture).config_class
    theirs = kind.__dataclass_fields__
    family = FAMILIES[architecture]
    assert family.model_type == kind.model_type
    read_by_transformers = {key: value for key, value in family.defaults.items() if key in theirs}
    assert read_by_transformers == {key: theirs[key].default for key in read_by_transformers}
    assert {"num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"} <= set(read_by_transformers)
    assert family.defaults["rope_theta"] == kind.default_theta


# --- numbers


def scaled(rope_type, **values):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 32}
SAME = {
    "llama3": scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **LLAMA3),
    "llama3 with low above high": scaled("llama3", low_freq_factor=4.0, high_freq_factor=1.0, **LLAMA3),
    "yarn": scaled("yarn", factor=4.0, original_max_position_embeddings=32),
    "yarn of a tiny factor": scaled("yarn", factor=1e-6, original_max_position_embeddings=32),
    "yarn without its factor's value": scaled("yarn", factor=None, original_max_position_embeddings=32),
    "yarn with a trained length beside it": {
        **scaled("yarn", factor=4.0, original_max_position_embeddings=16),
        "original_max_position_embeddings": 64,
    },
    "linear": scaled("linear", factor=0.001),
    "transformers 4": {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3}},
    "a base below one": {"rope_parameters": {"rope_type": "default", "rope_theta": 0.01}},
    "a huge base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e38}},
    "a large epsilon": {"rms_norm_eps": 0.5},
    "a tiny epsilon": {"rms_norm_eps": 1e-37},
    "another name of the activation": {"hidden_act": "swish"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "a window, which LLaMA does not read": {"sliding_window": 8},
    "layer types, which LLaMA does not read": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("name", SAME)
def test_logits_are_those_of_transformers(name, random_model, edited, hugging_face, open_session):
    folder = edited(random_model("LlamaForCausalLM"), **SAME[name])
    assert_logits_are_transformers(folder, hugging_face, open_session)


WINDOWS = {
    "Mistral reads no layer types": (
        "MistralForCausalLM",
        {"sliding_window": 40, "layer_types": ["full_attention"] * 2},
        40,
    ),
    "Mistral reads no switch": ("MistralForCausalLM", {"sliding_window": 40, "use_sliding_window": False}, 40),
    "Mistral without one": ("MistralForCausalLM", {"sliding_window": None}, None),
    "Qwen2 switched off": ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, None),
    "Qwen2 from a layer that it lacks": (
        "Qwen2ForCausalLM",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "layer_types": ...},
        None,
    ),
    "Qwen2 from a layer on": (
        "Qwen2ForCausalLM",
        {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1, "layer_types": ...},
        40,
    ),
    "Qwen2 with full layers only": (
        "Qwen2ForCausalLM",
        {
            "sliding_window": 8,
            "use_sliding_window": True,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 2,
        },
        None,
    ),
    "LLaMA": ("LlamaForCausalLM", {"sliding_window": 8}, None),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_read_where_transformers_reads_it(name, random_model, edited, hugging_face, open_session):
    architecture, keys, window = WINDOWS[name]
    folder = edited(random_model(architecture), **keys)
    checkpoint = Checkpoint.from_hugging_face(folder)
    assert checkpoint.config.sliding_window == window
    if window is not None:
        with pytest.raises(ConfigError, match="sliding window of 40"):
            checkpoint.build(BuildConfig(max_seq_len=41), plan=False)
    assert_logits_are_transformers(folder, hugging_face, open_session)


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM"])
def test_biases_that_a_family_does_not_read_are_left_aside(
    architecture, random_model, edited, hugging_face, open_session
):
    folder = edited(random_model(architecture), attention_bias=True, mlp_bias=True)
    assert_logits_are_transformers(folder, hugging_face, open_session)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_as_many_key_value_heads_as_query_heads_is_what_null_means(architecture, random_model, edited):
    folder = edited(random_model(architecture, num_key_value_heads=4), num_key_value_heads=None)
    assert Checkpoint.from_hugging_face(folder).config.num_key_value_heads == 4


QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
REFUSED = {
    "a base whose powers are no float32": (
        {"rope_theta": 1e-300},
        "rope_theta is 1e-300, expected a number that float",
    ),
    "a base that makes angles infinite": ({"rope_theta": 1e-37}, "rotary angle of the last position"),
    "an epsilon that is 0 in float32": ({"rms_norm_eps": 1e-300}, "rms_norm_eps is 1e-300"),
    "an epsilon that is infinite in float32": ({"rms_norm_eps": 1e300}, r"rms_norm_eps is 1e\+300"),
    "yarn on a base of 1": (scaled("yarn", factor=2.0, rope_theta=1.0), "yarn scaling needs a rotary_base"),
    "a negative mscale": (scaled("yarn", factor=2.0, mscale=-1.0), r"rope_parameters\.mscale is -1\.0"),
    "a rope of no type": ({"rope_scaling": {"type": None, "factor": 2.0}}, "type of the rotary scaling is null"),
    "a rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention",
    ),
    "an end id that is a str": ({"eos_token_id": "2"}, "eos_token_id is '2', expected an int or a list"),
    "end ids that are str": ({"eos_token_id": ["</s>"]}, r"eos_token_id is \['</s>'\]"),
    "an end id that is true": ({"eos_token_id": True}, "eos_token_id is True"),
    "an end id that is a number with a point": ({"eos_token_id": 2.0}, r"eos_token_id is 2\.0"),
    "end ids in lists": ({"eos_token_id": [[1]]}, r"eos_token_id is \[\[1\]\]"),
    "a dtype that torch lacks": ({"torch_dtype": "float99"}, "torch_dtype is 'float99', expected the name of a torch"),
    "a dtype that is a function of torch": ({"dtype": "add"}, "dtype is 'add'"),
    "more heads than width": ({"num_attention_heads": 65}, "hidden_size 64 cannot be split over 65"),
    "layers that differ": ({"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
    "a cap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "another program's quantization": ({"quantization": {"bits": 4}}, "quantization={'bits': 4}"),
    "layer types of another number": (
        {**QWEN, "layer_types": ["full_attention"]},
        "1 layer_types do not fit num_hidden_layers 2",
    ),
    "another attention": ({**QWEN, "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    "layers with a window that is off": (
        {**QWEN, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_attention, but the window is switched off; got use_sliding_window=False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_or_nobody_supports_is_refused_by_name(name, tmp_path):
    keys, words = REFUSED[name]
    with pytest.raises(TrtlabError, match=words):
        read_config(write(tmp_path, **keys)).to_model_config("float32")


@pytest.mark.parametrize("ids", [None, 2, -1, 0, [], [1, 2]])
def test_end_ids_of_every_form_that_transformers_takes_are_read(ids, tmp_path):
    stored = read_config(write(tmp_path, eos_token_id=ids)).eos_token_id
    assert (list(stored) if isinstance(stored, tuple) else stored) == ids


# --- keys that are not known

HARMLESS = {
    "_model_name_or_path": "x",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "is_llama_config": True,
    "unsloth_version": "2024.9",
    "unsloth_fixed": True,
    "model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "transformers.js_config": {"dtype": "q4"},
    "pad_token_id": -1,
    "sep_token_id": 3,
    "decoder_start_token_id": 1,
    "hidden_dropout": 0.1,
    "resid_pdrop": 0.1,
    "pretraining_tp": 2,
    "logit_scale": 1.0,
    "a_switch_that_is_off": False,
}


def test_keys_that_change_no_number_are_read_in_silence(tmp_path, caplog):
    read_config(write(tmp_path, **HARMLESS), allow_unknown=False)
    assert not caplog.records


def test_all_settings_of_generation_are_read_in_silence(tmp_path, caplog):
    from transformers import GenerationConfig

    settings = GenerationConfig._get_default_generation_params()
    telling = {key: value or 7 for key, value in settings.items()}
    read_config(write(tmp_path, **telling), allow_unknown=False)
    assert len(telling) > 30 and not caplog.records


def test_an_unknown_key_is_one_warning_that_names_it_once_or_an_error(random_model, edited, caplog):
    folder = edited(
        random_model("LlamaForCausalLM"),
        shiny=[1],
        hidden_sizes=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "twist": 1},
    )
    with caplog.at_level(logging.WARNING, logger="trtlab"):
        Checkpoint.from_hugging_face(folder)
        Checkpoint.from_hugging_face(folder)
    (record,) = caplog.records
    for key in ("shiny=[1]", "hidden_sizes=64 (did you mean hidden_size?)", "rope_parameters.twist=1"):
        assert record.message.count(key) == 1
    with pytest.raises(CheckpointError, match=r"unknown keys: .*shiny=\[1\]") as caught:
        Checkpoint.from_hugging_face(folder, allow_unknown_config=False)
    Checkpoint.from_hugging_face(edited(random_model("LlamaForCausalLM")), allow_unknown_config=False)
    assert "allow_unknown_config" in str(caught.value.remedy)


def test_no_key_is_both_read_and_unsupported_or_ignored():
    def kinds(kind):
        return [kind, *(inner for child in kind.__subclasses__() for inner in kinds(child))]

    assert HuggingFaceConfig in kinds(ForeignObject)
    for kind in kinds(ForeignObject):
        read = set(kind.model_fields)
        assert not read & set(kind.unsupported) and not read & set(kind.neutral)
        assert not [key for key in kind.unsupported if kind._is_accepted(key, 0.5)]


# --- another program's file


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"architecture": "LlamaForCausalLM", "producer": {}}, r"TensorRT-LLM checkpoint.*Checkpoint\.load\(\)"),
        ({"pretrained_config": {}, "build_config": {}}, r"an engine folder.*Engine\.load\(\)"),
        ({"dim": 64, "n_layers": 2, "n_heads": 4}, r"Meta's format.*Checkpoint\.from_meta_ckpt\(\)"),
    ],
)
def test_the_config_of_another_kind_of_folder_is_told_what_opens_it(keys, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.from_hugging_face(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size", "vocab_size"])
def test_absurd_sizes_are_refused_at_once(key, random_model, edited):
    folder = edited(random_model("LlamaForCausalLM"), **{key: 2**62})
    start = time.perf_counter()
    with pytest.raises(TrtlabError):
        Checkpoint.from_hugging_face(folder)
    assert time.perf_counter() - start < 5  # it takes milliseconds; listing or allocating would take minutes
