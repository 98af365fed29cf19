"""Which algorithm quantizes what: QuantConfig, frozen and validated, under TensorRT-LLM's names."""

from __future__ import annotations

import fnmatch
from typing import Literal, get_args

from trtlab.config.algorithms import ALGORITHMS, KV_CACHE_ALGORITHMS, Algorithm, KvCacheAlgorithm, KvScales
from trtlab.config.base import PositiveInt, Settings, Share, settings

GroupSize = Literal[32, 64, 128]
GROUP_SIZES: tuple[GroupSize, ...] = get_args(GroupSize)
QuantAlgo = Literal[
    "W8A16",
    "W4A16",
    "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL",
    "FP8",
    "W4A16_AWQ",
    "W4A8_AWQ",
    "W4A16_GPTQ",
    "FP8_PER_CHANNEL_PER_TOKEN",
]
KvCacheAlgo = Literal["INT8", "FP8"]
HEAD_MODULE = "lm_head"


@settings
class QuantConfig(Settings):
    """What to quantize and how; both algorithms None leave the model as it is.

    The embedding is never quantized, the head only with ``quantize_lm_head``.
    """

    quant_algo: QuantAlgo | None = None
    """Algorithm of the weights, TensorRT-LLM's string; None leaves them as they are.

    TensorRT-LLM: ``--qformat``.
    """
    kv_cache_quant_algo: KvCacheAlgo | None = None
    """Algorithm of the KV cache; None stores it in the model's type.

    Either halves the bytes of a 16-bit cache. TensorRT-LLM: ``--kv_cache_dtype``.
    """
    smoothquant_val: Share | None = 0.5
    """The alpha of SmoothQuant: 0 leaves the difficulty to the activations, 1 moves it to the weights; None searches.

    The search chooses one for each input. TensorRT-LLM: ``--smoothquant``.
    """
    group_size: GroupSize = 128
    """Weights that share an AWQ scale; fewer are closer to the weights and take more bytes.

    ModelOpt: ``--awq_block_size``.
    """
    kv_cache_scales: KvScales = "split"
    """The parts of an INT8 cache that have their own scale: a layer, its K and its V, or each of their heads.

    TensorRT-LLM has merged scales. Finer scales have smaller errors. FP8 caches always have the scale 1.
    """
    exclude_modules: tuple[str, ...] = ()
    """Linears that stay as they are: shell patterns over names such as ``transformer.layers.3.mlp.proj``."""

    quantize_lm_head: bool = False
    """Whether the head is quantized as the linears are.

    A step reads the whole head, which in a small model is up to half of its bytes at 4 bits. The head of a tied model
    is then stored apart from its table, which stays as it is. ModelOpt: ``quantize_lm_head``.
    """
    scale_ranks: PositiveInt = 1
    """Ranks that each have their own W8A16 or W4A16 scales where a linear's input is cut; 1: a scale for the whole row.

    TensorRT-LLM quantizes the part of each rank, which is finer: set it to ``tp_size`` to get the same numbers. The
    checkpoint then runs on that many ranks only.
    """

    @property
    def active(self) -> bool:
        """Whether anything is quantized."""
        return self.quant_algo is not None or self.kv_cache_quant_algo is not None

    @property
    def algorithm(self) -> Algorithm | None:
        """The weights' algorithm."""
        return None if self.quant_algo is None else ALGORITHMS[self.quant_algo]

    @property
    def quantizes_head(self) -> bool:
        """Whether the head is quantized, and so has a matrix of its own."""
        return self.algorithm_of(HEAD_MODULE) is not None

    @property
    def has_plain_form(self) -> bool:
        """Whether a folder may hold the unquantized weights (W8A16 and W4A16)."""
        return self.algorithm is not None and self.algorithm.has_plain_form

    @property
    def kv_algorithm(self) -> KvCacheAlgorithm | None:
        """The cache's algorithm."""
        algo = self.kv_cache_quant_algo
        return None if algo is None else KV_CACHE_ALGORITHMS[algo, self.kv_cache_scales]

    @property
    def reads_texts(self) -> str:
        """The statistics that calibration texts must give, empty when no texts are needed."""
        parts = [algorithm.reads_texts for algorithm in (self.algorithm, self.kv_algorithm) if algorithm is not None]
        return "; ".join(part for part in parts if part)

    def algorithm_of(self, module: str) -> Algorithm | None:
        """The algorithm of one linear by its full name, None when it is excluded."""
        excluded = module == HEAD_MODULE and not self.quantize_lm_head
        excluded = excluded or any(fnmatch.fnmatchcase(module, pattern) for pattern in self.exclude_modules)
        return None if excluded else self.algorithm
