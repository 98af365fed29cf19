"""Reads a Hugging Face folder: its config into a ModelConfig, its tensors lazily under TensorRT-LLM's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trtlab.config.model import DTYPES, ModelConfig, RotaryScaling, torch_dtype
from trtlab.convert.check import check_floating, check_kinds, check_layers, check_tensors
from trtlab.convert.families.tables import FAMILIES, HUGGING_FACE_NAMES, Family
from trtlab.errors import CheckpointError
from trtlab.ops.torch import ACTIVATIONS
from trtlab.storage.files import read_json
from trtlab.storage.lazy import LazyTensor, cat, open_pickle, open_safetensors

HANDLED_KEYS = frozenset(
    """
    architectures model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim intermediate_size hidden_act rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters
    tie_word_embeddings torch_dtype dtype sliding_window use_sliding_window max_window_layers layer_types
    attention_bias mlp_bias quantization_config partial_rotary_factor
    """.split()
)
# Keys that change no number of a forward pass.
NEUTRAL_KEYS = frozenset(
    """
    _name_or_path transformers_version use_cache initializer_range bos_token_id eos_token_id pad_token_id
    attention_dropout pretraining_tp max_sequence_length torchscript output_attentions output_hidden_states return_dict
    is_decoder is_encoder_decoder chunk_size_feed_forward id2label label2id problem_type tokenizer_class
    finetuning_task prefix task_specific_params
    """.split()
)
ROPE_KEYS = frozenset(
    """
    rope_theta rope_type type factor original_max_position_embeddings low_freq_factor high_freq_factor
    beta_fast beta_slow attention_factor mscale mscale_all_dim truncate partial_rotary_factor
    """.split()
)
KINDS = {
    "a whole number of at least 1": "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim intermediate_size max_position_embeddings sliding_window",
    "a positive number": "rms_norm_eps rope_theta partial_rotary_factor",
    "true or false": "tie_word_embeddings attention_bias mlp_bias use_sliding_window",
    "a text": "hidden_act dtype torch_dtype",
    "a list of texts": "architectures layer_types",
    "an object": "rope_scaling rope_parameters quantization_config",
}
ROPE_KINDS = {
    "a whole number of at least 1": "original_max_position_embeddings",
    "a positive number": "rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor "
    "partial_rotary_factor",
    "a number": "mscale mscale_all_dim",
    "true or false": "truncate",
    "a text": "rope_type type",
}
NO_SCALING = ("default", None)
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # old folders store the rotary frequencies; Hugging Face ignores them


def read_hugging_face(model_dir: Path, dtype: str = "auto") -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Config and lazy tensors of a folder; CheckpointError for what is missing, unknown or does not fit."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a folder", remedy="give a folder with config.json and safetensors")
    raw = read_json(model_dir / "config.json", remedy="give a folder that save_pretrained() wrote")
    config = read_config(raw, "float32")  # what the config forbids is said before the weights are opened
    found = {name: t for name, t in _find_tensors(model_dir).items() if not BUFFERS.search(name)}
    check_floating(model_dir.name, found.items())
    config = config.replace(dtype=_choose_dtype(raw, dtype, found))
    if config.tie_word_embeddings and "lm_head.weight" in found:
        if _head_differs(found):
            config = config.replace(tie_word_embeddings=False)
        else:
            del found["lm_head.weight"]
    return config, _rename(model_dir.name, config, found)


def _head_differs(found: Mapping[str, LazyTensor]) -> bool:
    """Whether a folder that calls itself tied holds two different tables; transformers 5 then uses both, as we do."""
    table, head = found.get("model.embed_tokens.weight"), found["lm_head.weight"]
    return table is not None and (table.shape != head.shape or not torch.equal(table.read(), head.read()))


def _choose_dtype(raw: Mapping[str, Any], dtype: str, found: Mapping[str, LazyTensor]) -> str:
    """``auto`` is the config's word, or what the tensors are when it says nothing."""
    if dtype != "auto":
        torch_dtype(dtype)
        return dtype
    named: str | None = raw.get("dtype") or raw.get("torch_dtype")
    if named in DTYPES:
        return named
    stored = next(iter(found.values())).dtype if found else torch.float32
    return next((name for name, kind in DTYPES.items() if kind == stored), "float32")


def _rename(where: str, config: ModelConfig, found: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    check_layers(where, config.num_hidden_layers, len(found))
    sources = HUGGING_FACE_NAMES.sources(config)
    check_tensors(where, found, HUGGING_FACE_NAMES.shapes(config))
    kind = config.torch_dtype
    return {ours: cat([found[theirs].to(kind) for theirs in names]) for ours, names in sources.items()}


def _find_tensors(model_dir: Path) -> dict[str, LazyTensor]:
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_pickle)):
        index = model_dir / f"{stem}.index.json"
        if index.is_file():
            where = _read_index(index)
            shards = {file: opener(model_dir / file) for file in sorted(set(where.values()))}
            absent = [name for name, file in where.items() if name not in shards[file]]
            if absent:
                raise CheckpointError(
                    f"{index.name} lists tensors that its shards lack: {', '.join(absent[:5])}",
                    remedy="copy the folder again",
                )
            return {name: shards[file][name] for name, file in where.items()}
        if (model_dir / stem).is_file():
            return opener(model_dir / stem)
    raise CheckpointError(
        f"{model_dir} holds no weights",
        expected="model.safetensors, or model.safetensors.index.json with its shards",
        remedy="for Meta's consolidated.*.pth use Checkpoint.from_meta_ckpt",
    )


def _read_index(index: Path) -> dict[str, str]:
    """Which shard holds which tensor; shards lie in the folder itself."""
    where = read_json(index, remedy="copy the folder again", known=("weight_map",))["weight_map"]
    if not isinstance(where, dict) or any(not isinstance(f, str) or Path(f).name != f for f in where.values()):
        raise CheckpointError(f"{index.name} has no map from tensors to files", remedy="copy the folder again")
    return where


def read_config(raw: Mapping[str, Any], dtype: str) -> ModelConfig:
    """A ModelConfig from config.json in the spelling of transformers 4 or 5.

    Raises CheckpointError naming an unknown architecture, a quantized source, a missing key, or a key that would
    change the numbers and is not handled.
    """
    check_kinds("config.json", raw, KINDS)
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise CheckpointError(
            f"unknown architecture {architecture!r}", expected=" | ".join(FAMILIES), remedy="convert one of these"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise CheckpointError(
            f"the folder is quantized already (quantization_config, method {method!r}), which is not supported yet",
            remedy="start from the unquantized model and use checkpoint.quantize()",
        )
    _refuse_unknown_keys(raw)
    family = FAMILIES[architecture]
    return _build_config(architecture, family, {**family.defaults, **raw}, dtype)


def _refuse_unknown_keys(raw: Mapping[str, Any]) -> None:
    unknown = {key: value for key, value in raw.items() if key not in HANDLED_KEYS | NEUTRAL_KEYS}
    changing = [f"{key}={value!r}" for key, value in unknown.items() if value not in (None, False, {}, [], "")]
    if changing:
        raise CheckpointError(
            f"config.json has keys that may change the numbers and are not handled: {', '.join(sorted(changing))}",
            remedy="if they do not, take them out of config.json",
        )


def _build_config(architecture: str, family: Family, values: Mapping[str, Any], dtype: str) -> ModelConfig:
    def need(key: str) -> Any:
        if values.get(key) is None:
            raise CheckpointError(f"config.json lacks {key}", remedy="copy the model's own config.json")
        return values[key]

    heads = need("num_attention_heads")
    kv_heads = (
        values["num_key_value_heads"] if "num_key_value_heads" in family.defaults else need("num_key_value_heads")
    )
    if values.get("mlp_bias") and not family.mlp_bias:
        raise CheckpointError(f"mlp_bias is not a setting of {architecture}", remedy="take it out of config.json")
    if values["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(
            f"hidden_act {values['hidden_act']!r} is not supported yet", expected=" | ".join(ACTIVATIONS)
        )
    longest = need("max_position_embeddings")
    base, scaling = _rope(values, longest)
    bias = bool(values["attention_bias"]) if family.attn_bias is None else family.attn_bias
    return ModelConfig(
        architecture=architecture,
        dtype=dtype,
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_size=values["head_dim"] or need("hidden_size") // heads,
        intermediate_size=need("intermediate_size"),
        max_position_embeddings=longest,
        hidden_act=values["hidden_act"],
        norm_epsilon=need("rms_norm_eps"),
        rotary_base=base,
        rotary_scaling=scaling,
        attn_bias=bias,
        dense_bias=bias and family.attn_bias is None,
        mlp_bias=bool(values.get("mlp_bias")),
        qk_layernorm=family.qk_layernorm,
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        sliding_window=_window(values),
    )


def _window(values: Mapping[str, Any]) -> int | None:
    """The window that some layer of the source applies, None when every layer sees everything."""
    kinds = set(values.get("layer_types") or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise CheckpointError(
            f"layer_types names kinds of attention that are not supported: {sorted(unknown)}",
            expected="full_attention | sliding_attention",
        )
    if values.get("use_sliding_window") is False or kinds == {"full_attention"}:
        return None
    window: int | None = values.get("sliding_window")
    return window


def _rope(values: Mapping[str, Any], longest: int) -> tuple[float, RotaryScaling | None]:
    """Base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if new and old and new != old:
        raise CheckpointError(
            f"config.json has both rope_parameters {new} and rope_scaling {old}", remedy="keep the one that is meant"
        )
    raw: dict[str, Any] = new or old
    unknown = sorted(set(raw) - ROPE_KEYS)
    if unknown:
        raise CheckpointError(f"rotary settings that are not handled: {', '.join(unknown)}", expected=sorted(ROPE_KEYS))
    check_kinds("config.json", raw, ROPE_KINDS)
    partial = raw.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"partial_rotary_factor={partial} is not supported yet", expected=1.0)
    base = raw.get("rope_theta", values["rope_theta"])
    if base is None:
        raise CheckpointError("config.json lacks rope_theta", remedy="copy the model's own config.json")
    kind = raw.get("rope_type", raw.get("type"))
    if kind in NO_SCALING:
        return float(base), None
    return float(base), _scaling(str(kind), raw, longest)


def _scaling(kind: str, raw: Mapping[str, Any], longest: int) -> RotaryScaling:
    trained = None if kind == "linear" else raw.get("original_max_position_embeddings") or longest
    factor = raw.get("factor") or (longest / trained if kind == "yarn" and trained else None)
    if factor is None:
        raise CheckpointError(f"{kind} rotary scaling lacks its factor", remedy="copy the model's own config.json")
    return RotaryScaling(
        kind=kind,
        factor=float(factor),
        original_max_position_embeddings=trained,
        low_freq_factor=raw.get("low_freq_factor"),
        high_freq_factor=raw.get("high_freq_factor"),
        beta_fast=raw.get("beta_fast") or 32.0,
        beta_slow=raw.get("beta_slow") or 1.0,
        attention_factor=raw.get("attention_factor"),
        mscale=raw.get("mscale"),
        mscale_all_dim=raw.get("mscale_all_dim"),
        truncate=bool(raw.get("truncate", True)),
    )
