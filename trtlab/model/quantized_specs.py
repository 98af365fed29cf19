"""Names, shapes and dtypes of the tensors of quantized linears and caches, by algorithm. Knows no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trtlab.config.algorithms import MERGED_KV_SCALE, Algorithm
from trtlab.config.model import ModelConfig
from trtlab.model.blocks import LinearSite
from trtlab.model.scales import FLOAT8


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a whole (unsplit) tensor and how tensor parallelism cuts it.

    ``split`` is ``"qkv"`` (q, k and v rows each by heads), ``"rows"``, ``"columns"``, ``"embedding"`` (as the
    EmbeddingLayout says), ``"head"`` (rows of the padded vocabulary), ``"kv_heads"`` or None (every rank holds the
    whole tensor). ``dim`` is the dimension of those rows, columns or heads. With ``dtype=None`` the tensor has the
    model's dtype. ``per_byte`` is the number of rows that share a byte.
    """

    shape: tuple[int, ...]
    split: str | None = None
    dim: int = 0
    dtype: torch.dtype | None = None
    per_byte: int = 1


@dataclass(frozen=True)
class _Linear:
    """One linear to be stored: its place in the model, its sizes, and how output and input are cut over ranks.

    ``layer`` is None for the head.
    """

    site: LinearSite
    layer: int | None
    out: int
    width: int
    config: ModelConfig
    algorithm: Algorithm

    @property
    def part(self) -> str:
        return self.site.part

    @property
    def out_split(self) -> str | None:
        return None if self.site.cuts_input else self.site.split

    @property
    def in_split(self) -> str | None:
        return self.site.split if self.site.cuts_input else None

    def by_row(self, shape: tuple[int, ...], dim: int = 0, dtype: torch.dtype | None = None) -> TensorSpec:
        """A tensor with one entry for each output along ``dim``."""
        return TensorSpec(shape, self.out_split, dim, dtype)

    def by_column(self, shape: tuple[int, ...], dim: int = 0, dtype: torch.dtype | None = None) -> TensorSpec:
        """A tensor with one entry for each input along ``dim``."""
        return TensorSpec(shape, self.in_split, dim, dtype)

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype | None = None, per_byte: int = 1) -> TensorSpec:
        """A tensor ``[out, in]`` that is cut in the same way as the weight."""
        return TensorSpec(shape, self.site.split, int(self.site.cuts_input), dtype, per_byte)

    def integers(self) -> TensorSpec:
        """int8 ``[out, in]``; with INT4 ``[ceil(out / 2), in]``, two rows in a byte, also of the dtype int8."""
        if not self.algorithm.packed:
            return self.matrix((self.out, self.width), torch.int8)
        return self.matrix((-(-self.out // 2), self.width), torch.int8, per_byte=2)


Specs = dict[str, TensorSpec]
ONE = TensorSpec((1,), dtype=torch.float32)


def quantized_specs(
    config: ModelConfig, layer: int | None, site: LinearSite, plain: TensorSpec, algorithm: Algorithm
) -> Specs:
    """The tensors that replace one linear's ``plain`` weight, by their names within the layer; None is the head's."""
    out, width = plain.shape
    return _SPECS[algorithm.family](_Linear(site, layer, out, width, config, algorithm), plain)


def _weight_only(linear: _Linear, plain: TensorSpec) -> Specs:
    return {
        f"{linear.part}.weight": linear.integers(),
        f"{linear.part}.per_channel_scale": _weight_only_scale(linear),
    }


def _weight_only_scale(linear: _Linear) -> TensorSpec:
    """``[out]``, or ``[out, ranks]`` where each rank's part of the input has its own scales."""
    ranks = weight_only_ranks(linear.config, linear.site)
    return linear.by_row((linear.out,)) if ranks == 1 else linear.by_column((linear.out, ranks), 1)


def weight_only_ranks(config: ModelConfig, site: LinearSite) -> int:
    """How many scales a row of a weight-only linear has, one for each rank that holds a part of its input."""
    return config.quantization.scale_ranks if site.cuts_input else 1


def _smoothquant(linear: _Linear, plain: TensorSpec) -> Specs:
    by_row = linear.algorithm.per_channel or linear.part == "attention.qkv"  # q, k and v have a scale each
    scale = linear.by_row((1, linear.out), 1, torch.float32) if by_row else TensorSpec((1, 1), None, 1, torch.float32)
    specs = {
        f"{linear.part}.weight": linear.integers(),
        f"{linear.part}.per_channel_scale": scale,
    }
    if linear.site.stores_input_scale(linear.algorithm.per_token):
        specs[linear.site.input_scale] = ONE
    if not linear.algorithm.per_token:
        specs[f"{linear.part}.act_scale"] = TensorSpec((1, 1), dtype=torch.float32)
    if linear.site.norm_before is None:
        specs[f"{linear.part}.smoother"] = linear.by_column((1, linear.width), 1, torch.float32)
    return specs


def _smoothquant_modelopt(linear: _Linear, plain: TensorSpec) -> Specs:
    return {
        f"{linear.part}.weight": linear.integers(),
        f"{linear.part}.weights_scaling_factor": linear.by_row((linear.out,), dtype=torch.float32),
        f"{linear.part}.activation_scaling_factor": ONE,
        f"{linear.part}.prequant_scaling_factor": linear.by_column((linear.width,)),
    }


def _fp8(linear: _Linear, plain: TensorSpec) -> Specs:
    return {
        f"{linear.part}.weight": linear.matrix((linear.out, linear.width), FLOAT8),
        f"{linear.part}.weights_scaling_factor": ONE,
        f"{linear.part}.activation_scaling_factor": ONE,
    }


def _fp8_by_row(linear: _Linear, plain: TensorSpec) -> Specs:
    """TensorRT-LLM quantizes only the MLPs, without those of the first and the last layer."""
    if linear.site.block != "mlp" or linear.layer in (0, linear.config.num_hidden_layers - 1):
        return {f"{linear.part}.weight": plain}
    return {
        f"{linear.part}.weight": linear.matrix((linear.out, linear.width), FLOAT8),
        f"{linear.part}.per_channel_scale": linear.by_row((linear.out,), dtype=torch.float32),
    }


def _awq(linear: _Linear, plain: TensorSpec) -> Specs:
    groups = linear.width // linear.config.quantization.group_size
    return {
        f"{linear.part}.weight": linear.integers(),
        f"{linear.part}.weights_scaling_factor": linear.matrix((linear.out, groups), torch.float32),
        f"{linear.part}.prequant_scaling_factor": linear.by_column((linear.width,)),
    }


def _awq_fp8(linear: _Linear, plain: TensorSpec) -> Specs:
    return _awq(linear, plain) | {
        f"{linear.part}.weights_scaling_factor_2": ONE,
        f"{linear.part}.activation_scaling_factor": ONE,
    }


def _gptq(linear: _Linear, plain: TensorSpec) -> Specs:
    groups = linear.width // linear.config.quantization.group_size
    return {
        f"{linear.part}.weight": linear.integers(),
        f"{linear.part}.weights_scaling_factor": linear.matrix((linear.out, groups)),
        f"{linear.part}.zero": linear.matrix((linear.out, groups)),
    }


_SPECS: dict[str, Callable[[_Linear, TensorSpec], Specs]] = {
    "weight_only": _weight_only,
    "smoothquant": _smoothquant,
    "smoothquant_modelopt": _smoothquant_modelopt,
    "fp8": _fp8,
    "fp8_by_row": _fp8_by_row,
    "awq": _awq,
    "awq_fp8": _awq_fp8,
    "gptq": _gptq,
}


def kv_scale_specs(config: ModelConfig) -> Specs:
    """The scales of one layer's KV cache, by their names within the layer."""
    algorithm = config.quantization.kv_algorithm
    if algorithm is None:
        return {}
    per_head = len(algorithm.tensors) == 2 and config.quantization.kv_cache_scales == "per_head"
    shape, split = ((config.num_key_value_heads,), "kv_heads") if per_head else ((1,), None)
    own = {name: TensorSpec(shape, split, dtype=torch.float32) for name in algorithm.tensors}
    return {MERGED_KV_SCALE: ONE} | own
