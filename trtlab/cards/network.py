"""The cards of a TensorRT network: its layers, a table of them, a comparison with torch."""

from __future__ import annotations

from collections import Counter

from trtlab.card import Card, Table, bar, card, count, size
from trtlab.tensorrt.compare import Difference, NetworkComparison
from trtlab.tensorrt.read.interpreter import LayerRow, LayerTable, Network
from trtlab.tensorrt.read.readback import NetworkTensor

LISTED = 12  # rows of a long table that a card spells out


@card.register
def layer_table_card(table: LayerTable) -> Card:
    """The number of layers of each kind, and the layers with the most weights."""
    groups = {kind: [row for row in table if row.kind == kind] for kind in table.mix}
    work = {kind: sum(row.flops for row in rows) for kind, rows in groups.items()}
    most_work = max(work.values(), default=0) or 1
    kinds = tuple(
        (kind, str(len(rows)), size(sum(r.weight_bytes for r in rows)), count(work[kind]), bar(work[kind] / most_work))
        for kind, rows in groups.items()
    )
    heavy = [row for row in sorted(table, key=lambda row: -row.weight_bytes)[:LISTED] if row.weight_bytes]
    return Card(
        f"{len(table)} layers",
        (("weights", size(table.weight_bytes)), ("work", f"{count(table.flops)} FLOP")),
        (
            Table(("kind", " layers", " weights", " FLOP", ""), kinds),
            Table(
                ("largest constants", "precision", "shape", " bytes", ""),
                tuple((*_row(row), bar(row.weight_bytes / heavy[0].weight_bytes)) for row in heavy),
            ),
        ),
        next="trtlab.widgets.EngineLayers(engine), or engine.network() to step through them",
    )


def _row(row: LayerRow) -> tuple[str, str, str, str]:
    return row.name, row.precision, str(list(row.shape)), size(row.weight_bytes)


@card.register
def network_card(network: Network) -> Card:
    """Inputs, outputs and the first layers of a network."""
    mix = Counter(layer.kind for layer in network)
    return Card(
        f"Network · {len(network)} layers",
        (("mix", ", ".join(f"{number} {kind}" for kind, number in mix.most_common(8))),),
        (
            Table(("input", "dtype", "shape"), tuple(_tensor(t) for t in network.inputs[:LISTED])),
            Table(("output", "dtype", "shape"), tuple(_tensor(t) for t in network.outputs[:LISTED])),
            Table(
                ("first layers", "kind", "result"),
                tuple((layer.name, layer.kind, str(list(layer.outputs[0].shape))) for layer in network.layers[:LISTED]),
            ),
        ),
        next="network.run(inputs, keep=[names])",
    )


def _tensor(tensor: NetworkTensor) -> tuple[str, str, str]:
    return tensor.name, str(tensor.dtype), str(["any" if n == -1 else n for n in tensor.shape]).replace("'", "")


@card.register
def network_comparison_card(comparison: NetworkComparison) -> Card:
    """The diagnosis, and the differences over the prompt, layer by layer, as logarithmic lines."""
    rows = tuple(_difference(d, comparison.tolerance) for d in _shown(comparison))
    agree = sum(comparison.same_token)
    return Card(
        "Comparison · torch in float32 against the network",
        (
            ("reading", comparison.reading),
            ("next tokens", f"{agree} of {len(comparison.same_token)} agree"),
            *((("tolerance", f"{comparison.tolerance:g}, relative"),) if comparison.recipes is None else ()),
        ),
        (Table(("prompt: result", " relative", "1e-8 to 1", ""), rows),),
    )


def _shown(comparison: NetworkComparison) -> list[Difference]:
    """The differences at the end of each layer, and the first one above the tolerance."""
    ends = [d for d in comparison.step(0) if d.name.endswith(("mlp.proj", "lm_head", "vocab_embedding"))]
    start = comparison.start
    return [d for d in comparison.step(0) if d in ends or d == start]


def _difference(difference: Difference, tolerance: float) -> tuple[str, str, str, str]:
    decades = 8 + _log10(max(difference.relative, 1e-8))
    mark = "above" if not difference.relative <= tolerance else ""
    return difference.name, f"{difference.relative:.0e}", bar(decades / 8), mark


def _log10(value: float) -> int:
    return int(f"{value:.0e}".partition("e")[2])
