"""The buffers that TensorRT-LLM stores among the weights: recomputed from the config, compared, and not kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.convert.trtllm_ranks import Ranks, rank_file
from trtlab.errors import CheckpointError
from trtlab.model.rope import rotary_frequencies
from trtlab.storage.lazy import LazyTensor

UNSCALED_BASE = 10000.0  # of embed_positions, whatever the config says: only attention without a plugin reads it
POSITIONS_AT_ONCE = 16384
NAME = re.compile(r"(?:transformer\.layers\.\d+\.attention\.)?(\w+)")
RELATIVE = 2.0**-18
"""Largest relative difference of a frequency: 32 units in the last place of float32.

TensorRT-LLM computes frequencies in float32, with at most eight roundings, of which llama3's blend enlarges some four
times. Another base or factor changes them far more: base 10001 for 10000 by 1e-4 in the slowest pairs.
"""
ABSOLUTE = 2.0**-20
"""Largest difference of a cosine or sine of the same angle: eight units in the last place below 1."""

_OF_OTHER_EMBEDDINGS = {  # the position embedding that each belongs to
    "alibi_slopes": "alibi",
    "embed_positions_short_factors": "long_rope",
    "embed_positions_long_factors": "long_rope",
    "embed_positions_short_factors_for_attention_plugin": "long_rope",
    "embed_positions_long_factors_for_attention_plugin": "long_rope",
    "rope_scaling_short_factors": "long_rope",
    "rope_scaling_long_factors": "long_rope",
    "short_inv_freq": "long_rope",
    "long_inv_freq": "long_rope",
    "embed_positions_local": "rope with a second base",
    "rotary_inv_freq_local": "rope with a second base",
    "embed_positions_for_gpt_attention_local": "rope with a second base",
}


def without_buffers(folder: str, config: ModelConfig, ranks: Ranks) -> dict[int, dict[str, LazyTensor]]:
    """The tensors of each rank without the buffers.

    Version 0.12 and later store one set a rank, 0.10 and 0.11 one set a layer (``attention.embed_positions``).

    Args:
        folder: The name of the checkpoint in errors.
        config: The model's shape.
        ranks: The tensors of each rank's file.

    Raises:
        CheckpointError: A buffer is not what the config gives: the model was converted with another position embedding.
    """
    buffers = dict[str, list[tuple[str, LazyTensor]]]()
    weights: dict[int, dict[str, LazyTensor]] = {rank: {} for rank in ranks}
    for rank, tensors in ranks.items():
        for name, tensor in tensors.items():
            kind = _kind(name)
            if kind is None:
                weights[rank][name] = tensor
            else:
                buffers.setdefault(kind, []).append((f"{folder}/{rank_file(rank)}: {name}", tensor))
    for kind in sorted(buffers, key=[*_OF_OTHER_EMBEDDINGS, *_EXPECTED].index):  # frequencies before their tables
        stored = buffers[kind]
        own = "rope_gpt_neox" if kind in _EXPECTED else _OF_OTHER_EMBEDDINGS[kind]
        if config.position_embedding_type != own:
            raise CheckpointError(
                f"{stored[0][0]} belongs to the position embedding {own}",
                got=f"position_embedding_type {config.position_embedding_type} in config.json",
                remedy="convert the model again: the file and config.json are of two models",
            )
        _compare(config, stored, _EXPECTED[kind])
    return weights


def _kind(name: str) -> str | None:
    """The name of a buffer without its layer, None for a tensor that is none."""
    match = NAME.fullmatch(name)
    return match[1] if match and (match[1] in _EXPECTED or match[1] in _OF_OTHER_EMBEDDINGS) else None


@dataclass(frozen=True)
class _Part:
    """Some of a buffer's numbers: where they begin in the flat buffer, and how far off each may be."""

    start: int
    numbers: Tensor
    tolerance: Tensor


@dataclass(frozen=True)
class _Expected:
    """The numbers of a buffer, from the config: how many there are, and their parts in order."""

    size: Callable[[ModelConfig], int]
    parts: Callable[[ModelConfig], Iterator[_Part]]


def _compare(config: ModelConfig, stored: list[tuple[str, LazyTensor]], expected: _Expected) -> None:
    """Raise CheckpointError for the first buffer of one kind that differs; each part is computed once for all."""
    size = expected.size(config)
    for where, tensor in stored:
        if torch.Size(tensor.shape).numel() != size:
            raise CheckpointError(
                f"{where} has the shape {list(tensor.shape)}",
                expected=f"{size} numbers: head_size {config.head_size}, {config.max_position_embeddings} positions",
                remedy="correct head_size and max_position_embeddings in config.json, or convert the model again",
            )
    for part in expected.parts(config):
        fits: Tensor | None = None
        for where, tensor in stored:
            got = tensor.read().reshape(-1)[part.start : part.start + len(part.numbers)].to(part.numbers.dtype)
            if fits is not None and torch.equal(got, fits):  # as a rule all ranks hold the same
                continue
            wrong = ~((got - part.numbers).abs() <= part.tolerance)  # true for a NaN
            if wrong.any():
                raise _differs(config, where, part, got, int(wrong.nonzero()[0]))
            fits = got


def _differs(config: ModelConfig, where: str, part: _Part, got: Tensor, index: int) -> CheckpointError:
    scaling = "no scaling" if config.rotary_scaling is None else config.rotary_scaling
    return CheckpointError(
        f"{where} is not of the rotary embedding in config.json",
        got=f"{float(got[index]):.7g} at index {part.start + index}",
        expected=f"{float(part.numbers[index]):.7g}, of rotary_base {config.rotary_base:g}, {scaling}",
        remedy="correct rotary_base and rotary_scaling in config.json, or convert the model again",
    )


def _frequencies(config: ModelConfig) -> Iterator[_Part]:
    frequencies, _ = rotary_frequencies(config, torch.float64)
    yield _Part(0, frequencies, RELATIVE * frequencies)


def _interleaved(config: ModelConfig) -> Iterator[_Part]:
    """A cosine and a sine for each pair of dimensions."""
    frequencies, factor = rotary_frequencies(config, torch.float64)
    yield from _table(config, frequencies.float(), lambda cos, sin: torch.stack((cos, sin), -1).mul(factor))


def _sines_and_cosines(config: ModelConfig) -> Iterator[_Part]:
    """The sines of a position, then its cosines."""
    plain = config.replace(rotary_base=UNSCALED_BASE, rotary_scaling=None)
    frequencies, _ = rotary_frequencies(plain, torch.float64)
    yield from _table(config, frequencies.float(), lambda cos, sin: torch.cat((sin, cos), -1))


def _table(config: ModelConfig, frequencies: Tensor, order: Callable[[Tensor, Tensor], Tensor]) -> Iterator[_Part]:
    """A table over all positions, some of them at a time."""
    for first in range(0, config.max_position_embeddings, POSITIONS_AT_ONCE):
        stop = min(first + POSITIONS_AT_ONCE, config.max_position_embeddings)
        angles = torch.outer(torch.arange(first, stop, dtype=torch.float32), frequencies)  # [positions, head_size / 2]
        off = RELATIVE * angles + ABSOLUTE
        numbers, tolerance = order(angles.cos(), angles.sin()).reshape(-1), order(off, off).reshape(-1)
        yield _Part(first * config.head_size, numbers, tolerance)


def _table_size(config: ModelConfig) -> int:
    return config.max_position_embeddings * config.head_size


_EXPECTED = {
    "rotary_inv_freq": _Expected(lambda config: config.head_size // 2, _frequencies),
    "embed_positions": _Expected(_table_size, _sines_and_cosines),
    "embed_positions_for_gpt_attention": _Expected(_table_size, _interleaved),
}
