"""Prediction of the memory that a quantization takes. Reads no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from trtlab.card import Shown, size
from trtlab.config.model import ModelConfig
from trtlab.errors import QuantizeError
from trtlab.hardware import free_bytes
from trtlab.model.blocks import LM_HEAD, LinearSite, by_input, layer_plan
from trtlab.model.names import EMBEDDING, HEAD, layer_name, source_name
from trtlab.model.tensor_specs import linear_shape, tensor_specs
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
    sites, head = layer_plan(config).linears, (LM_HEAD,) if config.quantization.quantizes_head else ()
    layer, own = _one(config, results, tensors, layer_name(0, ""), sites), 0
    if head:
        own = _one(config, results, {HEAD: tensors[source_name(HEAD, tensors)]}, f"{LM_HEAD.part}.", head)
    tokens = sum(len(batch.ids) for batch in texts)
    return Peak(
        layer=max(layer, own, tensors[EMBEDDING].nbytes),
        hidden=tokens * config.hidden_size * FLOAT + _activations(config, texts),
        statistics=max(_statistics(config, sites, texts), _statistics(config, head, texts)),
        kept=sum(results.values()) if in_memory else 0,
        whole_model=sum(tensor.nbytes for tensor in tensors.values()) + sum(results.values()),
    )


def _one(
    config: ModelConfig,
    results: Mapping[str, int],
    tensors: Mapping[str, LazyTensor],
    prefix: str,
    sites: Sequence[LinearSite],
) -> int:
    """Bytes of one layer, or of the head, in both forms; its tensors begin with ``prefix``."""
    source = sum(t.nbytes // t.dtype.itemsize * FLOAT for name, t in tensors.items() if name.startswith(prefix))
    result = sum(nbytes for name, nbytes in results.items() if name.startswith(prefix))
    return source + result + WORKING_COPIES * max(prod(linear_shape(config, site)) for site in sites) * FLOAT


def _activations(config: ModelConfig, texts: Sequence[TextBatch]) -> int:
    """Bytes of one batch where it is widest: the MLP's three tensors, attention's four, or the head's one."""
    tokens = max((len(batch.ids) for batch in texts), default=0)
    head = config.vocab_size if config.quantization.quantizes_head else 0
    return tokens * max(3 * config.intermediate_size, 4 * config.hidden_size, head) * FLOAT


def _statistics(config: ModelConfig, sites: Sequence[LinearSite], texts: Sequence[TextBatch]) -> int:
    widths = [linear_shape(config, group[0])[1] for group in by_input(sites).values()]
    sampled = sum(len(batch.sampled) for batch in texts)
    algorithm = config.quantization.algorithm
    gram = sum(width * width for width in widths) if texts and algorithm is not None and algorithm.grouped else 0
    outputs = sum(linear_shape(config, site)[0] for site in sites)
    return (gram + sampled * (sum(widths) + outputs)) * FLOAT
