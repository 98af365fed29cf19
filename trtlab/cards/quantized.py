"""The cards of a quantized checkpoint and of its report: what is quantized, what it saves, the largest errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from math import prod

from trtlab.card import Card, Table, bar, card, share_bars, size
from trtlab.cards.phrases import build_call, folder_facts
from trtlab.checkpoint import QuantizedCheckpoint
from trtlab.config.model import ModelConfig
from trtlab.config.quant import QuantConfig
from trtlab.model.quantized_specs import TensorSpec
from trtlab.model.scales import INT8
from trtlab.model.tensor_specs import tensor_specs
from trtlab.quantize.kv_cache import effective_bits
from trtlab.quantize.peak import Peak
from trtlab.quantize.report import LinearReport, QuantizationReport

MOST_NOISE = 5  # linears with the lowest signal-to-noise ratio


@card.register
def quantized_card(checkpoint: QuantizedCheckpoint) -> Card:
    """Algorithms, bytes before and after, and the linears with the lowest signal-to-noise ratio."""
    config, quant, report = checkpoint.config, checkpoint.config.quantization, checkpoint.report
    plain = config.replace(quantization=QuantConfig())
    before = _nbytes(tensor_specs(plain).values(), plain.torch_dtype.itemsize)
    after = _nbytes(tensor_specs(config).values(), config.torch_dtype.itemsize)
    part = "" if checkpoint.rank is None else f" · rank {checkpoint.rank} of {checkpoint.mapping.world_size}"
    facts = [
        ("from", checkpoint.source),
        *folder_facts(checkpoint.folder),
        ("linears", _linears(quant)),
        ("KV cache", _cache(quant)),
        ("head", _head(config)),
        ("excluded", ", ".join(quant.exclude_modules)),
        ("weights", f"{size(before)} before, {size(after)} now ({after / before:.0%})"),
        ("KV a token", f"{size(plain.kv_bytes_per_token)} before, {size(config.kv_bytes_per_token)} now"),
        ("memory", _peak(checkpoint)),
        ("report", "" if report else "none: quantize() makes it"),
    ]
    return Card(
        f"Quantized checkpoint · {config.architecture} · {config.dtype}{part}",
        tuple((label, value) for label, value in facts if value),
        () if report is None or not report.linears else (_worst(report),),
        next=", ".join(
            [
                *(["checkpoint.report"] if report else []),
                *(["trtlab.widgets.ScaleExplorer(checkpoint)"] if checkpoint.made_by else []),
                build_call(config),
            ]
        ),
    )


def _nbytes(specs: Iterable[TensorSpec], itemsize: int) -> int:
    return sum(prod(spec.shape) * (spec.dtype.itemsize if spec.dtype else itemsize) for spec in specs)


def _peak(checkpoint: QuantizedCheckpoint) -> str:
    if checkpoint.made_by is None:
        return ""
    peak = checkpoint.made_by.peak(in_memory=checkpoint.folder is None)
    return f"{size(peak.total)} while it was quantized; with the whole model in both forms {size(peak.at_once)}"


def _linears(quant: QuantConfig) -> str:
    algorithm = quant.algorithm
    if algorithm is None:
        return "as they were"
    parts = [algorithm.name]
    if algorithm.grouped:
        parts.append(f"groups of {quant.group_size}")
    if algorithm.family.startswith("smoothquant"):
        parts.append("alpha searched" if quant.smoothquant_val is None else f"alpha {quant.smoothquant_val:g}")
    return ", ".join(parts)


def _head(config: ModelConfig) -> str:
    if not config.quantization.quantizes_head:
        return ""
    return "quantized too" + (", and stored apart from the table" if config.tie_word_embeddings else "")


def _cache(quant: QuantConfig) -> str:
    if quant.kv_cache_quant_algo != "INT8":
        return quant.kv_cache_quant_algo or "as it was"
    return f"INT8, scales {quant.kv_cache_scales.replace('_', ' ')}"


def _worst(report: QuantizationReport) -> Table:
    rows = tuple(
        (row.name.removeprefix("transformer."), f"{row.snr_db:.1f}", bar(noise), size(row.bytes_saved))
        for row, noise in _noise(report, MOST_NOISE)
    )
    return Table(("most noise", " SNR dB", "noise", " saved"), rows)


def _noise(report: QuantizationReport, count: int) -> list[tuple[LinearReport, float]]:
    """The linears with the most noise, and the amplitude of each one's noise relative to the largest."""
    rows = report.worst(count)
    return [(row, 10 ** ((rows[0].snr_db - row.snr_db) / 20) if math.isfinite(row.snr_db) else 0.0) for row in rows]


@card.register
def peak_card(peak: Peak) -> Card:
    """The predicted memory of a quantization by its parts, and what it would be with the whole model in memory."""
    parts = (
        ("one layer in both forms", peak.layer),
        ("hidden states of the texts", peak.hidden),
        ("statistics of one layer", peak.statistics),
        ("the result", peak.kept),
    )
    facts = (("together", size(peak.total)), ("with the whole model in both forms", size(peak.at_once)))
    return Card("Predicted memory of a quantization", facts, (share_bars([(name, float(n)) for name, n in parts]),))


@card.register
def report_card(report: QuantizationReport) -> Card:
    """Algorithms, bytes saved, the linears with the lowest signal-to-noise ratio, and the scales of the cache."""
    quant = report.config
    cache = f"{quant.kv_cache_quant_algo}, {quant.kv_cache_scales}" if quant.kv_cache_quant_algo else "as it was"
    facts = [("weights", quant.quant_algo or "as they were"), ("KV cache", cache)]
    tables = []
    if report.linears:
        facts.append(("bytes saved", size(report.bytes_saved)))
        tables.append(_worst_table(report))
    if report.caches:
        tables.append(_kv_table(report))
    return Card("Quantization report", tuple(facts), tuple(tables), "report.worst(5), checkpoint.build()")


def _worst_table(report: QuantizationReport) -> Table:
    rows = tuple(
        (
            row.name.removeprefix("transformer."),
            f"{row.snr_db:.1f}",
            bar(noise),
            f"{row.cosine:.5f}",
            f"{row.saturation:.2%}",
            _ratio(row.outliers_before),
            _ratio(row.outliers_after),
            "" if row.alpha is None else f"{row.alpha:.2f}",
        )
        for row, noise in _noise(report, 8)
    )
    heads = ("linear", " SNR dB", "noise", " cosine", " at range end", " outliers", " after smoothing", " alpha")
    return Table(heads, rows, "the linears with the lowest signal-to-noise ratio")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"


def _kv_table(report: QuantizationReport) -> Table:
    rows = tuple(
        (
            str(row.layer),
            f"{row.k_scale:.5f}",
            f"{row.v_scale:.5f}",
            "" if row.k_bits is None else f"{row.k_bits:.2f}",
            "" if row.v_bits is None else f"{row.v_bits:.2f}",
        )
        for row in report.caches
    )
    heads = (" layer", " K scale", " V scale", " K bits used", " V bits used")
    return Table(heads, rows, _kv_caption(report))


def _kv_caption(report: QuantizationReport) -> str:
    """What the columns of bits mean; for merged scales also why they use the fewest bits."""
    used = [row.v_bits for row in report.caches if row.v_bits is not None]
    if not used:
        return "KV cache"
    full = effective_bits(1.0, 1.0 / INT8.high)
    if report.config.kv_cache_scales != "merged":
        return f"KV cache: of {full:.2f} bits that INT8 has"
    return (
        "KV cache: one scale reaches as far as the largest of Q, K and V before rotary, and Q is never cached: "
        f"V uses {min(used):.2f} to {max(used):.2f} of {full:.2f} bits; kv_cache_scales='split' gives it all of them"
    )
