"""Memory and FLOPs of a model, computed from shapes: weights, KV and activations of each rank. Reads no weight.

An estimate counts what an executor keeps: the rank's tensors, a KV pool of ``max_batch_size * max_seq_len`` tokens, and
the activations of its largest step. It does not count memory outside the model: the CUDA context, the workspace of
libraries, memory that an allocator reserves, and scratch space within an op.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NoReturn, Protocol

from trtlab.card import Shown, size
from trtlab.config.build import BuildConfig
from trtlab.config.calls import public
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import GroupSize, KvCacheAlgo, QuantAlgo, QuantConfig
from trtlab.errors import ConfigError, EngineError
from trtlab.model.blocks import LAYER_SITES, LM_HEAD
from trtlab.model.decoder import decoder
from trtlab.model.names import HEAD
from trtlab.model.tensor_specs import tensor_specs
from trtlab.model.weights import ModelWeights, rank_weights
from trtlab.ops.table import OpTable, Span, TableOps
from trtlab.parallel.shard import EmbeddingLayout, rank_tensors, shared_where_possible
from trtlab.storage.lazy import LazyTensor
from trtlab.validation import shorten

# A weight has the kind of the first fragment that occurs in its name. A static scale counts with its linear.
WEIGHT_KINDS = {
    **{site.input_scale: site.block for site in LAYER_SITES.values()},
    "embedding": "embedding",
    LM_HEAD.part: "head",
    "norm": "norms",
    "ln_f": "norms",
    "attention": "attention",
    "mlp": "mlp",
}


class HasConfig(Protocol):
    """A checkpoint, an engine, or any other object with a ``config``."""

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""
        ...


@dataclass(frozen=True)
class RankEstimate:
    """Memory and work of one rank. ``weights`` are bytes by kind: embedding, attention, mlp, norms, head.

    ``step_weight_bytes`` are the bytes that every step reads: all weights except the embedding table, which counts only
    if it is the head too. ``prefill_flops_per_token`` is the mean over a prompt of ``max_input_len`` tokens,
    ``generation_flops_per_token`` is for the token generated after it.
    """

    rank: int
    layers: range
    weights: abc.Mapping[str, int]
    step_weight_bytes: int
    kv_bytes_per_token: int
    kv_pool_bytes: int
    activation_bytes: int
    prefill_flops_per_token: float
    generation_flops_per_token: float
    table_bytes: int = 0
    """Bytes of rotary and block tables, which a session has."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def kv_pool_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.kv_pool_bytes // self.kv_bytes_per_token

    @property
    def total_bytes(self) -> int:
        """Weights, the whole KV pool, the activations of the largest step and the tables."""
        return self.weight_bytes + self.kv_pool_bytes + self.activation_bytes + self.table_bytes


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """Memory and work of every rank, and figures derived from them. ``build_config`` is resolved for the model.

    ``whole`` is the same model on one rank, with the embedding in the same ``layout``.
    """

    config: ModelConfig
    build_config: BuildConfig
    mapping: Mapping
    layout: EmbeddingLayout
    ranks: tuple[RankEstimate, ...]
    whole: RankEstimate

    @property
    def largest(self) -> RankEstimate:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def parameters(self) -> int:
        """The number of parameters of the model; a tied table counts once."""
        return sum(prod(spec.shape) for spec in tensor_specs(self.config).values())

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one block of ``tokens_per_block`` tokens on the largest rank."""
        return self.build_config.tokens_per_block * self.largest.kv_bytes_per_token

    @property
    def divided_evenly_bytes(self) -> float:
        """The usual formula (weights + KV + activations) / ranks.

        It is too low where several ranks keep copies: of a replicated embedding, of norms, of a shared key head, and
        of the activations between the linears.
        """
        return self.whole.total_bytes / len(self.ranks)

    def kv_tokens(self, memory_bytes: float, *, reserve_bytes: float | None = None) -> int:
        """Tokens of KV, in whole blocks, that fit beside the weights when every rank has ``memory_bytes``.

        ``reserve_bytes`` is kept free for everything else; None reserves the estimated activations.
        """
        block = self.build_config.tokens_per_block
        blocks = [
            int(memory_bytes - r.weight_bytes - (r.activation_bytes if reserve_bytes is None else reserve_bytes))
            // (block * r.kv_bytes_per_token)
            for r in self.ranks
        ]
        return max(0, min(blocks)) * block

    def step_seconds(self, bandwidth: float, *, batch: int = 1, context: int = 0) -> float:
        """The least time of a generation step that is limited by memory of ``bandwidth`` bytes per second.

        A step reads every weight once, at any batch size, and the K and V of ``context`` tokens for each request. The
        ranks of a pipeline stage read at the same time, stages run one after another; communication is not counted.
        """
        tp = self.mapping.tp_size
        reads = [r.step_weight_bytes + batch * context * r.kv_bytes_per_token for r in self.ranks]
        return sum(max(reads[first : first + tp]) for first in range(0, len(reads), tp)) / bandwidth

    def tokens_per_second(self, bandwidth: float, *, batch: int = 1, context: int = 0) -> float:
        """The upper bound on generated tokens per second that follows from ``step_seconds``."""
        return batch / self.step_seconds(bandwidth, batch=batch, context=context)

    def require_fits(self, available_bytes: float, where: str = "this machine") -> None:
        """Raise EngineError when the largest rank needs more memory; it lists the parts and what would fit."""
        if self.largest.total_bytes > available_bytes:
            self._refuse(available_bytes, where)

    def _refuse(self, available_bytes: float, where: str) -> NoReturn:
        need, build = self.largest, self.build_config
        bounds = f"max_batch_size {build.max_batch_size} x max_seq_len {build.seq_len}"
        pool = bounds if need.kv_pool_tokens == pool_tokens(build) else f"{need.kv_pool_tokens:,}"
        tables = f", {size(need.table_bytes)} of tables of positions and blocks" if need.table_bytes else ""
        raise EngineError(
            f"rank {need.rank} needs {size(need.total_bytes)}: {size(need.weight_bytes)} of weights, "
            f"{size(need.kv_pool_bytes)} of KV for {pool} tokens, {size(need.activation_bytes)} of activations{tables}",
            expected=f"at most {size(available_bytes)}, which {where} has free",
            remedy=self._remedy(available_bytes),
        )

    def _remedy(self, available_bytes: float) -> str:
        build, need = self.build_config, self.largest
        reserve = need.activation_bytes + need.table_bytes
        tokens = self.kv_tokens(available_bytes, reserve_bytes=reserve)
        if tokens and need.kv_pool_tokens != pool_tokens(build):  # the session's settings chose the pool
            return f"lower max_tokens_in_paged_kv_cache to {tokens}"
        batch = tokens // (pool_tokens(build) // build.max_batch_size)
        if 0 < batch < build.max_batch_size:
            return f"lower max_batch_size to {batch}, or max_seq_len"
        if tokens:
            return f"use max_batch_size=1 with max_seq_len={tokens} or less"
        if need.weight_bytes + reserve + build.seq_len * need.kv_bytes_per_token <= available_bytes:
            return f"lower tokens_per_block, at most to max_seq_len {build.seq_len}"
        if reserve > need.weight_bytes + available_bytes / 2:
            return "lower max_num_tokens, max_seq_len and max_batch_size"
        return "split the weights over more ranks (tp_size), quantize them, or lower max_num_tokens"


@public
def estimate(
    model: ModelConfig | HasConfig,
    build_config: BuildConfig | None = None,
    mapping: Mapping | None = None,
    *,
    quant_algo: QuantAlgo | None = None,
    kv_cache_quant_algo: KvCacheAlgo | None = None,
    group_size: GroupSize = 128,
    quantize_lm_head: bool = False,
    layout: EmbeddingLayout | None = None,
) -> Estimate:
    """Memory and work of a model within the bounds of ``build_config``, rank by rank.

    ``quant_algo`` and ``kv_cache_quant_algo`` are TensorRT-LLM's names; a quantized weight counts with its scales, and
    a quantized head of a tied model beside the table.
    ``layout=None`` takes the embedding layout that ``build`` takes. Raises ConfigError where ``build`` would.

    >>> estimate(SHAPES["LLaMA-2-7B"], quant_algo="W8A16").largest.weight_bytes / 2**30
    6.522...
    """
    source = model if isinstance(model, ModelConfig) else getattr(model, "config", None)
    if not isinstance(source, ModelConfig):
        name = model if isinstance(model, str) else "Llama-3-8B"
        raise ConfigError(
            "expected a ModelConfig, or a checkpoint or engine, which have one",
            got=shorten(model),
            remedy=f"for a model that is not on this machine give trtlab.published.SHAPES[{name!r:.60}]",
        )
    quant = source.quantization
    if not quant.active:
        quant = QuantConfig(
            quant_algo=quant_algo,
            kv_cache_quant_algo=kv_cache_quant_algo,
            group_size=group_size,
            quantize_lm_head=quantize_lm_head,
        )
    build = (build_config or BuildConfig()).resolve(source)
    config = source.replace(dtype=build.dtype, quantization=quant)
    mapping = mapping or Mapping()
    layout = layout or shared_where_possible(config, mapping)
    if layout.use_embedding_sharing and not config.tie_word_embeddings:
        raise ConfigError(
            "use_embedding_sharing needs a tied model, and this one has a head of its own",
            remedy="leave use_embedding_sharing out",
        )
    ranks = tuple(_rank_estimate(config, build, mapping, rank, layout) for rank in mapping.ranks)
    whole = ranks[0] if len(ranks) == 1 else _rank_estimate(config, build, Mapping(), 0, layout)
    return Estimate(config, build, mapping, layout, ranks, whole)


def op_table(
    model: ModelConfig | HasConfig,
    spans: Sequence[Span] = (Span(0, 1),),
    mapping: Mapping | None = None,
    rank: int = 0,
    *,
    layout: EmbeddingLayout | None = None,
    every_token: bool = False,
) -> OpTable:
    """The table of one step's ops on one rank, one row for each op; ``spans`` are the step's requests."""
    config = model if isinstance(model, ModelConfig) else model.config
    mapping = mapping or Mapping()
    layout = layout or shared_where_possible(config, mapping)
    weights = _meta_weights(config, mapping, rank, rank_tensors(config, mapping, rank, layout))
    return _trace(config, mapping, weights, spans, every_token=every_token)


def _meta_weights(
    config: ModelConfig, mapping: Mapping, rank: int, tensors: abc.Mapping[str, LazyTensor]
) -> ModelWeights:
    return rank_weights(config, mapping, rank, {name: tensor.meta() for name, tensor in tensors.items()})


def _trace(
    config: ModelConfig, mapping: Mapping, weights: ModelWeights, spans: Sequence[Span], *, every_token: bool = False
) -> OpTable:
    ops = TableOps(spans, dtype=config.torch_dtype, tp_size=mapping.tp_size, every_token=every_token)
    decoder(ops, config, weights, ops.tokens())
    return ops.table


def _rank_estimate(
    config: ModelConfig, build: BuildConfig, mapping: Mapping, rank: int, layout: EmbeddingLayout
) -> RankEstimate:
    stage = mapping.layers(rank, config.num_hidden_layers)
    tensors = rank_tensors(config, mapping, rank, layout)
    weights = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name, tensor in tensors.items():
        weights[_kind(name)] += tensor.nbytes
    lookup_only = not mapping.is_last_stage(rank) or HEAD in tensors
    per_token = config.kv_bytes_per_token * len(stage) * mapping.kv_heads(config)
    per_token //= config.num_hidden_layers * config.num_key_value_heads
    plain = config.replace(quantization=QuantConfig())  # activations have the model's dtype
    model = _meta_weights(plain, mapping, rank, rank_tensors(plain, mapping, rank, layout))
    prompt, past = build.input_len, min(build.input_len, build.seq_len - 1)
    return RankEstimate(
        rank=rank,
        layers=stage,
        weights=weights,
        step_weight_bytes=sum(weights.values()) - (weights["embedding"] if lookup_only else 0),
        kv_bytes_per_token=per_token,
        kv_pool_bytes=pool_tokens(build) * per_token,
        activation_bytes=_trace(plain, mapping, model, largest_step(build)).peak_bytes,
        prefill_flops_per_token=_trace(plain, mapping, model, [Span(0, prompt)]).flops / prompt,
        generation_flops_per_token=float(_trace(plain, mapping, model, [Span(past, 1)]).flops),
    )


def largest_step(build: BuildConfig) -> list[Span]:
    """The step whose activations are estimated: ``max_num_tokens`` new tokens over ``max_batch_size`` prompts.

    It has fewer tokens if prompts of ``max_input_len`` do not add up to ``max_num_tokens``. Only the last token of each
    prompt has logits; logits of every token take ``tokens * vocab_size * 4`` bytes more.
    """
    tokens = min(build.max_num_tokens, build.max_batch_size * build.input_len)
    rows = min(build.max_batch_size, tokens)
    share, rest = divmod(tokens, rows)
    spans = (Span(0, share + 1, rest), Span(0, share, rows - rest))
    return [span for span in spans if span.requests]


def pool_tokens(build: BuildConfig) -> int:
    """Tokens of a KV pool for ``max_batch_size`` requests of ``max_seq_len`` tokens, each in whole blocks."""
    blocks = -(-build.seq_len // build.tokens_per_block)
    return build.max_batch_size * blocks * build.tokens_per_block


def _kind(name: str) -> str:
    return next(kind for fragment, kind in WEIGHT_KINDS.items() if fragment in name)
