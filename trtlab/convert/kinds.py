"""Tells by its keys what kind of folder a config.json belongs to, so that a reader of another kind can say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtlab.errors import CheckpointError, TrtlabError


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder: its name, what opens it, and whether an object is its config.json."""

    name: str
    opened_by: str
    owns: Callable[[Mapping[str, Any]], bool]


ENGINE = FolderKind("an engine folder", "Engine.load()", lambda raw: "pretrained_config" in raw)
CHECKPOINT = FolderKind(
    "a TensorRT-LLM checkpoint",
    "Checkpoint.load()",
    lambda raw: isinstance(raw.get("architecture"), str) and "architectures" not in raw,
)
HUGGING_FACE = FolderKind(
    "a Hugging Face folder",
    "Checkpoint.from_hugging_face()",
    lambda raw: raw.get("architectures") is not None or raw.get("model_type") is not None,
)
META = FolderKind(
    "a folder in Meta's format", "Checkpoint.from_meta_ckpt()", lambda raw: {"dim", "n_layers", "n_heads"} <= raw.keys()
)
KINDS = (ENGINE, CHECKPOINT, HUGGING_FACE, META)


def refuse_other_kind(
    raw: Mapping[str, Any], wanted: FolderKind, where: str, *, error: type[TrtlabError] = CheckpointError
) -> None:
    """Raise an error that says what to open it with when an object is the config.json of another kind of folder."""
    kind = next((kind for kind in (wanted, *KINDS) if kind.owns(raw)), wanted)
    if kind is not wanted:
        raise error(
            f"{where} is the config.json of {kind.name}",
            expected=wanted.name,
            remedy=f"open the folder with {kind.opened_by}",
        )
