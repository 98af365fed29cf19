"""Torch's packed CPU kernels against the exact reference."""

import pytest
import torch

from trtlab import QuantConfig, SessionConfig
from trtlab.model.quantized import WeightOnly
from trtlab.model.weights import Dense
from trtlab.ops.fast import PackedLinear, _fast
from trtlab.ops.quantized import linear
from trtlab.quantize.primitives import ToOriginal, pack_int4


def random_weight(bits: int, rows: int, width: int, groups: int) -> WeightOnly:
    dice = torch.Generator().manual_seed(rows * width)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, width), generator=dice).to(torch.int8)
    scale = (torch.rand(rows, groups, generator=dice) + 0.5).to(torch.bfloat16).float() / 2**bits
    prequant = (torch.rand(width, generator=dice) + 0.5).to(torch.bfloat16)
    return WeightOnly("w", pack_int4(q) if bits == 4 else q, ToOriginal(scale), torch.randn(rows).bfloat16(), prequant)


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_packed_kernels_agree_with_the_reference_to_bfloat16(bits, groups, tokens):
    weight = random_weight(bits, 48, 256, groups)
    packed = _fast(weight)
    assert isinstance(packed, PackedLinear)
    assert packed.shape == weight.shape == (48, 256)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
    wide = WeightOnly("w", weight.weight, weight.scale, weight.bias.float(), weight.prequant)
    expected = linear(wide, x.float())
    got = linear(packed, x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_what_has_no_kernel_stays_as_it_is():
    odd = random_weight(4, 6, 256, 1)
    dense = Dense("d", torch.zeros(2, 2))
    assert _fast(odd) is odd
    assert _fast(dense) is dense


@pytest.mark.parametrize("algorithm", ["W8A16", "W4A16", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "FP8"])
def test_a_fast_session_stays_near_the_exact_one(checkpoint, texts, algorithm):
    quant = QuantConfig(quant_algo=algorithm, group_size=64)
    made = checkpoint.quantize(quant, calibration=texts if quant.reads_texts else None)
    with made.build(plan=False) as engine:
        with engine.session(backend="torch") as session:
            exact = session.logits(texts[0])
        with engine.session(SessionConfig(fast_cpu_kernels=True), backend="torch", device="cpu") as session:
            fast = session.logits(texts[0])
    assert fast.dtype == torch.float32
    bound = 0.2 if algorithm == "FP8" else 0.05  # a BF16 input falls on another E4M3 step now and then
    assert 0 < (fast - exact).norm() < bound * exact.norm()
