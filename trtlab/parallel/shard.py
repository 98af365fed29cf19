"""Splits whole tensors into those of each rank, and joins them again. Knows names and shapes, reads no data."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator
from typing import Annotated

from pydantic import Field
from torch import Tensor

from trtlab.config.base import Settings, settings
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import HEAD_MODULE
from trtlab.errors import ConfigError
from trtlab.model.names import EMBEDDING, HEAD, POSITIONS, layer_name, split_layer_name
from trtlab.model.quantized_specs import TensorSpec
from trtlab.model.tensor_specs import check_quantized, tensor_specs
from trtlab.storage.lazy import LazyTensor, cat

FIRST_STAGE = (EMBEDDING, POSITIONS)  # every other tensor outside the layers is on the last stage


@settings
class EmbeddingLayout(Settings):
    """How the token table is stored on tensor-parallel ranks: whole on each, or cut."""

    use_parallel_embedding: bool = False
    """Whether the token table is cut over the tensor-parallel ranks; each then holds a part of it."""
    embedding_sharding_dim: Annotated[int, Field(ge=0, le=1)] = 0
    """Where the table is cut: 0 by rows (the vocabulary), 1 by columns (the hidden size)."""
    use_embedding_sharing: bool = False
    """Whether lookup and head keep one table, which only a tied model may."""

    @property
    def cut(self) -> int | None:
        """The dimension that is cut, None when every rank holds the whole table."""
        return self.embedding_sharding_dim if self.use_parallel_embedding else None

    def check(self, config: ModelConfig, mapping: Mapping) -> None:
        """Raise ConfigError when the table cannot be split this way over these ranks."""
        if self.cut == 1 and config.hidden_size % mapping.tp_size:
            raise ConfigError(
                f"hidden size {config.hidden_size} cannot be cut into {mapping.tp_size} columns",
                remedy="use embedding_sharding_dim=0",
            )
        if self.use_embedding_sharing and config.quantization.quantizes_head:
            raise ConfigError(
                "use_embedding_sharing stores lookup and head once, and a quantized head is a matrix of its own",
                remedy="leave use_embedding_sharing out",
            )
        if self.use_embedding_sharing and mapping.pp_size > 1:
            raise ConfigError(
                f"use_embedding_sharing needs lookup and head on one rank, pp_size={mapping.pp_size} separates them",
                remedy="leave use_embedding_sharing out",
            )
        if self.use_embedding_sharing and mapping.tp_size > 1 and self.cut != 0:
            raise ConfigError(
                f"use_embedding_sharing with tp_size={mapping.tp_size} needs the table cut as the head is",
                remedy="add use_parallel_embedding=True, embedding_sharding_dim=0",
            )


def shared_where_possible(config: ModelConfig, mapping: Mapping) -> EmbeddingLayout:
    """The layout of an engine: on one rank a tied model, unless its head is quantized, stores one table for both."""
    is_tied = config.tie_word_embeddings and not config.quantization.quantizes_head
    return EmbeddingLayout(use_embedding_sharing=is_tied and len(mapping.ranks) == 1)


def shard(
    config: ModelConfig, mapping: Mapping, rank: int, tensors: abc.Mapping[str, LazyTensor], layout: EmbeddingLayout
) -> dict[str, LazyTensor]:
    """The tensors of one rank by name, lazily; layer numbers count from 0 within its stage.

    The head of a tied model is a copy of its table, unless it is quantized or ``layout.use_embedding_sharing``. A head,
    and a table cut by rows, are padded with zero rows until ``tp_size`` divides them.

    Args:
        config: The whole model.
        mapping: How the model is split over ranks.
        rank: The rank whose tensors are wanted.
        tensors: The whole model's tensors, by name.
        layout: How the token table is stored.

    Raises:
        ConfigError: when the model cannot be split this way.
    """
    mapping.check(config)
    layout.check(config, mapping)
    check_quantized(config, mapping)
    specs = tensor_specs(config)
    stage = mapping.layers(rank, config.num_hidden_layers)
    parts: dict[str, LazyTensor] = {}
    for name, spec in specs.items():
        local = _local_name(name, stage)
        if split_layer_name(name) is not None and local is not None:
            parts[local] = _cut(config, mapping, rank, spec, tensors[name])
    if mapping.is_first_stage(rank):
        parts[EMBEDDING] = _cut_embedding(config, mapping, rank, tensors[EMBEDDING], layout)
        parts |= {name: tensors[name] for name in specs if name == POSITIONS}
    if mapping.is_last_stage(rank):
        outside = [name for name in specs if split_layer_name(name) is None and name not in FIRST_STAGE]
        parts |= {name: _cut(config, mapping, rank, specs[name], tensors[name]) for name in outside}
        if HEAD not in specs and not layout.use_embedding_sharing:
            parts[HEAD] = _cut_head(config, mapping, rank, specs[EMBEDDING], tensors[EMBEDDING])
    return parts


def rank_tensors(config: ModelConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout) -> dict[str, LazyTensor]:
    """The tensors of one rank's file by name: shapes and dtypes without data."""
    whole = {
        name: LazyTensor(spec.shape, spec.dtype or config.torch_dtype, _no_data)
        for name, spec in tensor_specs(config).items()
    }
    return shard(config, mapping, rank, whole, layout)


def _no_data() -> Tensor:
    raise AssertionError("rank_tensors gives shapes and dtypes only; its tensors have no data to read")


def padded_vocab(config: ModelConfig, mapping: Mapping, per_byte: int = 1) -> int:
    """The vocabulary rounded up to a multiple of ``tp_size``, and of ``per_byte`` rows on each rank."""
    step = mapping.tp_size * per_byte
    return -(-config.vocab_size // step) * step


def _local_name(name: str, stage: range) -> str | None:
    """A tensor's name within a stage; None for a layer of another stage. Names outside the layers do not change."""
    place = split_layer_name(name)
    if place is None:
        return name
    number, part = place
    return layer_name(number - stage.start, part) if number in stage else None


def _cut(config: ModelConfig, mapping: Mapping, rank: int, spec: TensorSpec, whole: LazyTensor) -> LazyTensor:
    if spec.split is None or mapping.tp_size == 1:
        return whole
    if spec.split == "qkv":
        return _cut_qkv(config, mapping, rank, spec, whole)
    if spec.split == "head":
        return _cut_head(config, mapping, rank, spec, whole)
    if spec.split == "kv_heads":
        first = mapping.tp_rank(rank) * config.num_key_value_heads // mapping.tp_size
        return whole.narrow(0, first, mapping.kv_heads(config))
    width = whole.shape[spec.dim] // mapping.tp_size
    return whole.narrow(spec.dim, mapping.tp_rank(rank) * width, width)


def _cut_head(config: ModelConfig, mapping: Mapping, rank: int, spec: TensorSpec, whole: LazyTensor) -> LazyTensor:
    """A rank's rows of the padded vocabulary; with two rows in a byte, scales are padded as far as the bytes are."""
    if mapping.tp_size == 1:
        return whole
    algorithm = config.quantization.algorithm_of(HEAD_MODULE)
    packed = algorithm is not None and algorithm.packed
    rows = padded_vocab(config, mapping, 2 if packed else 1) // spec.per_byte // mapping.tp_size
    return whole.pad(spec.dim, rows * mapping.tp_size).narrow(spec.dim, mapping.tp_rank(rank) * rows, rows)


def _cut_qkv(config: ModelConfig, mapping: Mapping, rank: int, spec: TensorSpec, whole: LazyTensor) -> LazyTensor:
    """A rank's rows of q, k and v. With fewer key heads than ranks, neighbouring ranks hold the same head."""
    size, kv_heads, place = config.head_size // spec.per_byte, config.num_key_value_heads, mapping.tp_rank(rank)
    q_rows = config.num_attention_heads * size
    own_q = q_rows // mapping.tp_size
    own_kv_heads = mapping.kv_heads(config)
    first_kv_head = place * kv_heads // mapping.tp_size
    parts = [whole.narrow(spec.dim, place * own_q, own_q)]
    for start in (q_rows, q_rows + kv_heads * size):  # k, then v
        parts.append(whole.narrow(spec.dim, start + first_kv_head * size, own_kv_heads * size))
    return cat(parts, spec.dim)


def _cut_embedding(
    config: ModelConfig, mapping: Mapping, rank: int, table: LazyTensor, layout: EmbeddingLayout
) -> LazyTensor:
    if mapping.tp_size == 1 or layout.cut is None:
        return table
    if layout.cut == 0:
        rows = padded_vocab(config, mapping) // mapping.tp_size
        return table.pad(0, rows * mapping.tp_size).narrow(0, mapping.tp_rank(rank) * rows, rows)
    width = config.hidden_size // mapping.tp_size
    return table.narrow(1, mapping.tp_rank(rank) * width, width)


def unshard(
    config: ModelConfig,
    mapping: Mapping,
    layout: EmbeddingLayout,
    rank: Callable[[int], abc.Mapping[str, LazyTensor]],
) -> dict[str, LazyTensor]:
    """Join the tensors of all ranks to whole tensors, lazily: the inverse of ``shard``.

    Args:
        config: The whole model.
        mapping: How the model is split over ranks.
        layout: How the token table is stored.
        rank: Returns the tensors of the rank with the given number.
    """
    return {name: _join(config, mapping, spec, layout, parts) for name, spec, parts in _parts(config, mapping, rank)}


def copies(
    config: ModelConfig,
    mapping: Mapping,
    layout: EmbeddingLayout,
    rank: Callable[[int], abc.Mapping[str, LazyTensor]],
) -> Iterator[tuple[str, list[LazyTensor]]]:
    """Each tensor that tensor-parallel ranks hold alike, with the copy of each rank; arguments as for ``unshard``.

    These are whole tensors, and the rows of a key head that neighbouring ranks share.
    """
    shared = _copies(config, mapping)
    for name, spec, parts in _parts(config, mapping, rank):
        if _split(spec, layout) is None:
            yield name, parts
        elif spec.split == "qkv" and shared > 1:
            own = mapping.kv_heads(config) * config.head_size // spec.per_byte
            rows = [part.narrow(spec.dim, part.shape[spec.dim] - 2 * own, 2 * own) for part in parts]
            yield from ((name, rows[first : first + shared]) for first in range(0, len(rows), shared))


def _parts(
    config: ModelConfig, mapping: Mapping, rank: Callable[[int], abc.Mapping[str, LazyTensor]]
) -> Iterator[tuple[str, TensorSpec, list[LazyTensor]]]:
    """Each tensor of the whole model, and the parts of it that the ranks of its stage hold."""
    for name, spec in tensor_specs(config).items():
        stage = _stage_of(config, mapping, name)
        group = [rank(stage * mapping.tp_size + place) for place in range(mapping.tp_size)]
        local = _local_name(name, mapping.layers(stage * mapping.tp_size, config.num_hidden_layers))
        assert local is not None, f"{name} is not in stage {stage}"
        yield name, spec, [tensors[local] for tensors in group]


def _stage_of(config: ModelConfig, mapping: Mapping, name: str) -> int:
    place = split_layer_name(name)
    if place is None:
        return 0 if name in FIRST_STAGE else mapping.pp_size - 1
    return place[0] * mapping.pp_size // config.num_hidden_layers


def _join(
    config: ModelConfig, mapping: Mapping, spec: TensorSpec, layout: EmbeddingLayout, parts: list[LazyTensor]
) -> LazyTensor:
    split = _split(spec, layout)
    if split is None or mapping.tp_size == 1:
        return parts[0]
    if split == "qkv":
        return _join_qkv(config, mapping, spec, parts)
    if split == "kv_heads":
        return cat(parts[:: _copies(config, mapping)])
    if split == "head":
        return _crop(cat(parts, spec.dim), spec.dim, spec.shape[spec.dim])
    return cat(parts, dim=1 if spec.split == "embedding" else spec.dim)


def _split(spec: TensorSpec, layout: EmbeddingLayout) -> str | None:
    """How a tensor is cut, with the table as the layout says."""
    return {None: None, 0: "head", 1: "columns"}[layout.cut] if spec.split == "embedding" else spec.split


def _copies(config: ModelConfig, mapping: Mapping) -> int:
    """How many neighbouring ranks hold the same key head."""
    return max(1, mapping.tp_size // config.num_key_value_heads)


def _crop(padded: LazyTensor, dim: int, rows: int) -> LazyTensor:
    return padded if padded.shape[dim] == rows else padded.narrow(dim, 0, rows)


def _join_qkv(config: ModelConfig, mapping: Mapping, spec: TensorSpec, parts: list[LazyTensor]) -> LazyTensor:
    size, tp = config.head_size // spec.per_byte, mapping.tp_size
    own_q = config.num_attention_heads // tp * size
    own_kv = mapping.kv_heads(config) * size
    copies = _copies(config, mapping)
    q = [part.narrow(spec.dim, 0, own_q) for part in parts]
    k = [part.narrow(spec.dim, own_q, own_kv) for part in parts[::copies]]
    v = [part.narrow(spec.dim, own_q + own_kv, own_kv) for part in parts[::copies]]
    return cat([*q, *k, *v], spec.dim)
