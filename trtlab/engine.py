"""The third object of the workflow: a model split into ranks, with bounds fixed at build, and its TensorRT plans."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trtlab.card import Shown
from trtlab.config.base import PositiveInt
from trtlab.config.build import BuildConfig
from trtlab.config.calls import public
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import BackendName, SessionConfig
from trtlab.convert.check import check_layers
from trtlab.convert.folder_kinds import ENGINE, open_folder
from trtlab.convert.trtllm import fitting_ranks, same_layout
from trtlab.convert.trtllm_config import config_to_json
from trtlab.convert.trtllm_ranks import rank_file
from trtlab.engine_command import build_command
from trtlab.engine_config import REMEDY as BUILD_AGAIN
from trtlab.engine_config import read_engine_file
from trtlab.engine_weights import Digests, save_weights, verify_weights
from trtlab.errors import EngineError, MissingDependency
from trtlab.memory.fits import require_room_to_build
from trtlab.model.tensor_specs import check_runnable, tensor_specs
from trtlab.parallel.shard import EmbeddingLayout, shard, shared_where_possible
from trtlab.runtime.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer, find_tokenizer
from trtlab.session.open import open_session
from trtlab.session.prompts import as_ids
from trtlab.session.session import Session
from trtlab.storage.files import replacing
from trtlab.storage.fingerprint import fingerprint
from trtlab.storage.json_files import naming
from trtlab.storage.lazy import LazyTensor, open_safetensors
from trtlab.storage.paths import PathLike, absolute_path, has_file
from trtlab.tensorrt.build.plan_check import COPY_OR_BUILD
from trtlab.tensorrt.build.plans import Plans
from trtlab.tensorrt.compare import NetworkComparison, compare
from trtlab.tensorrt.emit.emission import Emission, emit
from trtlab.tensorrt.emit.ops import TensorRTOps
from trtlab.tensorrt.read.interpreter import LayerTable, Network
from trtlab.version import VERSION
from trtlab.weight_source import WeightSource, require_same_model

logger = logging.getLogger("trtlab")


@public
@dataclass(eq=False, repr=False)
class Engine(Shown):
    """A model ready to run: config, bounds, the lazy weights of each rank, and the plans that TensorRT built.

    ``plans`` is None for an engine without TensorRT plans, which runs in torch. ``weight_files`` are the ranks' files
    when a folder stores them in the same layout, so that ``save`` can link them. ``folder`` is where the engine was
    saved with all that it needs, and ``checkpoint_dir`` the checkpoint that it was built from, where they are known.
    A pickle of an engine holds the path of its folder. Use the engine as a context manager, or call ``close()``; after
    that every use is an error.
    """

    config: ModelConfig
    build_config: BuildConfig
    mapping: Mapping
    layout: EmbeddingLayout
    ranks: Sequence[dict[str, LazyTensor]]
    source: str
    tokenizer_path: Path | None = None
    weight_files: Sequence[Path] = ()
    plans: Plans | None = None
    fingerprints: Sequence[str] = ()
    digests: Sequence[Digests] = ()
    folder: Path | None = None
    checkpoint_dir: Path | None = None
    closed: bool = False

    def session(
        self,
        session_config: SessionConfig | None = None,
        backend: BackendName = "auto",
        device: str | torch.device | None = None,
    ) -> Session:
        """A session that generates with this engine; ``backend`` is auto, tensorrt, torch or interpreter."""
        config = SessionConfig() if session_config is None else session_config
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

    def layer_table(self, rank: int = 0, batch: PositiveInt = 1, tokens: PositiveInt = 1) -> LayerTable:
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
            checkpoint: The same model, quantized in any way or not. When it is quantized in another way than the
                engine, the comparison shows what that costs in each layer.
            prompt: Text or token ids.
            steps: Number of tokens to decode after the prompt.
            op_set: A subclass may emit an op in another way, to plant an error and see it found.

        Raises:
            EngineError: The checkpoint is of another model, with the settings that differ; or the engine has several
                ranks, no weights or, for a text, no tokenizer.
        """
        checkpoint.require_whole("compared")
        recipes = require_same_model(self.config, checkpoint.config)
        if isinstance(prompt, str):
            if self.tokenizer_path is None:
                raise EngineError("this engine has no tokenizer", remedy="give token ids")
            prompt = Tokenizer(self.tokenizer_path).encode(prompt)
        weights = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
        ids = list(as_ids(prompt))
        return compare(self.emission(0, op_set), checkpoint.config, weights, ids, steps=steps, recipes=recipes)

    def emission(self, rank: int = 0, op_set: type[TensorRTOps] = TensorRTOps) -> Emission:
        """One rank's network in TensorRT, with its bindings and its weights."""
        return emit(self.config, self.build_config, self.mapping, rank, self.weights(rank), op_set=op_set)

    def weights(self, rank: int) -> dict[str, torch.Tensor]:
        """Read the tensors of one rank; EngineError when the engine was saved without weights."""
        self.require_open()
        if not self.ranks:
            raise EngineError(
                "this engine was saved without weights",
                remedy="only its plan on a GPU runs: build it again and save it with its weights",
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
        digests: Sequence[Digests] = ()
        with replacing(folder, ours=_is_ours, marker="build_config", error=EngineError) as scratch:
            if weights != "none":
                link = weights == "link"
                digests = save_weights(scratch, self.ranks, self.weight_files, self.digests, link=link)
            meta = json.dumps(_to_json(self, digests), indent=2) + "\n"
            (scratch / "config.json").write_text(meta, encoding="utf-8")
            if self.plans is not None:
                self.plans.save(scratch)
            copy_tokenizer(self.tokenizer_path, scratch)
        if digests or not self.ranks:
            self.folder, self.digests = folder, digests
        return folder

    @classmethod
    def load(cls, engine_dir: PathLike, plan: bool = True, verify: bool = False) -> Engine:
        """Open an engine folder.

        Plans are read whole and compared with their digests. Of the weights, without ``verify``, three rows of each
        tensor are: that finds other weights and a file that was cut short, not an altered row between them.

        Args:
            engine_dir: The folder.
            plan: False ignores the plans and runs the weights.
            verify: Whether to read all weights and compare each tensor with the digest that ``save`` recorded.

        Raises:
            TrtlabError: The folder is damaged, holds other weights than it was built from, or has plans of another
                TensorRT than the installed one.
        """
        folder = open_folder(engine_dir, ENGINE, error=EngineError)
        stored = read_engine_file(folder, plans=plan)
        with naming(folder / "config.json", remedy=BUILD_AGAIN):
            config, mapping, layout = stored.pretrained_config.to_settings()
        files = [folder / rank_file(rank) for rank in mapping.ranks]
        opened = [open_safetensors(file) for file in files] if has_file(files[0], error=EngineError) else []
        if opened:
            check_layers(folder.name, config.num_hidden_layers, mapping.pp_size * max(map(len, opened)))
        elif not stored.plans:
            raise EngineError(f"{folder} has no weights and no plan to run", remedy=COPY_OR_BUILD)
        in_files = dict(enumerate(opened))
        ranks = fitting_ranks(folder.name, config, mapping, layout, in_files)
        known = stored.provenance
        prints, digests = known.fingerprints or (), known.digests or ()
        if opened and prints and prints != tuple(map(fingerprint, opened)):
            raise EngineError(f"{folder} holds other weights than it was built from", remedy=COPY_OR_BUILD)
        if verify and opened:
            verify_weights(folder, opened, digests)
        if not same_layout(in_files, ranks):  # written by an older version: its files are not to be linked
            files, prints, digests = [], tuple(map(fingerprint, ranks.values())), ()
        if stored.plans and len(stored.plans) != len(mapping.ranks):
            counts = f"{len(stored.plans)} plans for {len(mapping.ranks)} rank{'s' * (len(mapping.ranks) > 1)}"
            raise EngineError(f"{folder} has {counts}", remedy=COPY_OR_BUILD)
        plans = Plans.load(folder, stored.plans) if stored.plans else None
        return cls(
            config,
            stored.build_config,
            mapping,
            layout,
            list(ranks.values()),
            known.source or f"engine {folder.name}",
            find_tokenizer(folder),
            files if ranks else [],
            plans,
            prints,
            digests if len(digests) == len(ranks) else (),
            folder,
        )

    def __reduce__(self) -> tuple[Callable[..., Engine], tuple[object, ...]]:
        """A pickle holds the path of the folder, which is opened again."""
        self.require_open()
        if self.folder is None:
            raise EngineError(
                "an engine that is not saved cannot be pickled", remedy="save() it first: a pickle holds the folder"
            )
        return _reopen, (self.folder, self.plans is not None, self.build_config, tuple(self.fingerprints))

    def command(self) -> str:
        """The command line that builds this engine; capitals stand for folders that this engine does not know."""
        return build_command(
            self.config, self.build_config, self.checkpoint_dir, self.folder, plan=self.plans is not None
        )

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
    check_runnable(config, mapping)
    layout = shared_where_possible(config, mapping)
    specs = tensor_specs(config)
    tensors = {
        name: tensor if specs[name].dtype is not None else tensor.to(config.torch_dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    ranks = [shard(config, mapping, rank, tensors, layout) for rank in mapping.ranks]
    same = (checkpoint.config, checkpoint.mapping, checkpoint.layout) == (config, mapping, layout)
    linkable = checkpoint.folder is not None and checkpoint.holds_files and same
    files = [checkpoint.folder / rank_file(rank) for rank in mapping.ranks] if checkpoint.folder and linkable else []
    prints = tuple(fingerprint(rank) for rank in ranks)
    if plan:
        require_room_to_build(config, resolved, mapping, layout)
    plans = _build_plans(config, resolved, mapping, ranks) if plan else None
    engine = Engine(
        config, resolved, mapping, layout, ranks, checkpoint.source, checkpoint.tokenizer_path, files, plans, prints
    )
    engine.checkpoint_dir = checkpoint.folder if checkpoint.mapping == mapping else None
    return engine


def _build_plans(
    config: ModelConfig, build_config: BuildConfig, mapping: Mapping, ranks: Sequence[dict[str, LazyTensor]]
) -> Plans | None:
    try:
        return Plans.build(config, build_config, mapping, ranks)
    except MissingDependency as error:
        logger.warning("no plan was built: %s", error)
        return None


def _reopen(folder: Path, plan: bool, bounds: BuildConfig, prints: tuple[str, ...]) -> Engine:
    engine = Engine.load(folder, plan=plan)
    if (engine.build_config, tuple(engine.fingerprints)) != (bounds, prints):
        raise EngineError(
            f"{folder} holds another engine than the one that was pickled", remedy="load it, and pickle it again"
        )
    return engine


def _to_json(engine: Engine, digests: Sequence[Digests]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "pretrained_config": config_to_json(engine.config, engine.mapping, engine.layout, {}),
        "build_config": dataclasses.asdict(engine.build_config),
        "trtlab": {
            "source": engine.source,
            "fingerprints": list(engine.fingerprints),
            "digests": digests,
            "plans": engine.plans.to_json() if engine.plans else None,
        },
    }


def _is_ours(name: str) -> bool:
    known = name in TOKENIZER_FILES or name == "config.json"
    return known or (name.startswith("rank") and name.endswith((".safetensors", ".engine")))
