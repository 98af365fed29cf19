"""The version of this package, from its metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("trtlab")
    except PackageNotFoundError:  # run from a bare source tree
        return "0+source"


VERSION = _installed()
