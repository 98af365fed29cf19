"""How an object was opened from a folder, so that its pickle holds the path and not the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trtlab.errors import CheckpointError
from trtlab.storage.paths import files_state


@dataclass(frozen=True)
class Opening:
    """The call that opened an object, and the state of its folder's files then."""

    call: Callable[..., Any]
    folder: Path
    arguments: tuple[tuple[str, object], ...]
    files: tuple[tuple[str, int, int], ...]


class Reopenable:
    """An object that does not change and that a folder stores: a pickle of it opens the folder again."""

    opened: Opening | None

    def opened_by(self, call: Callable[..., Any], folder: Path, **arguments: object) -> Self:
        """Note the call that opened this object from a folder; returns the object."""
        opening = Opening(call, folder, tuple(arguments.items()), files_state(folder))
        object.__setattr__(self, "opened", opening)
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Opening]]:
        """A pickle holds how the object was opened."""
        if self.opened is None:
            name = type(self).__name__
            raise CheckpointError(
                f"a {name} in memory cannot be pickled: a pickle holds the path of a folder",
                remedy=f"save() it, and pickle {name}.load() of its folder",
            )
        return _open_again, (self.opened,)

    def __copy__(self) -> Self:
        """The object itself, as it does not change."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """The object itself, as it does not change."""
        return self


def _open_again(opening: Opening) -> Reopenable:
    """Open the folder again; CheckpointError when its files have changed since the pickled object was opened."""
    opened: Reopenable = opening.call(opening.folder, **dict(opening.arguments))
    if opened.opened != opening:
        raise CheckpointError(
            f"{opening.folder} has changed since the object was opened that was pickled",
            remedy="open it, and pickle it again",
        )
    return opened
