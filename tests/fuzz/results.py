"""What goes between the process that runs cases and the one that counts them, as lines of JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What one case may take; beyond ``hanging_s`` of a clock its process prints its stack and ends."""

    seconds: float = 5.0  # of processor time, for a loaded machine's clock says little
    nbytes: int = 2 * 2**30  # of resident memory
    hanging_s: float = 60.0


@dataclass(frozen=True)
class Job:
    """The cases of one kind from number ``first`` to ``stop - 1``; ``only`` names the edits to keep, None keeps all."""

    kind: str
    first: int
    stop: int
    only: tuple[int, ...] | None = None


@dataclass
class Result:
    """What became of one case."""

    kind: str
    number: int
    seconds: float = 0.0
    peak: int = 0
    stages: list[str] = field(default_factory=list)
    refused: str = ""  # the TrtlabError
    failure: str = ""  # anything else
    where: str = ""
    trace: str = ""
    edits: list[str] = field(default_factory=list)
    only: list[int] | None = None  # the single edit that fails alone
