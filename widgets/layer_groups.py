"""Groups and measures of layers: what a bar stands for, and how long it is. Knows no picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtlab.card import count, size
from trtlab.errors import ConfigError
from trtlab.tensorrt.read.interpreter import LayerRow, LayerTable

# Kinds of layers without a weight; by their names they would count to the weight before them.
ATTENTION = ("rotary_embedding", "kv_cache_update", "attention_input", "attention_output")


@dataclass(frozen=True)
class Measure:
    """The meaning of a bar's length: a number for each layer, its text, and the units of the axis."""

    of: Callable[[LayerRow], int]
    text: Callable[[float], str]
    title: str  # after the sum of all bars
    axis: str
    units: tuple[tuple[float, str], ...]

    def unit(self, largest: float) -> tuple[float, str]:
        """The factor and the name of the largest unit that is not above ``largest``."""
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
    """The weight to which a layer belongs, as ``mlp.fc``; ``attention`` for layers of attention without a weight."""
    if row.kind in ATTENTION:
        return "attention"
    scope, colon, _ = row.name.partition(":")
    scope = scope if colon else scope.rpartition(".")[0]  # a constant ends in .weight, .scale, .epsilon
    return re.sub(r"^transformer\.(layers\.\d+\.)?", "", scope)


def decoder_layer(row: LayerRow) -> str:
    """``layer 3``, or ``outside`` for embedding, final norm, head and rotary tables."""
    match = re.match(r"transformer\.layers\.(\d+)\.", row.name)
    return f"layer {match[1]}" if match else "outside"


GROUPINGS: Mapping[str, Callable[[LayerRow], str]] = {
    "part": part,
    "kind": lambda row: row.kind,
    "decoder layer": decoder_layer,
    "precision": lambda row: row.precision,
}


def groups(table: LayerTable, measure: str = "weight bytes", by: str = "part") -> dict[str, tuple[LayerRow, ...]]:
    """The layers of each bar, longest bar first (decoder layers in their order), without bars of length zero.

    Raises ConfigError for an unknown measure or grouping.
    """
    amount, group_of = known("measure", MEASURES, measure).of, known("grouping", GROUPINGS, by)
    members: dict[str, list[LayerRow]] = {}
    for row in table:
        members.setdefault(group_of(row), []).append(row)
    totals = {name: sum(map(amount, rows)) for name, rows in members.items()}
    names = [name for name in members if totals[name]]
    if by != "decoder layer":
        names.sort(key=lambda name: -totals[name])
    else:
        names.sort(key=lambda name: int(name.removeprefix("layer ")) if name != "outside" else -1)
    return {name: tuple(members[name]) for name in names}


def known(what: str, table: Mapping[str, Any], name: str) -> Any:
    """The entry of that name. Raises ConfigError, which lists the known names."""
    if name not in table:
        raise ConfigError(f"there is no such {what}", got=repr(name), expected=" | ".join(table))
    return table[name]
