"""Reads TensorRT-LLM's checkpoint folders: config.json and a rank{r}.safetensors for each rank."""

from __future__ import annotations

import dataclasses
from collections import abc
from pathlib import Path
from typing import Any

import torch

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.convert.check import check_dtype, check_layers, check_tensors
from trtlab.convert.kinds import CHECKPOINT, refuse_other_kind
from trtlab.convert.modelopt_config import complete_config
from trtlab.convert.trtllm_buffers import without_buffers
from trtlab.convert.trtllm_config import REMEDY, TrtllmConfig
from trtlab.convert.trtllm_ranks import (
    check_rank_files,
    check_same_conversion,
    pad_short_tables,
    rank_file,
    without_dummy_scales,
)
from trtlab.errors import CheckpointError
from trtlab.model.names import layer_name
from trtlab.model.scales import FLOAT8
from trtlab.parallel.shard import EmbeddingLayout, rank_tensors, unshard
from trtlab.storage.json_files import naming, parse_model, read_object
from trtlab.storage.lazy import LazyTensor, open_safetensors


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder: the whole tensors, or the tensors of one rank."""

    config: ModelConfig
    mapping: Mapping
    layout: EmbeddingLayout
    tensors: dict[str, LazyTensor]
    source: str | None
    """Origin of the weights, None where the folder does not say."""


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
    ranks = {r: open_safetensors(ckpt_dir / rank_file(r)) for r in (mapping.ranks if rank is None else (rank,))}
    check_layers(ckpt_dir.name, config.num_hidden_layers, mapping.pp_size * max(map(len, ranks.values())))
    ranks = without_buffers(ckpt_dir.name, config, ranks)
    config = _with_dense_bias(config, ranks)
    for r, contents in ranks.items():
        where = f"{ckpt_dir.name}/{rank_file(r)}"
        _check_scales(where, config, contents)
        shapes = rank_shapes(config, mapping, r, layout)
        contents = pad_short_tables(without_dummy_scales(contents, config), config, shapes, mapping.tp_rank(r))
        check_tensors(where, contents, shapes)
        dtypes = rank_dtypes(config, mapping, r, layout)
        ranks[r] = {name: _with_dtype(config, tensor, dtypes[name]) for name, tensor in contents.items()}
        check_dtype(where, ranks[r], dtypes)
    if rank is not None:
        return StoredCheckpoint(config, mapping, layout, ranks[rank], stored.provenance.source)
    check_same_conversion(ckpt_dir.name, config, mapping, layout, ranks)
    tensors = unshard(config, mapping, layout, ranks.__getitem__)
    return StoredCheckpoint(config, mapping, layout, tensors, stored.provenance.source)


def _read_config(path: Path, hf_config: abc.Mapping[str, Any] | None) -> TrtllmConfig:
    raw = read_object(path, remedy=REMEDY)
    if hf_config is not None:
        refuse_other_kind(raw, CHECKPOINT, str(path))
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


def _with_dense_bias(config: ModelConfig, ranks: abc.Mapping[int, abc.Mapping[str, LazyTensor]]) -> ModelConfig:
    """Set ``dense_bias`` from the tensors: TensorRT-LLM's ``attn_bias`` does not cover the output projection."""
    has = any(layer_name(0, "attention.dense.bias") in tensors for tensors in ranks.values())
    return config if has == config.dense_bias else config.replace(dense_bias=has)


def rank_shapes(
    config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout
) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that one rank's file holds."""
    return {name: tensor.shape for name, tensor in rank_tensors(config, mapping, rank, layout).items()}


def rank_dtypes(config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout) -> dict[str, torch.dtype]:
    """The name and dtype of every tensor that one rank's file holds: the model's dtype, or that of the algorithm."""
    return {name: tensor.dtype for name, tensor in rank_tensors(config, mapping, rank, layout).items()}
