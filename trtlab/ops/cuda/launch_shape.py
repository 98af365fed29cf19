"""Chooses how an attention call over paged K and V is split into programs: rows, tiles, splits of the positions.

Knows the device's size and the call's shapes; launches nothing and needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_SPLITS = 128
START = 4  # cost of a program before its first tile and after its last one, in tiles
WORKSPACE = 2**26  # bytes that the results of all splits may take before they are merged


@dataclass(frozen=True)
class LaunchShape:
    """How one call is split.

    ``rows`` are a program's queries (tokens times heads of a group), ``tile`` the positions that it reads at a time,
    ``splits`` the parts of the cached positions. ``warps`` and ``stages`` are Triton's: warps of a program, and one
    more than the tiles of K and V being loaded. ``overlap`` starts the merge while the last programs run, which Hopper
    and later GPUs support.
    """

    rows: int
    tile: int
    splits: int
    warps: int
    stages: int
    overlap: bool = False


def launch_shape(q: Tensor, keys: Tensor, sequences: int, longest: int, most: int) -> LaunchShape:
    """Choose shapes and splits from what the host knows.

    Args:
        q: Queries, ``[tokens, heads, head_size]``.
        keys: One layer's pool, ``[kv_heads, blocks, tokens_per_block, head_size]``.
        sequences: Their number.
        longest: About the most tokens of a sequence, past and new.
        most: The most new tokens of a sequence.
    """
    kv_heads, group, width = keys.shape[0], q.shape[1] // keys.shape[0], width_of(q.shape[2])
    exact = torch.float32 in (q.dtype, keys.dtype)
    return _launch_shape(q.device, kv_heads, group, width, keys.element_size(), exact, sequences, longest, most)


@lru_cache(maxsize=1024)  # every layer of a step calls it with the same arguments
def _launch_shape(
    device: torch.device,
    kv_heads: int,
    group: int,
    width: int,
    itemsize: int,
    exact: bool,
    sequences: int,
    longest: int,
    most: int,
) -> LaunchShape:
    """As ``launch_shape``; ``exact`` means float32, which tensor cores would round, so its products are smaller."""
    chip = torch.cuda.get_device_properties(device)
    rows = max(power_of_two(group), min(32 if exact or width > 128 else 128, power_of_two(most * group)))
    slots = (1 if rows > 64 else 2) * chip.multi_processor_count
    programs = -(-most // (rows // group)) * kv_heads * sequences
    most_tile = 512 // rows if exact else 128 if itemsize == 1 and rows <= 16 else 64
    tile = max(16, min(most_tile, 16384 // (width * itemsize)))  # 16 KB of K
    while tile > 32 and programs * -(-longest // tile) < slots:
        tile //= 2  # shorter tiles give work to more of the device
    room = WORKSPACE // (programs * rows * width * torch.float32.itemsize)
    merge = programs * rows // 1024  # merging 1024 rows takes about as long as one tile
    splits = split_count(programs, -(-longest // tile), slots, merge, room)
    return LaunchShape(rows, tile, splits, 8 if rows > (8 if exact else 64) else 4, stages=3, overlap=chip.major >= 9)


def split_count(programs: int, tiles: int, slots: int, merge: int = 0, room: int = MOST_SPLITS) -> int:
    """The best number of splits for ``programs`` of ``tiles`` each on a device that runs ``slots`` programs at once.

    The cost, in tiles, is the rounds of programs times the tiles of each plus its start, and the ``merge``. The result
    is the smallest number of splits within 2 % of the least cost; ``room`` is the most that the workspace allows.
    """

    def cost(splits: int) -> int:
        return -(-programs * splits // slots) * (-(-tiles // splits) + START) + (merge if splits > 1 else 0)

    counts = range(1, max(1, min(MOST_SPLITS, tiles, room)) + 1)
    enough = 1.02 * min(map(cost, counts))
    return next(splits for splits in counts if cost(splits) <= enough)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def width_of(head_size: int) -> int:
    """The columns of a head in a program: a tensor core's product needs a power of two, at least 16."""
    return max(16, power_of_two(head_size))
