"""Compares the tensors of a source with those that a model needs, and lists every difference in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from trtlab.errors import CheckpointError
from trtlab.storage.lazy import LazyTensor
from trtlab.validation import LISTED, listed


def check_layers(where: str, layers: int, tensors: int) -> None:
    """Raise CheckpointError when a config has more layers than there are tensors; listing all names would take long."""
    if layers > tensors:
        raise CheckpointError(
            f"{where} does not fit its config: {layers} layers and {tensors} tensors",
            remedy="compare num_hidden_layers with the weights",
        )


def check_tensors(where: str, tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that lists missing, surplus and mis-shaped tensors, with the expected shapes."""
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    surplus = [f"surplus {name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in expected]
    misshaped = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    kinds = [problems for problems in (missing, surplus, misshaped) if problems]
    if kinds:
        prefix = _surplus_prefix(tensors, expected)
        remedy = (
            f"its names begin with {prefix!r}, as a training tool writes them: store the tensors without it"
            if prefix
            else "compare the names with tensor_specs(config), or the config with the weights"
        )
        summary = "; ".join(listed(problems, LISTED // len(kinds)) for problems in kinds)
        raise CheckpointError(f"{where} does not fit its config: {summary}", remedy=remedy)


def _surplus_prefix(names: Iterable[str], expected: Mapping[str, object]) -> str | None:
    """What stands before the expected names, such as ``module.``, when none is there without it."""
    if any(name in expected for name in names):
        return None
    wanted = max(expected, key=len)
    return next((name.removesuffix(wanted) for name in names if name.endswith(wanted)), None)


def check_floating(where: str, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
    """Raise CheckpointError for weights of fewer than 16 bits or of integers, as in a quantized model."""
    refused = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors
        if tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point
    ]
    if refused:
        raise CheckpointError(
            f"{where} holds quantized weights: {listed(refused)}",
            remedy="start from the model's unquantized folder",
        )


def check_dtype(where: str, tensors: Mapping[str, LazyTensor], expected: Mapping[str, torch.dtype]) -> None:
    """Raise CheckpointError for tensors whose dtype is not the one that the config implies."""
    refused = [
        f"{name} is {tensor.dtype}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.dtype != expected[name]
    ]
    if refused:
        raise CheckpointError(f"{where} does not fit its config: {listed(refused)}", remedy="convert the model again")
