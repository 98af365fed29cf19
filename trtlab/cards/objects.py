"""The cards of trtlab's own objects: what each shows of itself, registered from outside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from statistics import median

from trtlab.bench import Benchmark, Duel
from trtlab.card import Card, Table, bar, card, count, size
from trtlab.cards.estimate import estimate_card, op_table_card, v100_card
from trtlab.cards.plan import comparison_card, layer_table_card, network_card, plan_facts
from trtlab.cards.quantized import quantized_card
from trtlab.cards.runtime import event_log_card, kv_cache_card, pool_card, request_card, step_event_card
from trtlab.cards.settings import settings_card
from trtlab.checkpoint import Checkpoint, QuantizedCheckpoint
from trtlab.config.base import Settings
from trtlab.config.build import BuildConfig
from trtlab.config.model import ModelConfig
from trtlab.engine import Engine
from trtlab.machine import Machine
from trtlab.memory.estimate import Estimate
from trtlab.ops.table import OpTable
from trtlab.published import V100Table
from trtlab.runtime.events import EventLog, StepEvent
from trtlab.runtime.kv_cache import KvCache
from trtlab.runtime.pool import PoolSize
from trtlab.session.request import Completion, Request
from trtlab.session.session import Session
from trtlab.storage.lazy import LazyTensor
from trtlab.tensorrt.compare import Comparison
from trtlab.tensorrt.read.interpreter import LayerTable, Network

card.register(Estimate)(estimate_card)
card.register(OpTable)(op_table_card)
card.register(V100Table)(v100_card)
card.register(LayerTable)(layer_table_card)
card.register(Network)(network_card)
card.register(Comparison)(comparison_card)
card.register(QuantizedCheckpoint)(quantized_card)
card.register(PoolSize)(pool_card)
card.register(KvCache)(kv_cache_card)
card.register(EventLog)(event_log_card)
card.register(StepEvent)(step_event_card)
card.register(Request)(request_card)
card.register(Settings)(settings_card)


@card.register
def checkpoint_card(checkpoint: Checkpoint) -> Card:
    """A checkpoint: its model, its bytes by kind of tensor, and where its rotary angles come from."""
    config = checkpoint.config
    part = "" if checkpoint.rank is None else f" · rank {checkpoint.rank} of {checkpoint.mapping.world_size}"
    return Card(
        f"Checkpoint · {config.architecture} · {config.dtype}{part}",
        (
            ("from", checkpoint.source),
            ("weights", _weights(checkpoint.tensors.values())),
            ("attention", _attention(config)),
            ("positions", _positions(config)),
            ("KV cache", f"{size(config.kv_bytes_per_token)} a token"),
        ),
        (_tensor_table(checkpoint.tensors),),
        next="engine = checkpoint.build(BuildConfig(max_batch_size=8, max_seq_len=2048))",
    )


@card.register
def engine_card(engine: Engine) -> Card:
    """An engine: its bounds, its ranks, and what memory each part will take."""
    config, build, mapping = engine.config, engine.build_config, engine.mapping
    split = f"tp_size {mapping.tp_size} x pp_size {mapping.pp_size}" if len(mapping.ranks) > 1 else "one rank"
    facts = (
        ("from", engine.source),
        ("bounds", _bounds(build)),
        ("ranks", split),
        *(plan_facts(engine.plans.records) if engine.plans else (("plan", "none: this engine runs in torch"),)),
        *((f"note {number}", note) for number, note in enumerate(build.notes, 1)),
    )
    closed = " · closed" if engine.closed else ""
    return Card(
        f"Engine · {config.architecture} · {config.dtype}{closed}",
        facts,
        (_memory_table(engine),) if engine.ranks else (),
        next="session = engine.session()",
    )


@card.register
def session_card(session: Session) -> Card:
    """A session: where it runs and why, and what it is busy with."""
    build = session.engine.build_config
    return Card(
        f"Session · {session.engine.config.architecture}{' · closed' if session.closed else ''}",
        (
            ("backend", session.backend_reason),
            ("bounds", _bounds(build)),
            ("KV pool", _pool(session.kv_cache.pool)),
            ("requests", f"{session.running} running, {session.waiting} waiting"),
            ("tokenizer", "in the engine's folder" if session.engine.tokenizer_dir else "none: give token ids"),
        ),
        next='session.generate("...") or for piece in session.stream("..."): print(piece, end="")',
    )


def _pool(pool: PoolSize) -> str:
    return f"{pool.num_blocks:,} blocks of {pool.tokens_per_block} tokens, {size(pool.nbytes)}, by {pool.winner}"


@card.register
def completion_card(completion: Completion) -> Card:
    """An answer: its text, and why it ended."""
    ended = {
        "stop": "at its end",
        "length": "at max_new_tokens",
        "cancelled": "when it was cancelled",
        "timed_out": "when its time was up",
    }[completion.finish_reason]
    if completion.stop_reason is not None:
        ended = f"before the stop word {completion.stop_reason!r}"
    return Card(
        "Completion",
        (
            ("text", completion.text or "(no tokenizer: see token_ids)"),
            ("tokens", f"{len(completion.prompt_token_ids)} in, {len(completion.token_ids)} out, ended {ended}"),
        ),
    )


@card.register
def model_config_card(config: ModelConfig) -> Card:
    """The shape of a model."""
    biases = [name for name in ("attn_bias", "dense_bias", "mlp_bias", "qk_layernorm") if getattr(config, name)]
    return Card(
        f"ModelConfig · {config.architecture} · {config.dtype}",
        (
            ("size", f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}"),
            ("attention", _attention(config)),
            ("MLP", f"{config.intermediate_size}, {config.hidden_act}"),
            ("positions", _positions(config)),
            ("also", ", ".join(biases + (["tied embeddings"] if config.tie_word_embeddings else [])) or "nothing"),
        ),
    )


@card.register
def machine_card(machine: Machine) -> Card:
    """What a machine has, and what follows for plans."""
    gpus = tuple(
        (f"GPU {i}", f"{gpu.name}, {size(gpu.memory_bytes)}, compute capability {gpu.compute_capability}")
        for i, gpu in enumerate(machine.gpus)
    )
    return Card(
        f"Machine · {machine.system}",
        (
            ("processor", f"{machine.cores} cores, {size(machine.memory_bytes)}"),
            *(gpus or (("GPU", "none: sessions run in torch on the processor"),)),
            ("torch", machine.torch),
            ("TensorRT", machine.tensorrt),
            ("plans", f"build here: {_yes(machine.builds_plans)}, run here: {_yes(machine.runs_plans)}"),
            ("MPI", "mpi4py is installed" if machine.mpi else "none"),
        ),
    )


@card.register
def benchmark_card(sweep: Benchmark) -> Card:
    """A sweep: tokens a second as bars."""
    best = max((row.tokens_per_sec for row in sweep.rows if row.tokens_per_sec == row.tokens_per_sec), default=1.0)
    rows = tuple(
        (
            str(row.batch_size),
            f"{row.input_length}, {row.output_length}",
            row.cells["tokens_per_sec"],
            row.cells["latency(ms)"],
            bar(row.tokens_per_sec / best) if row.tokens_per_sec == row.tokens_per_sec else "",
        )
        for row in sweep.rows
    )
    return Card("Benchmark", tables=(Table((" batch", "in, out", " tokens/s", " latency ms", ""), rows),))


@card.register
def duel_card(duel: Duel) -> Card:
    """Two ways side by side: the median of each, and the ratio run by run."""
    speeds = [
        (who, duel.tokens / median(times)) for who, times in (("trtlab", duel.ours_s), ("transformers", duel.theirs_s))
    ]
    best = max(speed for _, speed in speeds)
    rows = tuple((who, f"{speed:,.0f}", bar(speed / best)) for who, speed in speeds)
    return Card(
        f"{duel.ratio:.2f} times transformers' speed · {duel.what}", tables=(Table(("", " tokens/s", ""), rows),)
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _weights(tensors: Iterable[LazyTensor]) -> str:
    listed = list(tensors)
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in listed)
    nbytes = sum(tensor.nbytes for tensor in listed)
    return f"{count(parameters)} parameters, {size(nbytes)} in {len(listed)} tensors, read when needed"


def _attention(config: ModelConfig) -> str:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kind = "multi-head" if heads == kv_heads else "multi-query" if kv_heads == 1 else "grouped-query"
    return f"{kind}: {heads} query heads over {kv_heads} key/value heads of {config.head_size}"


def _positions(config: ModelConfig) -> str:
    scaling = config.rotary_scaling
    how = f", {scaling.kind} scaling x{scaling.factor:g}" if scaling else ""
    window = f", sliding window {config.sliding_window:,}" if config.sliding_window else ""
    return f"up to {config.max_position_embeddings:,}, rotary base {config.rotary_base:g}{how}{window}"


def _bounds(build: BuildConfig) -> str:
    return (
        f"max_batch_size {build.max_batch_size}, max_input_len {build.input_len}, "
        f"max_seq_len {build.max_seq_len}, max_num_tokens {build.max_num_tokens}"
    )


_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")


def _tensor_table(tensors: Mapping[str, LazyTensor]) -> Table:
    """Tensors grouped over layers: one row for ``attention.qkv.weight`` of all layers."""

    def kind(name: str) -> str:
        match = _LAYER.fullmatch(name)
        return f"layers.*.{match[2]}" if match else name

    order = {kind(name): place for place, name in reversed(list(enumerate(tensors)))}
    names = sorted(tensors, key=lambda name: order[kind(name)])
    groups = [(title, [tensors[name] for name in members]) for title, members in groupby(names, kind)]
    largest = max(sum(t.nbytes for t in members) for _, members in groups)
    rows = []
    for title, members in groups:
        nbytes = sum(t.nbytes for t in members)
        times = f"{len(members)} x " if len(members) > 1 else ""
        rows.append((title, f"{times}{list(members[0].shape)}", size(nbytes), bar(nbytes / largest)))
    return Table(("tensor", "shape", " bytes", ""), tuple(rows))


def _memory_table(engine: Engine) -> Table:
    """Weights and KV cache of each rank, for the bounds of the build."""
    build = engine.build_config
    tokens = build.max_batch_size * build.seq_len
    kv = engine.config.kv_bytes_per_token * tokens / len(engine.mapping.ranks)
    weights = [sum(t.nbytes for t in tensors.values()) for tensors in engine.ranks]
    largest = max([*weights, kv])
    rows = [(f"weights, rank {rank}", size(nbytes), bar(nbytes / largest)) for rank, nbytes in enumerate(weights)]
    rows.append((f"KV cache of {tokens:,} tokens, each rank", size(kv), bar(kv / largest)))
    return Table(("memory", " bytes", ""), tuple(rows))
