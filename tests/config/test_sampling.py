"""Sampling parameters are checked in the arithmetic that uses them, and take numpy's scalars in every field."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from trtlab import ConfigError, SamplingParams

NUMPY = {
    "max_new_tokens": np.int32(3),
    "temperature": np.float32(0.5),
    "top_k": np.uint8(3),
    "top_p": np.float64(0.5),
    "repetition_penalty": np.float16(1.5),
    "stop": np.str_("a"),
    "seed": np.uint64(2**64 - 1),
    "logprobs": np.bool_(True),
    "ignore_eos": np.bool_(True),
    "stop_token_ids": [np.int64(4), 5],
    "end_id": np.int8(-1),
}


def test_numpy_scalars_are_taken_in_every_field():
    params = SamplingParams(**NUMPY)
    assert params == SamplingParams(
        max_new_tokens=3,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.5,
        stop="a",
        seed=2**64 - 1,
        logprobs=True,
        ignore_eos=True,
        stop_token_ids=[4, 5],
        end_id=-1,
    )
    assert {field.name for field in dataclasses.fields(params)} == set(NUMPY)
    assert "np." not in repr(params)


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-50, 1e-39, 1.17e-38])
def test_a_number_that_is_zero_in_float32_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"SamplingParams.{field}.*from 1.18e-38 to 3.4e.38, which float32 holds"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_a_number_that_is_infinite_in_float32_is_refused(field):
    with pytest.raises(ConfigError, match=rf"SamplingParams.{field}.*which float32 holds"):
        SamplingParams(**{field: 1e39})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**400])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ConfigError, match=r"SamplingParams.seed.*64 bits"):
        SamplingParams(seed=seed)


@pytest.mark.parametrize("values", [{"end_id": -2}, {"end_id": True}, {"stop_token_ids": [-1]}, {"stop_token_ids": 5}])
def test_what_is_no_token_id_is_refused(values):
    with pytest.raises(ConfigError, match=rf"SamplingParams.{next(iter(values))}"):
        SamplingParams(**values)
