"""What a kind of input is: whole folders to start from, and edits that damage them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from .folder import Files
from .journeys import Journey
from .json_edits import JsonEdits
from .results import Limits

USUAL = Limits()

Edit = Callable[[Files, Random], str]  # changes the files, and says what it did


@dataclass(frozen=True)
class Base:
    """A whole folder, and how a user opens it.

    ``at`` is where in ``files`` the model lies, ``ends`` a stage that it reaches when nothing is damaged.
    """

    name: str
    files: Files
    use: Callable[[Journey], None]
    at: str = ""
    ends: str = "ran"


@dataclass(frozen=True)
class Kind:
    """A kind of input; of the cases, the share ``deep`` goes the whole way where the folder opens."""

    make_bases: Callable[[], list[Base]]
    edits: Sequence[tuple[float, Edit]]
    deep: float = 0.5
    most_edits: int = 3
    limits: Limits = USUAL


def json_edit(name: str, edits: JsonEdits) -> Edit:
    """An edit of the JSON file ``name`` of a folder that has it."""

    def edit(files: Files, rng: Random) -> str:
        text = files.get(name)
        if not isinstance(text, bytes):
            return "nothing"
        files[name], what = edits.change_text(text, rng)
        return f"{name}: {what}"

    return edit
