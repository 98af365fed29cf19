"""Shapes of whole tensors, plain and quantized, and how tensor parallelism cuts them. Knows no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trtlab.config.algorithms import COLUMN_CUT, LINEARS, NORM_BEFORE, STATIC_SCALE, Recipe
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import GROUP_SIZES
from trtlab.errors import ConfigError
from trtlab.model.scales import FLOAT8


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a whole (unsplit) tensor and how tensor parallelism cuts it.

    ``split`` is ``"qkv"`` (q, k and v rows each by heads), ``"rows"``, ``"columns"``, ``"embedding"`` (by choice),
    ``"head"`` (rows of the padded vocabulary), ``"kv_heads"`` or None (every rank holds it whole). ``dim`` is where
    those rows, columns or heads lie. ``dtype`` None follows the model's; ``per_byte`` rows share a byte.
    """

    shape: tuple[int, ...]
    split: str | None = None
    dim: int = 0
    dtype: torch.dtype | None = None
    per_byte: int = 1


def layer_name(layer: int, part: str) -> str:
    """``transformer.layers.3.attention.qkv.weight`` from 3 and ``attention.qkv.weight``."""
    return f"transformer.layers.{layer}.{part}"


def quantized_layer_specs(config: ModelConfig, layer: int, plain: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """A layer's tensors by name: those of ``plain`` with each quantized linear's own in the place of its weight."""
    if not config.quantization.active:
        return plain
    specs = dict(plain)
    for linear in LINEARS:
        specs |= _linear_specs(config, layer_name(layer, linear), linear, plain[f"{linear}.weight"])
    return specs | _kv_specs(config)


@dataclass(frozen=True)
class _Shape:
    """One linear: its name, sizes and how its output and its input are cut over ranks."""

    name: str
    out: int
    width: int
    out_split: str | None
    in_split: str | None


def _linear_specs(config: ModelConfig, module: str, linear: str, plain: TensorSpec) -> dict[str, TensorSpec]:
    """The tensors of one linear by their names within the layer; ``module`` is its full name."""
    name = f"{linear}.weight"
    recipe = config.quantization.recipe_of(module)
    if recipe is None:
        return {name: plain}
    out, width = plain.shape
    _check_groups(module, width, recipe, config.quantization.group_size)
    cut_by_columns = plain.split == "columns"
    shape = _Shape(
        linear,
        out,
        width,
        None if cut_by_columns else plain.split,
        "columns" if cut_by_columns else None,
    )
    return _SPECS[recipe.family](config, shape, recipe)


def _weight_only_specs(config: ModelConfig, shape: _Shape, recipe: Recipe) -> dict[str, TensorSpec]:
    return {
        f"{shape.name}.weight": _integers(shape, recipe),
        f"{shape.name}.per_channel_scale": TensorSpec((shape.out,), shape.out_split),
    }


def _smoothquant_specs(config: ModelConfig, shape: _Shape, recipe: Recipe) -> dict[str, TensorSpec]:
    by_row = recipe.per_channel or shape.name == "attention.qkv"
    scale = (1, shape.out) if by_row else (1, 1)
    specs = {
        f"{shape.name}.weight": _integers(shape, recipe),
        f"{shape.name}.per_channel_scale": TensorSpec(
            scale, shape.out_split if by_row else None, dim=1, dtype=torch.float32
        ),
        STATIC_SCALE[shape.name]: TensorSpec((1,), dtype=torch.float32),
    }
    if not recipe.per_token:
        specs[f"{shape.name}.act_scale"] = TensorSpec((1, 1), dtype=torch.float32)
    if shape.name not in NORM_BEFORE:
        specs[f"{shape.name}.smoother"] = TensorSpec((1, shape.width), shape.in_split, dim=1, dtype=torch.float32)
    return specs


def _modelopt_specs(config: ModelConfig, shape: _Shape, recipe: Recipe) -> dict[str, TensorSpec]:
    return {
        f"{shape.name}.weight": _integers(shape, recipe),
        f"{shape.name}.weights_scaling_factor": TensorSpec((shape.out,), shape.out_split, dtype=torch.float32),
        f"{shape.name}.activation_scaling_factor": TensorSpec((1,), dtype=torch.float32),
        f"{shape.name}.prequant_scaling_factor": TensorSpec((shape.width,), shape.in_split, dim=0),
    }


def _fp8_specs(config: ModelConfig, shape: _Shape, recipe: Recipe) -> dict[str, TensorSpec]:
    split = shape.out_split or shape.in_split
    dim = 0 if shape.out_split else 1
    return {
        f"{shape.name}.weight": TensorSpec((shape.out, shape.width), split, dim=dim, dtype=FLOAT8),
        f"{shape.name}.weights_scaling_factor": TensorSpec((1,), dtype=torch.float32),
        f"{shape.name}.activation_scaling_factor": TensorSpec((1,), dtype=torch.float32),
    }


def _awq_specs(config: ModelConfig, shape: _Shape, recipe: Recipe) -> dict[str, TensorSpec]:
    groups = shape.width // config.quantization.group_size
    split, dim = (shape.out_split, 0) if shape.out_split else (shape.in_split, 1)
    return {
        f"{shape.name}.weight": _integers(shape, recipe),
        f"{shape.name}.weights_scaling_factor": TensorSpec((shape.out, groups), split, dim=dim, dtype=torch.float32),
        f"{shape.name}.prequant_scaling_factor": TensorSpec((shape.width,), shape.in_split, dim=0),
    }


def _awq_fp8_specs(config: ModelConfig, shape: _Shape, recipe: Recipe) -> dict[str, TensorSpec]:
    return _awq_specs(config, shape, recipe) | {
        f"{shape.name}.weights_scaling_factor_2": TensorSpec((1,), dtype=torch.float32),
        f"{shape.name}.activation_scaling_factor": TensorSpec((1,), dtype=torch.float32),
    }


def _integers(shape: _Shape, recipe: Recipe) -> TensorSpec:
    """int8 ``[out, in]``, or two rows to a byte along out."""
    per_byte = 2 if recipe.packed else 1
    split, dim = (shape.out_split, 0) if shape.out_split else (shape.in_split, 1)
    rows = -(-shape.out // per_byte)
    dtype = torch.uint8 if recipe.packed else torch.int8
    return TensorSpec((rows, shape.width), split, dim=dim, dtype=dtype, per_byte=per_byte)


_SPECS: dict[str, Callable[[ModelConfig, _Shape, Recipe], dict[str, TensorSpec]]] = {
    "weight_only": _weight_only_specs,
    "smoothquant": _smoothquant_specs,
    "smoothquant_modelopt": _modelopt_specs,
    "fp8": _fp8_specs,
    "awq": _awq_specs,
    "awq_fp8": _awq_fp8_specs,
}


def _kv_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """The scales of one layer's cache by their names within the layer."""
    recipe = config.quantization.kv_recipe
    if recipe is None:
        return {}
    per_head = len(recipe.tensors) == 2 and config.quantization.kv_cache_scales == "per_head"
    shape, split = ((config.num_key_value_heads,), "kv_heads") if per_head else ((1,), None)
    return {name: TensorSpec(shape, split, dtype=torch.float32) for name in recipe.tensors}


def check_quantized(config: ModelConfig, mapping: Mapping) -> None:
    """ConfigError when packed rows or groups cannot be cut over ``mapping``, naming the sizes that would work."""
    recipe = config.quantization.recipe
    if recipe is None or mapping.tp_size == 1:
        return
    tp = mapping.tp_size
    if recipe.packed and config.intermediate_size % (2 * tp):
        raise ConfigError(
            f"intermediate size {config.intermediate_size} over tp_size={tp} leaves an odd number of rows a rank",
            remedy="INT4 packs two rows a byte: use a smaller tp_size",
        )
    if recipe.grouped:
        widths = {
            "attention.dense": config.num_attention_heads * config.head_size,
            "mlp.proj": config.intermediate_size,
        }
        for linear in COLUMN_CUT:
            layers = range(config.num_hidden_layers)
            if any(config.quantization.recipe_of(layer_name(layer, linear)) for layer in layers):
                group_size = config.quantization.group_size
                _check_groups(f"{linear} on each of {tp} ranks", widths[linear] // tp, recipe, group_size)


def _check_groups(what: str, width: int, recipe: Recipe, group_size: int) -> None:
    if not recipe.grouped or width % group_size == 0:
        return
    fits = [str(size) for size in GROUP_SIZES if width % size == 0]
    raise ConfigError(
        f"{what} has {width} inputs, which groups of {group_size} do not divide",
        remedy=f"use group_size={' or '.join(fits)}" if fits else "exclude it with exclude_modules, or use W8A16",
    )
