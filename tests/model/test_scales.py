"""The rounding table of TensorRT-LLM, packing and casts, against independent arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab.model.scales import (
    FLOAT8,
    INT4,
    INT8,
    INT8_SYMMETRIC,
    ToOriginal,
    ToQuantized,
    half_away,
    half_even,
    int_matmul,
    pack_int4,
    quantize_rows,
    to_float8,
    to_int,
    unpack_int4,
)

TIES = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])


def test_halves_go_to_the_even_number_or_away_from_zero():
    assert half_even(TIES).tolist() == [-2, -2, 0, 0, 2, 2]
    assert half_away(TIES).tolist() == [-3, -2, -1, 1, 2, 3]


def test_half_away_does_not_lift_what_lies_just_below_a_half():
    below = torch.tensor([0.49999997, -0.49999997, 8388609.0])
    assert half_away(below).tolist() == [0, 0, 8388609]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_half_away_is_the_round_of_c(values):
    x = np.array(values, dtype=np.float32).astype(np.float64)
    whole = np.trunc(x)
    expected = whole + np.sign(x) * (np.abs(x - whole) >= 0.5)
    assert half_away(torch.tensor(values, dtype=torch.float32)).double().tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("limits", "low", "high"), [(INT8, -128, 127), (INT8_SYMMETRIC, -127, 127), (INT4, -8, 7)], ids=str
)
def test_integers_saturate_at_the_ends_of_their_range(limits, low, high):
    q = to_int(torch.tensor([-1e9, 1e9]), ToOriginal(torch.tensor(1.0)), limits)
    assert q.tolist() == [low, high]


def test_a_scale_divides_in_one_direction_and_multiplies_in_the_other():
    x = torch.tensor([3.0, -1.0])
    to_original = ToOriginal(torch.tensor(0.5))
    assert to_int(x, to_original, INT8).tolist() == [6, -2]
    assert to_int(x, ToQuantized(torch.tensor(0.5)), INT8).tolist() == [2, 0]
    assert to_int(x, to_original.inverse, INT8).tolist() == [6, -2]
    assert to_original.inverse.inverse.value == to_original.value


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_int4_survives_packing_over_odd_shapes(rows, columns, seed):
    q = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((rows + 1) // 2, columns)
    assert torch.equal(unpack_int4(packed, rows), q)


def test_the_low_nibble_is_the_even_row():
    assert pack_int4(torch.tensor([[4], [2], [-8], [-6]], dtype=torch.int8)).tolist() == [[0x24], [0xA8]]


def test_float8_agrees_with_ml_dtypes_and_saturates():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the independent E4M3 cast")
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=generator) * 10.0**e for e in range(-4, 3)])
    x = torch.cat([x, torch.arange(-448.0, 449.0), torch.tensor([2.0**-10, 2.0**-9 * 1.5, 1e9, -1e9])])
    ours = to_float8(x, ToOriginal(torch.tensor(1.0)))
    theirs = np.clip(x.numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert ours.dtype == FLOAT8
    assert ours.view(torch.uint8).numpy().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("terms", [1, 1023, 1025, 5000])
def test_int8_products_are_exact_even_at_the_extremes(terms):
    generator = torch.Generator().manual_seed(terms)
    a = torch.randint(-128, 128, (3, terms), generator=generator).to(torch.int8)
    b = torch.full((2, terms), -128, dtype=torch.int8)
    assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().T)


def test_rows_have_a_scale_of_their_own_and_zero_rows_stay_zero():
    q, scale = quantize_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0], [254.0, 127.0]]))
    assert q.tolist() == [[64, -127], [0, 0], [127, 64]]
    assert scale.flatten().tolist() == pytest.approx([2 / 127, 1e-6 / 127, 2.0])
