"""Rotary frequencies against the functions of transformers, over their whole parameter space."""

from __future__ import annotations

import warnings

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trtlab import ModelConfig, RotaryScaling
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


bases = st.sampled_from([100.0, 10000.0, 500000.0, 1e6])
head_sizes = st.integers(1, 40).map(lambda half: 2 * half)
lengths = st.sampled_from([16, 32, 512, 4096, 131072])
factors = st.floats(0.5, 64)
turns = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 24.0, 32.0, 64.0])


def assert_same(config, expected):
    frequencies, factor = rotary_frequencies(config)
    torch.testing.assert_close(frequencies, expected[0], rtol=1e-6, atol=0)
    assert abs(factor - expected[1]) < 1e-9


@given(bases, head_sizes, lengths, factors)
def test_linear_scaling_is_that_of_transformers(base, head_size, longest, factor):
    config = config_of(base, head_size, longest, RotaryScaling("linear", factor))
    assert_same(config, reference(base, head_size, longest, "linear", {"factor": factor}))


@given(bases, head_sizes, lengths, factors, turns, turns)
def test_llama3_scaling_is_that_of_transformers(base, head_size, trained, factor, low, high):
    assume(low < high)
    parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    config = config_of(base, head_size, 131072, RotaryScaling("llama3", factor, trained, low, high))
    actual, _ = rotary_frequencies(config)
    expected, _ = reference(
        base, head_size, 131072, "llama3", {**parameters, "original_max_position_embeddings": trained}
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


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
            "mscale": st.floats(0, 2),
            "mscale_all_dim": st.floats(0, 2),
            "truncate": st.booleans(),
        },
    ),
)
def test_yarn_is_that_of_transformers(base, head_size, trained, factor, options):
    config = config_of(base, head_size, 131072, RotaryScaling("yarn", factor, trained, **options))
    parameters = {"factor": factor, "original_max_position_embeddings": trained, **options}
    expected = reference(base, head_size, 131072, "yarn", parameters)
    frequencies, attention = rotary_frequencies(config)
    torch.testing.assert_close(frequencies, expected[0], rtol=1e-5, atol=1e-12)
    assert abs(attention - expected[1]) < 1e-6


def test_the_table_holds_cosine_and_sine_of_every_position():
    config = config_of(10000.0, 8, 64, RotaryScaling("yarn", 4.0, 16))
    table = rotary_table(config, 64)
    frequencies, factor = rotary_frequencies(config)
    assert table.cos.shape == table.sin.shape == (64, 4)
    assert factor > 1
    torch.testing.assert_close(table.cos[17], (17 * frequencies).cos() * factor)
    torch.testing.assert_close(table.sin[0], torch.zeros(4))
