"""Tells what kind of folder a path is, so that a reader of another kind can name the call that opens it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtlab.errors import CheckpointError, TrtlabError
from trtlab.storage.files import finish_replacement
from trtlab.storage.json_files import read_object
from trtlab.storage.paths import PathLike, absolute_path, reading, require_folder

HUB_NAME = re.compile(r"(?:https?://huggingface\.co/)?([\w-][\w.-]*/[\w.-]+)/?")


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder: its name, what to do with one, and whether a config.json or the names of files are its own."""

    name: str
    remedy: str
    owns: Callable[[Mapping[str, Any]], bool] = lambda raw: False
    holds: Callable[[Collection[str]], bool] = lambda names: False


def _is_upstream_engine(raw: Mapping[str, Any]) -> bool:
    """Whether an engine's config.json has TensorRT-LLM's plugins in it, as versions 0.5 and later write."""
    build = raw.get("build_config")
    plugins = isinstance(build, Mapping) and "plugin_config" in build
    return "trtlab" not in raw and (plugins or {"builder_config", "plugin_config"} <= raw.keys())


UPSTREAM_ENGINE = FolderKind(
    "an engine that TensorRT-LLM built, which its own runtime alone can open",
    "build one from the checkpoint that it was built from: Checkpoint.load(...).build()",
    _is_upstream_engine,
    lambda names: any(re.fullmatch(r"\w+_tp\d+_rank\d+\.engine", name) for name in names),
)
BINARY = FolderKind(
    "a binary checkpoint of TensorRT-LLM 0.5 (config.ini and a .bin file for each tensor), which is not supported",
    "convert the model's Hugging Face folder: Checkpoint.from_hugging_face(...)",
    holds=lambda names: "config.ini" in names and any(name.endswith(".bin") for name in names),
)
ENGINE = FolderKind(
    "an engine folder",
    "open the folder with Engine.load()",
    lambda raw: "pretrained_config" in raw and not _is_upstream_engine(raw),
)
CHECKPOINT = FolderKind(
    "a TensorRT-LLM checkpoint",
    "open the folder with Checkpoint.load()",
    lambda raw: isinstance(raw.get("architecture"), str) and "architectures" not in raw,
)
HUGGING_FACE = FolderKind(
    "a Hugging Face folder",
    "open the folder with Checkpoint.from_hugging_face()",
    lambda raw: raw.get("architectures") is not None or raw.get("model_type") is not None,
)
META = FolderKind(
    "a folder in Meta's format",
    "open the folder with Checkpoint.from_meta_ckpt()",
    lambda raw: {"dim", "n_layers", "n_heads"} <= raw.keys(),
    lambda names: "params.json" in names or any(name.startswith("consolidated.") for name in names),
)
ADAPTER = FolderKind(
    "a PEFT adapter without its model",
    "give the folder of the model that it adapts",
    holds=lambda names: "adapter_config.json" in names,
)
GGUF = FolderKind(
    "a model in GGUF format",
    "open the file with Checkpoint.from_gguf()",
    holds=lambda names: any(name.endswith(".gguf") for name in names),
)
CACHE = FolderKind(
    "a model's folder in Hugging Face's cache",
    "give the folder of a revision, in its snapshots folder",
    holds=lambda names: {"snapshots", "refs"} <= {*names},
)
KINDS = (UPSTREAM_ENGINE, BINARY, ENGINE, CHECKPOINT, HUGGING_FACE, META, ADAPTER, GGUF, CACHE)


def open_folder(path: PathLike, wanted: FolderKind, *, error: type[TrtlabError] = CheckpointError) -> Path:
    """The absolute path of a folder that is not clearly of another kind; what it holds is not checked.

    Raises:
        TrtlabError: Of the class ``error``: there is no such folder, or it is of another kind. The remedy names the
            call that opens it, or ``snapshot_download`` for the name of a model on Hugging Face's hub.
    """
    folder = absolute_path(path, error=error)
    finish_replacement(folder, error=error)
    require_folder(folder, remedy=_instead_of(str(path), folder, wanted), error=error)
    with reading(folder, error=error):
        names = {entry.name for entry in folder.iterdir()}
    raw = _config(folder) if "config.json" in names else {}
    kinds = [kind for kind in KINDS if kind.owns(raw) or kind.holds(names)]
    _require(wanted, kinds, f"{folder} is", error)
    return folder


def refuse_other_kind(
    raw: Mapping[str, Any], wanted: FolderKind, where: str, *, error: type[TrtlabError] = CheckpointError
) -> None:
    """Raise an error that says what to open it with when an object is the config.json of another kind of folder."""
    _require(wanted, [kind for kind in KINDS if kind.owns(raw)], f"{where} is the config.json of", error)


def _require(wanted: FolderKind, kinds: Sequence[FolderKind], what: str, error: type[TrtlabError]) -> None:
    """Raise an error when something is of one or more kinds and not of the wanted one."""
    if kinds and wanted not in kinds:
        raise error(f"{what} {kinds[0].name}", expected=wanted.name, remedy=kinds[0].remedy)


def _instead_of(text: str, folder: Path, wanted: FolderKind) -> str:
    """What to give instead of something that is not a folder."""
    if GGUF.holds([folder.name]):
        return GGUF.remedy
    if os.path.isfile(folder):  # noqa: PTH113 - Path.is_file() raises for some names
        return f"give the folder that it lies in, {folder.parent}"
    hub = HUB_NAME.fullmatch(text)
    if hub and wanted in (HUGGING_FACE, META):
        return f'for a model of the hub give the folder that huggingface_hub.snapshot_download("{hub[1]}") returns'
    return f"give {wanted.name}"


def _config(folder: Path) -> dict[str, Any]:
    """config.json; empty when it cannot be read, which its own reader explains."""
    try:
        return read_object(folder / "config.json", remedy="")
    except CheckpointError:
        return {}
