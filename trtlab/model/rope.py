"""Rotary position embedding: the angle of each pair of dimensions at each position, for every kind of scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig, RotaryScaling


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines ``[positions, head_size / 2]`` in float32, multiplied by the attention factor."""

    cos: Tensor
    sin: Tensor


def rotary_table(config: ModelConfig, positions: int) -> RotaryTable:
    """The table for positions 0 to ``positions - 1``; angles are computed in float32 as Hugging Face does."""
    frequencies, factor = rotary_frequencies(config)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)  # [positions, head_size / 2]
    return RotaryTable(angles.cos() * factor, angles.sin() * factor)


def rotary_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """Radians a token for each pair of dimensions ``[head_size / 2]``, and the factor on cosine and sine.

    The operations and their order are those of transformers: an angle of thousands of turns makes other cosines of
    frequencies that differ in the last bit. ``dtype`` is that of the arithmetic.
    """
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.int64).to(dtype)
    wavelengths = config.rotary_base ** (pairs / config.head_size)  # of each pair, in tokens a radian
    scaling = config.rotary_scaling
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    return SCALINGS[scaling.kind](config, scaling, wavelengths)


def _linear(config: ModelConfig, scaling: RotaryScaling, wavelengths: Tensor) -> tuple[Tensor, float]:
    return 1.0 / wavelengths / scaling.factor, 1.0


def _llama3(config: ModelConfig, scaling: RotaryScaling, wavelengths: Tensor) -> tuple[Tensor, float]:
    """Long wavelengths are divided by the factor, short ones are kept, those between are blended (Llama 3.1).

    Where the bounds are in the wrong order nothing lies between them, and the low one alone decides.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    trained = scaling.original_max_position_embeddings
    assert low is not None and high is not None and trained is not None, f"llama3 scaling lacks a value: {scaling}"
    frequencies = 1.0 / wavelengths
    turn = 2 * math.pi / frequencies  # tokens of a full turn
    is_long, is_short = turn > trained / low, turn < trained / high
    scaled = torch.where(is_long, frequencies / scaling.factor, frequencies)
    keep = (trained / turn - low) / (high - low)
    blended = (1 - keep) * scaled / scaling.factor + keep * scaled
    return torch.where(~is_short & ~is_long, blended, scaled), 1.0


def _yarn(config: ModelConfig, scaling: RotaryScaling, wavelengths: Tensor) -> tuple[Tensor, float]:
    """High frequencies are kept, low ones are interpolated, with a linear ramp between them (arXiv:2309.00071)."""
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    size = config.head_size

    def dimension(turns: float) -> float:
        """The index of the pair that makes this many turns over the trained length."""
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    frequencies = 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _yarn_factor(scaling)


def _yarn_factor(scaling: RotaryScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


SCALINGS: dict[str, Callable[[ModelConfig, RotaryScaling, Tensor], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
