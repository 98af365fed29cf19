"""A name or a value that is misspelt, or that another tool uses, is answered with the one that was meant."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trtlab import BuildConfig, ConfigError, Mapping, QuantConfig, SamplingParams, SessionConfig
from trtlab.config.docs import other_names
from trtlab.config.names import OTHER_VALUES, USAGE, value_meant
from trtlab.config.session import BACKENDS
from trtlab.validation import choices, fields_of

KINDS = (BuildConfig, Mapping, QuantConfig, SamplingParams, SessionConfig)


def refusal(kind, **values):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        (BuildConfig, "max_bach_size", "max_batch_size"),
        (BuildConfig, "builder_opt", "optimization_level"),
        (SamplingParams, "max_tokens", "max_new_tokens"),
        (SamplingParams, "max_output_len", "max_new_tokens"),
        (SamplingParams, "stop_words", "stop"),
        (SamplingParams, "random_seed", "seed"),
        (SamplingParams, "stop_token_id", "stop_token_ids"),
        (SamplingParams, "temperture", "temperature"),
        (QuantConfig, "qformat", "quant_algo"),
        (QuantConfig, "kv_cache_dtype", "kv_cache_quant_algo"),
        (QuantConfig, "smoothquant", "smoothquant_val"),
        (QuantConfig, "awq_block_size", "group_size"),
        (SessionConfig, "max_tokens", "max_tokens_in_paged_kv_cache"),
        (SessionConfig, "free_gpu_memory_fraction", "kv_cache_free_gpu_memory_fraction"),
        (SessionConfig, "kv_cache_enable_block_reuse", "enable_block_reuse"),
    ],
)
def test_a_name_of_another_tool_or_a_misspelt_one_is_answered_with_the_field(kind, name, meant):
    assert str(refusal(kind, **{name: 1})) == f"{kind.__name__}.{name} is unknown; did you mean {meant}?"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("owner", KINDS)
def test_a_field_of_other_settings_is_answered_with_their_class_and_a_call(kind, owner):
    for field in dataclasses.fields(owner):
        if field.name in fields_of(kind) or field.name in other_names(kind):
            continue
        remedy = refusal(kind, **{field.name: field.default}).remedy
        belongs = f"{field.name} belongs to {owner.__name__}: use "
        assert remedy.startswith(belongs)
        assert f"{owner.__name__}({field.name}={field.default!r})" in remedy


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_each_class_is_code_that_makes_it(kind):
    assert isinstance(eval(USAGE[kind.__name__][1]), kind)


@pytest.mark.parametrize(
    ("kind", "field", "value", "meant"),
    [
        (QuantConfig, "quant_algo", "w8a16", "W8A16"),
        (QuantConfig, "quant_algo", "w8a8-sq-per-channel", "W8A8_SQ_PER_CHANNEL"),
        (QuantConfig, "quant_algo", "W8A8_SQ_PER_CHANEL", "W8A8_SQ_PER_CHANNEL"),
        (QuantConfig, "quant_algo", "int4_awq", "W4A16_AWQ"),
        (QuantConfig, "quant_algo", "int8_sq", "W8A8_SQ_PER_CHANNEL"),
        (QuantConfig, "kv_cache_quant_algo", "int8", "INT8"),
        (QuantConfig, "kv_cache_scales", "per-head", "per_head"),
        (BuildConfig, "dtype", "fp16", "float16"),
        (BuildConfig, "dtype", "half", "float16"),
        (BuildConfig, "dtype", "bf16", "bfloat16"),
        (BuildConfig, "dtype", "FP32", "float32"),
        (BuildConfig, "dtype", "torch.bfloat16", "bfloat16"),
        (BuildConfig, "dtype", torch.float16, "float16"),
        (SessionConfig, "batching_type", "inflight", "INFLIGHT"),
        (SessionConfig, "capacity_scheduler_policy", "max_utilisation", "MAX_UTILIZATION"),
    ],
)
def test_a_value_in_another_spelling_is_answered_with_the_choice(kind, field, value, meant):
    error = refusal(kind, **{field: value})
    assert error.remedy == f"did you mean {meant!r}?" and error.expected is None
    kind(**{field: meant})
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):  # by position too
        kind(*[default.default for default in dataclasses.fields(kind)][: list(fields_of(kind)).index(field)], value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (BuildConfig, "dtype", "float64"),
        (BuildConfig, "dtype", 16),
        (QuantConfig, "kv_cache_quant_algo", "INT4"),
        (QuantConfig, "quant_algo", "W8A8"),
        (QuantConfig, "group_size", "64"),
    ],
)
def test_another_value_is_answered_with_all_choices(kind, field, value):
    error = refusal(kind, **{field: value})
    assert " | " in error.expected and "did you mean" not in error.remedy


def test_the_table_of_other_values_leads_to_choices():
    known = {choice for kind in KINDS for hint in fields_of(kind).values() for choice in choices(hint)}
    assert set(OTHER_VALUES) <= known | set(BACKENDS)
    assert value_meant(str, "half") is None
