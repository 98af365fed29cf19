"""The first object of the workflow: a model's config and its lazy weights, under TensorRT-LLM's names."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import abc
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from trtlab.card import Shown
from trtlab.checkpoint_folder import Companions, tied_config, write_quantized, write_ranks, writing_checkpoint
from trtlab.config.algorithms import WeightOnlyForm
from trtlab.config.build import BuildConfig
from trtlab.config.calls import public
from trtlab.config.mapping import Mapping
from trtlab.config.model import DtypeChoice, ModelConfig
from trtlab.config.quant import QuantConfig
from trtlab.convert.folder_kinds import CHECKPOINT, HUGGING_FACE, META, open_folder
from trtlab.convert.gguf import gguf_path, gguf_source, gguf_tokenizer, read_gguf
from trtlab.convert.hugging_face import read_hugging_face
from trtlab.convert.meta import read_meta
from trtlab.convert.modelopt_config import HfConfig, hugging_face_object
from trtlab.convert.trtllm import read_checkpoint
from trtlab.convert.trtllm_config import config_to_json, provenance
from trtlab.convert.weights import read_weights
from trtlab.engine import Engine, build
from trtlab.errors import CheckpointError
from trtlab.model.tensor_specs import plain_linears, tensor_specs
from trtlab.parallel.launch import on_rank_zero
from trtlab.parallel.shard import EmbeddingLayout, shard
from trtlab.quantize.modelopt import check_modelopt, export_with_modelopt
from trtlab.quantize.report import QuantizationReport
from trtlab.quantize.report_file import read_report
from trtlab.quantize.run import Quantization, prepare
from trtlab.quantize.texts import Texts, encode_texts
from trtlab.quantize.weight_only import from_plain
from trtlab.runtime.tokenizer import Tokenizer, find_tokenizer
from trtlab.storage.gguf_file import open_gguf
from trtlab.storage.lazy import LazyTensor
from trtlab.storage.paths import PathLike, absolute_path
from trtlab.storage.pickle_by_path import Opening, Reopenable


@public
@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Shown, Reopenable):
    """A model that can be saved, quantized or built; its weights stay on disk until they are needed.

    ``tensors`` maps TensorRT-LLM's names to whole tensors, or to one rank's own when ``rank`` is given. Open one with
    ``from_hugging_face``, ``from_meta_ckpt``, ``from_gguf``, ``from_weights`` or ``load``. A pickle of one holds the
    path of its folder, which is opened again.
    """

    config: ModelConfig
    tensors: abc.Mapping[str, LazyTensor]
    source: str
    tokenizer_path: Path | None = None
    mapping: Mapping = field(default_factory=Mapping)
    layout: EmbeddingLayout = field(default_factory=EmbeddingLayout)
    rank: int | None = None
    folder: Path | None = None  # where the model is stored in TensorRT-LLM's format, if it is
    holds_files: bool = True  # whether the files there hold exactly these tensors, so that an engine may link them
    opened: Opening | None = field(default=None, init=False)

    @classmethod
    def from_hugging_face(
        cls, model_dir: PathLike, dtype: DtypeChoice = "auto", *, allow_unknown_config: bool = True
    ) -> Checkpoint:
        """Open a Hugging Face folder (config.json with safetensors, whole or sharded); nothing is copied.

        Args:
            model_dir: The folder.
            dtype: Type of the tensors; ``auto`` keeps the source's.
            allow_unknown_config: Whether a key of config.json that trtlab does not know is a warning, not an error.

        Raises:
            CheckpointError: For an unknown architecture, a quantized folder, a config key that changes the numbers and
                is not supported, or tensors that do not fit the config.
        """
        folder = open_folder(model_dir, HUGGING_FACE)
        config, tensors = read_hugging_face(folder, dtype, allow_unknown=allow_unknown_config)
        checkpoint = cls(config, tensors, f"Hugging Face folder {folder.name}", find_tokenizer(folder))
        return checkpoint.opened_by(cls.from_hugging_face, folder, dtype=dtype)

    @classmethod
    def from_meta_ckpt(
        cls,
        ckpt_dir: PathLike,
        dtype: DtypeChoice = "auto",
        *,
        max_position_embeddings: int | None = None,
        allow_unknown_config: bool = True,
    ) -> Checkpoint:
        """Open a folder in Meta's format (params.json with consolidated.*.pth); shards are joined when read.

        Args:
            ckpt_dir: The folder.
            dtype: Type of the tensors; ``auto`` keeps the source's.
            max_position_embeddings: Longest text in tokens, which params.json does not store; None derives it from the
                rotary embedding: 4096 for Llama 1 and 2, 8192 for Llama 3, 131072 for later ones, 16384 for Code Llama.
            allow_unknown_config: Whether a key of params.json that trtlab does not know is a warning, not an error.

        Raises:
            CheckpointError: For a folder that is incomplete or not supported, and for a pickle that would run code: the
                files are loaded as data only.
        """
        folder = open_folder(ckpt_dir, META)
        config, tensors = read_meta(
            folder, dtype, max_position_embeddings=max_position_embeddings, allow_unknown=allow_unknown_config
        )
        checkpoint = cls(config, tensors, f"Meta folder {folder.name}", find_tokenizer(folder))
        context = config.max_position_embeddings
        return checkpoint.opened_by(cls.from_meta_ckpt, folder, dtype=dtype, max_position_embeddings=context)

    @classmethod
    def from_gguf(
        cls, path: PathLike, dtype: DtypeChoice = "auto", *, dequantize: bool = True, allow_unknown_config: bool = True
    ) -> Checkpoint:
        """Open a GGUF file, llama.cpp's format, with its tokenizer and chat template.

        Architectures ``llama`` (Mistral's files too), ``qwen2`` and ``qwen3``; types F32, F16, BF16, Q8_0, Q4_0, Q4_1,
        Q5_0, Q5_1 and Q2_K to Q6_K, which are dequantized when they are read.

        Args:
            path: The file.
            dtype: Type of the tensors; ``auto`` is that of most matrices, and bfloat16 where they are quantized.
            dequantize: False keeps linears of Q4_0 in 4 bits: W4A16_AWQ in groups of 32, a QuantizedCheckpoint.
            allow_unknown_config: Whether a key that trtlab does not know is a warning, not an error.

        Raises:
            CheckpointError: The file is damaged or one of several; an architecture, a type or a key that changes the
                numbers is not supported; or the tensors do not fit the keys.
            MissingDependency: The package ``gguf`` is not installed.
        """
        file = open_gguf(gguf_path(path))
        config, tensors = read_gguf(file, dtype, allow_unknown=allow_unknown_config, dequantize=dequantize)
        kind = cls if dequantize else QuantizedCheckpoint
        checkpoint = kind(config, tensors, gguf_source(file, dequantize), gguf_tokenizer(file))
        return checkpoint.opened_by(cls.from_gguf, file.path, dtype=dtype, dequantize=dequantize)

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: abc.Mapping[str, Tensor]) -> Checkpoint:
        """A checkpoint from tensors in memory, by TensorRT-LLM's names (``tensor_specs(config)`` lists them).

        Raises CheckpointError listing every missing, surplus and mis-shaped tensor with the shape expected.
        """
        return cls(config, read_weights(config, weights), "weights in memory")

    @classmethod
    def load(cls, ckpt_dir: PathLike, rank: int | None = None, hf_config: HfConfig | None = None) -> Checkpoint:
        """Open a folder that ``save``, TensorRT-LLM or ModelOpt wrote.

        Args:
            ckpt_dir: The folder.
            rank: Open this rank alone, with its own tensors; None joins all ranks to whole tensors, when they are read.
            hf_config: The Hugging Face folder of the model, its config.json, or the config itself, for a folder whose
                config.json lacks the rotary embedding: ModelOpt leaves it out under transformers 5.

        Raises:
            CheckpointError: The folder is incomplete, of another kind or not supported; its tensors, its buffers, its
                ranks and its config.json contradict each other.
        """
        folder = open_folder(ckpt_dir, CHECKPOINT)
        hf_object = None if hf_config is None else hugging_face_object(hf_config)
        stored = read_checkpoint(folder, rank, hf_object)
        source = f"checkpoint {folder.name}" if stored.source is None else stored.source
        tensors = from_plain(stored.config, stored.tensors) if stored.is_plain else stored.tensors
        if rank is not None and stored.is_plain:
            tensors = shard(stored.config, stored.mapping, rank, tensors, stored.layout)
        parts = (stored.config, tensors, source, find_tokenizer(folder), stored.mapping, stored.layout, rank, folder)
        checkpoint = (
            QuantizedCheckpoint(
                *parts,
                holds_files=stored.is_exact,
                report=read_report(folder, stored.config),
                unquantized=stored.tensors if stored.is_plain else None,
            )
            if stored.config.quantization.active
            else Checkpoint(*parts, holds_files=stored.is_exact)
        )
        return checkpoint.opened_by(Checkpoint.load, folder, rank=rank, hf_config=hf_object)

    def save(
        self,
        ckpt_dir: PathLike,
        mapping: Mapping | None = None,
        use_parallel_embedding: bool = False,
        embedding_sharding_dim: int = 0,
        use_embedding_sharing: bool = False,
        weight_only: WeightOnlyForm | None = None,
    ) -> Path:
        """Write config.json, a ``rank{r}.safetensors`` for each rank and the tokenizer; returns the folder.

        One tensor is in memory at a time. The folder is replaced in one step: after an error or a kill the old folder
        is still complete.

        Args:
            ckpt_dir: The folder.
            mapping: The ranks to split the model over.
            use_parallel_embedding: Whether the token table is cut over the tensor-parallel ranks.
            embedding_sharding_dim: Where it is cut: 0 by rows, 1 by columns.
            use_embedding_sharing: Whether token table and head are stored once.
            weight_only: The form of W8A16 and W4A16. ``"plain"`` stores the unquantized weights, which every version
                of TensorRT-LLM quantizes when it builds: the form to give away. ``"integers"`` stores what runs here,
                in a half or a quarter of the bytes; only trtlab reads it, as TensorRT-LLM stores integers in the layout
                of one GPU's kernels. None: as the folder that was loaded, ``"integers"`` for a new one.

        Raises:
            ConfigError: The model cannot be split this way, or is to share its embedding and the two tables differ.
            CheckpointError: The plain form is asked for, and the unquantized weights are not at hand.
        """
        self.require_whole("saved")
        mapping = mapping or Mapping()
        layout = EmbeddingLayout(use_parallel_embedding, embedding_sharding_dim, use_embedding_sharing)
        config = tied_config(self.config, self.tensors) if use_embedding_sharing else self.config
        form, tensors = self._companions.in_form(config, self.tensors, weight_only)
        stored = plain_linears(config) if form == "plain" else config
        ranks = [shard(stored, mapping, rank, tensors, layout) for rank in mapping.ranks]
        folder = absolute_path(ckpt_dir)
        meta = config_to_json(config, mapping, layout, provenance(self.source, form))
        with writing_checkpoint(folder, meta, self.tokenizer_path, self._companions.report) as scratch:
            write_ranks(scratch, ranks, folder.name)
        return folder

    @property
    def _companions(self) -> Companions:
        return Companions()

    def quantize(
        self, quant_config: QuantConfig, calibration: Texts | None = None, output_dir: PathLike | None = None
    ) -> QuantizedCheckpoint:
        """A quantized checkpoint; this checkpoint does not change.

        Args:
            quant_config: The algorithms.
            calibration: Texts, or lists of token ids, for an algorithm that reads them.
            output_dir: Folder to write each layer to when it is done, so that memory holds one layer in both forms.
                When mpirun started several processes and all call this, rank 0 writes; the others wait for the folder
                and open it.

        Raises:
            QuantizeError: The texts are missing, not needed or useless, the model is quantized already, or this machine
                has too little memory free. Nothing is written then.
        """
        self.require_whole("quantized")
        if output_dir is None:
            quantization = self._prepare(quant_config, calibration, in_memory=True)
            tensors: dict[str, LazyTensor] = {}
            report = quantization.run(tensors.__setitem__)
            return QuantizedCheckpoint(
                quantization.config, tensors, self.source, self.tokenizer_path, report=report, made_by=quantization
            )
        folder, results = absolute_path(output_dir), list[QuantizedCheckpoint]()

        def write() -> None:
            quantization = self._prepare(quant_config, calibration, in_memory=False)
            report = write_quantized(folder, quantization, self.source, self.tokenizer_path)
            quantized = dataclasses.replace(QuantizedCheckpoint.load(folder), report=report, made_by=quantization)
            results.append(quantized.opened_by(Checkpoint.load, folder, rank=None, hf_config=None))

        on_rank_zero(write)
        return results[0] if results else QuantizedCheckpoint.load(folder)  # empty on the other ranks

    def _prepare(self, quant_config: QuantConfig, calibration: Texts | None, *, in_memory: bool) -> Quantization:
        tokenizer = Tokenizer(self.tokenizer_path) if self.tokenizer_path else None
        quantization = prepare(self.config, self.tensors, tokenizer, quant_config, calibration)
        quantization.peak(in_memory=in_memory).require_room()
        return quantization

    def build(
        self, build_config: BuildConfig | None = None, mapping: Mapping | None = None, plan: bool = True
    ) -> Engine:
        """An engine with these bounds; ``plan=False`` builds no TensorRT plan. The checkpoint does not change."""
        return build(self, build_config or BuildConfig(), mapping or Mapping(), plan=plan)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the storage dtype."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of the model's parameters; a tied table counts once."""
        return sum(tensor.nbytes // tensor.dtype.itemsize for tensor in self.tensors.values())

    def require_whole(self, what: str) -> None:
        """Raise CheckpointError when this holds a single rank of several; ``what`` completes "cannot be"."""
        if self.rank is not None and len(self.mapping.ranks) > 1:
            raise CheckpointError(
                f"rank {self.rank} of {self.mapping.world_size} alone cannot be {what}",
                remedy="open the folder without rank=",
            )


@public
@dataclass(frozen=True, eq=False, repr=False)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint with quantized linears, a quantized KV cache or both.

    ``report`` is stored in the folder, None where another tool wrote it. ``made_by`` is the quantization with its
    source and texts, which can quantize again; ``quantize`` sets it, and it is not stored. ``unquantized`` are the
    tensors of a folder that holds W8A16 or W4A16 in the plain form: its linears are quantized when they are read.
    """

    report: QuantizationReport | None = None
    made_by: Quantization | None = None
    unquantized: abc.Mapping[str, LazyTensor] | None = None

    @classmethod
    def load(
        cls, ckpt_dir: PathLike, rank: int | None = None, hf_config: HfConfig | None = None
    ) -> QuantizedCheckpoint:
        """Open a folder that holds a quantized checkpoint; see ``Checkpoint.load``."""
        checkpoint = Checkpoint.load(ckpt_dir, rank, hf_config)
        if not isinstance(checkpoint, QuantizedCheckpoint):
            raise CheckpointError(f"{checkpoint.source} is not quantized", remedy="open it with Checkpoint.load()")
        return checkpoint

    @property
    def _companions(self) -> Companions:
        source = self.unquantized if self.made_by is None else self.made_by.tensors
        return Companions(self.report, source, "integers" if self.unquantized is None else "plain")

    @classmethod
    def from_modelopt(
        cls, model_dir: PathLike, quant_config: QuantConfig, calibration: Texts, output_dir: PathLike
    ) -> QuantizedCheckpoint:
        """Quantize a Hugging Face folder with NVIDIA's ModelOpt, as TensorRT-LLM does for FP8, AWQ and SQ_PER_CHANNEL.

        Raises MissingDependency without ``nvidia-modelopt``, QuantizeError for settings that ModelOpt does not support.
        """
        check_modelopt(quant_config)
        source = absolute_path(model_dir)
        plain = Checkpoint.from_hugging_face(source)
        tokenizer = Tokenizer(plain.tokenizer_path) if plain.tokenizer_path else None
        rows = encode_texts(calibration, tokenizer, plain.config.vocab_size, plain.config.max_position_embeddings)
        with tempfile.TemporaryDirectory() as scratch:
            export_with_modelopt(source, plain.config, quant_config, rows, Path(scratch))
            exported = cls.load(scratch, hf_config=source)
            config = exported.config.replace(vocab_size=plain.config.vocab_size)
            tensors = {  # AWQ exports pad the vocabulary
                name: exported.tensors[name].narrow(0, 0, spec.shape[0]) for name, spec in tensor_specs(config).items()
            }
            QuantizedCheckpoint(config, tensors, plain.source, plain.tokenizer_path).save(output_dir)
        return cls.load(output_dir)
