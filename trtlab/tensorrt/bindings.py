"""The inputs and outputs of a rank's plan: names, types, shapes, and the bounds of each profile. Knows no TensorRT.

The emitter declares its inputs from these tables, the plan builder takes its profiles from them, and the rank that runs
the plan allocates memory by them, so that the three cannot disagree.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field, replace

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig

INPUT_IDS, HIDDEN_STATES = "input_ids", "hidden_states"
POSITION_IDS, WRITE_INDICES, MASK, LAST_TOKENS = "position_ids", "write_indices", "attention_mask", "last_token_ids"
CACHED_MASK, NEW_MASK = "cached_mask", "new_mask"  # with a quantized cache, instead of one mask and write indices
LOGITS, HIDDEN_OUTPUT = "logits", "hidden_states_output"

CACHE_DTYPES = {"INT8": "int8", "FP8": "float8_e4m3fn"}  # by kv_cache_quant_algo

BATCH, TOKENS, WANTED = "batch", "tokens", "wanted"

# Rows of logits that one run of the context profile can give: 32 x vocabulary x 4 bytes, 16 MB for 128k tokens.
MOST_WANTED = 32


@dataclass(frozen=True)
class Binding:
    """One input or output. A dimension that depends on the profile is a word: batch, tokens or wanted (logits)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def declared(self) -> tuple[int, ...]:
        """The shape as declared to TensorRT, with -1 for a dimension that depends on the profile."""
        return tuple(-1 if isinstance(size, str) else size for size in self.shape)

    def sized(self, dims: abc.Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the given sizes of batch, tokens and wanted."""
        return tuple(dims[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class Range:
    """The smallest, the usual and the largest size of a dimension."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        assert 1 <= self.min <= self.opt <= self.max, self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


@dataclass(frozen=True)
class Profile:
    """One way in which a plan runs: the ranges of batch, of tokens per row, and of wanted logits per row."""

    name: str
    batch: Range
    tokens: Range
    wanted: Range

    def dims(self, which: str) -> dict[str, int]:
        """All three dimensions at their ``min``, ``opt`` or ``max``."""
        return {name: getattr(getattr(self, name), which) for name in (BATCH, TOKENS, WANTED)}


def profiles(build: BuildConfig) -> tuple[Profile, Profile]:
    """The profiles ``context``, one row of many tokens, and ``generation``, many rows of one token.

    A plan is padded, not packed. Several prompts of different lengths in one run would compute on padding, and TensorRT
    would reserve memory for the largest batch times the longest prompt; with one row, tokens bound the activations.
    """
    tokens = min(build.max_num_tokens, build.input_len)
    one = Range(1, 1, 1)
    # A batch range of 1 to 1 fails in FP16 and BF16 (TensorRT for RTX 1.7: "Error while verifying IR" at the mask), so
    # the context profile allows two rows, and one is used.
    context = Profile("context", Range(1, 1, 2), Range(1, tokens, tokens), Range(1, 1, min(tokens, MOST_WANTED)))
    generation = Profile("generation", Range(1, build.max_batch_size, build.max_batch_size), one, one)
    return context, generation


@dataclass(frozen=True)
class Bindings:
    """The inputs and outputs of one rank, and which output belongs to which cache input.

    TensorRT's cache layer supports neither INT8 nor FP8. A plan only reads such a cache; it returns the new tokens,
    quantized, as separate outputs (``updates``), and the rank that runs the plan writes them into the cache.
    """

    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    caches: abc.Mapping[str, str]  # present_k_0 -> cache_k_0: both are bound to the same address
    updates: abc.Mapping[str, str] = field(default_factory=dict)  # new_k_0 -> cache_k_0: the first is written into it

    @property
    def first(self) -> Binding:
        """Token ids, or the hidden states of the previous stage."""
        return self.inputs[0]

    @property
    def cache_inputs(self) -> tuple[Binding, ...]:
        """The inputs that are caches: K and V of every layer."""
        names = {*self.caches.values(), *self.updates.values()}
        return tuple(binding for binding in self.inputs if binding.name in names)

    @property
    def result(self) -> Binding:
        """Logits, or the hidden states for the next stage."""
        return self.outputs[0]


def bindings(config: ModelConfig, build: BuildConfig, mapping: Mapping, rank: int) -> Bindings:
    """The inputs and outputs of one rank. ``build`` is resolved; caches hold ``max_seq_len`` tokens per row."""
    assert build.dtype is not None, "the build config is not resolved: it has no dtype"
    last_stage = mapping.is_last_stage(rank)
    hidden = (BATCH, TOKENS, config.hidden_size)
    kv_heads = mapping.kv_heads(config)
    layers = len(mapping.layers(rank, config.num_hidden_layers))
    masks, caches = _caches(config, build, kv_heads, layers)
    inner = Binding(HIDDEN_STATES, build.dtype, hidden)
    logits = Binding(LOGITS, "float32", (BATCH, WANTED, config.vocab_size))
    inputs = (
        Binding(INPUT_IDS, "int32", (BATCH, TOKENS)) if mapping.is_first_stage(rank) else inner,
        Binding(POSITION_IDS, "int32", (BATCH, TOKENS)),
        *masks,
        *([Binding(LAST_TOKENS, "int32", (BATCH, WANTED))] if last_stage else []),
        *caches.inputs,
    )
    result = logits if last_stage else replace(inner, name=HIDDEN_OUTPUT)
    return replace(caches, inputs=inputs, outputs=(result, *caches.outputs))


def _caches(
    config: ModelConfig, build: BuildConfig, kv_heads: int, layers: int
) -> tuple[tuple[Binding, ...], Bindings]:
    """The masks (with write indices), and Bindings of the caches alone."""
    assert build.dtype is not None, "the build config is not resolved: it has no dtype"
    quantized = config.quantization.kv_cache_quant_algo
    dtype = CACHE_DTYPES[quantized] if quantized else build.dtype
    tensors = [(kind, layer) for layer in range(layers) for kind in "kv"]
    whole, new = (BATCH, kv_heads, build.seq_len, config.head_size), (BATCH, kv_heads, TOKENS, config.head_size)
    inputs = tuple(Binding(cache_name(*tensor), dtype, whole) for tensor in tensors)
    past = (BATCH, 1, TOKENS, build.seq_len)
    if quantized:
        masks = (Binding(CACHED_MASK, "bool", past), Binding(NEW_MASK, "bool", (BATCH, 1, TOKENS, TOKENS)))
        outputs = tuple(Binding(update_name(*tensor), dtype, new) for tensor in tensors)
        return masks, Bindings(inputs, outputs, {}, {update_name(*tensor): cache_name(*tensor) for tensor in tensors})
    masks = (Binding(WRITE_INDICES, "int32", (BATCH,)), Binding(MASK, "bool", past))
    outputs = tuple(Binding(present_name(*tensor), dtype, whole) for tensor in tensors)
    return masks, Bindings(inputs, outputs, {present_name(*tensor): cache_name(*tensor) for tensor in tensors})


def cache_name(kind: str, layer: int) -> str:
    """The input with the cache of ``k`` or ``v`` of a layer; layers count from 0 within the rank."""
    return f"cache_{kind}_{layer}"


def present_name(kind: str, layer: int) -> str:
    """The output with the same cache after the new tokens were written."""
    return f"present_{kind}_{layer}"


def update_name(kind: str, layer: int) -> str:
    """The output with the new tokens alone, quantized as the cache stores them."""
    return f"new_{kind}_{layer}"
