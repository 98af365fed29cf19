"""Settings of a model, a build, a session and a request: frozen, validated, named as TensorRT-LLM names them."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from trtlab.display.card import Shown
from trtlab.errors import ConfigError
from trtlab.quantize.config import QuantConfig

logger = logging.getLogger("trtlab")

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
class RotaryScaling:
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
        torch_dtype(self.dtype)
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


@dataclass(frozen=True)
class Mapping:
    """How a model is laid over processes: ``tp_size`` ranks share each layer, ``pp_size`` stages share the layers.

    Tensor-parallel ranks are neighbours: ``tp_rank = rank % tp_size``, ``pp_rank = rank // tp_size``.
    ``world_size`` may be left out; if given it must equal ``tp_size * pp_size``.
    """

    world_size: int | None = None
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        require_positive("Mapping", tp_size=self.tp_size, pp_size=self.pp_size)
        product = self.tp_size * self.pp_size
        if self.world_size is None:
            object.__setattr__(self, "world_size", product)
        elif self.world_size != product:
            raise ConfigError(
                f"world_size {self.world_size} is not tp_size {self.tp_size} x pp_size {self.pp_size}",
                expected=f"world_size={product}",
                remedy="leave world_size out, or start that many processes",
            )

    @property
    def ranks(self) -> range:
        """All ranks, 0 to world_size - 1."""
        return range(self.tp_size * self.pp_size)

    def tp_rank(self, rank: int) -> int:
        """The place of a rank within its tensor-parallel group."""
        return rank % self.tp_size

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.tp_size

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share this rank's layers, itself among them."""
        first = self.pp_rank(rank) * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def layers(self, rank: int, num_hidden_layers: int) -> range:
        """The global layer numbers of this rank's stage."""
        per_stage = num_hidden_layers // self.pp_size
        first = self.pp_rank(rank) * per_stage
        return range(first, first + per_stage)

    def is_first_stage(self, rank: int) -> bool:
        """Whether the rank holds the token embedding."""
        return self.pp_rank(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank holds the final norm and the head."""
        return self.pp_rank(rank) == self.pp_size - 1

    def check(self, config: ModelConfig) -> None:
        """ConfigError when the model cannot be split this way, naming the sizes that would work."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def fits(n: int) -> bool:
            return heads % n == 0 and config.intermediate_size % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

        if not fits(self.tp_size):
            raise ConfigError(
                f"{heads} query heads, {kv_heads} key/value heads and intermediate size {config.intermediate_size} "
                f"cannot be split over tp_size={self.tp_size}",
                remedy=f"use {_one_of([n for n in range(1, min(heads, MOST_RANKS) + 1) if fits(n)])}",
            )
        layers = config.num_hidden_layers
        if layers % self.pp_size:
            stages = [n for n in range(1, min(layers, MOST_RANKS) + 1) if layers % n == 0]
            raise ConfigError(
                f"{config.num_hidden_layers} layers cannot be split over pp_size={self.pp_size}",
                remedy=f"use {_one_of(stages)}",
            )


MOST_RANKS = 1024  # sizes above it are not proposed


def _one_of(values: list[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


# TensorRT-LLM build flags that have no counterpart, and what they mean today.
OBSOLETE_BUILD_FLAGS = {
    "gemm_plugin": "TensorRT chooses its own matrix products; there is no GEMM plugin, so every weight can be streamed",
    "gpt_attention_plugin": "attention is a TensorRT layer of its own; there is no plugin to choose",
    "strongly_typed": "every network is strongly typed since TensorRT 11: precision is what the tensors say",
    "remove_input_padding": "torch runs packed tokens, a TensorRT plan padded rows; the tokens are the same",
    "context_fmha": "TensorRT fuses attention where it can",
    "paged_kv_cache": "how K and V are stored belongs to the session, not to the plan",
    "use_paged_context_fmha": "prefill always reads what is cached, so chunked context needs no flag",
    "use_inflight_batching": "the session's scheduler always batches in flight",
    "multi_block_mode": "a choice of the attention kernel at run time",
}


@dataclass(frozen=True)
class BuildConfig:
    """The bounds that an engine is built for; the defaults suit a notebook.

    ``max_seq_len=None`` becomes ``min(2048, the model's)`` at build. ``dtype=None`` keeps the checkpoint's.
    ``compute_capabilities`` pins a plan to targets such as ``("8.9",)``; empty builds for all that the library
    serves. ``optimization_level`` is TensorRT's 0 to 5, None its default. Flags of TensorRT-LLM that mean nothing
    today are accepted and answered in ``notes``.
    """

    max_batch_size: int = 8
    max_input_len: int = 1024
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    tokens_per_block: int = 32
    dtype: str | None = None
    weight_streaming: bool = False
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    notes: tuple[str, ...] = ()
    max_output_len: InitVar[int | None] = None
    max_beam_width: InitVar[int] = 1
    gemm_plugin: InitVar[object] = None
    gpt_attention_plugin: InitVar[object] = None
    strongly_typed: InitVar[object] = None
    remove_input_padding: InitVar[object] = None
    context_fmha: InitVar[object] = None
    paged_kv_cache: InitVar[object] = None
    use_paged_context_fmha: InitVar[object] = None
    use_inflight_batching: InitVar[object] = None
    multi_block_mode: InitVar[object] = None

    def __post_init__(self, max_output_len: int | None, max_beam_width: int, *obsolete: object) -> None:
        if max_output_len is not None:
            self._set_seq_len_from(max_output_len)
        if max_beam_width != 1:
            raise ConfigError("beam search is not supported yet", got=f"max_beam_width={max_beam_width}", expected=1)
        for (flag, meaning), value in zip(OBSOLETE_BUILD_FLAGS.items(), obsolete, strict=True):
            if value is not None:
                self._note(f"{flag}={value!r} has no effect: {meaning}")
        self._validate()

    def _validate(self) -> None:
        require_positive(
            "BuildConfig",
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_num_tokens=self.max_num_tokens,
            tokens_per_block=self.tokens_per_block,
        )
        if self.max_seq_len is not None:
            require_positive("BuildConfig", max_seq_len=self.max_seq_len)
            if self.max_input_len == BuildConfig.max_input_len:  # the default follows a smaller max_seq_len
                object.__setattr__(self, "max_input_len", min(self.max_input_len, self.max_seq_len))
            if self.max_input_len > self.max_seq_len:
                raise ConfigError(
                    f"max_input_len {self.max_input_len} exceeds max_seq_len {self.max_seq_len}",
                    remedy="max_seq_len counts prompt and answer together: raise it, or lower max_input_len",
                )
        if self.dtype is not None:
            torch_dtype(self.dtype)
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise ConfigError("optimization_level out of range", got=self.optimization_level, expected="0 to 5")
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}",
                remedy="a generation step feeds one token a request: raise max_num_tokens",
            )

    def _set_seq_len_from(self, max_output_len: int) -> None:
        require_positive("BuildConfig", max_output_len=max_output_len)
        if self.max_seq_len is not None:
            raise ConfigError("max_seq_len and max_output_len were both given", remedy="give max_seq_len alone")
        object.__setattr__(self, "max_seq_len", self.max_input_len + max_output_len)
        self._note(f"max_output_len={max_output_len} is the old spelling of max_seq_len={self.max_seq_len}")

    def _note(self, text: str) -> None:
        logger.warning(text)
        object.__setattr__(self, "notes", (*self.notes, text))

    def resolve(self, config: ModelConfig) -> BuildConfig:
        """The same bounds with ``max_seq_len`` and ``dtype`` filled in for a model, checked against it."""
        limit = config.max_position_embeddings
        seq_len = self.max_seq_len if self.max_seq_len is not None else min(2048, limit)
        if seq_len > limit:
            raise ConfigError(
                f"max_seq_len {seq_len} exceeds the model's max_position_embeddings {limit}",
                remedy=f"use max_seq_len={limit} or less",
            )
        if config.sliding_window is not None and seq_len > config.sliding_window:
            raise ConfigError(
                f"the model's sliding window of {config.sliding_window} tokens is shorter than max_seq_len {seq_len}",
                remedy=f"sliding windows are not supported yet: use max_seq_len={config.sliding_window} or less",
            )
        return dataclasses.replace(
            self,
            max_seq_len=seq_len,
            max_input_len=min(self.max_input_len, seq_len),
            dtype=self.dtype or config.dtype,
        )

    @property
    def seq_len(self) -> int:
        """``max_seq_len`` of a resolved config."""
        assert self.max_seq_len is not None, "resolve() fills max_seq_len in"
        return self.max_seq_len


@dataclass(frozen=True)
class SessionConfig:
    """How a session runs an engine. ``enable_chunked_context`` splits a prompt longer than ``max_num_tokens``.

    ``fast_cpu_kernels`` computes in BF16 on a CPU, weight-only linears by torch's packed INT8 and INT4 kernels:
    several times the speed, with answers that may differ from one kind of processor to another.
    """

    enable_chunked_context: bool = True
    fast_cpu_kernels: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; with none of temperature, top_k and top_p given, greedily.

    ``temperature`` divides the logits, then ``top_k`` keeps the k best and ``top_p`` the smallest set whose
    probability reaches p (Holtzman et al., arXiv:1904.09751). ``repetition_penalty`` divides positive and multiplies
    negative logits of tokens already seen (Keskar et al., arXiv:1909.05858). ``stop`` words end the text before
    them. ``logprobs`` keeps the log-probability of each chosen token, before temperature and filtering.
    """

    max_new_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        require_positive("SamplingParams", max_new_tokens=self.max_new_tokens)
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigError("temperature must not be negative", got=self.temperature)
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 0):
            raise ConfigError("top_k must be a whole number", got=self.top_k, remedy="0 keeps every token")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ConfigError("seed must be a whole number", got=repr(self.seed))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p must lie in (0, 1]", got=self.top_p)
        if not self.repetition_penalty > 0:
            raise ConfigError("repetition_penalty must be positive", got=self.repetition_penalty)
        if any(not isinstance(word, str) for word in self.stop):
            raise ConfigError("stop words must be texts", got=self.stop)
        if any(not word for word in self.stop):
            raise ConfigError("an empty stop word would stop at once", got=self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        chosen = (self.temperature, self.top_k, self.top_p)
        return chosen == (None, None, None) or self.temperature == 0 or self.top_k == 1
