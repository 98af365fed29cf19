"""The errors a user can cause, each saying what is wrong, what was got, what was expected and what to do next."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from traceback import FrameSummary

MOST_LINES = 5  # of one statement in a notebook's traceback
LONGEST_PART = 1500  # characters; eight problems of a settings object fit
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and newline; lone surrogates


class TrtlabError(Exception):
    """A mistake that the caller can correct.

    ``what`` names the problem, ``got`` the offending value, ``expected`` what would have been right and ``remedy``
    the next step. ``str(error)`` joins those that are given into one or two lines that any terminal can print; a part
    that quotes a very long name or value is cut.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(what, got, expected, remedy)

    def __reduce__(self) -> tuple[Callable[[str], TrtlabError], tuple[str]]:
        """Keep all parts in a pickle, so that an error can travel between processes."""
        return partial(type(self), got=self.got, expected=self.expected, remedy=self.remedy), (self.what,)

    def __str__(self) -> str:
        parts = [_bounded(self.what)]
        if self.got is not None:
            parts.append(f"got {_bounded(self.got)}")
        if self.expected is not None:
            parts.append(f"expected {_bounded(self.expected)}")
        if self.remedy is not None:
            parts.append(_bounded(self.remedy))
        return printable("; ".join(parts))

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython and Jupyter print: the caller's own statements, and the message.

        ``TRTLAB_TRACEBACK=full`` in the environment gives every frame, as Python prints them.
        """
        if os.environ.get("TRTLAB_TRACEBACK") == "full":
            return "".join(traceback.format_exception(self)).splitlines()
        lines = [line for frame in callers_frames(self) for line in _described(frame)]
        return lines + f"{type(self).__name__}: {self}".splitlines()


class ConfigError(TrtlabError):
    """A configuration value, or two that contradict each other."""


class CheckpointError(TrtlabError):
    """A model folder or a set of weights that cannot be read, written or put together."""


class QuantizeError(TrtlabError):
    """A model or calibration texts that cannot be quantized this way."""


class EngineError(TrtlabError):
    """An engine that cannot be built, saved, loaded or run here."""


class RequestError(TrtlabError):
    """A request that the engine cannot serve."""


class MissingDependency(TrtlabError):
    """An optional package that a feature needs; the remedy is the install line."""


def callers_frames(error: BaseException) -> list[FrameSummary]:
    """The frames of an error that are neither trtlab's nor of the standard library or an installed package."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    summaries = traceback.extract_tb(error.__traceback__)
    return [
        summary
        for frame, summary in zip(frames, summaries, strict=True)
        if not _is_library(str(frame.f_globals.get("__name__", "")), summary.filename)
    ]


def _is_library(module: str, file: str) -> bool:
    """Whether a frame's code is trtlab's, the standard library's or an installed package's."""
    if module.partition(".")[0] == "trtlab" or file.startswith((sysconfig.get_path("stdlib"), "<frozen")):
        return True
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    depth = module.count(".") + (path.name == "__init__.py")
    return path.is_file() and depth < len(path.parents) and _has_installed_packages(path.parents[depth])


@lru_cache(maxsize=64)
def _has_installed_packages(folder: Path) -> bool:
    """Whether an installer put packages into a folder, wherever it is: ``pip install --target`` takes any name."""
    return next(folder.glob("*.dist-info"), None) is not None


def _described(frame: FrameSummary) -> list[str]:
    """Where a frame was, and the lines of its statement."""
    place = f'File "{frame.filename}"' if Path(frame.filename).is_file() else "Cell"
    function = "" if frame.name.startswith("<") else f", in {frame.name}"
    first, last = frame.lineno or 1, frame.end_lineno or frame.lineno or 1
    lines = [linecache.getline(frame.filename, number) for number in range(first, last + 1)]
    shown = textwrap.dedent("".join(lines[:MOST_LINES])).splitlines() + ["..."] * (len(lines) > MOST_LINES)
    return [f"{place}, line {first}{function}", *(f"    {line}" for line in shown), ""]


def printable(text: str) -> str:
    r"""The text with control characters and lone surrogates as escapes: a file's own ``\x1b[2J`` clears no screen."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _bounded(part: object) -> str:
    text = str(part)
    return text if len(text) <= LONGEST_PART else f"{text[:LONGEST_PART]}... ({len(text):,} characters)"
