"""TensorRT-LLM's checkpoint format: config.json and one rank{r}.safetensors a rank, name for name."""

from __future__ import annotations

import dataclasses
from collections import abc
from pathlib import Path
from typing import Any

import torch

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig, RotaryScaling
from trtlab.convert.check import check_dtype, check_kinds, check_layers, check_tensors
from trtlab.convert.families.tables import FAMILIES
from trtlab.convert.quantization import quantization_extras, quantization_from_json, quantization_to_json
from trtlab.errors import CheckpointError
from trtlab.model.tensor_specs import layer_name
from trtlab.model.weights import tensor_specs
from trtlab.ops.torch import ACTIVATIONS
from trtlab.parallel.shard import EmbeddingLayout, shard, unshard
from trtlab.storage.files import read_json
from trtlab.storage.lazy import LazyTensor, open_safetensors
from trtlab.version import VERSION

FORMAT = 1  # raised when an older trtlab could no longer read what this one writes
PLAIN_FIELDS = (
    "architecture",
    "dtype",
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "hidden_act",
    "intermediate_size",
    "norm_epsilon",
    "rotary_base",
    "attn_bias",
    "dense_bias",
    "mlp_bias",
    "qk_layernorm",
    "tie_word_embeddings",
    "sliding_window",
)
REQUIRED = (*PLAIN_FIELDS[:8], "intermediate_size")
KINDS = {
    "a whole number of at least 1": "vocab_size max_position_embeddings hidden_size num_hidden_layers "
    "num_attention_heads num_key_value_heads head_size intermediate_size sliding_window",
    "a positive number": "norm_epsilon rotary_base",
    "true or false": "attn_bias dense_bias mlp_bias qk_layernorm tie_word_embeddings use_parallel_embedding "
    "share_embedding_table",
    "a text": "architecture dtype hidden_act",
    "a number": "embedding_sharding_dim",
    "an object": "mapping quantization trtlab rotary_scaling moe producer",
}
SCALING_KINDS = {
    "a whole number of at least 1": "original_max_position_embeddings",
    "a positive number": "factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor",
    "a number": "mscale mscale_all_dim",
    "true or false": "truncate",
    "a text": "rope_type type",
}
# What TensorRT-LLM writes besides and what it must say, because nothing else is served; and what changes no number.
FIXED = {
    "position_embedding_type": "rope_gpt_neox",
    "rotary_pct": 1.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "rmsnorm": True,
}
NEUTRAL = frozenset(
    """
    logits_dtype kv_dtype producer version runtime_defaults disable_weight_only_quant_plugin use_prompt_tuning
    has_partial_lora_mask remove_duplicated_kv_heads decoder rank
    """.split()
)


def rank_file(rank: int) -> str:
    """The file name of one rank's tensors."""
    return f"rank{rank}.safetensors"


def config_to_json(
    config: ModelConfig, mapping: Mapping, layout: EmbeddingLayout, provenance: abc.Mapping[str, Any]
) -> dict[str, Any]:
    """config.json as TensorRT-LLM lays it out; ``trtlab`` holds what is ours: format number and provenance."""
    scaling = config.rotary_scaling
    return {
        **{name: getattr(config, name) for name in PLAIN_FIELDS},
        "logits_dtype": "float32",
        "position_embedding_type": "rope_gpt_neox",
        "rotary_scaling": None if scaling is None else _scaling_to_json(scaling),
        "use_parallel_embedding": layout.use_parallel_embedding,
        "embedding_sharding_dim": layout.embedding_sharding_dim,
        "share_embedding_table": layout.use_embedding_sharing,
        "mapping": {
            "world_size": mapping.world_size,
            "tp_size": mapping.tp_size,
            "pp_size": mapping.pp_size,
        },
        "quantization": quantization_to_json(config.quantization),
        "producer": {"name": "trtlab", "version": VERSION},
        "trtlab": {"format": FORMAT, **quantization_extras(config.quantization), **provenance},
    }


def _scaling_to_json(scaling: RotaryScaling) -> dict[str, Any]:
    fields = dataclasses.asdict(scaling)
    return {"rope_type": fields.pop("kind"), **{key: value for key, value in fields.items() if value is not None}}


def config_from_json(raw: abc.Mapping[str, Any]) -> tuple[ModelConfig, Mapping, EmbeddingLayout]:
    """The inverse of ``config_to_json``; keys that a checkpoint of TensorRT-LLM's own lacks take its defaults."""
    missing = [key for key in REQUIRED if raw.get(key) is None]
    if missing:
        raise CheckpointError(
            f"config.json lacks {', '.join(missing)}", remedy="give a folder that checkpoint.save() wrote"
        )
    check_kinds("config.json", raw, KINDS)
    if (raw.get("producer") or {}).get("name") == "modelopt" and raw.get("rotary_base") is None:
        raise CheckpointError(
            "config.json comes from ModelOpt, which leaves rotary_base out",
            remedy="add rotary_base (the source's rope_theta) and its rotary_scaling to config.json",
        )
    _refuse_unknown_keys(raw)
    written = (raw.get("trtlab") or {}).get("format", FORMAT)
    if not isinstance(written, int) or written > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {written}; this trtlab {VERSION} reads up to {FORMAT}", remedy="upgrade trtlab"
        )
    if raw["architecture"] not in FAMILIES:
        raise CheckpointError(f"unknown architecture {raw['architecture']!r}", expected=" | ".join(FAMILIES))
    if raw.get("hidden_act", "silu") not in ACTIVATIONS:
        raise CheckpointError(
            f"hidden_act {raw['hidden_act']!r} is not supported yet", expected=" | ".join(ACTIVATIONS)
        )
    values = {name: raw[name] for name in PLAIN_FIELDS if raw.get(name) is not None}
    values.setdefault("head_size", raw["hidden_size"] // raw["num_attention_heads"])
    config = ModelConfig(
        **values,
        rotary_scaling=_scaling_from_json(raw.get("rotary_scaling")),
        quantization=quantization_from_json(raw.get("quantization") or {}, raw.get("trtlab") or {}),
    )
    sizes = raw.get("mapping") or {}
    if sizes.get("cp_size", 1) != 1:
        raise CheckpointError(f"cp_size={sizes['cp_size']} is not supported yet", expected=1)
    mapping = Mapping(**{key: sizes[key] for key in ("world_size", "tp_size", "pp_size") if key in sizes})
    if config.tie_word_embeddings is False and raw.get("share_embedding_table"):
        config = config.replace(tie_word_embeddings=True)
    layout = EmbeddingLayout(
        bool(raw.get("use_parallel_embedding")),
        int(raw.get("embedding_sharding_dim") or 0),
        bool(raw.get("share_embedding_table")),
    )
    return config, mapping, layout


def _refuse_unknown_keys(raw: abc.Mapping[str, Any]) -> None:
    known = {*" ".join(KINDS.values()).split(), *FIXED, *NEUTRAL}
    odd = [f"{k}={v!r}" for k, v in raw.items() if k not in known and v not in (None, False, 0, {}, [], "")]
    odd += [f"{key}={raw[key]!r}" for key, value in FIXED.items() if key in raw and raw[key] != value]
    if (raw.get("moe") or {}).get("num_experts"):
        odd.append(f"moe={raw['moe']!r}")
    if odd:
        raise CheckpointError(
            f"config.json has keys that may change the numbers and are not handled: {', '.join(sorted(odd))}",
            remedy="if they do not, take them out of config.json",
        )


def _scaling_from_json(raw: abc.Mapping[str, Any] | None) -> RotaryScaling | None:
    if not raw:
        return None
    fields = dict(raw)
    kind = fields.pop("rope_type", None) or fields.pop("type", None)
    check_kinds("rotary_scaling", fields, SCALING_KINDS)
    known = {field.name for field in dataclasses.fields(RotaryScaling)}
    unknown = sorted(set(fields) - known)
    if kind is None or unknown:
        raise CheckpointError(
            f"rotary_scaling is not understood: {dict(raw)}", expected=f"rope_type and {sorted(known)}"
        )
    return RotaryScaling(kind=kind, **fields)


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder: whole tensors, or with ``rank`` that rank's own."""

    config: ModelConfig
    mapping: Mapping
    layout: EmbeddingLayout
    tensors: dict[str, LazyTensor]
    provenance: dict[str, Any]


def read_checkpoint(ckpt_dir: Path, rank: int | None = None) -> StoredCheckpoint:
    """A folder in this format; with ``rank`` only that rank's file is opened.

    Raises CheckpointError for a missing folder, config or rank, and for tensors that do not fit the config.
    """
    if not ckpt_dir.is_dir():
        raise CheckpointError(f"{ckpt_dir} is not a folder", remedy="give a folder that checkpoint.save() wrote")
    raw = read_json(ckpt_dir / "config.json", remedy="give a folder that checkpoint.save() wrote")
    if "architecture" not in raw and "architectures" in raw:
        raise CheckpointError(
            f"{ckpt_dir.name} is a Hugging Face folder",
            expected="one that checkpoint.save() or TensorRT-LLM wrote",
            remedy="open it with Checkpoint.from_hugging_face()",
        )
    config, mapping, layout = config_from_json(raw)
    if rank is not None and rank not in mapping.ranks:
        raise CheckpointError(f"{ckpt_dir.name} has no rank {rank}", expected=f"0 to {mapping.ranks[-1]}")
    ranks = {r: open_safetensors(ckpt_dir / rank_file(r)) for r in (mapping.ranks if rank is None else (rank,))}
    check_layers(ckpt_dir.name, config.num_hidden_layers, mapping.pp_size * max(map(len, ranks.values())))
    config = _with_dense_bias(config, ranks)
    for r, found in ranks.items():
        where = f"{ckpt_dir.name}/{rank_file(r)}"
        _check_scales(where, config, found)
        check_tensors(where, found, rank_shapes(config, mapping, r, layout))
        dtypes = rank_dtypes(config, mapping, r, layout)
        ranks[r] = {name: _as_bytes(tensor, dtypes[name]) for name, tensor in found.items()}
        check_dtype(where, ranks[r], dtypes)
    tensors = unshard(config, mapping, layout, ranks.__getitem__) if rank is None else ranks[rank]
    return StoredCheckpoint(config, mapping, layout, tensors, dict(raw.get("trtlab") or {}))


def _check_scales(where: str, config: ModelConfig, found: abc.Mapping[str, LazyTensor]) -> None:
    """Say which step was left out when the config names an algorithm and no tensor holds a scale."""
    algorithm = config.quantization.quant_algo
    if algorithm is not None and not any("scal" in name for name in found):
        raise CheckpointError(
            f"{where} holds plain weights, though config.json says {algorithm}: the step that quantizes was left out",
            remedy=f"set quant_algo to null, load, and call checkpoint.quantize(QuantConfig(quant_algo={algorithm!r}))",
        )


def _as_bytes(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Packed INT4 and FP8 may be announced as plain int8: the bytes are the same."""
    if tensor.dtype != torch.int8 or dtype not in (torch.uint8, torch.float8_e4m3fn):
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: tensor.read().view(dtype))


def _with_dense_bias(config: ModelConfig, ranks: abc.Mapping[int, abc.Mapping[str, LazyTensor]]) -> ModelConfig:
    """TensorRT-LLM's ``attn_bias`` does not tell whether the output projection has one: the tensors do."""
    has = any(layer_name(0, "attention.dense.bias") in found for found in ranks.values())
    return config if has == config.dense_bias else config.replace(dense_bias=has)


def rank_shapes(
    config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout
) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that one rank's file holds."""
    return {name: tensor.shape for name, tensor in _rank(config, mapping, rank, layout).items()}


def rank_dtypes(config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout) -> dict[str, torch.dtype]:
    """The name and dtype of every tensor that one rank's file holds: the model's, or what its algorithm stores."""
    return {name: tensor.dtype for name, tensor in _rank(config, mapping, rank, layout).items()}


def _rank(config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout) -> dict[str, LazyTensor]:
    whole = {
        name: LazyTensor(spec.shape, spec.dtype or config.torch_dtype, _never_read)
        for name, spec in tensor_specs(config).items()
    }
    return shard(config, mapping, rank, whole, layout)


def _never_read() -> Any:
    raise AssertionError("a shape has no data")
