"""GGUF files: each type's numbers by a plain loop over its blocks, read lazily; what is damaged or unknown is named."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from trtlab import CheckpointError, MissingDependency
from trtlab.storage.gguf_file import open_gguf

from ..gguf_files import BLOCKS, FLOATS, K_BLOCKS, pack, random_blocks


def half(block, place):
    (value,) = struct.unpack_from("<e", block, place)
    return value


def nibble(block, start, number):
    """Of 32 numbers in 16 bytes: the low halves are the first 16 numbers."""
    return block[start + number % 16] >> (4 * (number // 16)) & 15


def fifth_bit(block, start, number):
    return int.from_bytes(block[start : start + 4], "little") >> number & 1


def scale_and_least(block, start, part):
    """Two numbers of 6 bits for each of eight parts, in 12 bytes: Q4_K and Q5_K."""
    if part < 4:
        return block[start + part] & 63, block[start + 4 + part] & 63
    low, high, other = block[start + 4 + part], block[start + part - 4] >> 6, block[start + part] >> 6
    return low & 15 | high << 4, low >> 4 | other << 4


def q3_scale(block, part):
    low = block[96 + part % 8] >> (4 * (part // 8)) & 15
    return (low | (block[104 + part % 4] >> (2 * (part // 4)) & 3) << 4) - 32


def q3_value(block, number):
    place, shift = number // 128 * 32 + number % 32, number // 32 % 4
    missing = not block[number % 32] >> (number // 32) & 1
    return (block[32 + place] >> (2 * shift) & 3) - 4 * missing


def q6_value(block, number):
    side, quarter, place = number // 128, number // 32 % 4, number % 32
    low = block[64 * side + 32 * (quarter % 2) + place] >> (4 * (quarter // 2)) & 15
    return (low | (block[128 + 32 * side + place] >> (2 * quarter) & 3) << 4) - 32


def signed(byte):
    return byte - 256 * (byte > 127)


def k_value(block, start, number):
    """Of 256 numbers in 128 bytes: a byte has those of two neighbouring parts of 32."""
    return block[start + number // 64 * 32 + number % 32] >> (4 * (number // 32 % 2)) & 15


def q4_k(block, number):
    scale, least = scale_and_least(block, 4, number // 32)
    return half(block, 0) * scale * k_value(block, 16, number), half(block, 2) * least


def q5_k(block, number):
    scale, least = scale_and_least(block, 4, number // 32)
    value = k_value(block, 48, number) | (block[16 + number % 32] >> (number // 32) & 1) << 4
    return half(block, 0) * scale * value, half(block, 2) * least


def q2_k(block, number):
    scale = block[number // 16]
    value = block[16 + number // 128 * 32 + number % 32] >> (2 * (number // 32 % 4)) & 3
    return half(block, 80) * (scale & 15) * value, half(block, 82) * (scale >> 4)


# The numbers of a block as the format describes them: number i is the first value less the second.
LOOPS = {
    "Q8_0": lambda b, i: (half(b, 0) * signed(b[2 + i]), 0.0),
    "Q4_0": lambda b, i: (half(b, 0) * (nibble(b, 2, i) - 8), 0.0),
    "Q4_1": lambda b, i: (half(b, 0) * nibble(b, 4, i), -half(b, 2)),
    "Q5_0": lambda b, i: (half(b, 0) * ((nibble(b, 6, i) | fifth_bit(b, 2, i) << 4) - 16), 0.0),
    "Q5_1": lambda b, i: (half(b, 0) * (nibble(b, 8, i) | fifth_bit(b, 4, i) << 4), -half(b, 2)),
    "Q2_K": q2_k,
    "Q3_K": lambda b, i: (half(b, 108) * q3_scale(b, i // 16) * q3_value(b, i), 0.0),
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": lambda b, i: (half(b, 208) * signed(b[192 + i // 16]) * q6_value(b, i), 0.0),
}


def write(path, tensors, **keys):
    """Write a file of tensors, each with its type, and whole numbers or texts as keys."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in keys.items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def noise():
    return np.random.default_rng(3).normal(size=(6, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", LOOPS)
def test_the_numbers_of_a_block_are_those_of_a_plain_loop(kind, noise, tmp_path):
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    stored = pack(noise, kind) if kind in BLOCKS else random_blocks(kind, 12).reshape(6, -1)
    tensor = open_gguf(write(tmp_path / "a.gguf", {"w": (stored, kind)})).tensors()["w"]
    assert tensor.shape == (6, 512) and tensor.dtype == torch.float32
    terms = [
        LOOPS[kind](block.tobytes(), number) for block in stored.reshape(-1, nbytes) for number in range(size)
    ]  # in exact arithmetic, for products of such short numbers
    first, second = torch.tensor(terms, dtype=torch.float64).unbind(1)
    # Three roundings to float32 of terms of this size, each by half of the last place of 24 bits.
    allowed = 3 * 2.0**-24 * (first.abs() + second.abs())
    values = tensor.read().double().flatten()
    assert ((values - (first - second)).abs() <= allowed).all()
    assert len(values.unique()) > 100


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_kept_bit_for_bit(kind, noise, tmp_path):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    values = torch.from_numpy(noise).to(dtype)
    stored = {"w": (pack(noise, kind), kind), "v": (pack(noise[0], kind), kind)}
    tensors = open_gguf(write(tmp_path / "a.gguf", stored)).tensors()
    assert tensors["w"].dtype == dtype and torch.equal(tensors["w"].read(), values)
    assert torch.equal(tensors["v"].read(), values[0])


@pytest.mark.parametrize("kind", (*FLOATS, *BLOCKS, *K_BLOCKS))
def test_rows_are_those_of_the_whole_and_are_all_that_is_read(kind, noise, tmp_path, monkeypatch):
    tensor = open_gguf(write(tmp_path / "a.gguf", {"w": (pack(noise, kind), kind)})).tensors()["w"]
    whole, read = tensor.read(), []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **kwargs: read.append(args[2]) or fromfile(*args, **kwargs))
    assert torch.equal(tensor.narrow(0, 2, 3).read(), whole[2:5])
    assert torch.equal(tensor.narrow(0, 5, 1).to(torch.bfloat16).read(), whole[5:].to(torch.bfloat16))
    assert torch.equal(tensor.narrow(1, 7, 300).read(), whole[:, 7:307])
    assert [nbytes * 6 // read[-1] for nbytes in read] == [3, 1, 6]


def test_opening_reads_no_tensor_and_a_changed_file_is_refused(noise, tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", {"w": (noise, "F32")})
    monkeypatch.setattr(np, "fromfile", lambda *_, **__: pytest.fail("read a tensor"))
    tensor = open_gguf(path).tensors()["w"]
    monkeypatch.undo()
    assert torch.equal(tensor.read(), torch.from_numpy(noise))
    write(path, {"w": (-noise, "F32")})
    with pytest.raises(CheckpointError, match=r"has changed since it was opened.*open"):
        tensor.read()
    path.unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        tensor.narrow(0, 0, 1).read()


def test_tensors_begin_where_the_files_alignment_says(noise, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    for name in "vw":
        writer.add_tensor(name, noise[: 1 + (name == "w")])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    assert [tensor.start % 256 for tensor in file.stored.values()] == [0, 0]
    assert torch.equal(file.tensors()["w"].read(), torch.from_numpy(noise[:2]))


@pytest.fixture
def content(noise, tmp_path):
    """The bytes of a whole file with a text, a list of texts and a tensor."""
    path = write(tmp_path / "whole.gguf", {"w": (noise, "F32")}, **{"general.name": "größe"})
    return path.read_bytes()


def open_bytes(folder, content):
    (folder / "damaged.gguf").write_bytes(content)
    return open_gguf(folder / "damaged.gguf")


COPY = "truncated or damaged: copy it again"
DAMAGED = {
    "empty": (lambda c: b"", "does not begin with GGUF.*give a model in GGUF"),
    "another format": (lambda c: b"PK\3\4" + c[4:], "does not begin with GGUF.*give a model in GGUF"),
    "its header ends early": (lambda c: c[:60], f"its header goes on behind the end of the file, at byte 60.*{COPY}"),
    "its data end early": (lambda c: c[:-1], rf"'w' ends at byte [\d,]+, and the file at [\d,]+.*{COPY}"),
    "big-endian": (lambda c: c[:4] + c[4:8][::-1] + c[8:], "big-endian machines.*convert the model to GGUF again"),
    "version 1": (
        lambda c: c[:4] + b"\1\0\0\0" + c[8:],
        "version 1, which is not supported.*convert the model to GGUF",
    ),
    "version 9": (
        lambda c: c[:4] + b"\t\0\0\0" + c[8:],
        "version 9, which is not supported.*convert the model to GGUF",
    ),
    "many tensors": (lambda c: c[:8] + b"\xff" * 7 + b"\0" + c[16:], f"cannot be read.*{COPY}"),
    "many keys": (lambda c: c[:16] + b"\xff" * 8 + c[24:], f"cannot be read.*{COPY}"),
    "no text": (lambda c: c.replace("größe".encode(), b"gr\xff\xff\xffe\xff"), f"can't decode byte.*{COPY}"),
    "a dimension too many": (lambda c: c.replace(b"w\2\0\0\0", b"w\5\0\0\0"), f"'w' has 5 dimensions.*{COPY}"),
    "no dimension": (lambda c: c.replace(b"w\2\0\0\0", b"w\0\0\0\0"), f"'w' has 0 dimensions.*{COPY}"),
    "empty rows": (lambda c: c.replace(b"w\2\0\0\0\0\2", b"w\2\0\0\0\0\0"), f"does not hold whole blocks.*{COPY}"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(damage, content, tmp_path):
    assert open_bytes(tmp_path, content).metadata["general.name"] == "größe"
    change, message = DAMAGED[damage]
    with pytest.raises(CheckpointError, match=rf"(?s)damaged\.gguf.*{message}"):
        open_bytes(tmp_path, change(content))


def test_every_truncation_is_refused(content, tmp_path):
    for length in [*range(200), *range(200, len(content), 1000), len(content) - 1]:
        with pytest.raises(CheckpointError, match=r"damaged\.gguf"):
            open_bytes(tmp_path, content[:length])


def test_a_file_of_several_is_refused_with_the_tool_that_joins_them(noise, tmp_path):
    path = write(tmp_path / "a-00001-of-00003.gguf", {"w": (noise, "F32")}, **{"split.count": 3})
    with pytest.raises(CheckpointError, match=r"one of 3 files that make a model.*llama-gguf-split --merge"):
        open_gguf(path)
    assert open_gguf(write(tmp_path / "b.gguf", {"w": (noise, "F32")}, **{"split.count": 1})).stored
    with pytest.raises(CheckpointError, match=r"one of 'two' files"):
        open_gguf(write(tmp_path / "c.gguf", {"w": (noise, "F32")}, **{"split.count": "two"}))


def test_a_type_that_is_not_read_is_named(noise, content, tmp_path):
    nl4 = np.zeros((6, 18 * 16), np.uint8)
    path = write(tmp_path / "a.gguf", {"v": (noise, "F32"), "w": (nl4, "IQ4_NL")})
    with pytest.raises(CheckpointError, match=r"type IQ4_NL are not supported.*Q4_0 \|.*Hugging Face folder"):
        open_gguf(path)
    dimensions = struct.pack("<IQQ", 2, 512, 6)
    with pytest.raises(CheckpointError, match=r"type number 77 are not supported"):
        open_bytes(tmp_path, content.replace(dimensions + b"\0", dimensions + b"\x4d"))


def test_a_row_that_is_no_whole_number_of_blocks_is_refused(content, tmp_path):
    dimensions = struct.pack("<IQQ", 2, 512, 6)
    other = struct.pack("<IQQ", 2, 500, 6) + b"\x08"  # Q8_0
    with pytest.raises(CheckpointError, match=r"'w' of shape \[6, 500\] does not hold whole blocks of 32 \(Q8_0\)"):
        open_bytes(tmp_path, content.replace(dimensions + b"\0", other))


def test_without_its_package_the_command_that_installs_it_is_given(content, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(content)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r"needs gguf.*pip install gguf"):
        open_gguf(tmp_path / "a.gguf")
