"""Settings: frozen, checked when made, and every refusal names the field."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import BuildConfig, ConfigError, Mapping, ModelConfig, RotaryScaling, SamplingParams, TrtlabError
from trtlab.config.build import OBSOLETE_BUILD_FLAGS, OLD_FLAGS

from ..models import LLAMA_7B


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


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_sizes_are_ints_of_at_least_one(value):
    for make in (
        lambda: Mapping(tp_size=value),
        lambda: Mapping(pp_size=value),
        lambda: BuildConfig(max_batch_size=value),
        lambda: BuildConfig(max_input_len=value),
        lambda: BuildConfig(max_num_tokens=value),
        lambda: SamplingParams(max_new_tokens=value),
    ):
        with pytest.raises(ConfigError, match="an int of at least 1"):
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


@pytest.mark.parametrize("flag", OBSOLETE_BUILD_FLAGS)
def test_a_flag_of_the_past_is_answered(flag, caplog):
    with caplog.at_level(logging.WARNING, logger="trtlab"):
        config = BuildConfig.from_trtllm(**{flag: "float16"})
    assert config == BuildConfig(notes=config.notes)
    assert flag in config.notes[0] and "no effect" in config.notes[0] and config.notes[0] in caplog.text
    assert BuildConfig.from_trtllm(**{flag: None}) == BuildConfig()


@pytest.mark.parametrize("flag", OLD_FLAGS)
def test_a_flag_of_the_past_is_no_bound(flag):
    words = rf"BuildConfig\.{flag} is unknown; use BuildConfig.from_trtllm\({flag}=\.\.\.\), which takes the old flags"
    with pytest.raises(ConfigError, match=words):
        BuildConfig(**{flag: 1})
    assert BuildConfig.from_trtllm(**{flag: 1})


def test_max_output_len_is_the_old_spelling():
    config = BuildConfig.from_trtllm(max_input_len=100, max_output_len=28)
    assert config.max_seq_len == 128 and "max_output_len=28" in config.notes[0]
    assert BuildConfig.from_trtllm(max_output_len=np.int64(28)).max_seq_len == 1024 + 28
    with pytest.raises(ConfigError, match="both given"):
        BuildConfig.from_trtllm(max_input_len=100, max_output_len=28, max_seq_len=128)


def test_trtllm_s_flags_are_all_answered_in_one_call():
    config = BuildConfig.from_trtllm(
        max_batch_size=4,
        max_input_len=64,
        max_output_len=32,
        max_beam_width=1,
        compute_capabilities=["8.9"],
        gemm_plugin="auto",
        context_fmha="enable",
        dtype="float16",
    )
    expected = BuildConfig(
        max_batch_size=4, max_input_len=64, max_seq_len=96, compute_capabilities=("8.9",), dtype="float16"
    )
    assert config == dataclasses.replace(expected, notes=config.notes)
    assert [note.split("=")[0] for note in config.notes] == ["max_output_len", "gemm_plugin", "context_fmha"]
    assert BuildConfig.from_trtllm() == BuildConfig()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_beam_width": 4}, "beam search is not supported yet; got max_beam_width=4; expected 1"),
        ({"max_beam_width": True}, "beam search"),
        ({"max_output_len": "x"}, "BuildConfig.max_output_len is not valid; got 'x'; expected an int of at least 1"),
        ({"max_output_len": 0}, "max_output_len is not valid"),
        ({"max_input_len": "x", "max_output_len": 4}, r"BuildConfig\.max_input_len is not valid"),
        ({"max_batch_size": 0}, r"BuildConfig\.max_batch_size is not valid"),
        ({"gemm_plugins": "auto"}, "unknown flag gemm_plugins; did you mean gemm_plugin?"),
        ({"zebra": 1}, "unknown flag zebra; known flags are max_batch_size, .*multi_block_mode"),
    ],
)
def test_a_flag_that_cannot_be_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        BuildConfig.from_trtllm(**flags)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_num_tokens": 4, "max_batch_size": 8}, "max_num_tokens 4 is below max_batch_size 8"),
        ({"dtype": "int4"}, r"dtype is not valid; got 'int4'; expected float32 \| float16 \| bfloat16 or None"),
        ({"optimization_level": 6}, "optimization_level.*at least 0 and at most 5"),
        ({"max_input_len": 300, "max_seq_len": 200}, "max_input_len 300 exceeds max_seq_len 200"),
        ({"max_input_len": 1024, "max_seq_len": 512}, "max_input_len 1024 exceeds max_seq_len 512"),
    ],
)
def test_a_build_that_cannot_be_says_why(changes, words):
    with pytest.raises(ConfigError, match=words):
        BuildConfig(**changes)


@pytest.mark.parametrize(
    ("bounds", "limit", "resolved"),
    [
        ({}, 4096, (1024, 2048)),
        ({}, 512, (512, 512)),
        ({"max_seq_len": 512}, 4096, (512, 512)),
        ({"max_seq_len": 4096}, 4096, (1024, 4096)),
        ({"max_input_len": 3000, "max_seq_len": 4096}, 4096, (3000, 4096)),
        ({"max_input_len": 8}, 512, (8, 512)),
    ],
)
def test_what_is_left_out_is_filled_in_for_a_model(bounds, limit, resolved):
    build = BuildConfig(**bounds).resolve(ModelConfig(**{**LLAMA_7B, "max_position_embeddings": limit}))
    assert (build.max_input_len, build.max_seq_len) == (build.input_len, build.seq_len) == resolved
    assert build.dtype == "float16" and build.resolve(ModelConfig(**LLAMA_7B)) == build


@pytest.mark.parametrize(
    ("bounds", "limit", "words", "mended"),
    [
        ({"max_input_len": 600}, 512, "max_input_len 600 exceeds max_seq_len 512; use max_input_len=512 or less", 512),
        ({"max_input_len": 3000}, 4096, "max_input_len=2048 or less, or give max_seq_len, at most 4096", 2048),
    ],
)
def test_a_prompt_longer_than_the_model_or_the_default_allows_is_refused(bounds, limit, words, mended):
    model = ModelConfig(**{**LLAMA_7B, "max_position_embeddings": limit})
    with pytest.raises(ConfigError, match=words):
        BuildConfig(**bounds).resolve(model)
    assert BuildConfig(max_input_len=mended).resolve(model).input_len == mended
    assert BuildConfig(max_input_len=min(limit, 3000), max_seq_len=limit).resolve(model).seq_len == limit


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("dynamic", {}, r"'dynamic'.*linear \| llama3 \| yarn.*no other is supported yet"),
        ("linear", {"factor": 0}, "factor"),
        ("linear", {"factor": math.inf}, "factor"),
        ("llama3", {}, "low_freq_factor"),
        ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 2.0}, "original_max_position|differ"),
    ],
)
def test_a_rotary_scaling_that_cannot_be_says_why(kind, changes, words):
    with pytest.raises(ConfigError, match=words):
        RotaryScaling(kind, **{"factor": 2.0, **changes})


def test_kv_bytes_of_a_token_are_the_published_figure():
    """LLaMA-2-7B in FP16: 512 KiB a token."""
    assert ModelConfig(**LLAMA_7B).kv_bytes_per_token == 512 * 1024


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
        ModelConfig(**{**LLAMA_7B, **changes})


def test_an_error_reads_as_what_got_expected_and_remedy():
    error = TrtlabError("heads do not fit", got=6, expected="a divisor of 8", remedy="use 4")
    assert str(error) == "heads do not fit; got 6; expected a divisor of 8; use 4"
    assert str(TrtlabError("alone")) == "alone"


def test_a_model_has_at_most_1024_ranks():
    assert Mapping(tp_size=32, pp_size=32).world_size == 1024
    for tp_size, pp_size in ((1025, 1), (1, 3 * 10**6), (2**62, 2**62)):
        with pytest.raises(ConfigError, match=r"tp_size \* pp_size is too large; got \d+; expected at most 1024"):
            Mapping(tp_size=tp_size, pp_size=pp_size)
