"""The cards of measurements: a benchmark, a comparison with transformers, a comparison of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from trtlab.bench import Benchmark, Duel
from trtlab.card import Card, Table, bar, card, size
from trtlab.evaluate.quantization import RecipeComparison, RecipeRow

SHOWN_LAYERS = 6


@card.register
def benchmark_card(sweep: Benchmark) -> Card:
    """A benchmark: a row for each cell, with tokens a second as bars."""
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
    """Median speed of trtlab and of transformers, and the median of the ratios of the runs."""
    speeds = [
        (way, duel.tokens / median(times)) for way, times in (("trtlab", duel.ours_s), ("transformers", duel.theirs_s))
    ]
    best = max(speed for _, speed in speeds)
    rows = tuple((way, f"{speed:,.0f}", bar(speed / best)) for way, speed in speeds)
    return Card(
        f"{duel.ratio:.2f} times transformers' speed · {duel.what}", tables=(Table(("", " tokens/s", ""), rows),)
    )


@card.register
def recipe_comparison_card(comparison: RecipeComparison) -> Card:
    """A row for each recipe: what it saves and what it costs; below, how its error grows through the layers."""
    asked = comparison.rows[0].accuracy is not None
    rows = tuple(
        (
            row.title,
            size(row.nbytes),
            size(row.kv_bytes_per_token),
            f"{row.perplexity:.4f}",
            f"{row.divergence:.6f}",
            *([f"{row.accuracy:.1%}"] if row.accuracy is not None else []),
            "" if row.worst_snr_db is None else f"{row.worst_snr_db:.1f}",
        )
        for row in comparison.rows
    )
    heads = ("recipe", " weights", " KV a token", " perplexity", " KL, nats", *[" answers"] * asked, " worst SNR dB")
    tables = (Table(heads, rows), _distances(comparison.rows[1:]))
    return Card("What quantization costs", (), tables[: len(comparison.rows)], "checkpoint.quantize(QuantConfig(...))")


def _distances(rows: Sequence[RecipeRow]) -> Table:
    """The distance from the original after some layers, in percent; a bar for the last one."""
    count = len(rows[0].distances) if rows else 0
    shown = sorted({round(place * (count - 1) / (SHOWN_LAYERS - 1)) for place in range(SHOWN_LAYERS)}) if rows else []
    longest = max((row.distances[-1] for row in rows), default=0.0) or 1.0
    cells = tuple(
        (row.title, *(f"{row.distances[layer]:.1%}" for layer in shown), bar(row.distances[-1] / longest))
        for row in rows
    )
    return Table(("distance from the original after layer", *(f" {layer}" for layer in shown), ""), cells)
