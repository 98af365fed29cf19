"""Reads TensorRT-LLM's checkpoint folders: config.json and a rank{r}.safetensors for each rank."""

from __future__ import annotations

import dataclasses
from collections import abc
from pathlib import Path
from typing import Any

import torch

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import HEAD_MODULE
from trtlab.convert.check import check_dtype, check_layers, check_tensors
from trtlab.convert.modelopt_config import complete_config
from trtlab.convert.trtllm_buffers import without_buffers
from trtlab.convert.trtllm_config import REMEDY, TrtllmConfig
from trtlab.convert.trtllm_ranks import (
    Ranks,
    check_rank_files,
    check_same_conversion,
    pad_short_tables,
    rank_file,
    with_merged_scales,
    without_dummy_scales,
)
from trtlab.errors import CheckpointError
from trtlab.model.blocks import SITES
from trtlab.model.names import layer_name
from trtlab.model.scales import FLOAT8
from trtlab.model.tensor_specs import plain_linears
from trtlab.parallel.shard import EmbeddingLayout, rank_tensors, unshard
from trtlab.storage.json_files import naming, parse_model, read_object
from trtlab.storage.lazy import LazyTensor, open_safetensors


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder: the whole tensors, or the tensors of one rank.

    With ``is_plain`` the linears are to be quantized as ``config`` says, and the tensors are whole: the scales of a
    linear that is cut by columns come from all ranks. ``is_exact`` is whether the files hold exactly these tensors,
    with no other beside them and each in its dtype.
    """

    config: ModelConfig
    mapping: Mapping
    layout: EmbeddingLayout
    tensors: dict[str, LazyTensor]
    source: str | None
    """Origin of the weights, None where the folder does not say."""
    is_plain: bool
    is_exact: bool


def read_checkpoint(
    ckpt_dir: Path, rank: int | None = None, hf_config: abc.Mapping[str, Any] | None = None
) -> StoredCheckpoint:
    """Read a folder in this format.

    Args:
        ckpt_dir: The folder.
        rank: The only rank whose file is opened; None opens all.
        hf_config: The Hugging Face config of the model, from which keys are taken that config.json lacks.

    Raises:
        CheckpointError: A missing folder, config or rank; tensors that do not fit the config.
    """
    stored = _read_config(ckpt_dir / "config.json", hf_config)
    with naming(ckpt_dir / "config.json", remedy=REMEDY):
        config, mapping, layout = stored.to_settings()
    if rank is not None and rank not in mapping.ranks:
        raise CheckpointError(f"{ckpt_dir.name} has no rank {rank}", expected=f"0 to {mapping.ranks[-1]}")
    check_rank_files(ckpt_dir, mapping, one=rank is not None)
    files = {r: open_safetensors(ckpt_dir / rank_file(r)) for r in (mapping.ranks if rank is None else (rank,))}
    is_plain = config.quantization.has_plain_form and not _has_integers(files)
    if config.quantization.has_plain_form and not is_plain and stored.trtlab is None:
        raise _device_layout(ckpt_dir.name, config)
    if is_plain:
        files = {r: files.get(r) or open_safetensors(ckpt_dir / rank_file(r)) for r in mapping.ranks}
    check_layers(ckpt_dir.name, config.num_hidden_layers, mapping.pp_size * max(map(len, files.values())))
    config = _with_dense_bias(config, files)
    if stored.trtlab is None:
        config = _with_quantized_head(config, files)
    in_files = plain_linears(config) if is_plain else config
    ranks = fitting_ranks(ckpt_dir.name, in_files, mapping, layout, files)
    if rank is None or is_plain:
        check_same_conversion(ckpt_dir.name, in_files, mapping, layout, ranks)
    tensors = unshard(in_files, mapping, layout, ranks.__getitem__) if rank is None or is_plain else ranks[rank]
    is_exact = not is_plain and same_layout(files, ranks)
    return StoredCheckpoint(config, mapping, layout, tensors, stored.provenance.source, is_plain, is_exact)


def fitting_ranks(
    folder: str, config: ModelConfig, mapping: Mapping, layout: EmbeddingLayout, files: Ranks
) -> dict[int, dict[str, LazyTensor]]:
    """The tensors that each rank must have, from files of any version: without buffers, and in their dtypes.

    Raises CheckpointError where they do not fit the config.
    """
    ranks = with_merged_scales(without_buffers(folder, config, files), config, mapping)
    for r, contents in ranks.items():
        where = f"{folder}/{rank_file(r)}"
        _check_scales(where, config, contents)
        shapes = rank_shapes(config, mapping, r, layout)
        contents = pad_short_tables(without_dummy_scales(contents, config), config, shapes, mapping.tp_rank(r))
        check_tensors(where, contents, shapes)
        dtypes = rank_dtypes(config, mapping, r, layout)
        ranks[r] = {name: _with_dtype(config, tensor, dtypes[name]) for name, tensor in contents.items()}
        check_dtype(where, ranks[r], dtypes)
    return ranks


def _has_integers(files: Ranks) -> bool:
    """Whether a linear has a scale or is stored in integers."""
    return any(
        name.endswith(f"{part}.per_channel_scale")
        or (name.endswith(f"{part}.weight") and not tensor.dtype.is_floating_point)
        for tensors in files.values()
        for name, tensor in tensors.items()
        for part in SITES
    )


def _device_layout(folder: str, config: ModelConfig) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds the integers of {config.quantization.quant_algo} in the layout of one GPU's kernels, which "
        "only TensorRT-LLM on such a GPU reads",
        remedy="convert the model with unquantized weights and quantize it here, or from its Hugging Face folder",
    )


def same_layout(files: Ranks, ranks: Ranks) -> bool:
    """Whether the files hold the tensors of these ranks and no others, each in its dtype."""
    return all(_layout(files[rank]) == _layout(ranks[rank]) for rank in ranks)


def _layout(tensors: abc.Mapping[str, LazyTensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _read_config(path: Path, hf_config: abc.Mapping[str, Any] | None) -> TrtllmConfig:
    raw = read_object(path, remedy=REMEDY)
    if hf_config is not None:
        raw = complete_config(raw, hf_config, str(path))
    return parse_model(raw, TrtllmConfig, str(path), remedy=REMEDY)


def _check_scales(where: str, config: ModelConfig, tensors: abc.Mapping[str, LazyTensor]) -> None:
    """Raise CheckpointError when the config has an algorithm and no tensor holds a scale."""
    algorithm = config.quantization.quant_algo
    if algorithm is not None and not any("scal" in name for name in tensors):
        raise CheckpointError(
            f"{where} holds plain weights, though config.json says {algorithm}: they were not quantized",
            remedy=f"set quant_algo to null, load, and call checkpoint.quantize(QuantConfig(quant_algo={algorithm!r}))",
        )


def _with_dtype(config: ModelConfig, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """FP8 may be stored under the dtype int8, and packed INT4 under uint8: the bytes are the same."""
    algorithm = config.quantization.algorithm
    packed = algorithm is not None and algorithm.packed
    if (tensor.dtype, dtype) not in {(torch.int8, FLOAT8), *([(torch.uint8, torch.int8)] if packed else [])}:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: tensor.read().view(dtype))


def _with_dense_bias(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """Set ``dense_bias`` from the tensors: TensorRT-LLM's ``attn_bias`` does not cover the output projection."""
    has = any(layer_name(0, "attention.dense.bias") in tensors for tensors in ranks.values())
    return config if has == config.dense_bias else config.replace(dense_bias=has)


def _with_quantized_head(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """Set ``quantize_lm_head`` from the tensors: ModelOpt lists the modules that it excluded only if there are any."""
    has = any(name.startswith(f"{HEAD_MODULE}.") and "scal" in name for tensors in ranks.values() for name in tensors)
    quant = config.quantization
    return config.replace(quantization=dataclasses.replace(quant, quantize_lm_head=True)) if has else config


def rank_shapes(
    config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout
) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that one rank's file holds."""
    return {name: tensor.shape for name, tensor in rank_tensors(config, mapping, rank, layout).items()}


def rank_dtypes(config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout) -> dict[str, torch.dtype]:
    """The name and dtype of every tensor that one rank's file holds: the model's dtype, or that of the algorithm."""
    return {name: tensor.dtype for name, tensor in rank_tensors(config, mapping, rank, layout).items()}
