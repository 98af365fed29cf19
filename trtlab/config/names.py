"""Finds the setting or the value that a misspelt or foreign name stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trtlab.config.docs import other_names
from trtlab.validation import LONGEST_VALUE, choices, fields_of, shorten

USAGE = {  # settings that a user makes: a call that takes them, and an example
    "BuildConfig": ("checkpoint.build({})", "BuildConfig(max_seq_len=512)"),
    "Mapping": ("checkpoint.build(mapping={})", "Mapping(tp_size=2)"),
    "QuantConfig": ("checkpoint.quantize({})", 'QuantConfig(quant_algo="W8A16")'),
    "SamplingParams": ("session.generate(prompt, {})", "SamplingParams(max_new_tokens=32)"),
    "SessionConfig": ("engine.session({})", "SessionConfig(enable_block_reuse=True)"),
}
OTHER_VALUES = {  # names that other tools have for a value
    "float32": ("fp32", "float", "single"),
    "float16": ("fp16", "half"),
    "bfloat16": ("bf16",),
    "W8A16": ("int8_wo",),
    "W4A16": ("int4_wo",),
    "W4A16_AWQ": ("int4_awq",),
    "W8A8_SQ_PER_CHANNEL": ("int8_sq",),
    "tensorrt": ("trt",),
    "torch": ("pytorch",),
}
NEAR_VALUE = 0.8  # similarity from which a value is proposed; names have the 0.6 of difflib


def field_called(kind: type, name: str) -> str | None:
    """The field that has this name, here or in TensorRT-LLM; None where there is none."""
    return name if name in fields_of(kind) else other_names(kind).get(name)


def field_like(kind: type, name: str) -> str | None:
    """The field with the most similar name, here or in TensorRT-LLM; None where none is similar."""
    near = difflib.get_close_matches(name, [*fields_of(kind), *other_names(kind)], n=1)
    return field_called(kind, near[0]) if near else None


def value_meant(hint: Any, value: object) -> object | None:
    """The choice of a type that a refused value stands for: ``W8A16`` for ``w8a16``; None where there is none.

    Upper and lower case, dashes and a prefix such as ``torch.`` do not count. A similar word is not proposed for a
    word with other digits: ``float64`` is not ``float16``.
    """
    known = {_folded(choice): choice for choice in choices(hint) if isinstance(choice, str)}
    if not known or not isinstance(value, (str, torch.dtype)) or len(str(value)) > LONGEST_VALUE:
        return None
    word = _folded(str(value).rpartition(".")[2])
    for choice, others in OTHER_VALUES.items():
        if word in map(_folded, others):
            word = _folded(choice)
    alike = [each for each in known if re.sub(r"\D", "", each) == re.sub(r"\D", "", word)]
    near = [word] if word in known else difflib.get_close_matches(word, alike, n=1, cutoff=NEAR_VALUE)
    return known[near[0]] if near else None


def belongs_to(name: str, value: object, kinds: Iterable[type]) -> str | None:
    """The remedy for a name that is a field of one of these settings, with the call that takes it."""
    for kind in kinds:
        field = field_called(kind, name) if kind.__name__ in USAGE else None
        if field is not None:
            return f"{name} belongs to {kind.__name__}: use {usage(kind, code(kind, {field: value}))}"
    return None


def usage(kind: type, settings: str | None = None) -> str | None:
    """A call that takes these settings, given as Python code, or an example of them; None where no call is known."""
    if kind.__name__ not in USAGE:
        return None
    call, example = USAGE[kind.__name__]
    return call.format(settings or example)


def code(kind: type, values: Mapping[str, object]) -> str:
    """The Python code that makes settings with these values."""
    return f"{kind.__name__}({', '.join(f'{field}={shorten(value)}' for field, value in values.items())})"


def _folded(word: str) -> str:
    return re.sub(r"[\W_]", "", word).lower()
