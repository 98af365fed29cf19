"""Writes the weights of an engine folder, with a digest for each tensor, and verifies them. Knows no plan."""

from __future__ import annotations

import os
from collections import abc
from collections.abc import Sequence
from pathlib import Path

from trtlab.convert.trtllm_ranks import rank_file
from trtlab.errors import EngineError
from trtlab.progress import progress
from trtlab.storage.digest import digested, digests
from trtlab.storage.files import write_safetensors
from trtlab.storage.lazy import LazyTensor
from trtlab.tensorrt.build.plan_check import COPY_OR_BUILD

Digests = abc.Mapping[str, str]  # of one rank, by the tensor's name

LISTED = 3  # altered tensors that an error names


def save_weights(
    folder: Path,
    ranks: Sequence[abc.Mapping[str, LazyTensor]],
    files: Sequence[Path],
    recorded: Sequence[Digests],
    *,
    link: bool,
) -> tuple[Digests, ...]:
    """Write the file of each rank; returns the digests of its tensors.

    Args:
        folder: The folder to write to.
        ranks: The tensors of each rank.
        files: Files with these tensors that may be linked; empty when there are none.
        recorded: Digests from an earlier save; empty when there was none. A copy is checked against them.
        link: Whether files are linked where the file system allows it.

    Raises:
        EngineError: A tensor is not the one that was recorded.
    """
    total = sum(tensor.nbytes for tensors in ranks for tensor in tensors.values())
    saved: list[Digests] = []
    with progress("saving weights", total) as bar:
        for rank, tensors in enumerate(ranks):
            target = folder / rank_file(rank)
            next(iter(tensors.values())).read()  # an error when the file has changed since it was opened
            if link and files and _linked(files[rank], target):
                if recorded:
                    bar.update(sum(tensor.nbytes for tensor in tensors.values()))
                    saved.append(recorded[rank])
                else:
                    saved.append(digests(tensors, on_tensor=lambda tensor: bar.update(tensor.nbytes)))
                continue
            read, table = digested(tensors)
            write_safetensors(target, read, on_tensor=lambda tensor: bar.update(tensor.nbytes))
            if recorded:
                _require_same(f"the engine's rank {rank}", table, recorded[rank])
            saved.append({name: table[name] for name in tensors})
    return tuple(saved)


def verify_weights(folder: Path, ranks: Sequence[abc.Mapping[str, LazyTensor]], recorded: Sequence[Digests]) -> None:
    """Read every byte of the weights; EngineError that names the tensors that are not as they were saved."""
    if len(recorded) != len(ranks):
        raise EngineError(
            f"{folder} has no digests of its weights, so they cannot be verified",
            remedy="it was saved by an earlier version: load it without verify=True, and save it again",
        )
    total = sum(tensor.nbytes for tensors in ranks for tensor in tensors.values())
    with progress("verifying weights", total) as bar:
        for rank, tensors in enumerate(ranks):
            table = digests(tensors, on_tensor=lambda tensor: bar.update(tensor.nbytes))
            _require_same(str(folder / rank_file(rank)), table, recorded[rank])


def _require_same(where: str, table: Digests, recorded: Digests) -> None:
    altered = [name for name in table if table[name] != recorded.get(name)]
    if altered:
        more = f" and {len(altered) - LISTED} more" if len(altered) > LISTED else ""
        raise EngineError(
            f"{where} holds other weights than were saved: {', '.join(altered[:LISTED])}{more}", remedy=COPY_OR_BUILD
        )


def _linked(source: Path, target: Path) -> bool:
    """Make a hard link; False where another file system or a missing right forbids it."""
    try:
        os.link(os.path.realpath(source), target)  # not a link of a link
    except OSError:
        return False
    return True
