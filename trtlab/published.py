"""Numbers that others published, as data, and the arithmetic that predicts them. Measures nothing."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from trtlab.card import Shown
from trtlab.config.model import ModelConfig, RotaryScaling
from trtlab.errors import ConfigError
from trtlab.validation import did_you_mean, shorten

GIB = 2**30

_LLAMA_2: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 32000,
    "head_size": 128,
    "max_position_embeddings": 4096,
}
_LLAMA_3: dict[str, Any] = {
    **_LLAMA_2,
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rotary_base": 500000.0,
}
_LLAMA_3_2: dict[str, Any] = {
    **_LLAMA_3,
    "max_position_embeddings": 131072,
    "rotary_scaling": RotaryScaling(
        "llama3", 32.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "tie_word_embeddings": True,
}


def _shape(
    common: dict[str, Any], layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **own: Any
) -> ModelConfig:
    return ModelConfig(
        **{**common, **own},
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


class _ByName(dict[str, ModelConfig]):
    """Shapes by the names of models; any other name is an error that lists them."""

    def __missing__(self, name: object) -> NoReturn:
        raise ConfigError(
            f"no published shape has the name {shorten(name)}",
            expected=" | ".join(self),
            remedy=did_you_mean(str(name), self) or "give a ModelConfig of its sizes",
        )


# Source: the config.json of each model on Hugging Face.
SHAPES: abc.Mapping[str, ModelConfig] = MappingProxyType(
    _ByName(
        {
            "LLaMA-2-7B": _shape(_LLAMA_2, 32, 4096, 11008, 32, 32),
            "LLaMA-2-13B": _shape(_LLAMA_2, 40, 5120, 13824, 40, 40),
            "LLaMA-2-70B": _shape(_LLAMA_2, 80, 8192, 28672, 64, 8),
            "Llama-3-8B": _shape(_LLAMA_3, 32, 4096, 14336, 32, 8),
            "Llama-3-70B": _shape(_LLAMA_3, 80, 8192, 28672, 64, 8),
            "Llama-3.2-1B": _shape(_LLAMA_3_2, 16, 2048, 8192, 32, 8, head_size=64),
            "Llama-3.2-3B": _shape(_LLAMA_3_2, 28, 3072, 8192, 24, 8),
        }
    )
)

# Bytes a second between a GPU and its memory. Source: the vendor's data sheets.
BANDWIDTH: abc.Mapping[str, float] = MappingProxyType({"V100": 900e9, "A100": 2039e9, "H100": 3350e9, "H200": 4800e9})


@dataclass(frozen=True)
class V100Run:
    """One cell: output tokens a second of a batch, None where it ran out of memory (OOM).

    ``printed_peak_gib`` is the ``gpu_peak_mem(gb)`` that TensorRT-LLM's benchmark printed, in units of 2**30 bytes;
    None where it was not published.
    """

    tp_size: int
    input_len: int
    output_len: int
    batch: int
    tokens_per_second: float | None
    printed_peak_gib: float | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether the published cell is OOM."""
        return self.tokens_per_second is None


@dataclass(frozen=True, repr=False)
class V100Table(Shown):
    """LLaMA-2-7B on V100-PCIE-32G under TensorRT-LLM 0.5, October 2023: 32 cells, each with its predicted peak.

    ``peak = base + batch * (input_len + output_len) * KV bytes a token / tp_size``. ``base`` is the printed peak of
    batch 1 without the KV of its own tokens: weights, and the space reserved for activations of the largest batch and
    prompt. ``setups`` names the weights for each ``tp_size``.
    """

    setups: abc.Mapping[int, str]
    runs: tuple[V100Run, ...]
    limit_gib: float
    shape: ModelConfig

    def kv_gib(self, run: V100Run) -> float:
        """GiB of K and V on each GPU at a run's end."""
        tokens = run.batch * (run.input_len + run.output_len)
        return tokens * self.shape.kv_bytes_per_token / run.tp_size / GIB

    def base_gib(self, tp_size: int) -> float:
        """GiB of each GPU in use before the first token is cached."""
        anchors = (r for r in self.runs if r.tp_size == tp_size and r.batch == 1)
        return next(r.printed_peak_gib - self.kv_gib(r) for r in anchors if r.printed_peak_gib is not None)

    def peak_gib(self, run: V100Run) -> float:
        """The predicted peak of one GPU in GiB."""
        return self.base_gib(run.tp_size) + self.kv_gib(run)

    def predicted_out_of_memory(self, run: V100Run) -> bool:
        """Whether the predicted peak exceeds the GPU's memory."""
        return self.peak_gib(run) > self.limit_gib

    @property
    def right(self) -> int:
        """Number of cells that the prediction gets right."""
        return sum(self.predicted_out_of_memory(run) == run.out_of_memory for run in self.runs)


OOM = None
PRINTED_PEAKS_GIB = {(1, 128, 128, 1): 22.58, (1, 128, 128, 16): 24.47, (4, 128, 128, 1): 21.36}


def _runs(
    tp_size: int, batches: tuple[int, ...], rows: dict[tuple[int, int], tuple[float | None, ...]]
) -> tuple[V100Run, ...]:
    return tuple(
        V100Run(
            tp_size,
            input_len,
            output_len,
            batch,
            speed,
            PRINTED_PEAKS_GIB.get((tp_size, input_len, output_len, batch)),
        )
        for (input_len, output_len), speeds in rows.items()
        for batch, speed in zip(batches, speeds, strict=True)
    )


V100 = V100Table(
    setups=MappingProxyType({1: "INT8 weight-only, 1 GPU", 4: "FP16, 4 GPUs"}),
    runs=_runs(
        1,
        (1, 4, 8, 16),
        {
            (128, 128): (49, 183, 339, 589),
            (128, 2048): (47, 171, 294, OOM),
            (2048, 128): (36.4, 79, 104, OOM),
            (2048, 2048): (43, 136, OOM, OOM),
        },
    )
    + _runs(
        4,
        (1, 8, 16, 32),
        {
            (128, 128): (113, 567, 876, 1214),
            (128, 2048): (108, 590, 919, 1258),
            (2048, 128): (71, 181, 204, 215),
            (2048, 2048): (93, 452, 625, OOM),
        },
    ),
    limit_gib=31.75,  # 32,510 MiB are available to a program
    shape=SHAPES["LLaMA-2-7B"],
)
