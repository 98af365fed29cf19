"""Damaged safetensors files: their length, their header, their bytes, and numbers that no model has."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from trtlab import Mapping

from . import bases
from .configs import hugging_face, stored
from .folder import Files
from .journeys import open_engine
from .json_edits import JsonEdits, broken_text, odd_value
from .kinds import Base, Edit, Kind

DTYPES = {  # and bytes of one number
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32", "f32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL", "F4", "F6_E2M3", "X", ""), 1),
}
HEADER_VALUES: dict[str, Any] = {
    "dtype": list(DTYPES),
    "shape": [[], [0], [1], [40, 16], [16, 40], [-1], [2**63], [2**32, 2**32], [0, 2**63], [1] * 70, [1.5], None, "x"],
    "data_offsets": [[0, 0], [0, 4], [4, 0], [0, 2**63], [-1, 3], [0], [0, 1, 2], None, [0.5, 1], [2**64, 2**64]],
    "format": ["pt", "np", 1, None],
}
NUMBERS = (float("nan"), float("inf"), float("-inf"), 0.0, 1e30, 3e38, -1e30, 1e-45)


def split(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and data of a file, None when an earlier edit broke it."""
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError, MemoryError):
        return None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def joined(header: dict[str, Any], data: bytes) -> bytes:
    """A file of this header and data."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data


def safetensors_edit(files: Files, rng: Random) -> str:
    """Change one of the safetensors files."""
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    content = files[name]
    assert isinstance(content, bytes)
    edit = rng.choice((_header, _header, _fitting, _fitting, _names, _numbers, _numbers, _length, _offsets, _bytes))
    files[name], what = edit(content, rng)
    return f"{name}: {what}"


_EDITS = JsonEdits(HEADER_VALUES)


def _header(content: bytes, rng: Random) -> tuple[bytes, str]:
    parts = split(content)
    if parts is None:
        return _bytes(content, rng)
    what = _EDITS.change(parts[0], rng)
    try:
        return joined(*parts), f"header: {what}"
    except (RecursionError, ValueError):
        return content, "nothing"


def _fitting(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Another dtype and shape for one tensor, in a file that is otherwise whole: lengths and offsets fit."""
    parts = split(content)
    names = (
        [name for name, entry in parts[0].items() if name != "__metadata__" and isinstance(entry, dict)]
        if parts
        else []
    )
    if parts is None or not names:
        return _bytes(content, rng)
    header, data = parts
    name = rng.choice(names)
    dtype = rng.choice(list(DTYPES))
    shape = rng.choice(
        ([], [0], [1], [0, 16], [16], [40, 16], [24, 16], [16, 24], [1, 1, 16], header[name].get("shape", []))
    )
    try:
        size = DTYPES[dtype] * int(torch.Size(shape).numel())
        laid_out, start, changed = {}, 0, bytearray()
        for other, entry in header.items():
            if other == "__metadata__":
                laid_out[other] = entry
                continue
            first, last = entry["data_offsets"]
            piece = bytes(size) if other == name else data[first:last]
            entry = {"dtype": dtype, "shape": shape} if other == name else dict(entry)
            laid_out[other] = {**entry, "data_offsets": [start, start + len(piece)]}
            start += len(piece)
            changed += piece
    except (TypeError, ValueError, KeyError, AttributeError):
        return _bytes(content, rng)
    return joined(laid_out, bytes(changed)), f"{name} is {dtype} {shape}"


def _names(content: bytes, rng: Random) -> tuple[bytes, str]:
    parts = split(content)
    if parts is None or not parts[0]:
        return _bytes(content, rng)
    header, data = parts
    name = rng.choice(list(header))
    prefixes = ("module.", "model.", "_orig_mod.", "base_model.model.", "transformer.", "")
    new = rng.choice(
        (*(prefix + name for prefix in prefixes), name.replace("0", "7"), "\ud800", "", "x" * 5000, "\0", "a/b")
    )
    try:
        header[new] = header.pop(name) if rng.random() < 0.7 else dict(header[name])
        return joined(header, data), f"{name} is called {new:.60}"
    except (TypeError, ValueError):
        return content, "nothing"


def _numbers(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Odd numbers in one tensor, all or some of its elements."""
    try:
        tensors = load_bytes(content)
        name = rng.choice(sorted(tensors))
        number, tensor = rng.choice(NUMBERS), tensors[name].flatten().clone()
        some = tensor if rng.random() < 0.5 else tensor[:: rng.choice((2, 7, max(1, len(tensor))))]
        some.fill_(
            number if tensor.is_floating_point() else rng.randrange(-128, 127) if tensor.dtype.is_signed else 255
        )
        tensors[name] = tensor.reshape(tensors[name].shape)
        return save_bytes(tensors), f"{name} holds {number}"
    except Exception:  # noqa: BLE001 - an earlier edit broke the file
        return _bytes(content, rng)


def _length(content: bytes, rng: Random) -> tuple[bytes, str]:
    length = int.from_bytes(content[:8], "little")
    changed = (
        rng.choice((0, 1, 7, length - 1, length + 1, length * 2, 10**6, 10**8, 2**31, 2**40, 2**63, 2**64 - 1)) % 2**64
    )
    return changed.to_bytes(8, "little") + content[8:], f"header length {changed}"


def _offsets(content: bytes, rng: Random) -> tuple[bytes, str]:
    parts = split(content)
    if parts is None:
        return _bytes(content, rng)
    header, data = parts
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry]
    if len(names) < 2:
        return _bytes(content, rng)
    first, second = rng.sample(names, 2)
    offsets = header[second]["data_offsets"]
    shift = rng.choice((1, 4, -4, len(data), 2**62))
    try:
        moved = [offset + shift for offset in header[first]["data_offsets"]]
        header[first]["data_offsets"] = rng.choice(
            (offsets, moved, header[first]["data_offsets"][::-1], odd_value(rng))
        )
    except (TypeError, ValueError):
        return content, "nothing"
    return joined(header, data), f"offsets of {first}"


def _bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    if rng.random() < 0.3:
        return content + bytes(rng.choice((1, 8, 4096))), "zeros at the end"
    return broken_text(content, rng)


def _make_bases() -> list[Base]:
    return [
        Base("hugging face", bases.hugging_face(), hugging_face),
        Base("tied", bases.hugging_face(tie_word_embeddings=True), hugging_face),
        Base("qwen 2", bases.hugging_face("Qwen2ForCausalLM", model_type="qwen2"), hugging_face),
        Base("sharded", bases.sharded(), hugging_face),
        Base("checkpoint", bases.checkpoint(Mapping(tp_size=2)), stored),
        Base("quantized", bases.quantized("W8A16"), stored),
        Base(
            "SmoothQuant", bases.quantized("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", kv_cache_quant_algo="INT8"), stored
        ),
        Base("engine", bases.engine(), open_engine),
    ]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    edit: Edit = safetensors_edit
    return {"safetensors": Kind(_make_bases, [(1, edit)], most_edits=2)}
