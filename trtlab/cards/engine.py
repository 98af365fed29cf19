"""The card of an engine: its bounds, its plans, its ranks, and the memory of weights and KV cache."""

from __future__ import annotations

import torch

from trtlab.card import Card, Table, bar, card, size
from trtlab.cards.phrases import bounds_phrase, folder_facts
from trtlab.engine import Engine
from trtlab.memory.estimate import pool_tokens
from trtlab.tensorrt.build.plan import PlanRecord


@card.register
def engine_card(engine: Engine) -> Card:
    """An engine: its bounds, its plans, its ranks, and the memory of weights and KV cache."""
    config, build, mapping = engine.config, engine.build_config, engine.mapping
    split = f"tp_size {mapping.tp_size} x pp_size {mapping.pp_size}" if len(mapping.ranks) > 1 else "one rank"
    facts = (
        ("from", engine.source),
        *folder_facts(engine.folder),
        ("bounds", bounds_phrase(build)),
        ("ranks", split),
        *(_plan_facts(engine.plans.records) if engine.plans else (("plan", "none: this engine runs in torch"),)),
        *((f"note {number}", note) for number, note in enumerate(build.notes, 1)),
    )
    closed = " · closed" if engine.closed else ""
    return Card(
        f"Engine · {config.architecture} · {config.dtype}{closed}",
        facts,
        (_memory_table(engine),) if engine.ranks else (),
        next="" if engine.closed else "session = engine.session()",
    )


def _plan_facts(records: tuple[PlanRecord, ...]) -> tuple[tuple[str, str], ...]:
    """The facts about an engine's plans."""
    first = records[0]
    targets = ", ".join(first.targets) or "every GPU that this TensorRT serves"
    activations = ", ".join(f"{size(n)} {profile}" for profile, n in first.activation_bytes.items())
    return (
        ("plan", f"{first.flavour} {first.version}, {size(sum(r.plan_bytes for r in records))}"),
        ("runs on", targets),
        ("activations", activations or "not reported by this TensorRT"),
        ("weight streaming", "possible" if first.weight_streaming else "off"),
    )


def _memory_table(engine: Engine) -> Table:
    """Weights and KV cache of each rank, for the bounds of the build."""
    tokens, config = pool_tokens(engine.build_config), engine.config
    kv = config.kv_bytes_per_token * tokens / len(engine.mapping.ranks)
    weights = [sum(t.nbytes for t in tensors.values()) for tensors in engine.ranks]
    largest = max([*weights, kv])
    rows = [(f"weights, rank {rank}", size(nbytes), bar(nbytes / largest)) for rank, nbytes in enumerate(weights)]
    stored = config.quantization.kv_cache_quant_algo or config.dtype
    rows.append((f"KV cache of {tokens:,} tokens in {stored}, each rank", size(kv), bar(kv / largest)))
    wide = torch.float32.itemsize / config.torch_dtype.itemsize
    if wide != 1 and stored == config.dtype:
        rows.append(("KV cache on a CPU, in float32", size(kv * wide), bar(kv * wide / largest)))
    return Table(("memory", " bytes", ""), tuple(rows))
