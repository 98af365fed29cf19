"""Damaged GGUF files: their counts, their keys and values, their table of tensors, their bytes, and odd numbers."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import save_file

from trtlab import Checkpoint
from trtlab.convert.families import FAMILIES

from ..gguf_files import byte_level_keys, sentencepiece_keys, write_gguf
from ..models import LLAMA2_PIECES, small_config, train_sentencepiece, write_byte_level_tokenizer
from . import bases
from .folder import Files
from .gguf_header import LIST, SCALARS, TEXT, Header, split
from .journeys import open_checkpoint
from .json_edits import ODD_TEXTS, broken_text
from .kinds import Base, Edit, Kind

NAME = "model.gguf"
HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
NUMBERS = (0, 1, 2, 3, 5, 16, 64, 255)
FLOATS = (0.0, -1.0, 1.0, 1e-30, 3e38, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "llama", "qwen2", "qwen3", "gpt2", "bert", "none", "linear", "yarn", "longrope", "\0", "x" * 5000)
KEYS = """
general.architecture general.alignment split.count {}.block_count {}.attention.head_count {}.attention.head_count_kv
{}.attention.key_length {}.attention.value_length {}.attention.sliding_window {}.embedding_length {}.vocab_size
{}.feed_forward_length {}.context_length {}.rope.dimension_count {}.rope.freq_base {}.rope.scaling {}.rope.scale_linear
{}.rope.scaling.type {}.rope.scaling.factor {}.rope.scaling.attn_factor {}.rope.scaling.original_context_length
{}.expert_count {}.attention.causal {}.x {}. {} tokenizer.chat_template tokenizer.ggml.model tokenizer.ggml.pre
tokenizer.ggml.tokens tokenizer.ggml.scores tokenizer.ggml.merges tokenizer.ggml.token_type tokenizer.ggml.bos_token_id
tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id tokenizer.ggml.unknown_token_id tokenizer.ggml.add_bos_token
""".split()
TENSORS = "token_embd.weight output.weight rope_freqs.weight blk.0.attn_q.bias blk.9.attn_q.weight x".split()


def _in_header(change: Callable[[Header, Random], str]) -> Edit:
    """An edit of a file whose header can still be read; of another one, any of its bytes."""

    def edit(files: Files, rng: Random) -> str:
        content = files[NAME]
        assert isinstance(content, bytes)
        header = split(content)
        if header is None or not header.keys or not header.tensors:
            return _bytes(files, rng)
        what = change(header, rng)
        files[NAME] = header.joined()
        return what

    return edit


def _odd(rng: Random) -> tuple[int, Any]:
    """A value of any type."""
    kind = rng.choice((TEXT, LIST, 13, *SCALARS))
    if kind == TEXT:
        return kind, rng.choice((*TEXTS, *ODD_TEXTS))
    if kind == LIST:
        item, one = _odd(rng)
        return (kind, (item, 0, [])) if item == LIST else (kind, (item, n := rng.randrange(4), [one] * n))
    return kind, _number(kind, rng)


def _number(kind: int, rng: Random) -> Any:
    format_ = SCALARS.get(kind, "Q")
    if format_ in "fd":
        return rng.choice(FLOATS)
    if format_ == "?":
        return rng.random() < 0.5
    bits = 8 * struct.calcsize("<" + format_) - format_.islower()
    value = rng.choice((*NUMBERS, *HUGE)) % 2**bits
    return -value if format_.islower() and rng.random() < 0.2 else value


def _value(header: Header, rng: Random) -> str:
    """Another value of the same type, or of any."""
    place = rng.randrange(len(header.keys))
    name, kind, value = header.keys[place]
    if kind in SCALARS and rng.random() < 0.6:
        value = _number(kind, rng)
    elif kind == TEXT and rng.random() < 0.5:
        value = rng.choice(TEXTS)
    else:
        kind, value = _odd(rng)
    header.keys[place] = (name, kind, value)
    return f"{name} is {value!r:.40} of type {kind}"


def _architecture(header: Header) -> str:
    return next(
        (value for name, kind, value in header.keys if name == "general.architecture" and kind == TEXT), "llama"
    )


def _key(header: Header, rng: Random) -> str:
    """A key more, one less, one twice, or two that change places."""
    place = rng.randrange(len(header.keys))
    name, kind, value = header.keys[place]
    way = rng.randrange(4)
    if way == 0:
        del header.keys[place]
        return f"no {name}"
    if way == 1:
        header.keys.append((name, kind, value))
        return f"{name} twice"
    if way == 2:
        other = rng.choice(header.keys)
        header.keys[place] = (name, *other[1:])
        return f"{name} has the value of {other[0]}"
    name = rng.choice(KEYS).replace("{}", _architecture(header))
    header.keys = [key for key in header.keys if key[0] != name] + [(name, *_odd(rng))]
    return f"{name} is {header.keys[-1][2]!r:.40}"


def _list(header: Header, rng: Random) -> str:
    """Another length or item of a list: the vocabulary, its types, its scores, its merges."""
    places = [place for place, (_, kind, _) in enumerate(header.keys) if kind == LIST]
    if not places:
        return "nothing"
    place = rng.choice(places)
    name, kind, (item, count, items) = header.keys[place]
    items, way = list(items), rng.randrange(4)
    if way == 0:
        count = rng.choice((*HUGE, 0, count + 1, max(0, count - 1)))
    elif way == 1:
        items = items[: rng.randrange(len(items) + 1)]
        count = len(items)
    elif items:
        for number in rng.sample(range(len(items)), min(len(items), rng.choice((1, 3, 99)))):
            odd = rng.choice((*TEXTS, *ODD_TEXTS)) if item == TEXT else _number(item, rng)
            items[number] = rng.choice((rng.choice(items), odd)) if way == 2 else odd
    header.keys[place] = (name, kind, (item, count, items))
    return f"{name} has {count} values, and other ones"


def _counts(header: Header, rng: Random) -> str:
    header.counts = [len(header.tensors), len(header.keys)]
    which = rng.randrange(2)
    header.counts[which] = rng.choice((*HUGE, 0, header.counts[which] + 1, header.counts[which] - 1))
    return f"counts {header.counts}"


def _shape(header: Header, rng: Random) -> str:
    place = rng.randrange(len(header.tensors))
    name, shape, kind, offset = header.tensors[place]
    odd = [rng.choice((*shape, *NUMBERS, *HUGE)) for _ in range(rng.choice((len(shape), 0, 1, 2, 3, 4, 5, 99)))]
    shape = rng.choice((odd, odd, shape[::-1], [*shape, 1], [1, *shape], shape[:1]))
    header.tensors[place] = (name, shape, kind, offset)
    return f"{name} is {shape!r:.60}"


def _type(header: Header, rng: Random) -> str:
    place = rng.randrange(len(header.tensors))
    name, shape, _, offset = header.tensors[place]
    kind = rng.choice((*range(40), 2**31, 2**32 - 1))
    header.tensors[place] = (name, shape, kind, offset)
    return f"{name} is of type {kind}"


def _offset(header: Header, rng: Random) -> str:
    place = rng.randrange(len(header.tensors))
    name, shape, kind, offset = header.tensors[place]
    header.tensors[place] = (name, shape, kind, rng.choice((0, 1, offset + 1, len(header.data), *HUGE)))
    return f"{name} lies at {header.tensors[place][3]}"


def _name(header: Header, rng: Random) -> str:
    place = rng.randrange(len(header.tensors))
    name, *rest = header.tensors[place]
    other = rng.choice((*TENSORS, rng.choice(header.tensors)[0], *ODD_TEXTS, name.replace("0", "7")))
    entry = (other, *rest)
    if rng.random() < 0.5:
        header.tensors[place] = entry  # type: ignore[assignment]
        return f"{name} is called {other!r:.40}"
    header.tensors.append(entry)  # type: ignore[arg-type]
    return f"{other!r:.40} is {name}"


def _numbers(header: Header, rng: Random) -> str:
    """Other bytes in the tensors: scales that are not finite, and whatever else."""
    data = bytearray(header.data)
    for _ in range(rng.choice((1, 10, 1000))):
        place = rng.randrange(len(data) - 4)
        data[place : place + 4] = rng.choice(
            (b"\xff" * 4, bytes(4), b"\0\0\x80\x7f", b"\0\x7c\0\x7c", rng.randbytes(4))
        )
    header.data = bytes(data)
    return "other numbers"


def _bytes(files: Files, rng: Random) -> str:
    """A change that knows nothing of the header; another version."""
    content = files[NAME]
    assert isinstance(content, bytes)
    way = rng.randrange(4)
    if way == 0:
        files[NAME], what = content[: rng.randrange(len(content) + 1)], "cut short"
    elif way == 1:
        place = rng.randrange(min(len(content), 2000) + 1)
        files[NAME], what = content[:place] + rng.randbytes(8) + content[place + 8 :], f"other bytes at {place}"
    elif way == 2:
        number = rng.choice((0, 1, 2, 4, 2**24 * 3, 2**32 - 1))
        files[NAME], what = content[:4] + struct.pack("<I", number) + content[8:], f"version {number}"
    else:
        files[NAME], what = broken_text(content, rng)
    return what


def _written(architecture: str, kind: str, tokenizer: str | None, rope: dict[str, Any] | None = None) -> Files:
    """A file of one layer, whose rows are whole blocks of ``kind``."""
    size = 256 if kind.endswith("_K") else 64
    sizes = {"vocab_size": 420, "hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1}
    model_type = architecture.removesuffix("ForCausalLM").lower()
    stored = {
        **bases.HUGGING_FACE,
        **sizes,
        "model_type": model_type,
        "head_dim": size // 4,
        "rope_parameters": rope or PLAIN,
    }
    family = FAMILIES[architecture]
    config = small_config(
        **sizes, architecture=architecture, head_size=size // 4, tie_word_embeddings=model_type == "qwen2"
    )
    config = config.replace(attn_bias=bool(family.attn_bias), qk_layernorm=family.qk_layernorm)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(stored))
        save_file(bases.tensors_of(family.names.shapes(config)), folder / "model.safetensors")
        keys: dict[str, Any] = {}
        if tokenizer == "sentencepiece":
            keys = sentencepiece_keys(train_sentencepiece(**LLAMA2_PIECES)) | TEMPLATE
        elif tokenizer:
            write_byte_level_tokenizer(folder)
            keys = byte_level_keys(folder, tokenizer, 420, bos_token_id=0, eos_token_id=1, eot_token_id=2) | TEMPLATE
        return {NAME: write_gguf(folder / NAME, folder, kind, tokenizer=keys).read_bytes()}


TEMPLATE = {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def _make_bases() -> list[Base]:
    made = {
        "llama": _written("LlamaForCausalLM", "F32", "llama-bpe"),
        "sentencepiece": _written("LlamaForCausalLM", "Q8_0", "sentencepiece"),
        "qwen 2": _written("Qwen2ForCausalLM", "Q4_0", "qwen2"),
        "qwen 3": _written("Qwen3ForCausalLM", "BF16", "qwen2"),
        "llama 3.1": _written("LlamaForCausalLM", "Q5_1", None, LLAMA3),
        "yarn": _written("LlamaForCausalLM", "F16", None, YARN),
        "K-quant": _written("LlamaForCausalLM", "Q4_K", None),
    }
    use = open_checkpoint(lambda folder: Checkpoint.from_gguf(folder / NAME))
    return [Base(name, files, use) for name, files in made.items()]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    changes = ((_value, 3), (_key, 2), (_list, 3), (_numbers, 1.5), (_shape, 1), (_type, 1), (_offset, 1), (_name, 1))
    edits = [(weight, _in_header(change)) for change, weight in (*changes, (_counts, 0.5))]
    return {"gguf": Kind(_make_bases, [*edits, (1, _bytes)], deep=0.8, most_edits=2)}
