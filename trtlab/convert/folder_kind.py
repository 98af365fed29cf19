"""Opens a folder of one kind; a folder of another kind, or the name of a model on a hub, is told what it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtlab.errors import CheckpointError, TrtlabError
from trtlab.storage.json_files import read_object
from trtlab.storage.paths import PathLike, absolute_path, reading, require_folder

HUB_NAME = re.compile(r"(?:https?://huggingface\.co/)?([\w-][\w.-]*/[\w.-]+)/?")


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder: its name with an article, and what to do with one."""

    name: str
    remedy: str


HUGGING_FACE = FolderKind("a Hugging Face folder", "open it with Checkpoint.from_hugging_face()")
META = FolderKind("a folder in Meta's format", "open it with Checkpoint.from_meta_ckpt()")
CHECKPOINT = FolderKind("a checkpoint folder of TensorRT-LLM", "open it with Checkpoint.load()")
ENGINE = FolderKind("an engine folder", "open it with Engine.load()")
ADAPTER = FolderKind("a PEFT adapter, without a model", "give the folder of the model that it adapts")
GGUF = FolderKind("a model in GGUF format", "GGUF is not supported yet: give the model's Hugging Face folder")
CACHE = FolderKind("a model's folder in Hugging Face's cache", "give the folder of a revision, in its snapshots folder")


def open_folder(path: PathLike, kind: FolderKind, *, error: type[TrtlabError] = CheckpointError) -> Path:
    """The absolute path of a folder that is not clearly of another kind; what it holds is not checked.

    Raises:
        TrtlabError: Of the class ``error``: there is no such folder, or it is of another kind. The remedy names the
            call that opens it, or ``snapshot_download`` for the name of a model on Hugging Face's hub.
    """
    folder = absolute_path(path, error=error)
    require_folder(folder, remedy=_instead_of(str(path), folder, kind), error=error)
    with reading(folder, error=error):
        others = list(_kinds(folder, [entry.name for entry in folder.iterdir()]))
    if others and kind not in others:
        raise error(f"{folder} is {others[0].name}", expected=kind.name, remedy=others[0].remedy)
    return folder


def _instead_of(text: str, folder: Path, kind: FolderKind) -> str:
    """What to give instead of something that is not a folder."""
    if folder.suffix == ".gguf":
        return GGUF.remedy
    if os.path.isfile(folder):  # noqa: PTH113 - Path.is_file() raises for some names
        return f"give the folder that it lies in, {folder.parent}"
    hub = HUB_NAME.fullmatch(text)
    if hub and kind in (HUGGING_FACE, META):
        return f'for a model of the hub give the folder that huggingface_hub.snapshot_download("{hub[1]}") returns'
    return f"give {kind.name}"


def _kinds(folder: Path, names: list[str]) -> Iterator[FolderKind]:
    """Every kind that a folder may be of, the likeliest first; none for a folder that nothing identifies."""
    config = _config(folder) if "config.json" in names else {}
    yield from (kind for kind, fits in _BY_CONFIG.items() if fits(config))
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        yield META
    if "adapter_config.json" in names:
        yield ADAPTER
    if any(name.endswith(".gguf") for name in names):
        yield GGUF
    if {"snapshots", "refs"} <= {*names}:
        yield CACHE


_BY_CONFIG: dict[FolderKind, Callable[[dict[str, Any]], bool]] = {
    ENGINE: lambda config: "build_config" in config and "pretrained_config" in config,
    CHECKPOINT: lambda config: "architecture" in config and "architectures" not in config,
    HUGGING_FACE: lambda config: "architectures" in config or "model_type" in config,
}


def _config(folder: Path) -> dict[str, Any]:
    """config.json; empty when it cannot be read, which its own reader explains."""
    try:
        return read_object(folder / "config.json", remedy="")
    except CheckpointError:
        return {}
