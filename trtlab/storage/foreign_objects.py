"""Reads the JSON objects of other programs: a key that is not known is named in a warning, or refused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict

from trtlab.errors import CheckpointError
from trtlab.storage.json_files import StoredObject, read_model
from trtlab.validation import did_you_mean, listed, shorten

logger = logging.getLogger("trtlab")


class ForeignObject(StoredObject):
    """Base of the models of an object that other programs extend: keys that the model does not know are kept apart."""

    model_config = ConfigDict(extra="allow")
    passes_empty: ClassVar[bool] = True
    unsupported: ClassVar[Collection[str]] = ()
    """Unknown keys that change the model's numbers; they must be off."""

    def unknown_keys(self, place: str = "") -> Iterator[tuple[str, Any, type[ForeignObject]]]:
        """Each key that is not known: its place (``rope_scaling.twist``), its value, and the model of its object."""
        for key, value in (self.model_extra or {}).items():
            yield f"{place}{key}", value, type(self)
        for name in self.model_fields_set & type(self).model_fields.keys():
            value = getattr(self, name)
            if isinstance(value, ForeignObject):
                yield from value.unknown_keys(f"{place}{name}.")


F = TypeVar("F", bound=ForeignObject)


def read_foreign(path: Path, kind: type[F], *, remedy: str, allow_unknown: bool) -> F:
    """``read_model`` for a file that other programs write.

    Args:
        path: The file.
        kind: The model that it must fit.
        remedy: What to do about a file that does not fit.
        allow_unknown: Whether a key that is not known is a warning rather than an error.

    Raises:
        CheckpointError: As ``read_model``; and for keys that change the model's numbers and are not supported.
    """
    stored = read_model(path, kind, remedy=remedy)
    check_unknown_keys(stored, str(path), allow_unknown=allow_unknown)
    return stored


def check_unknown_keys(stored: ForeignObject, where: str, *, allow_unknown: bool) -> None:
    """Refuse the unknown keys of an object that change numbers, and warn of the others or refuse them too."""
    unsupported, unknown = list[str](), list[str]()
    for place, value, kind in stored.unknown_keys():
        key = place.rpartition(".")[2]
        if key in kind.unsupported:
            unsupported.append(f"{place}={shorten(value)}")
        else:
            hint = did_you_mean(key, kind.model_fields)
            unknown.append(f"{shorten_key(place)}={shorten(value)}{f' ({hint})' if hint else ''}")
    if unsupported:
        raise CheckpointError(
            f"{where} has keys that change the model's numbers and are not supported: {listed(unsupported)}",
            remedy="use a model without them, or take out those that its authors say have no effect",
        )
    if unknown and not allow_unknown:
        raise CheckpointError(
            f"{where} has unknown keys: {listed(unknown)}",
            remedy="take out those that change no number, or leave allow_unknown_config=False out",
        )
    if unknown:
        _warn_once(
            f"{where} has unknown keys, which are ignored: {listed(unknown)}; "
            "allow_unknown_config=False makes this an error"
        )


def shorten_key(place: str) -> str:
    """The place of a key on one line of at most 80 characters."""
    return shorten(place)[1:-1]


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    logger.warning(text)
