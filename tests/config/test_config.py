"""Settings: frozen, checked when made, and every refusal names the field."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import BuildConfig, ConfigError, Mapping, ModelConfig, RotaryScaling, SamplingParams, TrtlabError
from trtlab.config.build import OBSOLETE_BUILD_FLAGS


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_ranks_fill_stages_one_after_another(tp, pp, per_stage):
    mapping = Mapping(tp_size=tp, pp_size=pp)
    assert mapping.world_size == tp * pp == len(mapping.ranks)
    layers = tp * [layer for stage in range(pp) for layer in range(stage * per_stage, (stage + 1) * per_stage)]
    assert sorted(layer for rank in mapping.ranks for layer in mapping.layers(rank, per_stage * pp)) == sorted(layers)
    for rank in mapping.ranks:
        assert mapping.pp_rank(rank) * tp + mapping.tp_rank(rank) == rank
        assert rank in mapping.tp_group(rank)
        assert {mapping.pp_rank(other) for other in mapping.tp_group(rank)} == {mapping.pp_rank(rank)}
        assert mapping.is_first_stage(rank) == (rank < tp) and mapping.is_last_stage(rank) == (rank >= tp * (pp - 1))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 99))
def test_a_world_that_is_not_the_product_is_refused_with_the_product(tp, pp, world):
    if world == tp * pp:
        assert Mapping(world, tp, pp) == Mapping(tp_size=tp, pp_size=pp)
        return
    with pytest.raises(
        ConfigError, match=f"world_size {world} is not tp_size {tp} x pp_size {pp}.*{tp * pp}"
    ) as caught:
        Mapping(world, tp, pp)
    assert caught.value.remedy


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_sizes_are_whole_numbers_of_at_least_one(value):
    for make in (
        lambda: Mapping(tp_size=value),
        lambda: Mapping(pp_size=value),
        lambda: BuildConfig(max_batch_size=value),
        lambda: BuildConfig(max_num_tokens=value),
        lambda: SamplingParams(max_new_tokens=value),
    ):
        with pytest.raises(ConfigError, match="whole number of at least 1"):
            make()


BAD_SAMPLING = {
    "temperature": [-0.1, math.nan],
    "top_k": [-1, 2.5, "4"],
    "top_p": [0, 1.1, -0.5, math.nan],
    "repetition_penalty": [0, -1, math.nan],
    "stop": [[""], [1], ["a", None]],
    "seed": ["x", 1.5],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, bad in BAD_SAMPLING.items() for v in bad])
def test_a_sampling_value_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError, match="stop" if field == "stop" else field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        ({}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "top_p": 0.5}, True),
        ({"top_k": 1, "temperature": 2.0}, True),
        ({"repetition_penalty": 2.0}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
    ],
)
def test_greedy_is_what_leaves_no_choice(params, greedy):
    assert SamplingParams(**params).greedy is greedy


def test_settings_are_frozen_and_unknown_words_are_refused():
    for made in (Mapping(), BuildConfig(), SamplingParams()):
        field = dataclasses.fields(made)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field, 1)
        with pytest.raises(TypeError):
            type(made)(nonsense=1)


@pytest.mark.parametrize("flag", OBSOLETE_BUILD_FLAGS)
def test_a_flag_of_the_past_is_answered(flag, caplog):
    with caplog.at_level(logging.WARNING, logger="trtlab"):
        config = BuildConfig(**{flag: "float16"})
    assert config == dataclasses.replace(BuildConfig(), notes=config.notes)
    assert flag in config.notes[0] and "no effect" in config.notes[0] and config.notes[0] in caplog.text


def test_max_output_len_is_the_old_spelling():
    config = BuildConfig(max_input_len=100, max_output_len=28)
    assert config.max_seq_len == 128 and "max_output_len=28" in config.notes[0]
    with pytest.raises(ConfigError, match="both given"):
        BuildConfig(max_input_len=100, max_output_len=28, max_seq_len=128)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_beam_width": 4}, "beam search is not supported yet"),
        ({"max_num_tokens": 4, "max_batch_size": 8}, "max_num_tokens 4 is below max_batch_size 8"),
        ({"dtype": "int4"}, "unknown dtype.*'int4'.*float32"),
        ({"optimization_level": 6}, "optimization_level.*0 to 5"),
        ({"max_input_len": 300, "max_seq_len": 200}, "max_input_len 300 exceeds max_seq_len 200"),
    ],
)
def test_a_build_that_cannot_be_says_why(changes, words):
    with pytest.raises(ConfigError, match=words):
        BuildConfig(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("dynamic", {}, r"'dynamic'.*linear \| llama3 \| yarn"),
        ("linear", {"factor": 0}, "factor"),
        ("linear", {"factor": math.inf}, "factor"),
        ("llama3", {}, "low_freq_factor"),
        ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 2.0}, "original_max_position|differ"),
    ],
)
def test_a_rotary_scaling_that_cannot_be_says_why(kind, changes, words):
    with pytest.raises(ConfigError, match=words):
        RotaryScaling(kind, **{"factor": 2.0, **changes})


MODEL = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_size": 128,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}


def test_kv_bytes_of_a_token_are_the_published_figure():
    """LLaMA-2-7B in FP16: 512 KiB a token."""
    assert ModelConfig(**MODEL).kv_bytes_per_token == 512 * 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 5}, "32 query heads and 5 key/value heads"),
        ({"head_size": 127}, "even head_size"),
        ({"norm_epsilon": 0}, "norm_epsilon"),
        ({"rotary_base": math.nan}, "rotary_base"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_a_model_that_cannot_be_says_why(changes, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**{**MODEL, **changes})


def test_an_error_reads_as_what_got_expected_and_remedy():
    error = TrtlabError("heads do not fit", got=6, expected="a divisor of 8", remedy="use 4")
    assert str(error) == "heads do not fit; got 6; expected a divisor of 8; use 4"
    assert str(TrtlabError("alone")) == "alone"
