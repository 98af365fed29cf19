"""The shape of one decoder, under the names of TensorRT-LLM's config.json: frozen, validated."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator

from trtlab.card import Shown
from trtlab.config.base import NotNegativeFloat, PositiveFloat, PositiveInt, Settings, settings
from trtlab.config.quant import QuantConfig
from trtlab.errors import ConfigError

DtypeName = Literal["float32", "float16", "bfloat16"]
DtypeChoice = DtypeName | Literal["auto"]
RotaryKind = Literal["linear", "llama3", "yarn"]
DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALLEST, LARGEST = 2.0**-126, 2.0**128  # float32 holds numbers from the first up to, without it, the second


def _in_float32(number: float) -> float:
    if number and not SMALLEST <= abs(number) < LARGEST:
        raise ValueError("a number that float32 holds: 1.2e-38 to 3.4e38")
    return number


PositiveFloat32 = Annotated[PositiveFloat, AfterValidator(_in_float32)]
NotNegativeFloat32 = Annotated[NotNegativeFloat, AfterValidator(_in_float32)]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of ``float32``, ``float16`` or ``bfloat16``; ConfigError for any other name."""
    return DTYPES[dtype_name(name)]


def dtype_name(name: str) -> DtypeName:
    """The name itself when it is one of the three; ConfigError for any other."""
    for known in DTYPES:
        if name == known:
            return known
    raise ConfigError("unknown dtype", got=repr(name), expected=" | ".join(DTYPES))


def name_of_dtype(dtype: torch.dtype) -> DtypeName:
    """The name of a torch dtype; ``float32`` for one that is none of the three."""
    return next((name for name, known in DTYPES.items() if known == dtype), "float32")


@settings
class RotaryScaling(Settings):
    """How rotary frequencies are stretched beyond the trained length, named as in Hugging Face's ``rope_parameters``.

    Fields that a kind does not use stay None.
    """

    kind: RotaryKind
    """The rule that stretches the frequencies; no other is supported yet.

    ``llama3`` is the interpolation published with Llama 3.1, ``yarn`` that of arXiv:2309.00071.
    """
    factor: PositiveFloat32
    """How many times longer a text may be than the longest of the training."""
    original_max_position_embeddings: PositiveInt | None = None
    """Longest text of the training in tokens; llama3 needs it, yarn takes the model's where it is None."""
    low_freq_factor: PositiveFloat32 | None = None
    """Turns over the trained length below which a frequency is stretched whole; llama3 only."""
    high_freq_factor: PositiveFloat32 | None = None
    """Turns over the trained length above which a frequency stays as it is; llama3 only."""
    beta_fast: PositiveFloat32 = 32.0
    """Turns over the trained length above which a frequency stays as it is; yarn only."""
    beta_slow: PositiveFloat32 = 1.0
    """Turns over the trained length below which a frequency is stretched whole; yarn only."""
    attention_factor: PositiveFloat32 | None = None
    """Number that cosines and sines are multiplied by; None derives it from the factor. Yarn only."""
    mscale: NotNegativeFloat32 | None = None
    """Weight of the factor's logarithm in the numerator of the attention factor; yarn only."""
    mscale_all_dim: NotNegativeFloat32 | None = None
    """Weight of the same logarithm in the denominator of the attention factor; yarn only."""
    truncate: bool = True
    """Whether the bounds between the two ``beta`` are rounded to whole dimensions; yarn only."""

    def __post_init__(self) -> None:
        if self.kind != "llama3":
            return
        needed = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"RotaryScaling.{missing[0]} is missing", expected=f"{', '.join(needed)} with llama3")
        if self.low_freq_factor == self.high_freq_factor:
            raise ConfigError("low_freq_factor and high_freq_factor must differ", got=self.low_freq_factor)


@settings
class ModelConfig(Shown, Settings):
    """The shape of one decoder, under the names of TensorRT-LLM's config.json."""

    architecture: str
    """Class of the model, such as ``LlamaForCausalLM``."""
    dtype: DtypeName
    """Type that the weights are stored in where they are not quantized."""
    vocab_size: PositiveInt
    """Number of token ids: rows of the embedding and of the head."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt
    """Number of decoder layers."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_key_value_heads: PositiveInt
    """Number of key/value heads; it divides the query heads. Fewer make the KV cache smaller."""
    head_size: PositiveInt
    """Width of one head; even, for the rotary embedding."""
    intermediate_size: PositiveInt
    """Width of the MLP."""
    max_position_embeddings: PositiveInt
    """Longest text in tokens, prompt and answer together."""
    hidden_act: str = "silu"
    """Activation of the MLP's gate."""
    norm_epsilon: PositiveFloat32 = 1e-5
    """Number that a norm adds to the mean square before the square root. Hugging Face: ``rms_norm_eps``."""
    rotary_base: PositiveFloat32 = 10000.0
    """Base of the rotary frequencies. Hugging Face: ``rope_theta``."""
    rotary_scaling: RotaryScaling | None = None
    """How the rotary frequencies are stretched; None leaves them as they are."""
    attn_bias: bool = False
    """Whether q, k and v have a bias."""
    dense_bias: bool = False
    """Whether the attention's output has a bias."""
    mlp_bias: bool = False
    """Whether the three linears of the MLP have a bias."""
    qk_layernorm: bool = False
    """Whether each head of q and k goes through an RMSNorm of its own."""
    tie_word_embeddings: bool = False
    """Whether the head is the token embedding."""
    sliding_window: PositiveInt | None = None
    """The source's attention window in tokens; a build longer than it is refused."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Kind of the norms in front of the blocks; ``layer_norm`` has a bias."""
    gated_mlp: bool = True
    """Whether the MLP's inner activation is multiplied by a gate."""
    position_embedding_type: Literal["rope_gpt_neox", "learned_absolute"] = "rope_gpt_neox"
    """Rotary embedding, or a table of learned positions that is added to the tokens' rows."""
    quantization: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    """How the tensors are quantized; the default leaves them as they are."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "num_attention_heads must be a multiple of num_key_value_heads",
                got=f"{self.num_attention_heads} query heads and {self.num_key_value_heads} key/value heads",
            )
        if self.head_size % 2:
            raise ConfigError("rotary embedding needs an even head_size", got=self.head_size)
        if self.uses_rotary:
            self._check_rotary()

    def _check_rotary(self) -> None:
        """Raise ConfigError where an angle would be no number: its cosine would make every logit NaN."""
        scaling = self.rotary_scaling
        if self.rotary_base == 1 and scaling is not None and scaling.kind == "yarn":
            raise ConfigError("yarn scaling needs a rotary_base other than 1", got=self.rotary_base)
        shrunk = 1.0 if scaling is None else scaling.factor  # factors below 1 make the frequencies higher
        largest = self.max_position_embeddings * max(1.0, 1 / self.rotary_base) * max(1.0, 1 / shrunk)
        if largest >= LARGEST:
            raise ConfigError(
                "the rotary angle of the last position is beyond float32",
                got=f"rotary_base {self.rotary_base:g}, a factor of {shrunk:g}, "
                f"{self.max_position_embeddings} positions",
                remedy="copy the base (Hugging Face: rope_theta) and its scaling from the model",
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The storage dtype of the weights."""
        return torch_dtype(self.dtype)

    @property
    def uses_rotary(self) -> bool:
        """Whether positions are a rotation of queries and keys."""
        return self.position_embedding_type == "rope_gpt_neox"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers, as they are stored."""
        elements = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_size  # K and V
        return elements * (self.torch_dtype.itemsize if self.quantization.kv_algorithm is None else 1)

    def replace(self, **changes: Any) -> ModelConfig:
        """The same model with some fields changed."""
        return dataclasses.replace(self, **changes)
