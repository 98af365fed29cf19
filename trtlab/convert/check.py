"""Compares the tensors of a source with what a model needs, and names every difference at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from trtlab.errors import CheckpointError
from trtlab.storage.lazy import LazyTensor

LISTED = 8  # differences that an error spells out


def check_layers(where: str, layers: int, tensors: int) -> None:
    """CheckpointError when a config asks for more layers than there are tensors, before all their names are listed."""
    if layers > tensors:
        raise CheckpointError(
            f"{where} does not fit its config: {layers} layers and {tensors} tensors",
            remedy="compare num_hidden_layers with the weights",
        )


def check_tensors(where: str, tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError listing missing, surplus and mis-shaped tensors together, with the shapes expected."""
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    surplus = [f"surplus {name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in expected]
    shaped = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    problems = missing + surplus + shaped
    if problems:
        raise CheckpointError(
            f"{where} does not fit its config: {_listed(problems)}",
            remedy="compare the names with tensor_specs(config), or the config with the weights",
        )


def check_floating(where: str, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
    """CheckpointError for a weight that is not a plain floating-point tensor, as a quantized model's are not."""
    refused = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors
        if tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point
    ]
    if refused:
        raise CheckpointError(
            f"{where} holds quantized weights: {_listed(refused)}", remedy="start from the model's unquantized folder"
        )


def check_dtype(where: str, tensors: Mapping[str, LazyTensor], expected: Mapping[str, torch.dtype]) -> None:
    """CheckpointError for tensors that are not stored in the dtypes that the config leads to."""
    refused = [
        f"{name} is {tensor.dtype}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.dtype != expected[name]
    ]
    if refused:
        raise CheckpointError(
            f"{where} does not hold what its config says: {_listed(refused)}", remedy="convert the model again"
        )


def _listed(problems: list[str]) -> str:
    rest = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + rest
