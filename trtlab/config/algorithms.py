"""The table of algorithms: what each stores, what it needs, and which step reads texts. Data, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trtlab.errors import ConfigError


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    ``family`` names the file that quantizes and the weight type that runs. ``reads_texts`` says which statistics of the
    calibration texts it needs, empty when it needs none. ``per_channel`` and ``per_token`` are SmoothQuant's switches.
    ``only_sizes`` marks an algorithm whose bytes ``estimate`` knows, but which cannot quantize or run, ``only_mlp`` one
    that leaves attention and the head as they are.
    """

    name: str
    family: str
    weight_bits: int
    per_channel: bool = True
    per_token: bool = False
    grouped: bool = False
    reads_texts: str = ""
    only_sizes: bool = False
    only_mlp: bool = False

    @property
    def packed(self) -> bool:
        """Whether two weights share a byte."""
        return self.weight_bits == 4

    @property
    def has_plain_form(self) -> bool:
        """Whether a folder may hold the unquantized weights, which are quantized when they are read."""
        return self.family == "weight_only"


def _smoothquant(name: str, *, per_channel: bool, per_token: bool) -> Algorithm:
    reads = "the largest magnitude of each linear's input, by channel" + ("" if per_token else ", and of its output")
    return Algorithm(name, "smoothquant", 8, per_channel=per_channel, per_token=per_token, reads_texts=reads)


_AWQ_READS = "the mean magnitude of each linear's input, by channel, and the errors of the alpha search"
ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("W8A16", "weight_only", 8),
        Algorithm("W4A16", "weight_only", 4),
        _smoothquant("W8A8_SQ_PER_TENSOR_PLUGIN", per_channel=False, per_token=False),
        _smoothquant("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", per_channel=True, per_token=False),
        _smoothquant("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", per_channel=False, per_token=True),
        _smoothquant("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", per_channel=True, per_token=True),
        Algorithm(
            "W8A8_SQ_PER_CHANNEL",
            "smoothquant_modelopt",
            8,
            reads_texts="the largest magnitude of each linear's input, by channel",
        ),
        Algorithm("FP8", "fp8", 8, per_channel=False, reads_texts="the largest magnitude of each linear's input"),
        Algorithm("W4A16_AWQ", "awq", 4, grouped=True, reads_texts=_AWQ_READS),
        Algorithm("W4A8_AWQ", "awq_fp8", 4, grouped=True, reads_texts=_AWQ_READS),
        Algorithm("W4A16_GPTQ", "gptq", 4, grouped=True, only_sizes=True),
        Algorithm("FP8_PER_CHANNEL_PER_TOKEN", "fp8_by_row", 8, per_token=True, only_sizes=True, only_mlp=True),
    )
}


def check_supported(algorithm: Algorithm | None) -> None:
    """Raise ConfigError for an algorithm that cannot quantize or run."""
    if algorithm is not None and algorithm.only_sizes:
        supported = [each.name for each in ALGORITHMS.values() if not each.only_sizes]
        raise ConfigError(f"{algorithm.name} is not supported yet", expected=" | ".join(supported))


@dataclass(frozen=True)
class KvCacheAlgorithm:
    """One way to store the KV cache: the scale tensors of a layer that run and the statistics that they need.

    TensorRT-LLM requires the merged scale; where K and V have their own scales, it is stored beside them.
    """

    tensors: tuple[str, ...]
    reads_texts: str = ""


MERGED_KV_SCALE = "attention.kv_cache_scaling_factor"
_MERGED = (MERGED_KV_SCALE,)
_SPLIT = ("attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor")
KV_CACHE_ALGORITHMS: dict[tuple[str, str], KvCacheAlgorithm] = {  # by kv_cache_quant_algo and kv_cache_scales
    ("INT8", "merged"): KvCacheAlgorithm(_MERGED, "the largest magnitude of Q, K and V together, before rotary"),
    ("INT8", "split"): KvCacheAlgorithm(
        _SPLIT, "the largest magnitudes of K and of V as they are cached, after rotary"
    ),
    ("INT8", "per_head"): KvCacheAlgorithm(_SPLIT, "the largest magnitudes of K and of V as they are cached, by head"),
    ("FP8", "merged"): KvCacheAlgorithm(_MERGED),
    ("FP8", "split"): KvCacheAlgorithm(_MERGED),
    ("FP8", "per_head"): KvCacheAlgorithm(_MERGED),
}
WeightOnlyForm = Literal["plain", "integers"]
KvScales = Literal["merged", "split", "per_head"]
KV_SCALES: tuple[KvScales, ...] = get_args(KvScales)
