"""pydantic's validation errors as trtlab's problems: the field, the value, what was expected."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from trtlab import CheckpointError, ConfigError
from trtlab.validation import combine, describe, did_you_mean, problems, shorten

Size = Annotated[int, Field(ge=1)]


class Scaling(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    kind: Literal["linear", "yarn"]
    factor: Annotated[FiniteFloat, Field(gt=0)] = 1.0


class File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    size: Size = 1
    window: Size | None = None
    share: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.5
    stop: int | list[int] | None = None
    names: tuple[str, ...] = ()
    scaling: Scaling | None = None
    layers: dict[str, Scaling] = {}
    renamed: bool = Field(default=False, alias="torchName")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"size": "x"}, "size is 'x', expected an int of at least 1"),
        ({"size": 0}, "size is 0, expected an int of at least 1"),
        ({"size": True}, "size is True, expected an int of at least 1"),
        ({"window": 0.5}, "window is 0.5, expected an int of at least 1 or None"),
        ({"share": 2}, "share is 2, expected a number of at least 0 and at most 1"),
        ({"share": math.nan}, "share is nan, expected a finite number of at least 0 and at most 1"),
        ({"stop": "a"}, "stop is 'a', expected an int or a list of int or None"),
        ({"stop": [1, "a"]}, "stop is [1, 'a'], expected an int or a list of int or None"),
        ({"names": ("a", 5)}, "names[1] is 5, expected a str"),
        ({"names": 5}, "names is 5, expected a list or tuple of str"),
        ({"scaling": 5}, "scaling is 5, expected a Scaling or None"),
        ({"scaling": {}}, "scaling.kind is missing, expected linear | yarn"),
        ({"scaling": {"kind": "cubic"}}, "scaling.kind is 'cubic', expected linear | yarn"),
        ({"scaling": {"kind": "yarn", "factor": 0}}, "scaling.factor is 0, expected a number above 0"),
        ({"scaling": {"kind": "yarn", "facto": 1}}, "scaling.facto is unknown, did you mean factor?"),
        ({"layers": {"a": {"kind": 1}}}, "layers.a.kind is 1, expected linear | yarn"),
        ({"layers": 1}, "layers is 1, expected a dict of str to Scaling"),
        ({"torchName": 1}, "torchName is 1, expected a bool"),
        ({"torchNam": True}, "torchNam is unknown, did you mean torchName?"),
    ],
)
def test_a_problem_is_a_line_that_names_field_value_and_what_was_expected(values, line):
    with pytest.raises(ValidationError) as caught:
        File.model_validate(values)
    assert [str(problem) for problem in problems(caught.value, File)] == [line]


def test_an_error_of_one_problem_has_its_parts_and_of_several_a_line_each():
    with pytest.raises(ValidationError) as caught:
        File.model_validate({"size": "x"})
    error = combine(ConfigError, problems(caught.value, File), "File", ".")
    assert (error.what, error.got, error.expected) == ("File.size is not valid", "'x'", "an int of at least 1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(ValidationError) as caught:
        File.model_validate({"size": "x", "share": "y", "nothing": 1})
    lines = str(combine(CheckpointError, problems(caught.value, File), "config.json")).splitlines()
    assert lines[0] == "config.json: size is 'x', expected an int of at least 1"
    assert lines[1].startswith("config.json: share is 'y'") and lines[2].startswith("config.json: nothing is unknown")


def test_a_text_that_is_no_json_says_where():
    with pytest.raises(ValidationError) as caught:
        File.model_validate_json('{"size": ')
    error = combine(CheckpointError, problems(caught.value, File), "config.json")
    assert str(error).startswith("config.json is not JSON: EOF")


def test_arguments_of_a_call_are_told_apart_from_values():
    from pydantic.dataclasses import dataclass as checked

    @checked(config=ConfigDict(extra="forbid"))
    class Pair:
        first: int
        second: int = 2

    for arguments, keywords, line in (
        ((1, 2, 3), {}, "Pair takes at most 2 arguments by position; give the others by name"),
        ((1,), {"first": 1}, "Pair.first is given twice, by position and by name"),
        ((), {}, "Pair.first is missing; expected an int"),
        ((1,), {"third": 1}, "Pair.third is unknown; expected first | second"),
    ):
        with pytest.raises(ValidationError) as caught:
            Pair(*arguments, **keywords)
        assert str(combine(ConfigError, problems(caught.value, Pair), "Pair", ".")) == line


class Row(TypedDict):
    name: str


@dataclass
class Plain:
    values: list[Annotated[int, Field(gt=0, lt=5)]]


@pytest.mark.parametrize(
    ("hint", "value", "line"),
    [
        (dict[str, int], {"a": "x"}, "a is 'x', expected an int"),
        (list[Row], [{"name": 1}], "[0].name is 1, expected a str"),
        (list[Row], [{}], "[0].name is missing, expected a str"),
        (tuple[int, str], (1, 2), "[1] is 2, expected a str"),
        (Plain, {"values": [7]}, "values[0] is 7, expected an int above 0 and below 5"),
        (int, "x", "is 'x', expected an int"),
    ],
)
def test_types_without_a_class_of_pydantic_are_named_too(hint, value, line):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(hint).validate_python(value, strict=hint is not Plain)
    assert [str(problem) for problem in problems(caught.value, hint)] == [line]


def test_types_are_described_in_words():
    assert describe(list[Size]) == "a list of int of at least 1"
    assert describe(dict[str, list[int]]) == "a dict of str to list of int"
    assert describe(np.ndarray) == "a ndarray" and describe(list) == "a list"


def test_a_value_is_shown_on_one_short_line_whatever_it_is():
    class Rude:
        def __repr__(self):
            raise RuntimeError

    assert shorten(Rude()).startswith("<Rude") and shorten(10**5000) == "<int>"
    assert len(shorten("x" * 1000)) <= 80 and len(shorten(list(range(1000)))) <= 80
    assert "\n" not in shorten(np.zeros((3, 3)))


def test_a_name_that_is_near_none_has_no_proposal():
    assert did_you_mean("max_bach_size", ("max_batch_size",)) == "did you mean max_batch_size?"
    assert did_you_mean("zebra", ("max_batch_size",)) is None
