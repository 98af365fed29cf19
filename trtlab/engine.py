"""The third object of the workflow: a model cut into ranks, within bounds that are fixed at build."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtlab.checkpoint import Checkpoint, PathLike
from trtlab.config import BuildConfig, Mapping, ModelConfig, SessionConfig
from trtlab.convert.check import check_tensors
from trtlab.convert.trtllm import config_from_json, config_to_json, rank_file, rank_shapes
from trtlab.display.card import Shown
from trtlab.errors import EngineError
from trtlab.files import read_json, replacing, write_safetensors
from trtlab.lazy import LazyTensor, open_safetensors
from trtlab.parallel.shard import EmbeddingLayout, shard, shared_where_possible
from trtlab.progress import progress
from trtlab.runtime.tokenizer import TOKENIZER_FILES, find_tokenizer, tokenizer_files
from trtlab.version import VERSION

if TYPE_CHECKING:
    from trtlab.session import Session

WEIGHTS = ("link", "copy", "none")


@dataclass(eq=False, repr=False)
class Engine(Shown):
    """A model ready to run: config, bounds, and each rank's weights, still lazy.

    ``weight_files`` are the ranks' files when they lie on disk in this layout already, so that ``save`` can link them.
    Use it as a context manager, or call ``close()``; afterwards it is an error to use it.
    """

    config: ModelConfig
    build_config: BuildConfig
    mapping: Mapping
    layout: EmbeddingLayout
    ranks: Sequence[dict[str, LazyTensor]]
    source: str
    tokenizer_dir: Path | None = None
    weight_files: Sequence[Path] = ()
    closed: bool = False

    def session(
        self, session_config: SessionConfig | None = None, backend: str = "auto", device: str | None = None
    ) -> Session:
        """A session that generates with this engine; ``backend`` is auto, tensorrt, torch or interpreter."""
        from trtlab.session import open_session

        return open_session(self, session_config or SessionConfig(), backend, device)

    def save(self, engine_dir: PathLike, weights: str = "link") -> Path:
        """Write the engine folder, in one step; gives the folder.

        ``weights`` is ``"link"`` (hard links where source and file system allow, else copies), ``"copy"``, or
        ``"none"``: such a folder needs TensorRT to run.
        """
        self.require_open()
        if weights not in WEIGHTS:
            raise EngineError("unknown way to keep weights", got=repr(weights), expected=" | ".join(WEIGHTS))
        folder = Path(engine_dir)
        with replacing(folder, ours=_is_ours, marker="build_config", error=EngineError) as scratch:
            meta = json.dumps(_to_json(self), indent=2) + "\n"
            (scratch / "config.json").write_text(meta, encoding="utf-8")
            if weights != "none":
                self._save_weights(scratch, link=weights == "link")
            for file in tokenizer_files(self.tokenizer_dir):
                shutil.copy2(file, scratch / file.name)
        return folder

    def _save_weights(self, folder: Path, *, link: bool) -> None:
        total = sum(tensor.nbytes for tensors in self.ranks for tensor in tensors.values())
        with progress("saving weights", total) as bar:
            for rank, tensors in enumerate(self.ranks):
                target = folder / rank_file(rank)
                if not (link and self.weight_files and _linked(self.weight_files[rank], target)):
                    write_safetensors(target, tensors, on_tensor=lambda t: bar.update(t.nbytes))

    @classmethod
    def load(cls, engine_dir: PathLike) -> Engine:
        """Open an engine folder; EngineError or CheckpointError, in one line with the remedy, when it does not fit."""
        folder = Path(engine_dir)
        if not folder.is_dir():
            raise EngineError(f"{folder} is not a folder", remedy="give a folder that engine.save() wrote")
        raw = read_json(folder / "config.json", remedy="give a folder that engine.save() wrote")
        if "build_config" not in raw or "pretrained_config" not in raw:
            raise EngineError(
                f"{folder.name} is not an engine folder",
                remedy="Checkpoint.load() opens a checkpoint; build() it first",
            )
        config, mapping, layout = config_from_json(raw["pretrained_config"])
        files = [folder / rank_file(rank) for rank in mapping.ranks]
        ranks = [open_safetensors(file) for file in files] if files[0].is_file() else []
        for rank, tensors in enumerate(ranks):
            check_tensors(files[rank].name, tensors, rank_shapes(config, mapping, rank, layout))
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["build_config"].items()}
        build_config = BuildConfig(**stored)
        tokenizer = find_tokenizer(folder)
        return cls(
            config, build_config, mapping, layout, ranks, raw["trtlab"]["source"], tokenizer, files if ranks else ()
        )

    def close(self) -> None:
        """Let the weights go; a second close is harmless."""
        self.closed = True
        self.ranks = []

    def require_open(self) -> None:
        """EngineError after ``close``."""
        if self.closed:
            raise EngineError("this engine is closed", remedy="build it again, or load it from its folder")

    def __enter__(self) -> Engine:
        self.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build(checkpoint: Checkpoint, build_config: BuildConfig, mapping: Mapping, *, plan: bool) -> Engine:
    """An engine from a checkpoint, which does not change and can be built again.

    Raises ConfigError when the bounds exceed the model or the model cannot be split over ``mapping``.
    """
    checkpoint.require_whole("built")
    resolved = build_config.resolve(checkpoint.config)
    config = checkpoint.config.replace(dtype=resolved.dtype)
    layout = shared_where_possible(config, mapping)
    tensors = {name: tensor.to(config.torch_dtype) for name, tensor in checkpoint.tensors.items()}
    ranks = [shard(config, mapping, rank, tensors, layout) for rank in mapping.ranks]
    linkable = checkpoint.folder is not None and (checkpoint.config, checkpoint.mapping, checkpoint.layout) == (
        config,
        mapping,
        layout,
    )
    files = [checkpoint.folder / rank_file(rank) for rank in mapping.ranks] if checkpoint.folder and linkable else []
    return Engine(config, resolved, mapping, layout, ranks, checkpoint.source, checkpoint.tokenizer_dir, files)


def _to_json(engine: Engine) -> dict[str, Any]:
    return {
        "version": VERSION,
        "pretrained_config": config_to_json(engine.config, engine.mapping, engine.layout, {}),
        "build_config": dataclasses.asdict(engine.build_config),
        "trtlab": {"source": engine.source},
    }


def _is_ours(name: str) -> bool:
    known = name in TOKENIZER_FILES or name == "config.json"
    return known or (name.startswith("rank") and name.endswith((".safetensors", ".engine")))


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made; another file system or a missing right makes it False."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
