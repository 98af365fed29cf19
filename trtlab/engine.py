"""The third object of the workflow: a model split into ranks, with bounds fixed at build, and its TensorRT plans."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from trtlab.card import Shown
from trtlab.config.build import BuildConfig
from trtlab.config.calls import public
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import BackendName, SessionConfig
from trtlab.convert.check import check_dtype, check_layers, check_tensors
from trtlab.convert.kinds import ENGINE, open_folder
from trtlab.convert.trtllm import rank_dtypes, rank_file, rank_shapes
from trtlab.convert.trtllm_config import config_to_json
from trtlab.engine_config import read_engine_file
from trtlab.errors import EngineError, MissingDependency
from trtlab.memory.fits import require_room_to_build
from trtlab.model.tensor_specs import tensor_specs
from trtlab.parallel.shard import EmbeddingLayout, shard, shared_where_possible
from trtlab.progress import progress
from trtlab.runtime.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer, find_tokenizer
from trtlab.session.open import open_session
from trtlab.session.session import Session
from trtlab.storage.files import replacing, write_safetensors
from trtlab.storage.fingerprint import fingerprint
from trtlab.storage.lazy import LazyTensor, open_safetensors
from trtlab.storage.paths import PathLike, absolute_path
from trtlab.tensorrt.build.plans import Plans
from trtlab.tensorrt.compare import NetworkComparison, compare
from trtlab.tensorrt.emit.emission import Emission, emit
from trtlab.tensorrt.emit.ops import TensorRTOps
from trtlab.tensorrt.read.interpreter import LayerTable, Network
from trtlab.validation import require
from trtlab.version import VERSION

logger = logging.getLogger("trtlab")


class WeightSource(Protocol):
    """A checkpoint, as far as an engine needs it to be built or compared."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    @property
    def tensors(self) -> abc.Mapping[str, LazyTensor]:
        """The whole tensors by TensorRT-LLM's names."""
        ...

    @property
    def source(self) -> str:
        """The origin of the weights, in words."""
        ...

    @property
    def tokenizer_dir(self) -> Path | None:
        """The folder of the tokenizer, if there is one."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder that stores the tensors in TensorRT-LLM's format, if there is one."""
        ...

    @property
    def mapping(self) -> Mapping:
        """How ``folder`` splits the model over ranks."""
        ...

    @property
    def layout(self) -> EmbeddingLayout:
        """How ``folder`` splits the token table over ranks."""
        ...

    def require_whole(self, what: str) -> None:
        """Raise CheckpointError when this holds a single rank of several; ``what`` completes "cannot be"."""
        ...


@public
@dataclass(eq=False, repr=False)
class Engine(Shown):
    """A model ready to run: config, bounds, the lazy weights of each rank, and the plans that TensorRT built.

    ``plans`` is None for an engine without TensorRT plans, which runs in torch. ``weight_files`` are the ranks' files
    when a folder stores them in the same layout, so that ``save`` can link them. Use the engine as a context manager,
    or call ``close()``; after that every use is an error.
    """

    config: ModelConfig
    build_config: BuildConfig
    mapping: Mapping
    layout: EmbeddingLayout
    ranks: Sequence[dict[str, LazyTensor]]
    source: str
    tokenizer_dir: Path | None = None
    weight_files: Sequence[Path] = ()
    plans: Plans | None = None
    fingerprints: Sequence[str] = ()
    closed: bool = False

    def session(
        self,
        session_config: SessionConfig | None = None,
        backend: BackendName = "auto",
        device: str | torch.device | None = None,
    ) -> Session:
        """A session that generates with this engine; ``backend`` is auto, tensorrt, torch or interpreter."""
        config = SessionConfig() if session_config is None else session_config
        require(SessionConfig, config, "SessionConfig(enable_block_reuse=True), and the backend as backend=...")
        return open_session(self, config, backend, device)

    def network(self, rank: int = 0) -> Network:
        """The network that TensorRT compiles for one rank: a list of layers to walk, and to run on a CPU.

        It is emitted anew from the weights, which gives the same network each time.
        """
        return self.emission(rank).read()

    @property
    def layers(self) -> LayerTable:
        """Every layer of rank 0 as emitted, for one generated token: name, kind, precision, shape, bytes, FLOPs."""
        return self.layer_table()

    def layer_table(self, rank: int = 0, batch: int = 1, tokens: int = 1) -> LayerTable:
        """``layers`` of any rank, for ``batch`` rows of ``tokens`` tokens; only shapes are computed."""
        return self.emission(rank).table(batch=batch, tokens=tokens)

    def compare(
        self,
        checkpoint: WeightSource,
        prompt: str | Sequence[int],
        steps: int = 4,
        op_set: type[TensorRTOps] = TensorRTOps,
    ) -> NetworkComparison:
        """Compare this engine's network with torch in float32 on the checkpoint, layer by layer.

        Args:
            checkpoint: The same model, quantized or not.
            prompt: Text or token ids.
            steps: Number of tokens to decode after the prompt.
            op_set: A subclass may emit an op in another way, to plant an error and see it found.
        """
        if isinstance(prompt, str):
            if self.tokenizer_dir is None:
                raise EngineError("this engine has no tokenizer", remedy="give token ids")
            prompt = Tokenizer(self.tokenizer_dir).encode(prompt)
        weights = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
        return compare(self.emission(0, op_set), self.config, weights, [int(token) for token in prompt], steps=steps)

    def emission(self, rank: int = 0, op_set: type[TensorRTOps] = TensorRTOps) -> Emission:
        """One rank's network in TensorRT, with its bindings and its weights."""
        return emit(self.config, self.build_config, self.mapping, rank, self.weights(rank), op_set=op_set)

    def weights(self, rank: int) -> dict[str, torch.Tensor]:
        """Read the tensors of one rank; EngineError when the engine was saved without weights."""
        self.require_open()
        if not self.ranks:
            raise EngineError(
                "this engine was saved without weights",
                remedy='only its plan on a GPU runs: build it again and save it with weights="link"',
            )
        if rank not in range(len(self.ranks)):
            raise EngineError(f"there is no rank {rank}", expected=f"0 to {len(self.ranks) - 1}")
        return {name: tensor.read() for name, tensor in self.ranks[rank].items()}

    def save(self, engine_dir: PathLike, weights: Literal["link", "copy", "none"] = "link") -> Path:
        """Write the engine folder, in one step; returns the folder.

        ``weights`` is ``"link"`` (hard links where source and file system allow them, else copies), ``"copy"`` or
        ``"none"``; a folder without weights needs TensorRT to run.
        """
        self.require_open()
        if weights != "none" and not self.ranks:
            raise EngineError("this engine was loaded without weights", remedy='save it with weights="none"')
        if weights == "none" and self.plans is None:
            raise EngineError("an engine without plan and weights cannot run", remedy='save it with weights="link"')
        folder = absolute_path(engine_dir, error=EngineError)
        with replacing(folder, ours=_is_ours, marker="build_config", error=EngineError) as scratch:
            meta = json.dumps(_to_json(self), indent=2) + "\n"
            (scratch / "config.json").write_text(meta, encoding="utf-8")
            if weights != "none":
                self._save_weights(scratch, link=weights == "link")
            if self.plans is not None:
                self.plans.save(scratch)
            copy_tokenizer(self.tokenizer_dir, scratch)
        return folder

    def _save_weights(self, folder: Path, *, link: bool) -> None:
        total = sum(tensor.nbytes for tensors in self.ranks for tensor in tensors.values())
        with progress("saving weights", total) as bar:
            for rank, tensors in enumerate(self.ranks):
                target = folder / rank_file(rank)
                next(iter(tensors.values())).read()  # an error when the file has changed since it was opened
                if not (link and self.weight_files and _linked(self.weight_files[rank], target)):
                    write_safetensors(target, tensors, on_tensor=lambda t: bar.update(t.nbytes))

    @classmethod
    def load(cls, engine_dir: PathLike, plan: bool = True) -> Engine:
        """Open an engine folder; ``plan=False`` ignores its plans and runs the weights.

        Raises EngineError or CheckpointError when the folder is damaged, holds other weights than it was built from,
        or has plans of another TensorRT than the installed one.
        """
        folder = open_folder(engine_dir, ENGINE, error=EngineError)
        stored = read_engine_file(folder, plans=plan)
        config, mapping, layout = stored.pretrained_config.to_settings()
        files = [folder / rank_file(rank) for rank in mapping.ranks]
        ranks = [open_safetensors(file) for file in files] if files[0].is_file() else []
        if ranks:
            check_layers(folder.name, config.num_hidden_layers, mapping.pp_size * max(map(len, ranks)))
        for rank, tensors in enumerate(ranks):
            check_tensors(files[rank].name, tensors, rank_shapes(config, mapping, rank, layout))
            check_dtype(files[rank].name, tensors, rank_dtypes(config, mapping, rank, layout))
        source = stored.provenance.source or f"engine {folder.name}"
        prints = stored.provenance.fingerprints or ()
        if ranks and prints and prints != tuple(map(fingerprint, ranks)):
            raise EngineError(
                f"{folder.name} holds other weights than it was built from", remedy="copy it again, or build again"
            )
        plans = Plans.load(folder, stored.plans) if stored.plans else None
        tokenizer = find_tokenizer(folder)
        files = files if ranks else []
        return cls(config, stored.build_config, mapping, layout, ranks, source, tokenizer, files, plans, prints)

    def close(self) -> None:
        """Release the weights and the plans; a second call does nothing."""
        self.closed = True
        self.ranks = []
        if self.plans is not None:
            self.plans.close()

    def require_open(self) -> None:
        """Raise EngineError after ``close``."""
        if self.closed:
            raise EngineError("this engine is closed", remedy="build it again, or load it from its folder")

    def __enter__(self) -> Engine:
        self.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build(checkpoint: WeightSource, build_config: BuildConfig, mapping: Mapping, *, plan: bool) -> Engine:
    """An engine from a checkpoint, which does not change and can be built again.

    Args:
        checkpoint: The model.
        build_config: The bounds.
        mapping: The ranks.
        plan: Whether TensorRT compiles every rank; without TensorRT a warning is logged and the engine has no plan.

    Raises:
        ConfigError: The bounds exceed the model, or the model cannot be split over ``mapping``.
        EngineError: TensorRT refuses the network, or this machine has too little memory for the plan.
    """
    checkpoint.require_whole("built")
    resolved = build_config.resolve(checkpoint.config)
    config = checkpoint.config.replace(dtype=resolved.dtype)
    layout = shared_where_possible(config, mapping)
    specs = tensor_specs(config)
    tensors = {
        name: tensor if specs[name].dtype is not None else tensor.to(config.torch_dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    ranks = [shard(config, mapping, rank, tensors, layout) for rank in mapping.ranks]
    linkable = checkpoint.folder is not None and (checkpoint.config, checkpoint.mapping, checkpoint.layout) == (
        config,
        mapping,
        layout,
    )
    files = [checkpoint.folder / rank_file(rank) for rank in mapping.ranks] if checkpoint.folder and linkable else []
    prints = tuple(fingerprint(rank) for rank in ranks)
    if plan:
        require_room_to_build(config, resolved, mapping, layout)
    plans = _build_plans(config, resolved, mapping, ranks) if plan else None
    return Engine(
        config, resolved, mapping, layout, ranks, checkpoint.source, checkpoint.tokenizer_dir, files, plans, prints
    )


def _build_plans(
    config: ModelConfig, build_config: BuildConfig, mapping: Mapping, ranks: Sequence[dict[str, LazyTensor]]
) -> Plans | None:
    try:
        return Plans.build(config, build_config, mapping, ranks)
    except MissingDependency as error:
        logger.warning("no plan was built: %s", error)
        return None


def _to_json(engine: Engine) -> dict[str, Any]:
    return {
        "version": VERSION,
        "pretrained_config": config_to_json(engine.config, engine.mapping, engine.layout, {}),
        "build_config": dataclasses.asdict(engine.build_config),
        "trtlab": {
            "source": engine.source,
            "fingerprints": list(engine.fingerprints),
            "plans": engine.plans.to_json() if engine.plans else None,
        },
    }


def _is_ours(name: str) -> bool:
    known = name in TOKENIZER_FILES or name == "config.json"
    return known or (name.startswith("rank") and name.endswith((".safetensors", ".engine")))


def _linked(source: Path, target: Path) -> bool:
    """Make a hard link; False where another file system or a missing right forbids it."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
