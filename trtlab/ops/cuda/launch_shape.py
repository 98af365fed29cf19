"""How an attention call over paged K and V is cut into programs: rows, tiles and splits of the cached positions.

Knows the device's size and the call's shapes; launches nothing and needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_SPLITS = 128
START = 4  # what a program costs before its first tile and after its last, in tiles
WORKSPACE = 2**26  # bytes that splits may take before they are merged


@dataclass(frozen=True)
class LaunchShape:
    """How one call is cut: query ``rows`` (tokens times heads of a group) and positions of a ``tile``, ``splits``.

    ``warps`` and ``stages`` are Triton's: warps of a program, and one more than the tiles of K and V under way.
    ``overlap`` starts the merge while the last programs run, which Hopper and later can.
    """

    rows: int
    tile: int
    splits: int
    warps: int
    stages: int
    overlap: bool = False


def launch_shape(q: Tensor, keys: Tensor, sequences: int, longest: int, most: int) -> LaunchShape:
    """Shapes and splits from what the host knows: types, head counts, sequences, ``longest`` and ``most``."""
    kv_heads, group, width = keys.shape[0], q.shape[1] // keys.shape[0], width_of(q.shape[2])
    exact = torch.float32 in (q.dtype, keys.dtype)
    return _launch_shape(q.device, kv_heads, group, width, keys.element_size(), exact, sequences, longest, most)


@lru_cache(maxsize=1024)  # every layer of a step asks the same
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
    """``exact``: float32, which tensor cores would round, so that its products must be smaller."""
    chip = torch.cuda.get_device_properties(device)
    rows = max(power_of_two(group), min(32 if exact or width > 128 else 128, power_of_two(most * group)))
    slots = (1 if rows > 64 else 2) * chip.multi_processor_count
    programs = -(-most // (rows // group)) * kv_heads * sequences
    most_tile = 512 // rows if exact else 128 if itemsize == 1 and rows <= 16 else 64
    tile = max(16, min(most_tile, 16384 // (width * itemsize)))  # 16 KB of K
    while tile > 32 and programs * -(-longest // tile) < slots:
        tile //= 2  # so short that more of the device has a share
    room = WORKSPACE // (programs * rows * width * torch.float32.itemsize)
    merge = programs * rows // 1024  # about a tile's time for so many rows
    splits = split_count(programs, -(-longest // tile), slots, merge, room)
    return LaunchShape(rows, tile, splits, 8 if rows > (8 if exact else 64) else 4, stages=3, overlap=chip.major >= 9)


def split_count(programs: int, tiles: int, slots: int, merge: int = 0, room: int = MOST_SPLITS) -> int:
    """Into how many parts ``programs`` of ``tiles`` each are best cut on a device that runs ``slots`` at once.

    The cost is rounds of programs times tiles of each with its start, and the ``merge``, in tiles. It takes the fewest
    splits within 2 % of the least cost.
    """

    def cost(splits: int) -> int:
        return -(-programs * splits // slots) * (-(-tiles // splits) + START) + (merge if splits > 1 else 0)

    counts = range(1, max(1, min(MOST_SPLITS, tiles, room)) + 1)
    enough = 1.02 * min(map(cost, counts))
    return next(splits for splits in counts if cost(splits) <= enough)


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def width_of(head_size: int) -> int:
    """The columns that a head takes in a program: a tensor core's product wants a power of two, 16 at least."""
    return max(16, power_of_two(head_size))
