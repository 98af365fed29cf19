"""Settings accept only values of their declared types, name a field that they refuse, and show a table."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import math
import pickle
import pydoc
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trtlab import (
    BuildConfig,
    Checkpoint,
    ConfigError,
    Mapping,
    ModelConfig,
    QuantConfig,
    RotaryScaling,
    SamplingParams,
    SessionConfig,
)
from trtlab.card import card, text
from trtlab.config.algorithms import ALGORITHMS, KV_CACHE_ALGORITHMS, KV_SCALES
from trtlab.config.base import Settings, python_code
from trtlab.config.docs import field_docs, first_sentence
from trtlab.config.model import DTYPES
from trtlab.model.rope import SCALINGS
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.tiny import llama_dir
from trtlab.validation import fields_of

from ..models import LLAMA_7B

NEEDED = {  # what must be given
    BuildConfig: {},
    EmbeddingLayout: {},
    Mapping: {},
    ModelConfig: LLAMA_7B,
    QuantConfig: {},
    RotaryScaling: {"kind": "linear", "factor": 2.0},
    SamplingParams: {},
    SessionConfig: {},
}
FIELDS = [(kind, field.name) for kind in NEEDED for field in dataclasses.fields(kind)]
HUGE = 10**400


def kinds():
    """Every class of settings that trtlab has."""
    return {kind for kind in Settings.__subclasses__() if kind.__module__.startswith("trtlab.")}


def test_the_tables_here_know_every_class():
    assert kinds() == set(NEEDED)


def made(kind, /, **values):
    """Settings with their required fields and these values."""
    return kind(**{**NEEDED[kind], **values})


def refusal(kind, /, **values):
    """The text of the ConfigError that these values raise."""
    with pytest.raises(ConfigError) as caught:
        made(kind, **values)
    return str(caught.value)


# --- types

WRONG = {  # by the type that a field is declared with, as errors name it
    "a bool": [0, 1, "yes", None, 1.0, np.int64(1), []],
    "an int": [True, np.True_, 1.5, 1.0, np.float32(2.0), "4", "x", [1], {}, math.nan, b"1", object()],
    "a number": [True, np.False_, "1.0", [0.5], {}, math.nan, math.inf, -math.inf, np.float32("nan"), HUGE, 1j],
    "a str": [1, True, 1.0, b"silu", ["silu"]],
    "a list or tuple of str": [5, 1.5, {"a": 1}, {"a"}, [5], ("a", None), [["a"]]],
    "a list or tuple of int": [5, 1.5, {1: 1}, {1}, ["5"], (1, None), [[1]], [True], [1.0]],
}


def expected_of(kind, name):
    """The word of ``WRONG`` for a field, None where it has a type of its own."""
    try:
        made(kind, **{name: object()})
    except ConfigError as error:
        return next((word for word in WRONG if str(error.expected).startswith(word)), None)
    raise AssertionError(f"{kind.__name__}.{name} takes anything")


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_value_of_another_type_is_refused_by_class_and_field(kind, name):
    for value in WRONG.get(expected_of(kind, name), [object(), 7.5, b"x"]):
        assert f"{kind.__name__}.{name}" in refusal(kind, **{name: value}), value


def test_most_fields_are_of_a_type_in_the_table():
    others = {f"{kind.__name__}.{name}" for kind, name in FIELDS if expected_of(kind, name) is None}
    assert others == {
        "BuildConfig.dtype",
        "ModelConfig.dtype",
        "ModelConfig.norm",
        "ModelConfig.position_embedding_type",
        "ModelConfig.rotary_scaling",
        "ModelConfig.quantization",
        "QuantConfig.quant_algo",
        "QuantConfig.kv_cache_quant_algo",
        "QuantConfig.group_size",
        "QuantConfig.kv_cache_scales",
        "RotaryScaling.kind",
        "SessionConfig.capacity_scheduler_policy",
        "SessionConfig.batching_type",
    }


class Rank(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    ("kind", "name", "given", "kept"),
    [
        (BuildConfig, "max_batch_size", np.int32(4), 4),
        (BuildConfig, "max_batch_size", np.uint8(4), 4),
        (BuildConfig, "max_batch_size", Rank.TWO, 2),
        (BuildConfig, "weight_streaming", np.True_, True),
        (BuildConfig, "compute_capabilities", ["8.9", np.str_("9.0")], ("8.9", "9.0")),
        (SamplingParams, "temperature", 1, 1.0),
        (SamplingParams, "temperature", np.int64(1), 1.0),
        (SamplingParams, "temperature", np.float32(0.5), 0.5),
        (SamplingParams, "temperature", np.float64(0.5), 0.5),
        (SamplingParams, "stop", "end", ("end",)),
        (SamplingParams, "stop", ["a", "b"], ("a", "b")),
        (SamplingParams, "stop", None, ()),
        (SamplingParams, "seed", np.uint64(2**64 - 1), 2**64 - 1),
        (QuantConfig, "group_size", np.int64(64), 64),
        (QuantConfig, "exclude_modules", ["*.mlp.fc"], ("*.mlp.fc",)),
        (BuildConfig, "max_batch_size", np.array(4), 4),
        (BuildConfig, "max_batch_size", torch.tensor(4), 4),
        (BuildConfig, "weight_streaming", torch.tensor(True), True),
        (SamplingParams, "temperature", torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (SamplingParams, "temperature", np.array(0.5, np.float16), 0.5),
        (SamplingParams, "temperature", torch.nn.Parameter(torch.tensor(0.5)), 0.5),
    ],
)
def test_numpy_s_scalars_and_lists_are_taken_for_python_s_and_tuples(kind, name, given, kept):
    value = getattr(made(kind, **{name: given}), name)
    assert value == kept and type(value) is type(kept)
    assert not isinstance(kept, tuple) or [type(item) for item in value] == [type(item) for item in kept]


ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 9),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.sampled_from(["FP8", "INT8", "W8A16", "split", "STATIC", "float16", "yarn", "llama3", 64, HUGE, 10**5000]),
    st.sampled_from([np.int8(3), np.float16(0.5), np.float32("inf"), np.True_, np.str_("x"), np.zeros(2), np.array(3)]),
    st.sampled_from([torch.tensor(3), torch.tensor([3]), torch.tensor(2.5), torch.empty((), device="meta")]),
    st.lists(st.one_of(st.text(max_size=2), st.integers()), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.builds(object),
    st.sampled_from([SamplingParams, SamplingParams(), QuantConfig("FP8"), RotaryScaling("linear", 2.0), np, Rank.TWO]),
)


def plain(value):
    """The value that is stored for an argument: an equal value of Python's own types."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value


@given(st.sampled_from(FIELDS), ANY)
def test_whatever_is_given_is_kept_as_an_equal_value_or_refused_by_name(place, value):
    kind, name = place
    try:
        kept = getattr(made(kind, **{name: value}), name)
    except ConfigError as error:
        assert kind.__name__ in str(error) or name in str(error)
        assert len(str(error)) < 1200
        return
    if (kind, name) == (SamplingParams, "stop"):
        value = () if value is None else (value,) if isinstance(value, str) else value
    if (kind, name) == (Mapping, "world_size") and value is None:
        value = 1
    assert kept == plain(value)
    assert type(kept) in (int, float, bool, str, tuple, type(None), QuantConfig, RotaryScaling)


def test_a_list_within_itself_is_refused_like_any_other():
    endless: list = []
    endless.append(endless)
    assert "compute_capabilities[0]" in refusal(BuildConfig, compute_capabilities=endless)


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (
            BuildConfig,
            {"max_batch_size": "x"},
            "BuildConfig.max_batch_size is not valid; got 'x'; expected an int of at least 1; "
            "max_batch_size: most requests that run in one step",
        ),
        (
            SamplingParams,
            {"top_p": 0},
            "SamplingParams.top_p is not valid; got 0; expected a number above 0 and at most 1 or None; "
            "top_p: probability that the smallest set of best tokens must reach; 1 keeps every token",
        ),
        (
            SessionConfig,
            {"batching_type": "STATC"},
            "SessionConfig.batching_type is not valid; got 'STATC'; did you mean 'STATIC'?",
        ),
        (
            SessionConfig,
            {"batching_type": "V1"},
            "SessionConfig.batching_type is not valid; got 'V1'; expected INFLIGHT | STATIC; batching_type: whether "
            "requests join and leave at each step, or (STATIC) a batch is closed until all its requests are done",
        ),
        (
            BuildConfig,
            {"compute_capabilities": ("8.9", 9)},
            "BuildConfig.compute_capabilities[1] is not valid; got 9; expected a str; compute_capabilities: targets of "
            'the plan, such as ("8.9",); empty means all that the TensorRT library supports',
        ),
        (
            Mapping,
            {"tp_size": 0, "pp_size": 1.0},
            "Mapping.tp_size is 0, expected an int of at least 1\n"
            "Mapping.pp_size is 1.0, expected an int of at least 1",
        ),
    ],
)
def test_a_refusal_says_what_was_got_what_was_expected_and_what_the_field_is(kind, values, line):
    assert refusal(kind, **values) == line


# --- the call


def test_words_that_are_no_fields_are_refused_with_the_nearest():
    assert refusal(BuildConfig, max_bach_size=4) == "BuildConfig.max_bach_size is unknown; did you mean max_batch_size?"
    assert "BuildConfig.self is unknown" in refusal(BuildConfig, self=1)
    unknown = refusal(Mapping, zebra=1)
    assert unknown == "Mapping.zebra is unknown; expected world_size | tp_size | pp_size"
    for kind, needed in NEEDED.items():
        with pytest.raises(ConfigError, match=rf"{kind.__name__}\.zebra is unknown") as caught:
            kind(**needed, zebra=1)
        assert isinstance(caught.value.__cause__, ValidationError)


def test_too_many_values_or_one_twice_or_too_few_are_refused():
    with pytest.raises(ConfigError, match="Mapping takes at most 3 arguments by position; give the others by name"):
        Mapping(1, 1, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"Mapping\.world_size is given twice"):
        Mapping(1, world_size=1)
    with pytest.raises(ConfigError, match=r"Mapping\.tp_size is not valid; got 0"):
        Mapping(1, 0)
    with pytest.raises(ConfigError, match=r"RotaryScaling\.factor is missing; expected a number above 0"):
        RotaryScaling("linear")


@pytest.mark.parametrize("kind", NEEDED)
def test_settings_are_frozen_values(kind):
    one, other = made(kind), made(kind)
    assert one == other and hash(one) == hash(other) and one is not other
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one) == dataclasses.replace(one)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(kind)[0].name, 1)
    assert set(dataclasses.asdict(one)) == {field.name for field in dataclasses.fields(kind)}
    with pytest.raises(ConfigError, match="zebra"):
        dataclasses.replace(one, zebra=1)


def test_a_changed_copy_is_checked_too():
    assert dataclasses.replace(SamplingParams(), top_k=np.int64(3)).top_k == 3
    with pytest.raises(ConfigError, match=r"SamplingParams\.top_k"):
        dataclasses.replace(SamplingParams(), top_k=-1)


# --- words


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_has_a_docstring_under_it(kind, name):
    sentence = first_sentence(kind, name)
    assert list(field_docs(kind)) == [field.name for field in dataclasses.fields(kind)]
    assert 10 < len(sentence) <= 120 and sentence[0].isupper() and "`" not in sentence


@pytest.mark.parametrize("kind", NEEDED)
def test_the_signature_and_the_types_are_those_that_are_written(kind):
    names = [field.name for field in dataclasses.fields(kind)]
    assert list(inspect.signature(kind).parameters) == names == list(fields_of(kind))


@pytest.mark.parametrize("kind", NEEDED)
def test_help_shows_every_field_with_its_docstring(kind):
    page = inspect.getdoc(kind)
    assert page.startswith(inspect.cleandoc(kind.__dict__["__doc__"].summary)) and made(kind).__doc__ == kind.__doc__
    shown = pydoc.plain(pydoc.render_doc(kind))
    for name, doc in field_docs(kind).items():
        assert f"    {name}: {doc.splitlines()[0]}" in page and f"{name}: {doc.splitlines()[0]}" in shown


def test_a_class_without_source_has_no_docs():
    space: dict = {}
    exec("class Nameless: pass", space)
    assert field_docs(space["Nameless"]) == {} and first_sentence(space["Nameless"], "x") == ""


def test_the_choices_are_those_of_the_tables():
    def choices(kind, name):
        with pytest.raises(ConfigError) as caught:
            made(kind, **{name: "nothing"})
        return tuple(str(caught.value.expected).removesuffix(" or None").split(" | "))

    assert choices(QuantConfig, "quant_algo") == tuple(ALGORITHMS)
    assert choices(QuantConfig, "kv_cache_scales") == KV_SCALES
    assert {(a, s) for a in choices(QuantConfig, "kv_cache_quant_algo") for s in KV_SCALES} == set(KV_CACHE_ALGORITHMS)
    assert choices(RotaryScaling, "kind") == tuple(SCALINGS)
    assert choices(BuildConfig, "dtype") == choices(ModelConfig, "dtype") == tuple(DTYPES)


@pytest.mark.parametrize("kind", [kind for kind in NEEDED if kind is not ModelConfig])
def test_a_card_shows_every_field_with_what_it_is(kind):
    one = made(kind)
    page, lines = one._repr_html_(), text(card(one))
    for field in dataclasses.fields(kind):
        assert field.name in page and first_sentence(kind, field.name) in lines
    assert "0x" not in page


def test_what_is_written_can_be_typed_again():
    assert python_code(BuildConfig()) == "BuildConfig()"
    for chosen in (
        BuildConfig(max_input_len=8, compute_capabilities=["8.9"]),
        QuantConfig("W4A16_AWQ", "INT8", group_size=64, exclude_modules=("*.mlp.fc",)),
        SamplingParams(temperature=0.7, stop="end"),
        SessionConfig(batching_type="STATIC"),
        Mapping(tp_size=2),
        RotaryScaling("linear", 2.0),
    ):
        assert eval(python_code(chosen)) == chosen
        assert eval(repr(chosen)) == chosen
    assert ">2<" in Mapping(tp_size=2)._repr_html_() and "required" in RotaryScaling("linear", 2.0)._repr_html_()


def test_the_steps_refuse_what_are_no_settings(tmp_path):
    checkpoint = Checkpoint.from_hugging_face(llama_dir())
    with checkpoint.build(plan=False) as engine, engine.session(backend="torch", device="cpu") as session:
        for call, expected in (
            (lambda: checkpoint.build({"max_batch_size": 4}), "a BuildConfig or None; use BuildConfig("),
            (lambda: checkpoint.build(mapping=2), "a Mapping or None; use checkpoint.build(mapping=Mapping("),
            (lambda: checkpoint.quantize("W8A16"), "a QuantConfig; use QuantConfig("),
            (lambda: checkpoint.save(tmp_path / "x", mapping=2), "a Mapping or None; use checkpoint.build("),
            (lambda: engine.session("torch"), "a SessionConfig or None; use backend='torch'"),
            (lambda: session.generate("x", {"max_new_tokens": 2}), "a SamplingParams or None; use SamplingParams("),
        ):
            with pytest.raises(ConfigError, match=re.escape(f"expected {expected}")):
                call()
    assert not (tmp_path / "x").exists()
