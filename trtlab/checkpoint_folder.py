"""Writes a checkpoint's folder: config.json, the file of each rank, tokenizer and report, in one step or not at all."""

from __future__ import annotations

import contextlib
import json
from collections import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtlab.config.algorithms import WeightOnlyForm
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.convert.trtllm_config import config_to_json, provenance
from trtlab.convert.trtllm_ranks import RANK_FILE, rank_file
from trtlab.errors import CheckpointError, ConfigError
from trtlab.model.names import EMBEDDING, HEAD
from trtlab.model.tensor_specs import tensor_specs
from trtlab.parallel.shard import shared_where_possible
from trtlab.progress import progress
from trtlab.quantize.report import QuantizationReport
from trtlab.quantize.report_file import REPORT, write_report
from trtlab.quantize.run import Quantization
from trtlab.quantize.weight_only import to_plain
from trtlab.runtime.tokenizer import TOKENIZER_FILES, copy_tokenizer
from trtlab.storage.files import TensorFile, replacing, write_safetensors
from trtlab.storage.lazy import LazyTensor


@dataclass(frozen=True)
class Companions:
    """What belongs to a checkpoint besides its tensors and its tokenizer.

    ``unquantized`` are the source's tensors, if they are at hand; ``form`` is how W8A16 and W4A16 are stored unless
    ``save`` is told another form.
    """

    report: QuantizationReport | None = None
    unquantized: abc.Mapping[str, LazyTensor] | None = None
    form: WeightOnlyForm = "integers"

    def in_form(
        self, config: ModelConfig, tensors: abc.Mapping[str, LazyTensor], form: WeightOnlyForm | None
    ) -> tuple[WeightOnlyForm | None, abc.Mapping[str, LazyTensor]]:
        """The form to write, None for a model that has no two, and the tensors in it.

        Raises:
            ConfigError: A form is given, and the model is not quantized to W8A16 or W4A16.
            CheckpointError: The plain form has no source.
        """
        if not config.quantization.has_plain_form:
            if form is not None:
                raise ConfigError(
                    "weight_only chooses how W8A16 and W4A16 are stored, and this checkpoint has other weights",
                    got=config.quantization.quant_algo or "unquantized weights",
                    remedy="leave weight_only out",
                )
            return None, tensors
        form = form or self.form
        return form, to_plain(config, tensors, self.unquantized) if form == "plain" else tensors


@contextlib.contextmanager
def writing_checkpoint(
    folder: Path, meta: abc.Mapping[str, Any], tokenizer_path: Path | None, report: QuantizationReport | None
) -> Iterator[Path]:
    """A new folder with config.json, tokenizer and report, which replaces ``folder`` when the block ends."""
    with replacing(folder, ours=_is_ours, marker="mapping", error=CheckpointError) as scratch:
        (scratch / "config.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(tokenizer_path, scratch)
        if report is not None:
            write_report(scratch, report)
        yield scratch


def write_quantized(
    folder: Path, quantization: Quantization, source: str, tokenizer_path: Path | None
) -> QuantizationReport:
    """Quantize into a folder of one rank, each tensor written when it is done; returns the report, which it holds."""
    config, one_rank = quantization.config, Mapping()
    form: WeightOnlyForm | None = "integers" if config.quantization.has_plain_form else None
    meta = config_to_json(config, one_rank, shared_where_possible(config, one_rank), provenance(source, form))
    with writing_checkpoint(folder, meta, tokenizer_path, None) as scratch:
        specs = tensor_specs(config)
        shapes = {name: (spec.shape, spec.dtype or config.torch_dtype) for name, spec in specs.items()}
        with TensorFile(scratch / rank_file(0), shapes) as file:
            report = quantization.run(lambda name, tensor: file.put(name, tensor.read()))
        write_report(scratch, report)
    return report


def write_ranks(scratch: Path, ranks: Sequence[abc.Mapping[str, LazyTensor]], name: str) -> None:
    """Write the file of each rank, one tensor at a time; ``name`` is what the progress bar shows."""
    total = sum(tensor.nbytes for tensors in ranks for tensor in tensors.values())
    with progress(f"saving {name}", total) as bar:
        for rank, tensors in enumerate(ranks):
            write_safetensors(scratch / rank_file(rank), tensors, on_tensor=lambda t: bar.update(t.nbytes))


def tied_config(config: ModelConfig, tensors: abc.Mapping[str, LazyTensor]) -> ModelConfig:
    """The config of the same model as a tied one.

    Raises ConfigError, with the largest difference, when token table and head differ.
    """
    if config.tie_word_embeddings:
        return config
    gap = float((tensors[EMBEDDING].read().float() - tensors[HEAD].read().float()).abs().max())
    if gap > 0:
        raise ConfigError(
            "use_embedding_sharing needs a tied model: lookup table and head differ",
            got=f"a largest difference of {gap:.6g}",
            remedy="leave use_embedding_sharing out",
        )
    return config.replace(tie_word_embeddings=True)


def _is_ours(name: str) -> bool:
    return name in TOKENIZER_FILES or name in ("config.json", REPORT) or RANK_FILE.fullmatch(name) is not None
