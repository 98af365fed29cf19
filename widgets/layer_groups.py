"""Layers put into groups and measured: what a bar stands for, and how long it is. Knows no picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtlab.card import count, size
from trtlab.errors import ConfigError
from trtlab.tensorrt.read.interpreter import LayerRow, LayerTable

# These belong to no weight; by name they would count as part of the weight before them.
ATTENTION = ("rotary_embedding", "kv_cache_update", "attention_input", "attention_output")


@dataclass(frozen=True)
class Measure:
    """What a bar's length means: a number for each layer, how to write it, and the units of the axis."""

    of: Callable[[LayerRow], int]
    text: Callable[[float], str]
    title: str  # after the sum of all bars
    axis: str
    units: tuple[tuple[float, str], ...]

    def unit(self, largest: float) -> tuple[float, str]:
        """The largest unit that a number reaches, with its name for the axis."""
        return next(((factor, name) for factor, name in self.units if largest >= factor), self.units[-1])


MEASURES: Mapping[str, Measure] = {
    "weight bytes": Measure(
        lambda row: row.weight_bytes,
        size,
        "of weights",
        "weights",
        ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")),
    ),
    "FLOP": Measure(
        lambda row: row.flops,
        lambda number: f"{count(number)} FLOP",
        "",
        "floating-point operations",
        ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, "")),
    ),
    "layers": Measure(lambda row: 1, lambda number: f"{number:.0f} layers", "", "number of layers", ((1, ""),)),
}


def part(row: LayerRow) -> str:
    """The weight that a layer serves, without its decoder layer: ``mlp.fc``; ``attention`` for what has no weight."""
    if row.kind in ATTENTION:
        return "attention"
    scope, colon, _ = row.name.partition(":")
    scope = scope if colon else scope.rpartition(".")[0]  # a constant ends in .weight, .scale, .epsilon
    return re.sub(r"^transformer\.(layers\.\d+\.)?", "", scope)


def decoder_layer(row: LayerRow) -> str:
    """``layer 3``, or ``outside`` for embedding, last norm, head and rotary tables."""
    match = re.match(r"transformer\.layers\.(\d+)\.", row.name)
    return f"layer {match[1]}" if match else "outside"


GROUPINGS: Mapping[str, Callable[[LayerRow], str]] = {
    "part": part,
    "kind": lambda row: row.kind,
    "decoder layer": decoder_layer,
    "precision": lambda row: row.precision,
}


def groups(table: LayerTable, measure: str = "weight bytes", by: str = "part") -> dict[str, tuple[LayerRow, ...]]:
    """The layers of each bar, the longest bar first (decoder layers in their order); bars of length zero are left out.

    Raises ConfigError for an unknown measure or grouping.
    """
    amount, group_of = known("measure", MEASURES, measure).of, known("grouping", GROUPINGS, by)
    found: dict[str, list[LayerRow]] = {}
    for row in table:
        found.setdefault(group_of(row), []).append(row)
    totals = {name: sum(map(amount, rows)) for name, rows in found.items()}
    names = [name for name in found if totals[name]]
    if by != "decoder layer":
        names.sort(key=lambda name: -totals[name])
    else:
        names.sort(key=lambda name: int(name.removeprefix("layer ")) if name != "outside" else -1)
    return {name: tuple(found[name]) for name in names}


def known(what: str, table: Mapping[str, Any], name: str) -> Any:
    """The entry of that name; ConfigError lists the names that there are."""
    if name not in table:
        raise ConfigError(f"there is no such {what}", got=repr(name), expected=" | ".join(table))
    return table[name]
