"""Settings refuse values of other types, by name, and show themselves as a table."""

from __future__ import annotations

import dataclasses

import pytest

from trtlab import (
    BuildConfig,
    Checkpoint,
    ConfigError,
    Mapping,
    QuantConfig,
    RotaryScaling,
    SamplingParams,
    SessionConfig,
)
from trtlab.config.base import written
from trtlab.tiny import llama_dir

EVERY = (BuildConfig, Mapping, QuantConfig, SamplingParams, SessionConfig)


@pytest.mark.parametrize(
    ("kind", "field", "value", "expected"),
    [
        (SamplingParams, "temperature", "x", "a number or None"),
        (SamplingParams, "temperature", True, "a number or None"),
        (SamplingParams, "top_p", "a", "a number or None"),
        (SamplingParams, "stop", 5, "each item a text"),
        (SamplingParams, "stop", {"a": 1}, "each item a text"),
        (SamplingParams, "seed", 1.0, "a whole number or None"),
        (SamplingParams, "logprobs", "yes", "True or False"),
        (SessionConfig, "kv_cache_free_gpu_memory_fraction", "a", "a number"),
        (SessionConfig, "enable_block_reuse", "maybe", "True or False"),
        (SessionConfig, "batching_type", 1, "a text"),
        (BuildConfig, "weight_streaming", "yes", "True or False"),
        (BuildConfig, "compute_capabilities", "8.9", "each item a text"),
        (BuildConfig, "compute_capabilities", (8.9,), "each item a text"),
        (BuildConfig, "dtype", 16, "a text or None"),
        (QuantConfig, "smoothquant_val", "x", "a number or None"),
        (QuantConfig, "exclude_modules", 5, "each item a text"),
        (QuantConfig, "exclude_modules", "lm_head", "each item a text"),
        (QuantConfig, "exclude_modules", (5,), "each item a text"),
        (Mapping, "world_size", "2", "a whole number or None"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(kind, field, value, expected):
    with pytest.raises(ConfigError, match=f"{kind.__name__}.{field} has the wrong type.*{expected}"):
        kind(**{field: value})


@pytest.mark.parametrize("kind", EVERY)
def test_a_notebook_shows_every_field_and_what_is_not_at_its_default(kind):
    page = kind()._repr_html_()
    for field in dataclasses.fields(kind):
        assert field.name in page
    assert "0x" not in page and written(kind()) in (f"{kind.__name__}()", "Mapping(world_size=1)")


def test_what_is_written_can_be_typed_again():
    for settings in (
        QuantConfig("W4A16_AWQ", "INT8", group_size=64, exclude_modules=("*.mlp.fc",)),
        SamplingParams(temperature=0.7, stop="end"),
        Mapping(tp_size=2),
        RotaryScaling("linear", 2.0),
    ):
        assert eval(written(settings)) == settings
        assert eval(repr(settings)) == settings
    assert ">2<" in Mapping(tp_size=2)._repr_html_() and "must be given" in RotaryScaling("linear", 2.0)._repr_html_()


def test_no_stop_word_is_none_at_all():
    assert SamplingParams(stop=None) == SamplingParams()


def test_the_steps_refuse_what_are_no_settings(tmp_path):
    checkpoint = Checkpoint.from_hugging_face(llama_dir())
    with checkpoint.build(plan=False) as engine, engine.session(backend="torch") as session:
        for call, expected in (
            (lambda: checkpoint.build({"max_batch_size": 4}), "BuildConfig"),
            (lambda: checkpoint.build(mapping=2), "Mapping"),
            (lambda: checkpoint.quantize("W8A16"), "QuantConfig"),
            (lambda: checkpoint.save(tmp_path / "x", mapping=2), "Mapping"),
            (lambda: engine.session("torch"), "SessionConfig"),
            (lambda: session.generate("x", {"max_new_tokens": 2}), "SamplingParams"),
        ):
            with pytest.raises(ConfigError, match=f"this is no {expected}; got .*; expected .*{expected}"):
                call()
    assert not (tmp_path / "x").exists()
