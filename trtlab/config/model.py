"""The shape of a model, by TensorRT-LLM's config.json names: frozen, validated."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from trtlab.card import Shown
from trtlab.config.base import Settings, check_types
from trtlab.config.quant import QuantConfig
from trtlab.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of ``float32``, ``float16`` or ``bfloat16``; ConfigError for any other name."""
    if name not in DTYPES:
        raise ConfigError("unknown dtype", got=repr(name), expected=" | ".join(DTYPES))
    return DTYPES[name]


def require_positive(owner: str, **values: int) -> None:
    """ConfigError naming the first value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{owner}.{name} must be a whole number of at least 1", got=repr(value))


def require_number(owner: str, **values: object) -> None:
    """ConfigError naming the first value that is not a positive, finite number."""
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:  # type: ignore[operator]
            raise ConfigError(f"{owner}.{name} must be a positive number", got=repr(value))


ROTARY_SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryScaling(Settings):
    """How rotary frequencies are stretched beyond the trained length: linear, llama3 or yarn.

    Fields that a kind does not use stay None. Sources: Hugging Face's ``rope_parameters`` of the same names; YaRN is
    arXiv:2309.00071; llama3 is the interpolation published with Llama 3.1.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROTARY_SCALINGS:
            raise ConfigError(
                f"rotary scaling {self.kind!r} is not supported yet", expected=" | ".join(ROTARY_SCALINGS)
            )
        require_number("RotaryScaling", factor=self.factor)
        check_types(self)
        if self.kind == "llama3":
            low, high, trained = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
            require_number(
                "RotaryScaling", low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=trained
            )
            if low == high:
                raise ConfigError("low_freq_factor and high_freq_factor must differ", got=low)


@dataclass(frozen=True, repr=False)
class ModelConfig(Shown):
    """The shape of one decoder, by TensorRT-LLM's config.json names.

    ``attn_bias`` is a bias on q, k and v, ``dense_bias`` one on the attention output, ``mlp_bias`` one on the three
    MLP linears, ``qk_layernorm`` an RMSNorm over each head of q and k. ``sliding_window`` is the source's window in
    tokens; a build longer than it is refused. ``quantization`` says how the tensors are stored; the default is plain.
    """

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "silu"
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    attn_bias: bool = False
    dense_bias: bool = False
    mlp_bias: bool = False
    qk_layernorm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    quantization: QuantConfig = field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        require_positive(
            "ModelConfig",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_size=self.head_size,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
        )
        require_number("ModelConfig", norm_epsilon=self.norm_epsilon, rotary_base=self.rotary_base)
        check_types(self)
        torch_dtype(self.dtype)
        if self.sliding_window is not None:
            require_positive("ModelConfig", sliding_window=self.sliding_window)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "query heads must be a multiple of key/value heads",
                got=f"{self.num_attention_heads} query heads and {self.num_key_value_heads} key/value heads",
            )
        if self.head_size % 2:
            raise ConfigError("rotary embedding needs an even head_size", got=self.head_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The storage dtype of the weights."""
        return torch_dtype(self.dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers, as they are stored."""
        elements = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_size  # K and V
        return elements * (self.torch_dtype.itemsize if self.quantization.kv_recipe is None else 1)

    def replace(self, **changes: Any) -> ModelConfig:
        """The same model with some fields changed."""
        return dataclasses.replace(self, **changes)
