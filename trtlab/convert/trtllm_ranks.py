"""What the rank files of one conversion have in common, and the ways of older converters in them."""

from __future__ import annotations

import re
from collections import abc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from trtlab.config.algorithms import MERGED_KV_SCALE
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.errors import CheckpointError
from trtlab.model.names import EMBEDDING, HEAD, layer_name, split_layer_name
from trtlab.parallel.shard import EmbeddingLayout, copies
from trtlab.storage.lazy import LazyTensor, raw_bytes
from trtlab.storage.paths import reading

Ranks = abc.Mapping[int, abc.Mapping[str, LazyTensor]]  # the tensors of each rank's file
RANK_FILE = re.compile(r"rank(0|[1-9]\d*)\.safetensors")
CONVERT_AGAIN = "convert the model again, into an empty folder"
COMPARED_ROWS = 16  # of each copy: other weights differ in the first row
DUMMY_SCALES = (".attention.quantization_scaling_factor", ".mlp.quantization_scaling_factor")


def rank_file(rank: int) -> str:
    """The file name of one rank's tensors."""
    return f"rank{rank}.safetensors"


def check_rank_files(folder: Path, mapping: Mapping, *, one: bool) -> None:
    """Raise CheckpointError for rank files that are missing, and for those of more ranks than config.json has.

    With ``one`` a single rank is opened: the files of the others may be on other machines.
    """
    with reading(folder):
        present = {int(match[1]) for entry in folder.iterdir() if (match := RANK_FILE.fullmatch(entry.name))}
    ranks = set(mapping.ranks)
    number = "one rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
    split = f"config.json has {number} (tp_size={mapping.tp_size}, pp_size={mapping.pp_size})"
    if present - ranks:
        raise CheckpointError(
            f"{folder.name} has {_files(present - ranks)}, though {split}: the folder holds files of two conversions",
            remedy=CONVERT_AGAIN,
        )
    if ranks - present and not one:
        raise CheckpointError(
            f"{folder.name}/{_files(ranks - present)} is missing: {split}",
            remedy="copy the whole folder again: each rank holds other weights",
        )


def _files(ranks: abc.Set[int]) -> str:
    names = [rank_file(rank) for rank in sorted(ranks)]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_same_conversion(
    folder: str, config: ModelConfig, mapping: Mapping, layout: EmbeddingLayout, ranks: Ranks
) -> None:
    """Raise CheckpointError when ranks differ in a tensor that they hold alike.

    Compared are the tensors outside the layers and those of the first and the last layer of each stage, and of each a
    few rows. Two stages have nothing in common but the table of a tied model, so that stages of two conversions are
    found there alone.
    """
    for name, parts in copies(config, mapping, layout, ranks.__getitem__):
        if _is_compared(config, mapping, name) and any(_rows(part) != _rows(parts[0]) for part in parts[1:]):
            reason = "ranks of two conversions are mixed"
            if "scal" in name:
                reason += ", or each rank has its own scale"
            raise CheckpointError(
                f"{folder}: the ranks hold different {name}, of which each should hold a copy: {reason}",
                remedy=f"{CONVERT_AGAIN}; Checkpoint.load(..., rank=0) opens one rank alone",
            )
    _check_tied_head(folder, config, mapping, layout, ranks)


def _is_compared(config: ModelConfig, mapping: Mapping, name: str) -> bool:
    place = split_layer_name(name)
    if place is None:
        return True
    each = config.num_hidden_layers // mapping.pp_size
    return place[0] % each in (0, each - 1)


def _rows(tensor: LazyTensor) -> memoryview:
    return raw_bytes(tensor.narrow(0, 0, min(COMPARED_ROWS, tensor.shape[0])).read())


def _check_tied_head(folder: str, config: ModelConfig, mapping: Mapping, layout: EmbeddingLayout, ranks: Ranks) -> None:
    """Raise CheckpointError when a tied model stores a head that is not its table, which alone is read."""
    if not config.tie_word_embeddings or config.quantization.quantizes_head or layout.use_embedding_sharing:
        return
    count = min(COMPARED_ROWS, config.vocab_size // mapping.tp_size)
    tables = [ranks[rank][EMBEDDING].narrow(0, 0, count).read() for rank in range(mapping.tp_size)]
    table = torch.cat(tables, dim=1) if layout.cut == 1 else tables[0]
    last_stage = len(mapping.ranks) - mapping.tp_size
    head = ranks[last_stage][HEAD].narrow(0, 0, count).read()
    if raw_bytes(table) != raw_bytes(head):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from {EMBEDDING}, though config.json says that they are tied",
            remedy="set tie_word_embeddings to false in config.json, or convert the model again",
        )


def pad_short_tables(
    tensors: abc.Mapping[str, LazyTensor], config: ModelConfig, shapes: abc.Mapping[str, tuple[int, ...]], tp_rank: int
) -> dict[str, LazyTensor]:
    """The tensors with zero rows where the last rank's table ends with the vocabulary.

    The older of TensorRT-LLM's converters does not pad a parallel embedding to a multiple of ``tp_size``.
    """
    padded = dict(tensors)
    for name in (EMBEDDING, HEAD):
        if name in tensors and name in shapes and len(tensors[name].shape) == 2:
            rows, whole = tensors[name].shape[0], shapes[name][0]
            if rows < whole and rows == config.vocab_size - tp_rank * whole:
                padded[name] = tensors[name].pad(0, whole)
    return padded


def without_dummy_scales(tensors: abc.Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """The tensors without the input scales of SmoothQuant per token, which has none; only some versions store them."""
    algorithm = config.quantization.algorithm
    dummies = DUMMY_SCALES if algorithm is not None and algorithm.per_token else ()
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(dummies)}


def with_merged_scales(ranks: Ranks, config: ModelConfig, mapping: Mapping) -> dict[int, dict[str, LazyTensor]]:
    """The tensors of each rank with the merged scale beside those of K and V, which older folders of trtlab lack.

    It is the largest scale of the layer, of which each tensor-parallel rank may hold some heads.
    """
    cache = config.quantization.kv_algorithm
    own = () if cache is None or MERGED_KV_SCALE in cache.tensors else cache.tensors
    completed = {rank: dict(tensors) for rank, tensors in ranks.items()}
    for rank, tensors in completed.items() if own else ():
        group = [ranks[other] for other in mapping.tp_group(rank) if other in ranks]
        for layer in range(len(mapping.layers(rank, config.num_hidden_layers))):
            names = [layer_name(layer, part) for part in own]
            scales = [member[name] for member in group for name in names if name in member]
            if scales:
                merged = LazyTensor((1,), torch.float32, partial(_largest, scales))
                tensors.setdefault(layer_name(layer, MERGED_KV_SCALE), merged)
    return completed


def _largest(scales: Sequence[LazyTensor]) -> torch.Tensor:
    return torch.cat([scale.read().flatten() for scale in scales]).amax().reshape(1)
