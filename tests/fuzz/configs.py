"""The kinds whose damage lies in a JSON file: the four config files, the index of shards, the quantization's report."""

from __future__ import annotations

import json
from typing import Any

from trtlab import Checkpoint, Mapping

from . import bases
from .journeys import open_checkpoint, open_engine
from .json_edits import JsonEdits
from .kinds import Base, Kind, json_edit

ROPES: list[Any] = [
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},  # noqa: E501
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 32},  # noqa: E501
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 1e-6, "attention_factor": 0.5, "truncate": False},
    {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]},
    {"rope_type": "yarn"},
    {"rope_theta": 500000.0, "rope_type": "default"},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
]  # fmt: skip
SIZES = [1, 2, 4, 8, 16, 32, 40, 64, 1000, 10**6, 2**31, 2**40]
RATES = [1e-6, 1e-5, 1e-300, 5e-324, 1e-38, 1e-46, 1.0, 10.0, 1e4, 5e5, 1e30, 3.4e38, 1e300]
DTYPES = ["float32", "float16", "bfloat16", "auto", "float64", "torch.float16", "int8", None]
ACTIVATIONS = ["silu", "gelu", "relu", "swish", "gelu_pytorch_tanh", "SiLU", None]
ARCHITECTURES = [
    "LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GPT2LMHeadModel", "MixtralForCausalLM", "LlamaForSequenceClassification", "",
]  # fmt: skip
COUNTS = """
    num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size vocab_size
    max_position_embeddings
""".split()
HUGGING_FACE_VALUES: dict[str, Any] = {
    "architectures": [*[[name] for name in ARCHITECTURES], [], None, ["LlamaForCausalLM", "GPT2LMHeadModel"]],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "", None],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": RATES,
    "rms_norm_eps": RATES,
    "hidden_act": ACTIVATIONS,
    "torch_dtype": DTYPES,
    "dtype": DTYPES,
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False, None],
    "mlp_bias": [True, False],
    "sliding_window": [None, 1, 16, 4096, 2**63],
    "use_sliding_window": [True, False, None],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"], ["x"]],
    "head_dim": [None, *SIZES],
    "partial_rotary_factor": [1.0, 0.5, None],
    "quantization_config": [None, {}, {"quant_method": "gptq", "bits": 4}, {"bits": 4}],
    "eos_token_id": [None, 2, [2, 3], "2", ["</s>"], [[1]], True, -1, 10**9],
    **dict.fromkeys(COUNTS, SIZES),
}  # fmt: skip
HUGGING_FACE_EXTRA = {
    "_name_or_path": "x/y",
    "_attn_implementation_autoset": True,
    "unsloth_version": "2026.1",
    "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": "evil.Tokenizer"},
    "num_local_experts": 8,
    "kv_lora_rank": 512,
    "use_cache": False,
    "pretraining_tp": 2,
    "logit_scale": 0.5,
    "final_logit_softcapping": 30.0,
    "text_config": {"hidden_size": 16},
    "residual_multiplier": 0.22,
    "rope_interleaved": True,
    "model_max_length": 10**30,
    "quantization": {"group_size": 64, "bits": 4},
}
QUANTIZATIONS: list[Any] = [
    None,
    {},
    *[{"quant_algo": algo} for algo in ("W8A16", "W4A16", "FP8", "W4A16_AWQ", "w8a16", "NVFP4", "MIXED_PRECISION")],
    {"quant_algo": "W8A16", "kv_cache_quant_algo": "INT8"},
    {"kv_cache_quant_algo": "FP8"},
    {"quant_algo": "W4A16_AWQ", "group_size": 7},
    {"quant_algo": "W8A16", "exclude_modules": 2},
    {"quant_algo": "W8A16", "exclude_modules": ["*"]},
    {"quant_algo": "W8A16", "exclude_modules": ["[" * 500]},
]
MAPPINGS: list[Any] = [
    None,
    {},
    {"world_size": 2, "tp_size": 2},
    {"world_size": 2, "pp_size": 2},
    {"world_size": 4, "tp_size": 2, "pp_size": 2},
    {"tp_size": 3 * 10**6, "world_size": 3 * 10**6},
    {"tp_size": 10**9, "pp_size": 10**9},
    {"world_size": 3, "tp_size": 2},
    {"cp_size": 2},
    {"tp_size": 3},
]
CHECKPOINT_VALUES: dict[str, Any] = {
    "architecture": ARCHITECTURES,
    "dtype": DTYPES,
    "hidden_act": ACTIVATIONS,
    "rotary_scaling": ROPES,
    "rotary_base": RATES,
    "norm_epsilon": RATES,
    "quantization": QUANTIZATIONS,
    "mapping": MAPPINGS,
    "tp_size": SIZES,
    "pp_size": SIZES,
    "world_size": SIZES,
    "use_parallel_embedding": [True, False, None],
    "embedding_sharding_dim": [0, 1, 2, -1, None],
    "share_embedding_table": [True, False, None],
    "tie_word_embeddings": [True, False],
    "position_embedding_type": ["rope_gpt_neox", "learned_absolute", "rope_gptj", "alibi", None],
    "qk_layernorm": [True, False],
    "attn_bias": [True, False],
    "dense_bias": [True, False],
    "mlp_bias": [True, False],
    "sliding_window": [None, 1, 16],
    "trtlab": [None, {}, {"format": 2}, {"format": 10**30}, {"kv_cache_scales": "x"}, {"source": "\ud800"}],
    **dict.fromkeys([*COUNTS, "head_size"], SIZES),
}  # fmt: skip
CHECKPOINT_EXTRA = {
    "architectures": ["LlamaForCausalLM"],
    "producer": {"name": "modelopt"},
    "moe": {"num_experts": 8},
    "logits_dtype": "float16",
    "rotary_pct": 0.5,
    "embedding_multiplier": 2.0,
    "qk_scale": 1.0,
}
ENGINE_VALUES: dict[str, Any] = {
    **CHECKPOINT_VALUES,
    "max_batch_size": [1, 8, 10**9, 2**31, 2**63 - 1],
    "max_input_len": [None, 1, 32, 10**9],
    "max_seq_len": [None, 1, 8, 64, 65, 10**9],
    "max_num_tokens": [1, 2, 8192, 10**9],
    "tokens_per_block": [1, 3, 32, 10**9],
    "weight_streaming": [True, False],
    "compute_capabilities": [[], ["8.9"], ["x"], "8.9", [8.9]],
    "optimization_level": [None, 0, 5, 6],
    "notes": [[], ["a"], ["\ud800"], ["x" * 10_000], "note"],
    "fingerprints": [None, [], ["0"], ["0", "0"], [1]],
    "plans": [None, [], [{}], [None]],
    "digest": ["", "0", 1, None, "../x"],
    "plan_bytes": ["x", -1, 2**63],
    "activation_bytes": [None, {}, {"context": -1}, {"context": "x"}, {"\ud800": 1}],
}
PARAMS_VALUES: dict[str, Any] = {
    "dim": SIZES,
    "n_layers": SIZES,
    "n_heads": SIZES,
    "n_kv_heads": [None, *SIZES],
    "norm_eps": RATES,
    "rope_theta": RATES,
    "use_scaled_rope": [True, False, None],
    "rope_scaling_factor": RATES,
    "max_seq_len": SIZES,
    "vocab_size": [-1, *SIZES],
    "multiple_of": SIZES,
    "ffn_dim_multiplier": [1.3, None],
}
PARAMS_EXTRA = {"lora_args": {"rank": 8}, "quantization_args": {"group_size": 32}, "moe": {}, "max_batch_size": 4}
INDEX_EXTRA = {"weight_map": {}, "metadata": None, "model.rotary.inv_freq": "model-00001-of-00002.safetensors"}
SHARDS = [
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors", "config.json", "",
    ".", "..", "../model", "/etc/passwd", "{outside}/secret.json", "x" * 300, "a\0b", "\ud800", "C:\\x", "a/b", " ",
]  # fmt: skip
REPORT_VALUES: dict[str, Any] = {
    key: [0, -1.0, 1e300, float("inf"), float("nan"), None, "x", 10**400]
    for key in (
        "snr_db",
        "cosine",
        "saturation",
        "outliers_before",
        "alpha",
        "bytes_after",
        "k_scale",
        "v_bits",
        "layer",
    )
} | {"name": ["", "transformer.", "\ud800", "<b>", "x" * 10_000, 7]}

hugging_face = open_checkpoint(Checkpoint.from_hugging_face)
meta = open_checkpoint(Checkpoint.from_meta_ckpt)
stored = open_checkpoint(Checkpoint.load)


def _config_bases() -> list[Base]:
    old = {"rope_theta": ..., "torch_dtype": ..., "dtype": "float32", "rope_parameters": ROPES[6] | {"rope_theta": 1e4}}
    made = {
        "llama": bases.hugging_face(),
        "llama 3": bases.hugging_face(rope_scaling=ROPES[6]),
        "llama of transformers 5": bases.hugging_face(**old),
        "yarn": bases.hugging_face(rope_scaling=ROPES[8]),
        "linear": bases.hugging_face(rope_scaling=ROPES[3]),
        "mistral": bases.hugging_face("MistralForCausalLM", model_type="mistral", sliding_window=None),
        "qwen 2": bases.hugging_face("Qwen2ForCausalLM", model_type="qwen2", use_sliding_window=False),
        "qwen 3": bases.hugging_face("Qwen3ForCausalLM", model_type="qwen3"),
    }
    return [Base(name, files, hugging_face) for name, files in made.items()]


def _params_bases() -> list[Base]:
    made = {
        "llama 2": bases.meta(),
        "llama 3.1": bases.meta(use_scaled_rope=True, rope_theta=500000.0, max_seq_len=...),
        "llama 3.2": bases.meta(use_scaled_rope=True, rope_scaling_factor=32.0),
    }
    return [Base(name, files, meta) for name, files in made.items()]


def _checkpoint_bases() -> list[Base]:
    made = {
        "plain": bases.checkpoint(),
        "two ranks": bases.checkpoint(Mapping(tp_size=2), use_parallel_embedding=True),
        "two stages": bases.checkpoint(Mapping(pp_size=2)),
        "weight only": bases.quantized("W8A16"),
        "AWQ": bases.quantized("W4A16_AWQ", group_size=64),
        "AWQ with the head": bases.quantized("W4A16_AWQ", group_size=64, quantize_lm_head=True),
        "SmoothQuant": bases.quantized("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", kv_cache_quant_algo="INT8"),
        "FP8": bases.quantized("FP8", kv_cache_quant_algo="FP8"),
    }
    return [Base(name, files, stored) for name, files in made.items()]


def _engine_bases() -> list[Base]:
    made = {
        "plain": bases.engine(),
        "two ranks": bases.engine(Mapping(tp_size=2)),
        "weight only": bases.engine(quant_algo="W8A16"),
        "a plan": bases.engine_with_plan(),
    }
    return [Base(name, files, open_engine) for name, files in made.items()]


def _index_bases() -> list[Base]:
    left_over = {"model.safetensors": bases.hugging_face()["model.safetensors"], **bases.sharded()}
    made = {"safetensors": bases.sharded(), "pickles": bases.sharded(pickle=True), "a whole file too": left_over}
    return [Base(name, files, hugging_face) for name, files in made.items()]


def _report_bases() -> list[Base]:
    return [base for base in _checkpoint_bases() if "report.json" in base.files]


def _index_values() -> dict[str, Any]:
    return dict.fromkeys(json.loads(bases.sharded()["model.safetensors.index.json"])["weight_map"], SHARDS)  # type: ignore[arg-type]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    index = JsonEdits(_index_values(), INDEX_EXTRA)
    config = json_edit("config.json", JsonEdits(HUGGING_FACE_VALUES, HUGGING_FACE_EXTRA))
    checkpoint = json_edit("config.json", JsonEdits(CHECKPOINT_VALUES, CHECKPOINT_EXTRA))
    engine = json_edit("config.json", JsonEdits(ENGINE_VALUES, CHECKPOINT_EXTRA))
    params = json_edit("params.json", JsonEdits(PARAMS_VALUES, PARAMS_EXTRA))
    return {
        "config": Kind(_config_bases, [(1, config)]),
        "params": Kind(_params_bases, [(1, params)]),
        "checkpoint": Kind(_checkpoint_bases, [(1, checkpoint)]),
        "engine": Kind(_engine_bases, [(1, engine)]),
        "index": Kind(
            _index_bases,
            [(1, json_edit(f"{stem}.index.json", index)) for stem in ("model.safetensors", "pytorch_model.bin")],
        ),
        "report": Kind(_report_bases, [(1, json_edit("report.json", JsonEdits(REPORT_VALUES)))]),
    }
