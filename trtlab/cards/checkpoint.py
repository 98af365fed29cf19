"""The card of a checkpoint: its model, its bytes by kind of tensor, its attention and its positions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby

from trtlab.card import Card, Table, bar, card, count, size
from trtlab.cards.phrases import attention_phrase, build_call, folder_facts, position_phrase
from trtlab.checkpoint import Checkpoint
from trtlab.storage.lazy import LazyTensor


@card.register
def checkpoint_card(checkpoint: Checkpoint) -> Card:
    """A checkpoint: its model, its bytes by kind of tensor, its attention and its positions."""
    config = checkpoint.config
    whole = checkpoint.rank is None or len(checkpoint.mapping.ranks) == 1
    part = "" if checkpoint.rank is None else f" · rank {checkpoint.rank} of {checkpoint.mapping.world_size}"
    return Card(
        f"Checkpoint · {config.architecture} · {config.dtype}{part}",
        (
            ("from", checkpoint.source),
            *folder_facts(checkpoint.folder),
            ("weights", _weights(checkpoint.tensors.values())),
            ("attention", attention_phrase(config)),
            ("positions", position_phrase(config)),
            ("KV cache", f"{size(config.kv_bytes_per_token)} a token"),
        ),
        (_tensor_table(checkpoint.tensors),),
        next=f"engine = {build_call(config)}" if whole else "Checkpoint.load(folder), without rank=, to build it",
    )


def _weights(tensors: Iterable[LazyTensor]) -> str:
    listed = list(tensors)
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in listed)
    nbytes = sum(tensor.nbytes for tensor in listed)
    return f"{count(parameters)} parameters, {size(nbytes)} in {len(listed)} tensors, read when needed"


_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")


def _tensor_table(tensors: Mapping[str, LazyTensor]) -> Table:
    """Tensors grouped over layers: a single row for ``attention.qkv.weight`` of all layers."""

    def kind(name: str) -> str:
        match = _LAYER.fullmatch(name)
        return f"layers.*.{match[2]}" if match else name

    order = {kind(name): place for place, name in reversed(list(enumerate(tensors)))}
    names = sorted(tensors, key=lambda name: order[kind(name)])
    groups = [(title, [tensors[name] for name in members]) for title, members in groupby(names, kind)]
    largest = max(sum(t.nbytes for t in members) for _, members in groups)
    rows = []
    for title, members in groups:
        nbytes = sum(t.nbytes for t in members)
        times = f"{len(members)} x " if len(members) > 1 else ""
        rows.append((title, f"{times}{list(members[0].shape)}", size(nbytes), bar(nbytes / largest)))
    return Table(("tensor", "shape", " bytes", ""), tuple(rows))
