"""Prediction of the memory that a quantization takes. Reads no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trtlab.card import Shown, size
from trtlab.config.model import ModelConfig
from trtlab.errors import QuantizeError
from trtlab.hardware import free_bytes
from trtlab.model.blocks import layer_plan
from trtlab.model.names import EMBEDDING, layer_name
from trtlab.model.tensor_specs import tensor_specs
from trtlab.quantize.texts import TextBatch
from trtlab.storage.lazy import LazyTensor

FLOAT = 4  # bytes: layers are computed in float32
WORKING_COPIES = 4  # of the largest linear, while its scales are searched


@dataclass(frozen=True, repr=False)
class Peak(Shown):
    """Predicted bytes in addition to what the process already holds.

    ``layer`` is one layer in both forms, ``hidden`` the hidden states of all texts, ``statistics`` those of one layer,
    ``kept`` the result if it stays in memory. ``whole_model`` is for comparison: all weights in their own dtype and
    their quantized copy.
    """

    layer: int
    hidden: int
    statistics: int
    kept: int
    whole_model: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.layer + self.hidden + self.statistics + self.kept

    @property
    def at_once(self) -> int:
        """The same work with the whole model in memory in both forms."""
        return self.layer + self.hidden + self.statistics + self.whole_model

    def require_room(self) -> None:
        """Raise QuantizeError when this machine has less memory free."""
        free = free_bytes()
        if free and self.total > free:
            raise QuantizeError(
                f"quantizing takes about {size(self.total)}: {size(self.layer)} for one layer in both forms, "
                f"{size(self.hidden + self.statistics)} for calibration, {size(self.kept)} for the result",
                expected=f"at most {size(free)}, which this machine has free",
                remedy=self._remedy(),
            )

    def _remedy(self) -> str:
        given = ["output_dir"] * bool(self.kept) + ["fewer texts or shorter ones"] * bool(self.hidden)
        return f"give {', '.join(given)}" if given else "free memory, or quantize on a machine that has more"


def predict(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], texts: Sequence[TextBatch], *, in_memory: bool
) -> Peak:
    """The peak of quantizing ``tensors`` to the recipe in ``config``.

    With ``in_memory`` the quantized tensors stay in memory; otherwise each layer is written to disk and freed.
    """
    specs = tensor_specs(config)
    sizes = {
        name: torch.Size(spec.shape).numel() * (spec.dtype or config.torch_dtype).itemsize
        for name, spec in specs.items()
    }
    results = {name: nbytes for name, nbytes in sizes.items() if name not in tensors or specs[name].dtype is not None}
    prefix = layer_name(0, "")
    source = sum(t.nbytes // t.dtype.itemsize * FLOAT for name, t in tensors.items() if name.startswith(prefix))
    linears = {linear: tensors[layer_name(0, f"{linear}.weight")].shape for linear in layer_plan(config).parts}
    largest = max(rows * width for rows, width in linears.values()) * FLOAT
    result = sum(nbytes for name, nbytes in results.items() if name.startswith(prefix))
    tokens = sum(len(batch.ids) for batch in texts)
    return Peak(
        layer=max(source + result + WORKING_COPIES * largest, tensors[EMBEDDING].nbytes),
        hidden=tokens * config.hidden_size * FLOAT + _activations(config, texts),
        statistics=_statistics(config, linears, texts),
        kept=sum(results.values()) if in_memory else 0,
        whole_model=sum(tensor.nbytes for tensor in tensors.values()) + sum(results.values()),
    )


def _activations(config: ModelConfig, texts: Sequence[TextBatch]) -> int:
    """Bytes of one batch inside a layer: the MLP's three wide tensors or attention's four, whichever is larger."""
    tokens = max((len(batch.ids) for batch in texts), default=0)
    return tokens * max(3 * config.intermediate_size, 4 * config.hidden_size) * FLOAT


def _statistics(config: ModelConfig, linears: Mapping[str, tuple[int, ...]], texts: Sequence[TextBatch]) -> int:
    widths = [linears[sites[0].part][1] for sites in layer_plan(config).inputs.values()]
    sampled = sum(len(batch.sampled) for batch in texts)
    algorithm = config.quantization.algorithm
    gram = sum(width * width for width in widths) if texts and algorithm is not None and algorithm.grouped else 0
    outputs = sum(shape[0] for shape in linears.values())
    return (gram + sampled * (sum(widths) + outputs)) * FLOAT
