"""Quantizes a model layer by layer, then its head: reads, calibrates, quantizes and reports one, then frees it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.config.algorithms import check_supported
from trtlab.config.model import ModelConfig
from trtlab.config.quant import HEAD_MODULE, QuantConfig
from trtlab.errors import QuantizeError
from trtlab.model.names import EMBEDDING, FINAL_NORM, HEAD, LAYER_PREFIX, POSITIONS, layer_name, source_name
from trtlab.model.quantized_specs import TensorSpec
from trtlab.model.tensor_specs import quantized_linears, tensor_specs
from trtlab.model.weights import final_norm
from trtlab.progress import progress
from trtlab.quantize import awq, fp8, kv_cache, smoothquant, smoothquant_modelopt, weight_only
from trtlab.quantize.calibrate import Calibration
from trtlab.quantize.layer import CalibratedLayer, QuantizedLayer, require_finite
from trtlab.quantize.peak import Peak, predict
from trtlab.quantize.report import LinearReport, QuantizationReport, report_kv, report_linears
from trtlab.quantize.texts import TextBatch, Texts, batches, encode_texts
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.storage.lazy import LazyTensor, in_memory

Sink = Callable[[str, LazyTensor], None]
QUANTIZERS: dict[str, Callable[[CalibratedLayer], QuantizedLayer]] = {
    "weight_only": weight_only.quantize_layer,
    "smoothquant": smoothquant.quantize_layer,
    "smoothquant_modelopt": smoothquant_modelopt.quantize_layer,
    "fp8": fp8.quantize_layer,
    "awq": awq.quantize_layer,
    "awq_fp8": awq.quantize_layer_fp8,
}


@dataclass(frozen=True)
class Quantization:
    """A checked quantization, ready to run: the resulting config, the source tensors and the calibration texts."""

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    texts: Sequence[TextBatch]

    def peak(self, *, in_memory: bool) -> Peak:
        """The predicted memory of ``run``."""
        return predict(self.config, self.tensors, self.texts, in_memory=in_memory)

    @torch.inference_mode()
    def run(self, sink: Sink, done: Callable[[int], object] | None = None) -> QuantizationReport:
        """Pass every tensor of the quantized model to ``sink``, layer by layer, and return the report.

        ``done(1)`` is called after each of ``steps``; without it there is a progress bar.
        """
        if done is None:
            with progress(f"quantizing {self._title}", self.steps, unit="layer") as bar:
                return self.run(sink, bar.update)
        specs = tensor_specs(self.config)
        rows: list[LinearReport] = []
        kv_rows = []
        for layer in self.layers():
            result = quantize_layer(layer)
            self._pass_on(layer.index, specs, result.tensors, sink)
            rows += report_linears(layer, result)
            kv_rows += report_kv(layer, result)
            del layer, result  # before the next layer is read
            done(1)
        quantized = tuple(map(_prefix, self._indices))
        for name in specs:
            if not name.startswith(quantized):
                sink(name, self.tensors[name])
        return QuantizationReport(self.config.quantization, tuple(rows), tuple(kv_rows))

    @property
    def steps(self) -> int:
        """The number of ``layers``."""
        return len(self._indices)

    @property
    def _indices(self) -> list[int | None]:
        head = [None] if self.config.quantization.quantizes_head else []
        return [*range(self.config.num_hidden_layers), *head]

    def layers(self) -> Iterator[CalibratedLayer]:
        """Each layer, and last a head that is quantized, with weights and statistics; one is in memory at a time."""
        plain = self.config.replace(quantization=QuantConfig())
        specs, algorithm = tensor_specs(plain), self.config.quantization.algorithm
        for name, tensor in self.tensors.items():
            if not name.startswith(LAYER_PREFIX):  # a layer's tensors are checked when the layer is read
                require_finite(name, tensor.read())
        calibration = None
        if self.texts:
            gram = algorithm is not None and algorithm.grouped
            positions = self.tensors[POSITIONS].read() if POSITIONS in self.tensors else None
            calibration = Calibration(plain, self.texts, self.tensors[EMBEDDING].read(), positions, gram=gram)
        for index in self._indices:
            yield self._read(index, specs, calibration)

    @property
    def _title(self) -> str:
        quant = self.config.quantization
        algorithms = [quant.quant_algo, quant.kv_cache_quant_algo and f"{quant.kv_cache_quant_algo} KV cache"]
        return " + ".join(name for name in algorithms if name)

    def _read(
        self, index: int | None, specs: Mapping[str, TensorSpec], calibration: Calibration | None
    ) -> CalibratedLayer:
        if index is None:
            return self._read_head(calibration)
        prefix = _prefix(index)
        weights = {}
        for name in specs:
            if name.startswith(prefix):
                weights[name.removeprefix(prefix)] = self.tensors[name].read().float()
                require_finite(name, weights[name.removeprefix(prefix)])
        statistics = None if calibration is None else calibration.run_layer(index, weights)
        return CalibratedLayer(self.config, index, weights, statistics)

    def _read_head(self, calibration: Calibration | None) -> CalibratedLayer:
        head = self.tensors[source_name(HEAD, self.tensors)].read().float()
        norm = {name: tensor.read().float() for name, tensor in self.tensors.items() if name.startswith(FINAL_NORM)}
        statistics = None if calibration is None else calibration.run_head(final_norm(self.config, norm), head)
        return CalibratedLayer(self.config, None, {HEAD: head}, statistics)

    def _pass_on(
        self, index: int | None, specs: Mapping[str, TensorSpec], result: Mapping[str, Tensor], sink: Sink
    ) -> None:
        for name, spec in specs.items():
            if not name.startswith(_prefix(index)):
                continue
            tensor = result.get(name.removeprefix(layer_name(index, "")))
            if tensor is None:
                sink(name, self.tensors[name])
                continue
            dtype = spec.dtype or self.config.torch_dtype
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, dtype), (name, tensor.shape, tensor.dtype, spec)
            sink(name, in_memory(tensor))


def _prefix(index: int | None) -> str:
    """What the names of all tensors of a layer, or of the head, begin with."""
    return f"{HEAD_MODULE}." if index is None else layer_name(index, "")


def quantize_layer(layer: CalibratedLayer) -> QuantizedLayer:
    """The quantized tensors of one layer and its cache, or of the head, by the recipe in the layer's config."""
    quant = layer.config.quantization
    result = QuantizedLayer({}) if quant.algorithm is None else QUANTIZERS[quant.algorithm.family](layer)
    algorithm = quant.kv_cache_quant_algo
    if algorithm is not None and layer.index is not None:
        result.tensors.update(kv_cache.kv_scales(algorithm, quant.kv_cache_scales, layer.statistics))
    return result


def prepare(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    tokenizer: Tokenizer | None,
    quant: QuantConfig,
    calibration: Texts | None,
) -> Quantization:
    """Check model, recipe and texts together before anything is computed or written.

    Args:
        config: The settings of the source.
        tensors: Its tensors by name.
        tokenizer: Encodes texts that are strings; None if there are only token ids.
        quant: The recipe.
        calibration: Texts for a recipe that reads texts, None for one that does not.

    Raises:
        QuantizeError: Texts are missing, not needed or unusable, or the model is already quantized.
        ConfigError: The recipe does not fit the model.
    """
    if config.quantization.active:
        raise QuantizeError(
            f"this checkpoint is already quantized ({config.quantization.quant_algo or 'its KV cache'})",
            remedy="quantize the unquantized checkpoint",
        )
    if not quant.active:
        raise QuantizeError(
            "the recipe quantizes nothing", remedy="set quant_algo, kv_cache_quant_algo or both in QuantConfig"
        )
    check_supported(quant.algorithm)
    if quant.quantize_lm_head and quant.algorithm is None:
        raise QuantizeError(
            "quantize_lm_head needs an algorithm for the head", remedy="set quant_algo, or leave quantize_lm_head out"
        )
    quantized = config.replace(quantization=quant)
    tensor_specs(quantized)  # raises ConfigError if groups do not divide the inputs of a linear
    _check_exclusions(config, quant)
    if not quant.reads_texts and calibration is not None:
        raise QuantizeError(
            f"{_algorithms(quant)} needs no calibration texts: its scales come from the weights alone",
            remedy="leave calibration out",
        )
    if quant.reads_texts and calibration is None:
        raise QuantizeError(
            f"{_algorithms(quant)} needs calibration texts: this step reads {quant.reads_texts}",
            remedy="pass calibration=[...], a few dozen texts like those that the model will read",
        )
    texts: list[TextBatch] = []
    if calibration is not None:
        texts = batches(encode_texts(calibration, tokenizer, config.vocab_size, config.max_position_embeddings))
    return Quantization(quantized, tensors, texts)


def _check_exclusions(config: ModelConfig, quant: QuantConfig) -> None:
    """Raise QuantizeError for a pattern that matches no module, and for patterns that exclude every linear."""
    modules = [name.removesuffix(".weight") for name in tensor_specs(config)]
    for pattern in quant.exclude_modules:
        if not fnmatch.filter(modules, pattern):
            raise QuantizeError(
                "exclude_modules has a pattern that matches no module",
                got=repr(pattern),
                expected=f"a name like {layer_name(0, 'mlp.fc')!r}, or a pattern like '*.attention.dense'",
            )
    if quant.quant_algo is not None and not quantized_linears(config.replace(quantization=quant)):
        raise QuantizeError(
            f"{quant.quant_algo} has nothing to quantize: exclude_modules matches every linear",
            got=quant.exclude_modules,
            remedy="exclude fewer modules, or leave quant_algo out",
        )


def _algorithms(quant: QuantConfig) -> str:
    cache = f"{quant.kv_cache_quant_algo} KV cache" if quant.kv_cache_quant_algo else None
    return " with ".join(name for name in (quant.quant_algo, cache) if name)
