"""Rotary frequencies against the functions of transformers, over their whole parameter space."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trtlab import ConfigError, ModelConfig, RotaryScaling
from trtlab.model.rope import rotary_frequencies, rotary_table

from ..models import small_config

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def config_of(base, head_size, longest, scaling) -> ModelConfig:
    return small_config(
        head_size=head_size, max_position_embeddings=longest, rotary_base=base, rotary_scaling=scaling, **SIZES
    )


def reference(base, head_size, longest, kind, parameters):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LlamaConfig(
            **SIZES,
            head_dim=head_size,
            max_position_embeddings=longest,
            rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
        )
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


bases = st.sampled_from([0.01, 1.0, 100.0, 10000.0, 500000.0, 1e6, 1e30])
head_sizes = st.integers(1, 40).map(lambda half: 2 * half)
lengths = st.sampled_from([16, 32, 512, 4096, 131072])
factors = st.floats(0.5, 64) | st.sampled_from([1e-6, 1e-3, 1e6])
turns = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 24.0, 32.0, 64.0])


def assert_same(config, expected):
    """Equal in every bit: both sides make the same operations of torch on tensors of the same shape."""
    frequencies, factor = rotary_frequencies(config)
    assert torch.equal(frequencies, expected[0])
    assert factor == expected[1]


@given(bases, head_sizes, lengths, factors)
def test_linear_scaling_is_that_of_transformers(base, head_size, longest, factor):
    config = config_of(base, head_size, longest, RotaryScaling("linear", factor))
    assert_same(config, reference(base, head_size, longest, "linear", {"factor": factor}))


@given(bases, head_sizes, lengths, factors, turns, turns)
def test_llama3_scaling_is_that_of_transformers_for_bounds_in_either_order(base, head_size, trained, factor, low, high):
    assume(low != high)
    parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    config = config_of(base, head_size, 131072, RotaryScaling("llama3", factor, trained, low, high))
    parameters["original_max_position_embeddings"] = trained
    assert_same(config, reference(base, head_size, 131072, "llama3", parameters))


@given(
    bases,
    head_sizes,
    lengths,
    factors,
    st.fixed_dictionaries(
        {},
        optional={
            "beta_fast": turns,
            "beta_slow": turns,
            "attention_factor": st.floats(0.1, 3),
            "mscale": st.floats(0.1, 2) | st.just(0.0),
            "mscale_all_dim": st.floats(0.1, 2) | st.just(0.0),
            "truncate": st.booleans(),
        },
    ),
)
def test_yarn_is_that_of_transformers(base, head_size, trained, factor, options):
    assume(base != 1)
    config = config_of(base, head_size, 131072, RotaryScaling("yarn", factor, trained, **options))
    parameters = {"factor": factor, "original_max_position_embeddings": trained, **options}
    assert_same(config, reference(base, head_size, 131072, "yarn", parameters))


@pytest.mark.parametrize(
    ("base", "scaling", "words"),
    [
        (1e-300, None, "rotary_base.*float32"),
        (1e300, None, "rotary_base.*float32"),
        (1e-37, None, "rotary angle of the last position.*rotary_base 1e-37"),
        (1e-20, RotaryScaling("yarn", 1e-20, 16), "rotary angle of the last position.*a factor of 1e-20"),
        (1.0, RotaryScaling("yarn", 2.0, 16), "yarn scaling needs a rotary_base other than 1"),
    ],
)
def test_frequencies_that_float32_cannot_hold_are_refused(base, scaling, words):
    with pytest.raises(ConfigError, match=words):
        config_of(base, 8, 131072, scaling)


@given(
    st.floats(1e-37, 3e38),
    st.sampled_from(["linear", "llama3", "yarn"]),
    st.floats(1e-37, 3e38),
    st.floats(1e-37, 3e38),
    st.floats(1e-37, 3e38),
)
def test_every_table_that_is_not_refused_is_finite(base, kind, factor, low, high):
    bounds = {"low_freq_factor": low, "high_freq_factor": high} if kind == "llama3" else {}
    bounds = {"beta_fast": low, "beta_slow": high} if kind == "yarn" else bounds
    try:
        config = config_of(base, 8, 2048, RotaryScaling(kind, factor, 16, **bounds))
    except ConfigError:
        return
    table = rotary_table(config, 2048)
    assert table.cos.isfinite().all() and table.sin.isfinite().all()


def test_the_table_holds_cosine_and_sine_of_every_position():
    config = config_of(10000.0, 8, 64, RotaryScaling("yarn", 4.0, 16))
    table = rotary_table(config, 64)
    frequencies, factor = rotary_frequencies(config)
    assert table.cos.shape == table.sin.shape == (64, 4)
    assert factor > 1
    torch.testing.assert_close(table.cos[17], (17 * frequencies).cos() * factor)
    torch.testing.assert_close(table.sin[0], torch.zeros(4))
