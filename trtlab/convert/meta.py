"""Reads Meta's format: params.json and consolidated.*.pth, whose shards are put together lazily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trtlab.config.model import DTYPES, ModelConfig, RotaryScaling, torch_dtype
from trtlab.convert.check import check_floating, check_kinds, check_layers, check_tensors
from trtlab.convert.families.tables import META_NAMES
from trtlab.errors import CheckpointError
from trtlab.storage.files import read_json
from trtlab.storage.lazy import LazyTensor, cat, open_pickle

PARAMS = frozenset(
    """
    dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta
    use_scaled_rope rope_scaling_factor max_seq_len max_batch_size
    """.split()
)
KINDS = {
    "a whole number of at least 1": "dim n_layers n_heads n_kv_heads max_seq_len",
    "a positive number": "norm_eps rope_theta rope_scaling_factor",
    "true or false": "use_scaled_rope",
}
BUFFERS = ("rope.freqs",)
COLUMN_SPLIT = (".wo.weight", ".w2.weight")  # row-parallel linears: shards lie side by side
# params.json of Llama 3.2 does not tell its factor of 32 from Llama 3.1's 8: these (dim, n_layers) do.
FACTOR_32 = ((2048, 16), (3072, 28))


def read_meta(ckpt_dir: Path, dtype: str = "auto") -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Config and lazy tensors of a folder in Meta's format; CheckpointError for what does not fit."""
    if not ckpt_dir.is_dir():
        raise CheckpointError(f"{ckpt_dir} is not a folder", remedy="give a folder with params.json and *.pth")
    params = read_json(ckpt_dir / "params.json", remedy="give Meta's own folder", known=("dim", "n_layers", "n_heads"))
    check_kinds("params.json", params, KINDS)
    files = sorted(ckpt_dir.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{ckpt_dir} holds no consolidated.*.pth", remedy="give Meta's own folder")
    shards = [{n: t for n, t in open_pickle(file).items() if n not in BUFFERS} for file in files]
    names = dict.fromkeys(name for shard in shards for name in shard)
    found = {name: _merge(name, [shard.get(name) for shard in shards], params["dim"]) for name in names}
    check_floating(ckpt_dir.name, found.items())
    config = _read_config(params, found, dtype)
    return config, _rename(ckpt_dir.name, config, found)


def _merge(name: str, parts: Sequence[LazyTensor | None], hidden: int) -> LazyTensor:
    whole = [part for part in parts if part is not None]
    if len(whole) != len(parts):
        raise CheckpointError(f"{name} is not in every consolidated.*.pth", remedy="copy the folder again")
    if len(whole[0].shape) == 1:  # norms: every shard has the whole
        return whole[0]
    cut_columns = name.endswith(COLUMN_SPLIT) or (name.startswith("tok_embeddings") and whole[0].shape[1] != hidden)
    return cat(whole, dim=1 if cut_columns else 0)


def _read_config(params: Mapping[str, Any], found: Mapping[str, LazyTensor], dtype: str) -> ModelConfig:
    unknown = sorted(key for key, value in params.items() if key not in PARAMS and value)
    if unknown:
        raise CheckpointError(
            f"params.json has keys that are not handled: {', '.join(unknown)}", expected=" ".join(sorted(PARAMS))
        )
    needed = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    if any(name not in found for name in needed):
        raise CheckpointError("these are not the weights of a LLaMA", expected=", ".join(needed))
    scaled = bool(params.get("use_scaled_rope"))
    base = float(params.get("rope_theta") or 10000.0)
    stored = next((name for name, kind in DTYPES.items() if kind == found[needed[0]].dtype), "float32")
    if dtype != "auto":
        torch_dtype(dtype)
    heads = int(params["n_heads"])
    return ModelConfig(
        architecture="LlamaForCausalLM",
        dtype=stored if dtype == "auto" else dtype,
        vocab_size=found[needed[0]].shape[0],
        hidden_size=params["dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_size=params["dim"] // heads,
        intermediate_size=found[needed[1]].shape[0],
        max_position_embeddings=params.get("max_seq_len") or _context(scaled, base),
        norm_epsilon=params.get("norm_eps") or 1e-5,
        rotary_base=base,
        rotary_scaling=_scaling(params) if scaled else None,
        tie_word_embeddings="output.weight" not in found,
    )


def _context(scaled: bool, base: float) -> int:
    """The trained context, which params.json does not tell: Llama 3.1 and later, Llama 3, Llama 1 and 2."""
    return 131072 if scaled else 8192 if base == 500000.0 else 4096


def _scaling(params: Mapping[str, Any]) -> RotaryScaling:
    factor = params.get("rope_scaling_factor") or (32.0 if (params["dim"], params["n_layers"]) in FACTOR_32 else 8.0)
    return RotaryScaling("llama3", float(factor), 8192, low_freq_factor=1.0, high_freq_factor=4.0)


def _rename(where: str, config: ModelConfig, found: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    check_layers(where, config.num_hidden_layers, len(found))
    sources = META_NAMES.sources(config)
    check_tensors(where, found, META_NAMES.shapes(config))
    kind = config.torch_dtype

    def turned(name: str) -> LazyTensor:
        tensor = found[name].to(kind)
        rotated = name.endswith((".wq.weight", ".wk.weight"))
        return tensor.map(lambda w: to_half_split(w, config.head_size)) if rotated else tensor

    return {ours: cat([turned(theirs) for theirs in names]) for ours, names in sources.items()}


def to_half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows ``[heads * head_size, in]`` from Meta's order (neighbours are a pair) to Hugging Face's (halves are)."""
    rows = weight.view(-1, head_size // 2, 2, weight.shape[1])  # [heads, pairs, 2, in]
    return rows.transpose(1, 2).reshape(weight.shape)
