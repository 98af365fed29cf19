"""How a quantized checkpoint shows itself: what was quantized, what it saves, and where it hurts most."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from trtlab.card import Card, Table, bar, size
from trtlab.checkpoint import QuantizedCheckpoint
from trtlab.config.quant import QuantConfig
from trtlab.model.quantized_specs import TensorSpec
from trtlab.model.tensor_specs import tensor_specs
from trtlab.quantize.report import QuantizationReport

LISTED = 5  # linears with the lowest signal-to-noise ratio


def quantized_card(checkpoint: QuantizedCheckpoint) -> Card:
    """Algorithms, bytes before and after, the linears with the most noise."""
    config, quant, report = checkpoint.config, checkpoint.config.quantization, checkpoint.report
    plain = config.replace(quantization=QuantConfig())
    before = _nbytes(tensor_specs(plain).values(), plain.torch_dtype.itemsize)
    after = _nbytes(tensor_specs(config).values(), config.torch_dtype.itemsize)
    part = "" if checkpoint.rank is None else f" · rank {checkpoint.rank} of {checkpoint.mapping.world_size}"
    facts = [
        ("from", checkpoint.source),
        ("linears", _linears(quant)),
        ("KV cache", _cache(quant)),
        ("excluded", ", ".join(quant.exclude_modules)),
        ("weights", f"{size(before)} before, {size(after)} now ({after / before:.0%})"),
        ("KV a token", f"{size(plain.kv_bytes_per_token)} before, {size(config.kv_bytes_per_token)} now"),
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
                "checkpoint.build()",
            ]
        ),
    )


def _nbytes(specs: Iterable[TensorSpec], itemsize: int) -> int:
    return sum(prod(spec.shape) * (spec.dtype.itemsize if spec.dtype else itemsize) for spec in specs)


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


def _cache(quant: QuantConfig) -> str:
    if quant.kv_cache_quant_algo != "INT8":
        return quant.kv_cache_quant_algo or "as it was"
    return f"INT8, scales {quant.kv_cache_scales.replace('_', ' ')}"


def _worst(report: QuantizationReport) -> Table:
    rows = tuple(
        (row.name.removeprefix("transformer."), f"{row.snr_db:.1f}", bar(row.snr_db / 60), size(row.bytes_saved))
        for row in report.worst(LISTED)
    )
    return Table(("most noise", " SNR dB", "", " saved"), rows)
