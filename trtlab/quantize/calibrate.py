"""Calibration: an op set that runs the decoder layer by layer, then the head; records inputs and outputs of linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.errors import QuantizeError
from trtlab.model.blocks import LM_HEAD, LinearSite, by_input, layer_plan
from trtlab.model.decoder import residual_stream
from trtlab.model.names import HEAD, layer_name, split_layer_name
from trtlab.model.rope import rotary_table
from trtlab.model.scales import all_finite, amax
from trtlab.model.weights import Dense, Linear, ModelWeights, Norm, layer_weights
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.torch import TorchOps, spread
from trtlab.parallel.comm import Solo
from trtlab.quantize.layer import GRAM_BLOCK, InputStatistics, LayerStatistics
from trtlab.quantize.texts import TextBatch

CPU = torch.device("cpu")


class ObservingOps(TorchOps):
    """TorchOps that passes inputs and outputs of linears, and K and V, to a recorder. Uses no hooks."""

    def __init__(self, batch: PackedBatch, cache: PagedCache, recorder: Recorder) -> None:
        super().__init__(batch, cache, Solo())
        self._recorder = recorder

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        assert isinstance(weight, Dense), f"calibration needs an unquantized {weight.name}, got {type(weight).__name__}"
        y = super().linear(x, weight)
        self._recorder.linear(weight, x, y)
        return y

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # K is recorded after rotary, because the cache stores it so.
        self._recorder.cached(k, v)
        return super().attention(layer, q, k, v)


@dataclass
class _Input:
    """Running statistics of one linear's input."""

    amax: Tensor
    mean: Tensor
    sample: list[Tensor]
    gram: Tensor | None


class Recorder:
    """Running statistics of some linears over all batches. An input that several linears share is recorded once."""

    def __init__(self, sites: Sequence[LinearSite], *, gram: bool) -> None:
        self._gram = gram
        self._first_readers = {group[0].part: reads for reads, group in by_input(sites).items()}
        self._inputs: dict[str, _Input] = {}
        self._outputs: dict[str, Tensor] = {}
        self._sampled: dict[str, list[Tensor]] = {}
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.batch: TextBatch | None = None

    def linear(self, weight: Dense, x: Tensor, y: Tensor) -> None:
        """Record input ``[tokens, in]`` and output ``[tokens, out]`` of a linear."""
        assert self.batch is not None, "the recorder has no batch"
        linear = _part(weight.name)
        self._outputs[linear] = _larger(self._outputs.get(linear), amax(y, 0))
        sampled = y[self.batch.sampled]
        self._sampled.setdefault(linear, []).append(sampled if weight.bias is None else sampled - weight.bias)
        if linear in self._first_readers:
            self._input(self._first_readers[linear], x)

    def _input(self, reads: str, x: Tensor) -> None:
        assert self.batch is not None, "the recorder has no batch"
        shares = self.batch.shares
        if reads not in self._inputs:
            width = x.shape[1]
            gram = torch.zeros(width, width) if self._gram else None
            self._inputs[reads] = _Input(torch.zeros(width), torch.zeros(width), [], gram)
        running = self._inputs[reads]
        magnitudes = x.abs()
        running.amax = torch.maximum(running.amax, magnitudes.amax(0))
        running.mean += shares @ magnitudes
        running.sample.append(x[self.batch.sampled].clone())
        if running.gram is not None:
            weighted = x * shares.sqrt()[:, None]
            for start in range(0, x.shape[1], GRAM_BLOCK):  # only the lower triangle; statistics() mirrors it
                block = slice(start, start + GRAM_BLOCK)
                running.gram[block, : block.stop].addmm_(weighted[:, block].T, weighted[:, : block.stop])

    def cached(self, k: Tensor, v: Tensor) -> None:
        """Record keys and values ``[tokens, kv_heads, head_size]``."""
        self._keys = _larger(self._keys, amax(k, (0, 2)))
        self._values = _larger(self._values, amax(v, (0, 2)))

    def statistics(self) -> LayerStatistics:
        """The statistics over all recorded batches."""
        assert self._inputs, "no batch has been recorded"
        for running in self._inputs.values():
            if running.gram is not None:
                _mirror(running.gram)
        inputs = {
            reads: InputStatistics(running.amax, running.mean, torch.cat(running.sample), running.gram)
            for reads, running in self._inputs.items()
        }
        sampled = {linear: torch.cat(rows) for linear, rows in self._sampled.items()}
        nothing = torch.zeros(0)
        keys, values = (nothing if largest is None else largest for largest in (self._keys, self._values))
        return LayerStatistics(inputs, self._outputs, sampled, keys, values)


def _part(name: str) -> str:
    """``mlp.fc`` from the name of its weight, ``lm_head`` from the head's."""
    split = split_layer_name(name)
    return (name if split is None else split[1]).removesuffix(".weight")


def _mirror(gram: Tensor) -> None:
    """Copy the blocks below the diagonal above it."""
    for start in range(GRAM_BLOCK, len(gram), GRAM_BLOCK):
        block = slice(start, start + GRAM_BLOCK)
        gram[:start, block] = gram[block, :start].T


def _larger(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else torch.maximum(before, now)


class Calibration:
    """Runs all texts through the model layer by layer, and the head last; only one of them is in memory at a time."""

    def __init__(
        self,
        config: ModelConfig,
        texts: Sequence[TextBatch],
        embedding: Tensor,
        positions: Tensor | None = None,
        *,
        gram: bool,
    ) -> None:
        longest = max(length for batch in texts for length in batch.lengths)
        self._config = config
        self._texts = texts
        self._gram = gram
        self._rotary = spread(rotary_table(config, longest), torch.float32, CPU)
        slots = max(len(batch.lengths) for batch in texts)
        self._tables = BlockTables.apart(slots, longest)
        self._cache = _one_layer_cache(config, slots, longest)
        self.hidden = [F.embedding(batch.ids, embedding).float() for batch in texts]  # [tokens, hidden] each
        if positions is not None:
            for x, batch in zip(self.hidden, texts, strict=True):
                x += torch.cat([positions[:length] for length in batch.lengths])

    @torch.inference_mode()
    def run_layer(self, layer: int, weights: dict[str, Tensor]) -> LayerStatistics:
        """Run one layer over all texts and return its statistics.

        Args:
            layer: The number of the layer; layers run in order, each once.
            weights: Its tensors in float32, by their names within a layer.

        Raises:
            QuantizeError: The hidden states became NaN or infinite.
        """
        named = {layer_name(layer, part): tensor for part, tensor in weights.items()}
        parts = layer_weights(self._config, named, layer, layer)
        model = ModelWeights(
            self._config.num_attention_heads, self._config.num_key_value_heads, (parts,), None, None, None
        )
        recorder = Recorder(layer_plan(self._config).linears, gram=self._gram)
        for number, batch in enumerate(self._texts):
            x = residual_stream(self._ops(batch, recorder), self._config, model, self.hidden[number])
            if not all_finite(x):
                raise QuantizeError(
                    f"the activations of layer {layer} hold NaN or infinity on the calibration texts",
                    remedy="check weights and config of the source; nothing was written",
                )
            self.hidden[number] = x
        return recorder.statistics()

    @torch.inference_mode()
    def run_head(self, norm: Norm, weight: Tensor) -> LayerStatistics:
        """Run the final norm and the head over all texts, after all layers, and return the head's statistics.

        Args:
            norm: The final norm, in float32.
            weight: The head ``[vocab, hidden]`` in float32.
        """
        recorder, head = Recorder((LM_HEAD,), gram=self._gram), Dense(HEAD, weight)
        for number, batch in enumerate(self._texts):
            ops = self._ops(batch, recorder)
            ops.linear(ops.norm(self.hidden[number], norm), head)
        return recorder.statistics()

    def _ops(self, batch: TextBatch, recorder: Recorder) -> ObservingOps:
        recorder.batch = batch
        sequences = [NewTokens(slot, 0, length) for slot, length in enumerate(batch.lengths)]
        return ObservingOps(PackedBatch(sequences, self._rotary, self._tables, CPU), self._cache, recorder)


def _one_layer_cache(config: ModelConfig, slots: int, capacity: int) -> PagedCache:
    return PagedCache(
        layers=1,
        num_blocks=slots,
        kv_heads=config.num_key_value_heads,
        tokens_per_block=capacity,
        head_size=config.head_size,
        dtype=torch.float32,
        device=CPU,
    )
