"""The cards of an estimate, a table of ops and the published V100 table. Computes no figure of its own."""

from __future__ import annotations

from collections.abc import Sequence

from trtlab.card import Card, Table, card, count, share_bars, size
from trtlab.memory.estimate import Estimate
from trtlab.ops.table import OpRow, OpTable
from trtlab.published import BANDWIDTH, V100Run, V100Table

FIRST_OF_LAYER = "input_layernorm.weight"


@card.register
def estimate_card(estimate: Estimate) -> Card:
    """Memory of the largest rank by kind, KV bytes a token, how many tokens fit, and the limit of the bandwidth."""
    build, rank = estimate.build_config, estimate.largest
    cached = build.max_batch_size * build.seq_len
    facts = [
        ("model", f"{count(estimate.parameters)} parameters"),
        ("weights", size(rank.weight_bytes)),
        ("KV a token", f"{size(rank.kv_bytes_per_token)}, {size(estimate.kv_bytes_per_block)} a block of "
                       f"{build.tokens_per_block}"),
        ("KV pool", f"{size(rank.kv_pool_bytes)}: {build.max_batch_size} requests x {build.seq_len:,} tokens = "
                    f"{cached:,}"),
        ("activations", f"{size(rank.activation_bytes)} in a step of {build.max_num_tokens:,} tokens"),
        ("together", size(rank.total_bytes)),
        ("work", f"{flops(rank.prefill_flops_per_token)} a prompt token, "
                 f"{flops(rank.generation_flops_per_token)} a generated one"),
    ]  # fmt: skip
    if len(estimate.ranks) > 1:
        facts.insert(1, ("ranks", f"{len(estimate.ranks)}; rank {rank.rank}, the largest, is shown"))
        facts.append(("divided evenly", f"{size(estimate.divided_evenly_bytes)} a rank: too low, ranks share things"))
    parts = [(kind, float(nbytes)) for kind, nbytes in rank.weights.items()]
    parts += [("KV pool", float(rank.kv_pool_bytes)), ("activations", float(rank.activation_bytes))]
    tables = [share_bars(parts), _what_fits(estimate), _ceilings(estimate)]
    if len(estimate.ranks) > 1:
        tables.insert(1, _ranks(estimate))
    return Card(
        f"Estimate · {estimate.config.architecture} · {_precision(estimate)}",
        tuple(facts),
        tuple(tables),
        next="engine = checkpoint.build(build_config, mapping)",
    )


def _precision(estimate: Estimate) -> str:
    quant = estimate.config.quantization
    weights = estimate.config.dtype + (f", weights {quant.quant_algo}" if quant.quant_algo else "")
    weights += " with the head" if quant.quantizes_head else ""
    return weights + (f", KV {quant.kv_cache_quant_algo}" if quant.kv_cache_quant_algo else "")


def _ranks(estimate: Estimate) -> Table:
    rows = tuple(
        (
            str(r.rank),
            f"{r.layers.start} to {r.layers.stop - 1}",
            size(r.weight_bytes),
            size(r.kv_pool_bytes),
            size(r.activation_bytes),
            size(r.total_bytes),
        )
        for r in estimate.ranks
    )
    return Table(("rank", "layers", " weights", " KV pool", " activations", " together"), rows)


def _what_fits(estimate: Estimate) -> Table:
    """Tokens that fit in four memory sizes, from the smallest power of two that holds weights and activations."""
    rank, seq_len = estimate.largest, estimate.build_config.seq_len
    smallest = 1 << (rank.weight_bytes + rank.activation_bytes).bit_length()
    rows = []
    for memory in (smallest, 2 * smallest, 4 * smallest, 8 * smallest):
        tokens = estimate.kv_tokens(memory)
        rows.append((size(memory), f"{tokens:,}", f"{tokens // seq_len:,}"))
    heads = ("memory for the model", " tokens of KV", f" requests of {seq_len:,}")
    return Table(heads, tuple(rows), "What fits beside weights and activations:")


def _ceilings(estimate: Estimate) -> Table:
    ranks = len(estimate.ranks)
    rows = tuple(
        (
            gpu if ranks == 1 else f"{ranks} x {gpu}",
            f"{bandwidth / 1e9:,.0f}",
            f"{estimate.tokens_per_second(bandwidth):,.0f}",
        )
        for gpu, bandwidth in BANDWIDTH.items()
    )
    heads = ("GPU", " GB/s each", " tokens/s at most")
    return Table(heads, rows, "Batch 1, empty cache: memory bandwidth / bytes read a step:")


def flops(number: float) -> str:
    """FLOPs with a decimal prefix: ``13.2 GFLOP``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}FLOP"
    return f"{number:g} FLOP"


@card.register
def op_table_card(table: OpTable) -> Card:
    """The ops of one step: all rows of the first layer, and the number of the other layers."""
    before, layers, after = _by_layer(table.rows)
    rows = [*before, *(layers[0] if layers else ()), *after]
    facts = (
        ("ops", f"{len(table.rows)}, {len(layers)} layers of {len(layers[0]) if layers else 0}"),
        ("work", flops(table.flops)),
        ("weights met", size(table.weight_bytes)),
        ("activations", f"{size(table.peak_bytes)} alive at once"),
    )
    cells = [_cells(row) for row in rows]
    if len(layers) > 1:
        place = len(before) + len(layers[0])
        cells.insert(place, (f"… {len(layers) - 1} more layers", "", "", "", "", ""))
    heads = ("op", "weight", "result", " weight bytes", " activation bytes", " work")
    return Card("OpTable · one step, op by op", facts, (Table(heads, tuple(cells)),))


def _by_layer(rows: Sequence[OpRow]) -> tuple[Sequence[OpRow], list[Sequence[OpRow]], Sequence[OpRow]]:
    """The rows before the layers, the rows of each layer, and the rows after them."""
    starts = [i for i, row in enumerate(rows) if row.weight and row.weight.endswith(FIRST_OF_LAYER)]
    if not starts:
        return rows, [], []
    # A layer ends with the second sum since its start.
    end = [i for i, row in enumerate(rows) if row.op == "add" and i > starts[0]][1] + 1
    length = end - starts[0]
    layers = [rows[start : start + length] for start in starts]
    return rows[: starts[0]], layers, rows[starts[-1] + length :]


def _cells(row: OpRow) -> tuple[str, ...]:
    return (
        row.op,
        row.weight or "",
        " ".join("×".join(map(str, out.shape)) for out in row.outputs),
        size(row.weight_bytes) if row.weight_bytes else "",
        size(row.activation_bytes) if row.activation_bytes else "a view",
        flops(row.flops) if row.flops else "",
    )


@card.register
def v100_card(table: V100Table) -> Card:
    """Published speed or OOM in each cell, with the predicted peak."""
    facts = (
        ("prediction", "base + batch x (in + out) x KV bytes a token / GPUs"),
        ("a GPU has", f"{table.limit_gib} GiB"),
        ("cells predicted right", f"{table.right} of {len(table.runs)}"),
    )
    tables = tuple(_v100_table(table, tp_size) for tp_size in table.setups)
    return Card("LLaMA-2-7B on V100-PCIE-32G, TensorRT-LLM 0.5: output tokens/s and predicted peak", facts, tables)


def _v100_table(table: V100Table, tp_size: int) -> Table:
    lengths: dict[tuple[int, int], list[V100Run]] = {}
    for run in table.runs:
        if run.tp_size == tp_size:
            lengths.setdefault((run.input_len, run.output_len), []).append(run)
    heads = tuple(f" batch {run.batch}" for run in next(iter(lengths.values())))
    rows = tuple((f"{i} / {o}", *(_v100_cell(table, run) for run in runs)) for (i, o), runs in lengths.items())
    caption = f"{table.setups[tp_size]}, base {table.base_gib(tp_size):.3f} GiB:"
    return Table(("in / out", *heads), rows, caption)


def _v100_cell(table: V100Table, run: V100Run) -> str:
    published = "OOM" if run.out_of_memory else f"{run.tokens_per_second:g}"
    wrong = "" if table.predicted_out_of_memory(run) == run.out_of_memory else " (wrong)"
    return f"{published} · {table.peak_gib(run):.1f} GiB{wrong}"
