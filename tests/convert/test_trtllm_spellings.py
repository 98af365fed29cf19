"""config.json as versions 0.9 to 0.17 spell it: the same model is read alike, a contradiction is refused by name."""

from __future__ import annotations

import pytest

from trtlab import CheckpointError, Mapping, RotaryScaling, TrtlabError
from trtlab.convert.trtllm_config import REMEDY, TrtllmConfig
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.storage.json_files import parse_model

PLAIN = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "intermediate_size": 176,
    "max_position_embeddings": 256,
    "norm_epsilon": 1e-6,
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 500000.0,
    "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
}
QWEN2 = {**PLAIN, "architecture": "Qwen2ForCausalLM", "attn_bias": True}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def read(changes, base=PLAIN):
    raw = {key: value for key, value in {**base, **changes}.items() if value is not ...}
    return parse_model(raw, TrtllmConfig, "config.json", remedy=REMEDY).to_settings()


SAME = {
    "0.9, flat experts and switches": {
        "moe_num_experts": 0,
        "moe_top_k": 0,
        "moe_tp_mode": 2,
        "moe_normalization_mode": 1,
        "use_fused_mlp": True,
        "enable_pos_shift": False,
        "dense_context_fmha": False,
        "max_lora_rank": 64,
        "lora_target_modules": None,
        "hf_modules_to_trtllm_modules": {"q_proj": "attn_q"},
        "kv_dtype": "float16",
    },
    "an exporter of Megatron": {"moe_num_experts": 1, "moe_tp_mode": None, "use_prompt_tuning": False},
    "a flat mapping": {"mapping": ..., "world_size": 4, "tp_size": 2, "pp_size": 2, "gpus_per_node": 8},
    "num_kv_heads": {"num_key_value_heads": ..., "num_kv_heads": 2},
    "both names of the heads": {"num_kv_heads": 2},
    "rotary_embedding_base": {"rotary_base": ..., "rotary_embedding_base": 500000.0},
    "rope_theta": {"rotary_base": None, "rope_theta": 500000.0},
    "the base in a scaling that scales nothing": {
        "rotary_base": ...,
        "rotary_scaling": {"rope_theta": 500000.0, "rope_type": "default", "partial_rotary_factor": 1.0},
    },
    "0.16": {
        "rotary_embedding_dim": 16,
        "rotary_pct": 1.0,
        "layer_idx_offset": 0,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "runtime_defaults": None,
        "moe": {"num_experts": 0, "shared_expert_intermediate_size": 0, "device_limited_routed_scaling_factor": 1.0},
        "quantization": {"quant_algo": None, "group_size": 128, "use_meta_recipe": False, "exclude_modules": None},
    },
    "0.17": {
        "mapping": {
            "world_size": 4,
            "tp_size": 2,
            "pp_size": 2,
            "attn_tp_size": 2,
            "attn_cp_size": 1,
            "moe_cluster_size": 1,
            "enable_attention_dp": False,
            "auto_parallel": False,
        },
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "has_partial_lora_mask": False,
    },
}


@pytest.mark.parametrize("name", SAME)
def test_another_spelling_is_the_same_model(name):
    assert read(SAME[name]) == read({})
    assert read({})[1:] == (Mapping(tp_size=2, pp_size=2), EmbeddingLayout())


def test_a_missing_number_of_key_heads_is_that_of_the_query_heads():
    assert read({"num_key_value_heads": ...})[0].num_key_value_heads == 4
    assert read({"num_key_value_heads": None})[0].num_key_value_heads == 4


def test_a_parallel_embedding_on_one_rank_is_the_whole_table():
    _, mapping, layout = read({"mapping": {"tp_size": 1}, "use_parallel_embedding": True, "embedding_sharding_dim": 1})
    assert (mapping, layout) == (Mapping(), EmbeddingLayout(use_parallel_embedding=True, embedding_sharding_dim=1))


@pytest.mark.parametrize("kinds", [{"rope_type": "yarn"}, {"type": "yarn"}, {"rope_type": "yarn", "type": "yarn"}])
def test_a_scaling_may_name_its_kind_once_or_twice(kinds):
    assert read({"rotary_scaling": {**YARN, **kinds}})[0].rotary_scaling == RotaryScaling("yarn", 4.0, 64)


QWENS = {
    "0.16": {"qwen_type": "qwen2", "num_labels": 1, "tie_word_embeddings": False, "moe_intermediate_size": 0},
    "one class for all": {"architecture": "QWenForCausalLM", "qwen_type": "qwen2"},
    "0.9, without its bias": {"attn_bias": ..., "seq_length": 256},
}


@pytest.mark.parametrize("name", QWENS)
def test_qwen2_has_the_same_settings_in_each_version(name):
    config, _, _ = read(QWENS[name], QWEN2)
    assert config == read({}, QWEN2)[0]
    assert config.architecture == "Qwen2ForCausalLM" and config.attn_bias


REFUSED = {
    "two numbers of key heads": ({"num_kv_heads": 4}, "num_kv_heads=4 and num_key_value_heads=2 contradict"),
    "two bases": ({"rope_theta": 1e4}, "rope_theta=10000.0 and rotary_base=500000.0 contradict"),
    "two bases, one of them in the scaling": (
        {"rotary_scaling": {"rope_theta": 1e4, "rope_type": "default"}},
        r"rotary_scaling\.rope_theta=10000.0 and rotary_base",
    ),
    "two splits": ({"tp_size": 4}, "tp_size=4 and tp_size=2 contradict"),
    "two kinds of scaling": (
        {"rotary_scaling": {**YARN, "rope_type": "yarn", "type": "linear"}},
        "rotary_scaling is not valid.*a single rope_type",
    ),
    "a part of each head": ({"rotary_embedding_dim": 8}, "rotary_embedding_dim 8 .*not supported yet; expected 16"),
    "a part of each head, before 0.16": ({"rotary_dim": 8}, "rotary_dim 8 .*not supported yet"),
    "a share of each head": ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
    "a share of each head, in the scaling": (
        {"rotary_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rotary_pct is 0.5",
    ),
    "experts in flat keys": ({"moe_num_experts": 8, "moe_top_k": 2}, "num_experts"),
    "attention whole on each rank": (
        {"mapping": {"tp_size": 2, "pp_size": 2, "enable_attention_dp": True}},
        "enable_attention_dp",
    ),
    "shifted positions": ({"enable_pos_shift": True}, "enable_pos_shift=True is unknown"),
    "the first Qwen": ({"architecture": "QWenForCausalLM", "qwen_type": "qwen"}, "architecture 'QWenForCausalLM'"),
    "another Qwen": ({"architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2_moe"}, "qwen_type 'qwen2_moe'"),
    "a Qwen that is none": ({"qwen_type": "qwen2"}, "qwen_type 'qwen2' does not fit architecture Llama"),
    "kinds that are lists": ({"rotary_scaling": {**YARN, "rope_type": ["yarn"]}}, r"rotary_scaling\.rope_type"),
    "a mapping that is a number": ({"mapping": 3, "tp_size": 2}, "mapping is 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_or_is_not_supported_is_refused_by_name(name):
    changes, words = REFUSED[name]
    with pytest.raises(TrtlabError, match=words) as caught:
        read(changes)
    assert caught.value.remedy or caught.value.expected


EVERY = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate"]
EXCLUDED = {
    "the default": (None, ()),
    "an empty list, which is the default": ([], ()),
    "the default of 0.13, written out": (EVERY, ()),
    "the default of 0.9, written out": (["lm_head", "router", "vocab_embedding"], ()),
    "ModelOpt's": (["lm_head"], ()),
    "a linear": (["lm_head", "transformer.layers.2.mlp.proj"], ("transformer.layers.2.mlp.proj",)),
    "a pattern": (["*lm_head", "*.dense"], ("*.dense",)),
    "a bare name": (["lm_head", "fc"], ("*.fc",)),
    "nothing quantized": (["*"], ("*",)),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_a_list_of_modules_replaces_the_default_of_tensorrt_llm(name):
    stored, patterns = EXCLUDED[name]
    config, _, _ = read({"quantization": {"quant_algo": "FP8", "exclude_modules": stored}})
    assert config.quantization.exclude_modules == patterns


def test_a_list_without_the_head_quantizes_it_when_the_plain_form_is_read():
    weight_only = {"quant_algo": "W8A16", "exclude_modules": ["*.dense"]}
    assert read({"quantization": weight_only})[0].quantization.quantizes_head
    own = read({"quantization": weight_only, "trtlab": {"format": 1}})[0].quantization
    assert own.exclude_modules == ("*.dense",)
    assert not own.quantizes_head, "trtlab's own section decides"
    listed = read({"quantization": {**weight_only, "exclude_modules": ["*.dense", "lm_*"]}})[0].quantization
    assert listed.exclude_modules == ("*.dense", "lm_*")
    assert not listed.quantizes_head


def test_a_group_size_counts_only_where_there_are_groups():
    assert read({"quantization": {"quant_algo": "FP8", "group_size": 48}})[0].quantization.group_size == 128
    with pytest.raises(CheckpointError, match="group_size"):
        read({"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 48}})
