"""Each algorithm against hand-made vectors, and identities that hold before rounding."""

import pytest
import torch

from trtlab import QuantConfig
from trtlab.config.algorithms import ALGORITHMS
from trtlab.model.blocks import LAYER_SITES
from trtlab.model.scales import dequantize, pack_int4, unpack_int4
from trtlab.quantize import awq, fp8, kv_cache, smoothquant, weight_only
from trtlab.quantize.layer import CalibratedLayer, InputStatistics, LayerStatistics

from .conftest import CONFIG, random_checkpoint


def test_int8_weight_only_divides_by_128_and_saturates_the_positive_end():
    q, scale = weight_only.weight_only(torch.tensor([[0.5, -1.0, 0.25, 1.0]]), 8)
    assert scale.value.tolist() == [0.0078125]
    assert q.tolist() == [[64, -128, 32, 127]]


def test_int4_weight_only_divides_by_8_and_packs_neighbouring_outputs():
    by_input = torch.tensor([[0.5, 0.3], [-1.0, -0.7], [0.25, 1.0], [1.0, -1.0]])
    q, _ = weight_only.weight_only(by_input.T, 4)
    assert q.T.tolist() == [[4, 2], [-8, -6], [2, 7], [7, -8]]
    assert pack_int4(q).tolist() == [[0x24, 0xA8, 0x72, 0x87]]


def test_a_weight_only_tie_goes_away_from_zero():
    q, _ = weight_only.weight_only(torch.tensor([[-1.0, 0.5 / 128, -1.5 / 128]]), 8)
    assert q.tolist() == [[-128, 1, -2]]


def test_an_all_zero_channel_becomes_zeros_under_a_positive_scale():
    q, scale = weight_only.weight_only(torch.zeros(1, 4), 8)
    assert q.tolist() == [[0, 0, 0, 0]]
    assert float(scale.value) > 0


def test_smoothing_splits_the_range_between_input_and_weight():
    weight = torch.tensor([[1.0, 4.0], [2.0, 0.25]])
    x_max = torch.tensor([8.0, 1.0])
    s = smoothquant.smoothing(x_max, weight.abs().amax(0), 0.5)
    assert s.tolist() == [2.0, 0.5]
    assert (x_max / s).tolist() == [4.0, 2.0]
    assert (weight * s).tolist() == [[2.0, 2.0], [4.0, 0.125]]


def test_alpha_0_looks_at_the_weight_alone_and_alpha_1_flattens_the_input():
    x_max, w_max = torch.tensor([8.0, 0.5]), torch.tensor([2.0, 4.0])
    assert smoothquant.smoothing(x_max, w_max, 0.0).tolist() == [0.5, 0.25]
    assert (x_max / smoothquant.smoothing(x_max, w_max, 1.0)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_dead_channel_is_left_alone(alpha):
    s = smoothquant.smoothing(torch.tensor([0.0, 3.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]), alpha)
    assert s[:2].tolist() == [1.0, 1.0]
    assert torch.isfinite(s).all()


def test_per_tensor_weights_keep_a_scale_for_each_of_query_key_and_value():
    parts = [torch.tensor([[2.0], [1.0]]), torch.tensor([[4.0]]), torch.tensor([[0.5]])]
    q, scale = smoothquant.int8_weight(parts, per_channel=False)
    assert scale.value.tolist() == [63.5, 63.5, 31.75, 254.0]
    assert q.flatten().tolist() == [127, 64, 127, 127]  # 63.5 is a tie: the even one


def test_the_fused_float8_weight_has_one_scale_the_largest():
    q, scale = fp8.float8_weight(torch.tensor([[448.0, 1.0], [-896.0, 0.0]]))
    assert float(scale.value) == 2.0
    assert q.float().tolist() == [[224.0, 0.5], [-448.0, 0.0]]


def seen_with(q_max: float, k_max: float, v_max: float) -> LayerStatistics:
    """One key head of size 1: an output amax for each of q, k and v."""
    outputs = {"attention.qkv": torch.tensor([q_max, k_max, v_max])}
    return LayerStatistics({}, outputs, {}, torch.tensor([k_max]), torch.tensor([v_max]))


def test_the_merged_scale_counts_q_and_starves_v():
    merged = kv_cache.kv_scales("INT8", "merged", seen_with(20.0, 10.0, 2.0))
    scale = float(merged["attention.kv_cache_scaling_factor"])
    assert scale == pytest.approx(20 / 127)
    assert 2.0 / scale == pytest.approx(12.7)
    assert kv_cache.effective_bits(2.0, scale) < 5 < kv_cache.effective_bits(2.0, 2.0 / 127)


def test_split_scales_use_every_bit_of_both():
    split = kv_cache.kv_scales("INT8", "split", seen_with(20.0, 10.0, 2.0))
    assert {name.removeprefix("attention."): float(value) for name, value in split.items()} == pytest.approx(
        {"k_cache_scaling_factor": 10 / 127, "v_cache_scaling_factor": 2 / 127, "kv_cache_scaling_factor": 10 / 127}
    )


def test_a_float8_cache_needs_no_texts_and_has_the_scale_1():
    assert float(kv_cache.kv_scales("FP8", "split", None)["attention.kv_cache_scaling_factor"]) == 1.0


def test_awq_groups_divide_by_7_and_come_back_within_half_a_step():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    scale = awq.group_scales(weight, 64)
    assert scale.value.shape == (6, 2)
    assert torch.equal(scale.value[2, 1], weight[2, 64:].abs().max() / 7)
    back = dequantize(awq.int4_groups(weight, scale), scale.value)
    assert bool(((back - weight).abs() <= scale.value.repeat_interleave(64, 1) * 0.5001).all())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(32, 128), (193, 448), (3, 64)])  # blocks of the Gram matrix and chunks with a rest
def test_the_search_finds_the_alpha_of_the_plain_loop_over_all_tokens(seed, shape):
    """The search leaves an alpha as soon as its sum is too large; the loop, in float64, computes every sum in full."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    x = torch.randn(200, width, generator=generator) * torch.logspace(-1, 1, width)
    weight = torch.randn(rows, width, generator=generator) * torch.logspace(-1, 0, rows)[:, None]
    inputs = InputStatistics(x.abs().amax(0), x.abs().mean(0), x, x.T @ x / len(x))
    losses = {}
    for alpha in awq.ALPHAS:
        s = awq.awq_scale(inputs.mean, awq.importance(weight, 64), alpha)
        scale = awq.group_scales(weight * s, 64)
        back = dequantize(awq.int4_groups(weight * s, scale), scale.value)
        losses[alpha] = float(((x / s).double() @ back.T.double() - x.double() @ weight.T.double()).square().mean())
    alpha, s = awq.search_scale(weight, inputs, 64)
    assert losses[alpha] <= min(losses.values()) * (1 + 1e-4), "float32 sums of some hundred thousand squares"
    assert torch.equal(s, awq.awq_scale(inputs.mean, awq.importance(weight, 64), alpha))


def observed_layer(quant: QuantConfig) -> CalibratedLayer:
    """Layer 0 of the random model with statistics of random inputs, two channels of them loud."""
    generator = torch.Generator().manual_seed(3)
    config = CONFIG.replace(quantization=quant)
    prefix = "transformer.layers.0."
    tensors = random_checkpoint().tensors
    weights = {name.removeprefix(prefix): t.read() for name, t in tensors.items() if name.startswith(prefix)}
    inputs, outputs, sampled = {}, {}, {}
    for linear, site in LAYER_SITES.items():
        if site.reads not in inputs:
            x = torch.randn(300, 256, generator=generator)
            x[:, [3, 17]] *= 12
            inputs[site.reads] = InputStatistics(x.abs().amax(0), x.abs().mean(0), x, x.T @ x / 300)
        sampled[linear] = inputs[site.reads].sample @ weights[f"{linear}.weight"].T
        outputs[linear] = sampled[linear].abs().amax(0)
    return CalibratedLayer(config, 0, weights, LayerStatistics(inputs, outputs, sampled, torch.ones(2), torch.ones(2)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_leaves_the_float32_output_unchanged(alpha):
    layer = observed_layer(QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN", smoothquant_val=alpha))
    result = smoothquant.quantize_layer(layer)
    hidden = torch.randn(20, 256, generator=torch.Generator().manual_seed(4))
    for linear, norm in (("attention.qkv", "input_layernorm"), ("mlp.fc", "post_layernorm")):
        before = (hidden * layer.weights[f"{norm}.weight"]) @ layer.weight(linear).T
        after = (hidden * result.tensors[f"{norm}.weight"]) @ (layer.weight(linear) * result.smoothing[linear]).T
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    for linear in ("attention.dense", "mlp.proj"):
        s = result.tensors[f"{linear}.smoother"][0]
        before, after = hidden @ layer.weight(linear).T, (hidden / s) @ (layer.weight(linear) * s).T
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_a_norm_rounded_to_bfloat16_still_cancels_against_its_weight():
    gain, s = torch.tensor([1.0, 0.7]), torch.tensor([3.0, 0.37])
    real, stored = smoothquant.fold(gain, s, torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    assert torch.allclose(stored.float() * real, gain, rtol=1e-6)


def test_awq_scaling_leaves_the_float32_output_unchanged():
    layer = observed_layer(QuantConfig(quant_algo="W4A16_AWQ", group_size=64))
    result = awq.quantize_layer(layer)
    x = layer.observed.input_of("attention.qkv").sample
    prequant = result.tensors["attention.qkv.prequant_scaling_factor"]
    before = x @ layer.weight("attention.qkv").T
    after = (x * prequant) @ (layer.weight("attention.qkv") / prequant).T
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_awq_shares_a_prequant_scale_where_linears_share_an_input():
    result = awq.quantize_layer(observed_layer(QuantConfig(quant_algo="W4A16_AWQ", group_size=64)))
    fc, gate = (result.tensors[f"mlp.{name}.prequant_scaling_factor"] for name in ("fc", "gate"))
    assert torch.equal(fc, gate)
    assert result.tensors["attention.qkv.prequant_scaling_factor"].shape == (256,)


def test_awq_packs_along_out_with_the_scales_that_it_stores():
    layer = observed_layer(QuantConfig(quant_algo="W4A16_AWQ", group_size=64))
    tensors = awq.quantize_layer(layer).tensors
    scale = tensors["mlp.proj.weights_scaling_factor"]
    back = dequantize(unpack_int4(tensors["mlp.proj.weight"], 256), scale)
    wanted = layer.weight("mlp.proj") / tensors["mlp.proj.prequant_scaling_factor"]
    assert bool(((back - wanted).abs() <= scale.repeat_interleave(64, 1) * 0.5001).all())


def test_static_scales_multiply_to_the_inverse_of_input_and_weight_scale():
    layer = observed_layer(QuantConfig(quant_algo="W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"))
    tensors = smoothquant.quantize_layer(layer).tensors
    s = tensors["mlp.proj.smoother"][0]
    scale_x = tensors["mlp.quantization_scaling_factor"]
    w_scale = 127 / (layer.weight("mlp.proj") * s).abs().amax(1)
    product = tensors["mlp.proj.per_channel_scale"][0] * tensors["mlp.proj.act_scale"][0]
    assert torch.allclose(product, 1 / (scale_x * w_scale), rtol=1e-5)
    assert torch.allclose(scale_x, 127 / (layer.observed.input_of("mlp.proj").amax / s).max())


def test_a_searched_alpha_is_no_worse_than_any_fixed_one():
    algorithm = ALGORITHMS["W8A8_SQ_PER_TENSOR_PLUGIN"]
    layer = observed_layer(QuantConfig(quant_algo=algorithm.name, smoothquant_val=None))
    inputs = layer.observed.input_of("mlp.fc")
    best = smoothquant.search_alpha(inputs, layer, ("mlp.fc", "mlp.gate"), algorithm)
    losses = [
        smoothquant._loss(inputs, layer, ("mlp.fc", "mlp.gate"), algorithm, alpha) for alpha in (0.0, 0.5, 1.0, best)
    ]
    assert min(losses) == losses[-1]
    assert set(smoothquant.quantize_layer(layer).alphas) == set(LAYER_SITES)
