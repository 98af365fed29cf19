"""TableOps says what TorchOps does: the same shapes, dtypes and memory, and FLOPs that can be counted by hand."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trtlab.card import html, text
from trtlab.cards.estimate import op_table_card
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.memory.estimate import op_table
from trtlab.model.decoder import decoder
from trtlab.model.names import EMBEDDING
from trtlab.model.op_set import Ops
from trtlab.model.rope import rotary_table
from trtlab.model.weights import ModelWeights, rank_weights
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.table import Span, TableOps
from trtlab.ops.torch import TorchOps, spread
from trtlab.parallel.comm import Comm, Solo, ThreadComm, thread_group
from trtlab.parallel.shard import EmbeddingLayout, shard
from trtlab.storage.lazy import in_memory

from ..models import normal_weights, small_config

CPU = torch.device("cpu")
PLAIN = small_config()
FULL = PLAIN.replace(
    head_size=16, attn_bias=True, dense_bias=True, mlp_bias=True, qk_layernorm=True, tie_word_embeddings=True
)
STEPS = {
    "prefill": [Span(0, 7)],
    "several prompts": [Span(0, 7), Span(0, 3)],
    "generation": [Span(7, 1), Span(3, 1), Span(0, 1)],
    "mixed": [Span(9, 1), Span(0, 5), Span(4, 3)],
}
MAPPINGS = [Mapping(), Mapping(tp_size=2), Mapping(pp_size=2), Mapping(tp_size=2, pp_size=2), Mapping(tp_size=4)]
SILENT = {"all_reduce", "all_gather", "last_tokens"}  # they write no row when they change nothing


@dataclass
class Seen:
    """What one verb of TorchOps really gave: shape, dtype, and bytes of memory of its own."""

    op: str
    results: list[tuple[tuple[int, ...], torch.dtype, int]]


def _watched(verb: str) -> Any:
    def call(watched: WatchedOps, *args: Any) -> Any:
        result = getattr(watched.ops, verb)(*args)
        outputs = result if isinstance(result, tuple) else (result,)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        sources = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        unchanged = verb in SILENT and any(result is tensor for tensor in tensors)
        if not unchanged:
            op = args[0] if verb == "activation" else verb
            watched.seen.append(Seen(op, [(tuple(t.shape), t.dtype, _own_bytes(t, sources)) for t in outputs]))
        return result

    return call


class Verbs(Ops[Tensor]):
    """Every verb that an op set must give, with a note of each call; the derived ones are those of Ops."""

    vars().update({verb: _watched(verb) for verb in Ops.__abstractmethods__})


class WatchedOps(Verbs):
    """TorchOps, with a note of each call."""

    def __init__(self, ops: TorchOps) -> None:
        self.ops = ops
        self.seen: list[Seen] = []


def _own_bytes(tensor: Tensor, sources: set[int]) -> int:
    return 0 if tensor.untyped_storage().data_ptr() in sources else tensor.nbytes


def random_ranks(config: ModelConfig, mapping: Mapping, layout: EmbeddingLayout) -> list[dict[str, Tensor]]:
    whole = {name: in_memory(tensor) for name, tensor in normal_weights(config).items()}
    return [
        {name: t.read() for name, t in shard(config, mapping, rank, whole, layout).items()} for rank in mapping.ranks
    ]


def torch_ops(config: ModelConfig, weights: ModelWeights, spans: list[Span], comm: Comm, every_token: bool) -> TorchOps:
    table = spread(rotary_table(config, config.max_position_embeddings), config.torch_dtype, CPU)
    cache = PagedCache(
        layers=len(weights.layers),
        num_blocks=len(spans),
        kv_heads=weights.kv_heads,
        tokens_per_block=config.max_position_embeddings,
        head_size=config.head_size,
        dtype=config.torch_dtype,
        device=CPU,
    )
    tables = BlockTables.apart(len(spans), config.max_position_embeddings)
    batch = PackedBatch([NewTokens(slot, s.past, s.length) for slot, s in enumerate(spans)], table, tables, CPU)
    return TorchOps(batch, cache, comm, every_token=every_token)


@torch.inference_mode()
def watch(
    config: ModelConfig, weights: ModelWeights, spans: list[Span], comm: Comm, every_token: bool = False
) -> list[Seen]:
    ops = WatchedOps(torch_ops(config, weights, spans, comm, every_token))
    decoder(ops, config, weights, torch.zeros(sum(s.length for s in spans), dtype=torch.int64))
    return ops.seen


def watch_or_abort(config: ModelConfig, weights: ModelWeights, spans: list[Span], comm: ThreadComm) -> list[Seen]:
    try:
        return watch(config, weights, spans, comm)
    except BaseException:
        comm.abort()
        raise


def tabulated(
    config: ModelConfig, spans: list[Span], mapping: Mapping, rank: int, layout: EmbeddingLayout, every_token: bool
) -> list[Seen]:
    table = op_table(config, spans, mapping, rank, layout=layout, every_token=every_token)
    return [Seen(row.op, [(o.shape, o.dtype, o.new_bytes) for o in row.outputs]) for row in table.rows]


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_every_row_has_the_shape_dtype_and_memory_that_torch_gives(
    config: ModelConfig, dtype: str, step: str, every_token: bool
) -> None:
    config, spans, layout = config.replace(dtype=dtype), STEPS[step], EmbeddingLayout()
    (tensors,) = random_ranks(config, Mapping(), layout)
    seen = watch(config, rank_weights(config, Mapping(), 0, tensors), spans, Solo(), every_token)
    assert tabulated(config, spans, Mapping(), 0, layout, every_token) == seen


@pytest.mark.parametrize("dim", [None, 0, 1], ids=["replicated", "rows", "columns"])
@pytest.mark.parametrize("mapping", MAPPINGS[1:], ids=lambda m: f"tp{m.tp_size}pp{m.pp_size}")
def test_every_rank_of_a_split_model_has_the_rows_that_torch_gives(mapping: Mapping, dim: int | None) -> None:
    layout = EmbeddingLayout(dim is not None, dim or 0)
    ranks = random_ranks(FULL, mapping, layout)
    spans, comms = STEPS["mixed"], thread_group(mapping)
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [
            pool.submit(watch_or_abort, FULL, rank_weights(FULL, mapping, rank, tensors), spans, comms[rank])
            for rank, tensors in enumerate(ranks)
        ]
    for rank, future in enumerate(futures):
        assert tabulated(FULL, spans, mapping, rank, layout, False) == future.result()


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_weight_bytes_of_the_rows_are_those_of_the_checkpoint(config: ModelConfig) -> None:
    (tensors,) = random_ranks(config, Mapping(), EmbeddingLayout(use_embedding_sharing=config.tie_word_embeddings))
    assert op_table(config).weight_bytes == sum(t.nbytes for t in tensors.values())


def test_a_tied_table_stands_in_two_rows_and_counts_once() -> None:
    table = op_table(FULL)
    assert [row.op for row in table.rows if row.weight == EMBEDDING] == ["embedding", "linear"]
    assert table.weight_bytes < sum(row.weight_bytes for row in table.rows)


def test_flops_of_one_prompt_are_those_counted_by_hand() -> None:
    by_op = Counter[str]()
    for row in op_table(PLAIN, [Span(0, 3)]).rows:
        by_op[row.op] += row.flops
    assert by_op == {
        "embedding": 0,
        "rms_norm": 4 * 32 * (2 * 2 * 3 + 1),  # two a layer for three tokens, then one for the last token
        "linear": 2 * (2 * 3 * 32 * ((4 + 2 * 2) * 8 + 4 * 8 + 3 * 48) + 32 * 99),  # qkv, dense, three of the MLP; head
        "split_heads": 0,
        "rotary": 2 * 3 * (4 + 2) * 8 * 3,
        "attention": 2 * 4 * 4 * 8 * (1 + 2 + 3),  # layers, two products of 2, heads, head_size, keys seen
        "add": 2 * 2 * 3 * 32,
        "silu": 2 * 3 * 48,
        "multiply": 2 * 3 * 48,
        "last_tokens": 0,
        "logits": 0,
    }


def test_generation_attends_to_the_past_and_to_itself() -> None:
    table = op_table(PLAIN, [Span(10, 1), Span(20, 1)])
    assert [row.flops for row in table.rows if row.op == "attention"] == [2 * 2 * 4 * 8 * (11 + 21)] * 2


def test_a_bias_adds_one_flop_a_result() -> None:
    with_bias, without = (op_table(PLAIN.replace(attn_bias=b), [Span(0, 5)]).flops for b in (True, False))
    assert with_bias - without == 2 * 5 * (4 + 2 * 2) * 8


@given(st.integers(0, 40), st.integers(1, 40))
def test_keys_seen_are_those_under_a_causal_mask(past: int, length: int) -> None:
    assert Span(past, length).keys_seen == sum(
        key <= past + new for new in range(length) for key in range(past + new + 1)
    )


@pytest.mark.parametrize("step", STEPS)
def test_linear_flops_are_those_that_torch_counts(step: str) -> None:
    spans = STEPS[step]
    (tensors,) = random_ranks(PLAIN, Mapping(), EmbeddingLayout())
    with FlopCounterMode(display=False) as counter:
        watch(PLAIN, rank_weights(PLAIN, Mapping(), 0, tensors), spans, Solo())
    products = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in products.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert counted == sum(row.flops for row in op_table(PLAIN, spans).rows if row.op == "linear")


@pytest.mark.parametrize("spans", [[Span(0, 48)], [Span(0, 16)] * 3, [Span(20, 1)] * 8], ids=["one", "three", "decode"])
def test_the_peak_of_activations_is_what_torch_allocates(spans: list[Span]) -> None:
    config = PLAIN.replace(intermediate_size=88)
    (tensors,) = random_ranks(config, Mapping(), EmbeddingLayout())
    weights = rank_weights(config, Mapping(), 0, tensors)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's attention allocates its working memory for each thread
    try:
        measured = allocated_peak(config, weights, spans)
    finally:
        torch.set_num_threads(threads)
    local = sum(s.length for s in spans) * config.hidden_size * 4  # the decoder's own variable, held to the MLP's end
    assert 0 <= measured - op_table(config, spans).peak_bytes <= local


@torch.inference_mode()
def allocated_peak(config: ModelConfig, weights: ModelWeights, spans: list[Span]) -> int:
    ops = torch_ops(config, weights, spans, Solo(), False)
    tokens = torch.zeros(sum(s.length for s in spans), dtype=torch.int64)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:  # acc_events: without it, some versions of torch warn that a second profile drops the first one's
        decoder(ops, config, weights, tokens)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_live_bytes_end_with_the_result_alone() -> None:
    assert op_table(PLAIN, [Span(0, 5)]).live_bytes[-1] == 99 * 4  # float32 logits are a view of the head's result


def test_a_table_of_nothing_is_empty() -> None:
    table = TableOps([Span(0, 1)], dtype=torch.float32).table
    assert (table.rows, table.flops, table.weight_bytes, table.peak_bytes) == ((), 0, 0, 0)


@pytest.mark.parametrize("rank", range(4))
def test_the_card_shows_one_layer_and_counts_the_rest(rank: int) -> None:
    config = PLAIN.replace(num_hidden_layers=6)
    card = op_table_card(op_table(config, [Span(0, 5)], Mapping(tp_size=2, pp_size=2), rank))
    assert "… 2 more layers" in text(card)
    assert text(card).count("mlp.fc.weight") == 1
    assert "… 2 more layers" in html(card)
