"""The errors a user can cause, each saying what is wrong, what was got, what was expected and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class TrtlabError(Exception):
    """A mistake that the caller can correct.

    ``what`` names the problem, ``got`` the offending value, ``expected`` what would have been right and ``remedy``
    the next step. ``str(error)`` joins those that are given into one or two lines.
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
        parts = [self.what]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.remedy is not None:
            parts.append(self.remedy)
        return "; ".join(parts)


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
