"""The report's figures against direct arithmetic."""

import math

import pytest
import torch

from trtlab import QuantConfig
from trtlab.model.scales import unpack_int4


def test_worst_lists_the_lowest_ratios_first(quantized_by):
    report = quantized_by(QuantConfig(quant_algo="FP8")).report
    worst = report.worst(5)
    assert len(worst) == 5
    assert [row.snr_db for row in worst] == sorted(row.snr_db for row in report.linears)[:5]
    assert len(report.linears) == 10


def test_weight_only_figures_compare_the_weights(checkpoint, quantized_by):
    quantized = quantized_by(QuantConfig(quant_algo="W8A16"))
    row = quantized.report.linears[1]
    name = "transformer.layers.0.attention.dense"
    weight = checkpoint.tensors[f"{name}.weight"].read()
    q = quantized.tensors[f"{name}.weight"].read()
    scale = quantized.tensors[f"{name}.per_channel_scale"].read()
    error = q * scale[:, None] - weight
    assert row.name == name
    assert row.snr_db == pytest.approx(10 * math.log10(float(weight.square().sum() / error.square().sum())), abs=0.01)
    assert row.bytes_saved == weight.nbytes - q.nbytes - scale.nbytes
    assert row.scale_max == pytest.approx(float(scale.max()))
    assert row.saturation > 0  # the largest positive weight of a channel ends at 127
    assert row.outliers_before is None


@pytest.mark.parametrize(
    ("algorithm", "end"),
    [("W8A16", 127), ("W4A16", 7), ("W8A8_SQ_PER_TENSOR_PLUGIN", 127), ("FP8", 448), ("W4A16_AWQ", 7), ("W4A8_AWQ", 7)],
)
def test_saturation_is_the_share_of_weights_at_the_end_of_the_range(quantized_by, algorithm, end):
    quant = QuantConfig(quant_algo=algorithm)
    quantized = quantized_by(quant)
    for row in quantized.report.linears:
        stored = quantized.tensors[f"{row.name}.weight"].read()
        numbers = unpack_int4(stored, 2 * len(stored)) if end == 7 else stored
        expected = (numbers.double().abs() >= end).double().mean().item()
        assert row.saturation == pytest.approx(expected, rel=1e-6)
        assert 0 < row.saturation < 0.2


def test_smoothing_flattens_the_loud_channels(quantized_by):
    quant = QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN", smoothquant_val=0.8)
    rows = quantized_by(quant).report.linears
    loud = [row for row in rows if row.name.endswith(("attention.qkv", "mlp.fc"))]
    assert all(row.outliers_before > 8 and row.outliers_after < 4 for row in loud)
    assert all(row.alpha == 0.8 for row in rows)


def test_split_scales_use_more_bits_of_v_than_the_merged_one(quantized_by):
    bits = {}
    for scales in ("merged", "split", "per_head"):
        quant = QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales=scales)
        bits[scales] = [row.v_bits for row in quantized_by(quant).report.caches]
    assert all(merged <= split for merged, split in zip(bits["merged"], bits["split"], strict=True))
    assert bits["per_head"] == pytest.approx([math.log2(255)] * 2)


def test_the_report_says_what_a_merged_scale_costs_v(quantized_by):
    shown = {}
    for scales in ("merged", "split"):
        quant = QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales=scales)
        shown[scales] = repr(quantized_by(quant).report)
    assert "Q is never cached: V uses" in shown["merged"]
    assert "kv_cache_scales='split'" in shown["merged"]
    assert "of 7.99 bits that INT8 has" in shown["split"]


def test_the_report_shows_itself_as_text_and_table(quantized_by):
    quant = QuantConfig(quant_algo="W4A16_AWQ", group_size=64, kv_cache_quant_algo="INT8")
    report = quantized_by(quant).report
    shown = repr(report)
    assert "W4A16_AWQ" in shown
    assert "V bits used" in shown
    assert "<table>" in report._repr_html_()
    assert "0x7f" not in shown


def test_more_bits_mean_less_noise(quantized_by):
    def mean_snr(**settings):
        quant = QuantConfig(group_size=64, **settings)
        rows = quantized_by(quant).report.linears
        return float(torch.tensor([row.snr_db for row in rows]).mean())

    assert mean_snr(quant_algo="W8A16") > mean_snr(quant_algo="W4A16_AWQ") > 10
    per_token = mean_snr(quant_algo="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN")
    assert per_token > mean_snr(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN")
