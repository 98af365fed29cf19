"""Reads Meta's format: params.json and consolidated.*.pth, whose shards are joined when they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from trtlab.config.model import ModelConfig, PositiveFloat32, RotaryScaling, dtype_name, name_of_dtype
from trtlab.convert.check import check_floating, check_layers, check_tensors
from trtlab.convert.families.llama import META_NAMES
from trtlab.errors import CheckpointError
from trtlab.storage.foreign_objects import ForeignObject, read_foreign
from trtlab.storage.json_files import Count, naming
from trtlab.storage.lazy import LazyTensor, cat, open_pickle

REMEDY = "copy Meta's own params.json"
BUFFERS = re.compile(r"(^|\.)rope\.freqs$")  # of the model, or in LLaMA 1 of each layer: computed anew
COLUMN_SPLIT = (".wo.weight", ".w2.weight")  # row-parallel linears: shards are joined by columns
# params.json of Llama 3.2 does not store its factor of 32 (Llama 3.1 has 8): these (dim, n_layers) identify it.
FACTOR_32 = ((2048, 16), (3072, 28))
# The trained context, which params.json does not store, by the base of the rotary embedding: Llama 3, Code Llama.
CONTEXT_OF_BASE = {500000.0: 8192, 1000000.0: 16384}


class Params(ForeignObject):
    """params.json: the keys that are read, and in ``neutral`` those that the tensors show or that change no number."""

    neutral: ClassVar[frozenset[str]] = frozenset(
        "vocab_size multiple_of ffn_dim_multiplier max_batch_size hidden_dim head_dim".split()
    )
    unsupported: ClassVar[frozenset[str]] = frozenset(
        """
        moe moe_args quantization_args lora_args sliding_window use_qk_norm nope_layer_interval attention_chunk_size
        attn_temperature_tuning floor_scale attn_scale rope_high_freq_factor rope_low_freq_factor
        vision_args vision_encoder vision_chunk_size vision_max_num_chunks vision_num_cross_attention_layers
        """.split()
    )

    dim: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = None
    """None: as many as query heads."""
    norm_eps: PositiveFloat32 | None = None
    rope_theta: PositiveFloat32 | None = None
    use_scaled_rope: bool | None = None
    rope_scaling_factor: PositiveFloat32 | None = None
    max_seq_len: Count | None = None


def read_meta(
    ckpt_dir: Path, dtype: str = "auto", *, max_position_embeddings: int | None = None, allow_unknown: bool = True
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Config and lazy tensors of a folder in Meta's format; CheckpointError when it is incomplete or not supported."""
    params = read_params(ckpt_dir, allow_unknown=allow_unknown)
    files = sorted(path for path in ckpt_dir.iterdir() if path.match("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{ckpt_dir} holds no consolidated.*.pth", remedy="give Meta's own folder")
    shards = [{n: t for n, t in open_pickle(file).items() if not BUFFERS.search(n)} for file in files]
    names = dict.fromkeys(name for shard in shards for name in shard)
    tensors = {name: _merge(name, [shard.get(name) for shard in shards], params.dim) for name in names}
    check_floating(ckpt_dir.name, tensors.items())
    config = _read_config(ckpt_dir / "params.json", params, tensors)
    if dtype != "auto":
        config = config.replace(dtype=dtype_name(dtype))
    if max_position_embeddings is not None:
        config = config.replace(max_position_embeddings=max_position_embeddings)
    return config, _rename(ckpt_dir.name, config, tensors)


def read_params(ckpt_dir: Path, *, allow_unknown: bool = True) -> Params:
    """Read params.json of a folder; CheckpointError for keys and values that are not valid or not supported."""
    params = read_foreign(ckpt_dir / "params.json", Params, remedy=REMEDY, allow_unknown=allow_unknown)
    if params.dim % params.n_heads:
        raise CheckpointError(
            f"{ckpt_dir / 'params.json'}: dim {params.dim} is not a multiple of n_heads {params.n_heads}", remedy=REMEDY
        )
    return params


def _merge(name: str, parts: Sequence[LazyTensor | None], hidden: int) -> LazyTensor:
    whole = [part for part in parts if part is not None]
    if len(whole) != len(parts):
        raise CheckpointError(f"{name} is not in every consolidated.*.pth", remedy="copy the folder again")
    first = whole[0]
    if len(first.shape) != 2:  # norms: every shard has the whole tensor
        return first
    cut_columns = name.endswith(COLUMN_SPLIT) or (name.startswith("tok_embeddings") and first.shape[1] != hidden)
    joined, other = (1, 0) if cut_columns else (0, 1)
    for part in whole:
        if len(part.shape) != 2 or part.shape[other] != first.shape[other] or part.dtype != first.dtype:
            raise CheckpointError(
                f"the shards of {name} do not fit together",
                got=" and ".join(f"{list(piece.shape)} {piece.dtype}" for piece in (first, part)),
                remedy="copy the folder again",
            )
    return cat(whole, dim=joined)


def _read_config(file: Path, params: Params, tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    needed = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    if any(name not in tensors for name in needed):
        raise CheckpointError("the weights are not those of a LLaMA", expected=", ".join(needed))
    for name in needed:
        if len(tensors[name].shape) != 2 or 0 in tensors[name].shape:
            raise CheckpointError(
                f"{name} is {list(tensors[name].shape)}, expected two dimensions", remedy="copy the folder again"
            )
    scaled = bool(params.use_scaled_rope)
    base = params.rope_theta or 10000.0
    with naming(file, remedy=REMEDY):
        return ModelConfig(
            architecture="LlamaForCausalLM",
            dtype=name_of_dtype(tensors[needed[0]].dtype),
            vocab_size=tensors[needed[0]].shape[0],
            hidden_size=params.dim,
            num_hidden_layers=params.n_layers,
            num_attention_heads=params.n_heads,
            num_key_value_heads=params.n_kv_heads or params.n_heads,
            head_size=params.dim // params.n_heads,
            intermediate_size=tensors[needed[1]].shape[0],
            max_position_embeddings=params.max_seq_len or _context(scaled, base),
            norm_epsilon=params.norm_eps or 1e-5,
            rotary_base=base,
            rotary_scaling=_scaling(params) if scaled else None,
            tie_word_embeddings="output.weight" not in tensors,
        )


def _context(scaled: bool, base: float) -> int:
    """The trained context; Llama 3.1 and later scale the rotary embedding, Llama 1 and 2 have the usual base."""
    return 131072 if scaled else CONTEXT_OF_BASE.get(base, 4096)


def _scaling(params: Params) -> RotaryScaling:
    factor = params.rope_scaling_factor or (32.0 if (params.dim, params.n_layers) in FACTOR_32 else 8.0)
    return RotaryScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


def _rename(where: str, config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    check_layers(where, config.num_hidden_layers, len(tensors))
    sources = META_NAMES.sources(config)
    check_tensors(where, tensors, META_NAMES.shapes(config))
    kind = config.torch_dtype

    def converted(name: str) -> LazyTensor:
        tensor = tensors[name].to(kind)
        rotated = name.endswith((".wq.weight", ".wk.weight"))
        return tensor.map(lambda w: to_half_split(w, config.head_size)) if rotated else tensor

    return {name: cat([converted(part) for part in parts]) for name, parts in sources.items()}


def to_half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows ``[heads * head_size, ...]`` from Meta's order (neighbours are a pair) to Hugging Face's (halves are)."""
    rows = weight.view(-1, head_size // 2, 2, *weight.shape[1:])  # [heads, pairs, 2, ...]
    return rows.transpose(1, 2).reshape(weight.shape)
