"""Reads a GGUF file, llama.cpp's format: its ModelConfig, and its lazy tensors by TensorRT-LLM's names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from trtlab.config.model import DtypeName, ModelConfig, PositiveFloat32, RotaryScaling, dtype_name, name_of_dtype
from trtlab.convert.check import check_layers, check_tensors
from trtlab.convert.families import FAMILIES
from trtlab.convert.families.llama import GGUF_NAMES
from trtlab.convert.gguf_blocks import KIND, keep_blocks
from trtlab.convert.meta import to_half_split
from trtlab.errors import CheckpointError
from trtlab.model.rope import rotary_frequencies
from trtlab.storage.foreign_objects import ForeignObject, check_unknown_keys
from trtlab.storage.gguf_file import BLOCKS, FLOATS, GgufFile
from trtlab.storage.json_files import Count, Listed, naming, parse_model
from trtlab.storage.lazy import LazyTensor, cat
from trtlab.storage.paths import PathLike, absolute_path, reading
from trtlab.validation import shorten

REMEDY = "convert the model to GGUF again, or give its Hugging Face folder"
ARCHITECTURE, VOCABULARY = "general.architecture", "tokenizer.ggml.model"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PAIRED = ("llama",)  # neighbouring rows of q and k are a rotary pair; elsewhere the two halves of a head are
ROPE_FACTORS = "rope_freqs.weight"  # what each frequency is divided by: the scaling of Llama 3.1 and later
# Llama 3.1 and later: the trained context, and the turns between which frequencies are blended. The file has only the
# divisors that they give.
LLAMA3_TRAINED, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0
DEFAULT_DTYPE: DtypeName = "bfloat16"  # of a file whose matrices are quantized


class _Scaling(ForeignObject):
    unsupported: ClassVar[frozenset[str]] = frozenset(("yarn_log_multiplier", "yarn_ext_factor"))

    type: Literal["none", "linear", "yarn"] | None = None
    factor: PositiveFloat32 | None = None
    original_context_length: Count | None = None
    finetuned: bool | None = None
    attn_factor: PositiveFloat32 | None = None
    yarn_attn_factor: PositiveFloat32 | None = None
    yarn_beta_fast: PositiveFloat32 | None = None
    yarn_beta_slow: PositiveFloat32 | None = None


class _Rope(ForeignObject):
    unsupported: ClassVar[frozenset[str]] = frozenset(("dimension_sections", "freq_base_swa", "scale"))

    dimension_count: Count | None = None
    freq_base: PositiveFloat32 | None = None
    scale_linear: PositiveFloat32 | None = None
    """A linear scaling in the oldest files."""
    scaling: _Scaling = _Scaling()


class _Attention(ForeignObject):
    unsupported: ClassVar[frozenset[str]] = frozenset(
        """
        max_alibi_bias clamp_kqv logit_softcapping scale output_scale temperature_length temperature_scale
        shared_kv_layers sliding_window_pattern layer_norm_epsilon q_lora_rank kv_lora_rank
        """.split()
    )

    head_count: Count | Listed[int]
    head_count_kv: Count | Listed[int] | None = None
    """None: as many as query heads. A list has a number for each layer."""
    layer_norm_rms_epsilon: PositiveFloat32
    key_length: Count | None = None
    value_length: Count | None = None
    sliding_window: Count | None = None
    causal: Literal[True] = True


class _Architecture(ForeignObject):
    """The keys under the architecture's name; a dot in a key is a level here."""

    neutral: ClassVar[frozenset[str]] = frozenset(("tensor_data_layout", "vocab_size"))
    unsupported: ClassVar[frozenset[str]] = frozenset(
        """
        expert_count expert_used_count expert_shared_count expert_feed_forward_length logit_scale residual_scale
        embedding_scale final_logit_softcapping attn_logit_softcapping use_parallel_residual pooling_type
        interleave_moe_layer_step nextn_predict_layers swin_norm
        """.split()
    )

    block_count: Count
    context_length: Count
    embedding_length: Count
    feed_forward_length: Count | Listed[int]
    attention: _Attention
    rope: _Rope = _Rope()


def gguf_path(path: PathLike) -> Path:
    """The absolute path of a file; CheckpointError for a folder, with the GGUF files that it holds."""
    file = absolute_path(path)
    with reading(file):
        files = sorted(entry.name for entry in file.iterdir() if entry.suffix == ".gguf") if file.is_dir() else None
    if files is not None:
        raise CheckpointError(
            f"{file} is a folder", expected="a GGUF file", remedy=f"give {file / files[0]}" if files else REMEDY
        )
    return file


def gguf_tokenizer(file: GgufFile) -> Path | None:
    """Where the tokenizer is: the file itself, if it has one."""
    return file.path if VOCABULARY in file.metadata else None


def gguf_source(file: GgufFile, dequantize: bool) -> str:
    """The origin of the weights in words: the file, and the types that are dequantized."""
    kept = () if dequantize else (KIND,)
    kinds = [kind for kind in BLOCKS if any(kind == t.kind not in kept for t in file.stored.values())]
    return f"GGUF file {file.path.name}" + (f", dequantized from {' and '.join(kinds)}" if kinds else "")


def read_gguf(
    file: GgufFile, dtype: str = "auto", *, allow_unknown: bool = True, dequantize: bool = True
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Config and lazy tensors of a GGUF file.

    Args:
        file: The file.
        dtype: Type of the tensors; ``auto`` is that of most matrices, and bfloat16 where they are quantized.
        allow_unknown: Whether a key that is not known is a warning, not an error.
        dequantize: Whether linears in Q4_0 are dequantized; else they stay in 4 bits, as W4A16_AWQ in groups of 32.

    Raises:
        CheckpointError: The architecture is unknown; a key changes the numbers and is not supported; the tensors do not
            fit the keys.
    """
    stored = _read_keys(file, allow_unknown=allow_unknown)
    tensors = file.tensors()
    factors = tensors.pop(ROPE_FACTORS, None)
    check_layers(file.path.name, stored.block_count, len(tensors))
    with naming(file.path, remedy=REMEDY):
        config = _to_config(stored, str(file.metadata[ARCHITECTURE]), tensors)
    check_tensors(file.path.name, tensors, GGUF_NAMES.shapes(config))
    if factors is not None:
        with naming(file.path, remedy=REMEDY):
            config = config.replace(rotary_scaling=_llama3_scaling(config, factors))
    config = config.replace(dtype=_choose_dtype(dtype, file))
    sources = GGUF_NAMES.sources(config)

    def reorder(name: str) -> Callable[[Tensor], Tensor]:
        rotated = file.metadata[ARCHITECTURE] in PAIRED and name.split(".")[-2] in ("attn_q", "attn_k")
        return (lambda rows: to_half_split(rows, config.head_size)) if rotated else _as_it_is

    def converted(name: str) -> LazyTensor:
        tensor, order = tensors[name].to(config.torch_dtype), reorder(name)
        return tensor if order is _as_it_is else tensor.map(order)

    floats = {name: cat([converted(part) for part in parts]) for name, parts in sources.items()}
    return (config, floats) if dequantize else keep_blocks(config, file, sources, floats, reorder)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _read_keys(file: GgufFile, *, allow_unknown: bool) -> _Architecture:
    architecture = file.metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path.name}: the architecture {shorten(architecture)} is not supported",
            expected=" | ".join(ARCHITECTURES),
            remedy="give a model of one of these",
        )
    own = {key: value for key, value in file.metadata.items() if key.startswith(f"{architecture}.")}
    where = f"{file.path}, {architecture}"
    stored = parse_model(_nested(own, where)[architecture] if own else {}, _Architecture, where, remedy=REMEDY)
    check_unknown_keys(stored, where, allow_unknown=allow_unknown)
    return stored


def _nested(keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys with dots as objects in objects."""
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        *path, last = key.split(".")
        place = nested
        for name in path:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                break
        if not isinstance(place, dict) or last in place:
            raise CheckpointError(f"{where} has the key {shorten(key)} beside one that it begins with", remedy=REMEDY)
        place[last] = value.tolist() if isinstance(value, np.ndarray) else value
    return nested


def _to_config(stored: _Architecture, architecture: str, tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    family = FAMILIES[ARCHITECTURES[architecture]]
    attention, first = stored.attention, GGUF_NAMES.layer.format(0)
    heads = _same_in_each_layer("attention.head_count", attention.head_count)
    kv_heads = _same_in_each_layer("attention.head_count_kv", attention.head_count_kv or heads)
    head_size = attention.key_length or stored.embedding_length // heads
    table = tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError("the file has no tensor token_embd.weight", remedy=REMEDY)
    others = {"attention.value_length": attention.value_length, "rope.dimension_count": stored.rope.dimension_count}
    for key, size in others.items():
        if size not in (None, head_size):
            raise CheckpointError(f"{key} {size} is not the width of a head, {head_size}: not supported yet")
    return ModelConfig(
        architecture=ARCHITECTURES[architecture],
        dtype="float32",
        vocab_size=table.shape[0],
        hidden_size=stored.embedding_length,
        num_hidden_layers=stored.block_count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=head_size,
        intermediate_size=_same_in_each_layer("feed_forward_length", stored.feed_forward_length),
        max_position_embeddings=stored.context_length,
        norm_epsilon=attention.layer_norm_rms_epsilon,
        rotary_base=stored.rope.freq_base or 10000.0,
        rotary_scaling=_scaling(stored),
        attn_bias=f"{first}.attn_q.bias" in tensors if family.attn_bias is None else family.attn_bias,
        dense_bias=f"{first}.attn_output.bias" in tensors,
        mlp_bias=f"{first}.ffn_gate.bias" in tensors,
        qk_layernorm=family.qk_layernorm,
        tie_word_embeddings="output.weight" not in tensors,
        sliding_window=attention.sliding_window,
        **family.settings,
    )


def _same_in_each_layer(key: str, value: int | Sequence[int]) -> int:
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(f"{key} differs from layer to layer, which is not supported", got=shorten(list(value)))
    return value[0]


def _scaling(stored: _Architecture) -> RotaryScaling | None:
    scaling = stored.rope.scaling
    kind, factor = scaling.type or "linear", scaling.factor or stored.rope.scale_linear
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    if factor is None:
        raise CheckpointError(f"rope.scaling.factor is missing, which {kind} needs", remedy=REMEDY)
    if kind == "linear":
        return RotaryScaling("linear", factor)
    return RotaryScaling(
        "yarn",
        factor,
        scaling.original_context_length,
        beta_fast=scaling.yarn_beta_fast or 32.0,
        beta_slow=scaling.yarn_beta_slow or 1.0,
        attention_factor=_attention_factor(scaling.yarn_attn_factor or scaling.attn_factor, factor),
    )


def _attention_factor(more: float | None, factor: float) -> float | None:
    """llama.cpp multiplies the attention factor that yarn derives from its scale by the file's."""
    return None if more in (None, 1.0) else more * (1 + 0.1 * math.log(factor))


def _llama3_scaling(config: ModelConfig, factors: LazyTensor) -> RotaryScaling:
    """The scaling of Llama 3.1 and later that gives these divisors of the frequencies."""
    divisors = factors.read().double()
    scaling = RotaryScaling(
        "llama3", float(divisors.max()), LLAMA3_TRAINED, low_freq_factor=LLAMA3_LOW, high_freq_factor=LLAMA3_HIGH
    )
    plain, _ = rotary_frequencies(config, torch.float64)
    scaled, _ = rotary_frequencies(config.replace(rotary_scaling=scaling), torch.float64)
    if divisors.shape != plain.shape or not torch.allclose(plain / scaled, divisors, rtol=1e-5, atol=0):
        raise CheckpointError(
            f"{ROPE_FACTORS} is another scaling of the rotary embedding than Llama 3.1's: not supported",
            got=shorten(divisors.tolist()),
        )
    return scaling


def _choose_dtype(dtype: str, file: GgufFile) -> DtypeName:
    if dtype != "auto":
        return dtype_name(dtype)
    (kind, _), *_ = Counter(tensor.kind for tensor in file.stored.values() if len(tensor.shape) > 1).most_common()
    return name_of_dtype(FLOATS[kind]) if kind in FLOATS else DEFAULT_DTYPE
