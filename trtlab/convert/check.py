"""Compares configs and tensors that were found with what a model needs, and names every difference at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from trtlab.errors import CheckpointError
from trtlab.storage.lazy import LazyTensor

LISTED = 8  # differences that an error spells out


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


KINDS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "a whole number of at least 1": lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        "a positive number": lambda v: _number(v) and v > 0,
        "a number": _number,
        "true or false": lambda v: isinstance(v, bool),
        "a text": lambda v: isinstance(v, str),
        "a list of texts": _texts,
        "an object": lambda v: isinstance(v, dict),
        "a list of objects": lambda v: isinstance(v, list) and all(isinstance(item, dict) for item in v),
    }
)


def check_kinds(where: str, raw: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """CheckpointError naming the values of a JSON file that are of the wrong kind; null passes as absent.

    ``kinds`` maps a name of ``KINDS`` to the keys, separated by spaces, that must be of it.
    """
    wrong = [
        f"{key} is {raw[key]!r}, expected {kind}"
        for kind, keys in kinds.items()
        for key in keys.split()
        if raw.get(key) is not None and not KINDS[kind](raw[key])
    ]
    if wrong:
        raise CheckpointError(f"{where} cannot be read: {_listed(wrong)}", remedy="copy the model's own file again")


def check_layers(where: str, layers: int, tensors: int) -> None:
    """CheckpointError when a config asks for more layers than there are tensors, before all their names are listed."""
    if layers > tensors:
        raise CheckpointError(
            f"{where} does not fit its config: {layers} layers and {tensors} tensors",
            remedy="compare num_hidden_layers with the weights",
        )


def check_tensors(where: str, found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError listing missing, surplus and mis-shaped tensors together, with the shapes expected."""
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    surplus = [f"surplus {name} {list(tensor.shape)}" for name, tensor in found.items() if name not in expected]
    shaped = [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    problems = missing + surplus + shaped
    if problems:
        raise CheckpointError(
            f"{where} does not fit its config: {_listed(problems)}",
            remedy="compare the names with tensor_specs(config), or the config with the weights",
        )


def check_floating(where: str, found: Iterable[tuple[str, LazyTensor]]) -> None:
    """CheckpointError for a weight that is not a plain floating-point tensor, as a quantized model's are not."""
    odd = [
        f"{name} is {tensor.dtype}"
        for name, tensor in found
        if tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point
    ]
    if odd:
        raise CheckpointError(
            f"{where} holds quantized weights: {_listed(odd)}", remedy="start from the model's unquantized folder"
        )


def check_dtype(where: str, found: Mapping[str, LazyTensor], expected: Mapping[str, torch.dtype]) -> None:
    """CheckpointError for tensors that are not stored in the dtypes that the config leads to."""
    odd = [
        f"{name} is {tensor.dtype}, expected {expected[name]}"
        for name, tensor in found.items()
        if tensor.dtype != expected[name]
    ]
    if odd:
        raise CheckpointError(
            f"{where} does not hold what its config says: {_listed(odd)}", remedy="convert the model again"
        )


def _listed(problems: list[str]) -> str:
    rest = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + rest
