"""Damaged tokenizer files, in each layout, and code that they ask for."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from trtlab import BuildConfig, Checkpoint

from . import bases
from .configs import hugging_face
from .folder import Files
from .journeys import Journey, require, use_text
from .json_edits import JsonEdits, broken_text
from .kinds import Base, Edit, Kind, json_edit

VOCAB = 600  # of the model: more than any tokenizer here has
EVIL = b"""
open("canary", "w")
class Tokenizer:
    from_pretrained = classmethod(lambda cls, *arguments, **options: open("canary", "w"))
"""
CLASSES = [
    *(None, 1, "", "../evil", "os.system"),
    *"LlamaTokenizer LlamaTokenizerFast PreTrainedTokenizerFast GPT2Tokenizer Qwen2Tokenizer BertTokenizer".split(),
    *"T5Tokenizer TokenizersBackend MistralCommonTokenizer Tokenizer evil".split(),
]
AUTO_MAPS: list[Any] = [
    {"AutoTokenizer": ["evil.Tokenizer", None]},
    {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    {"AutoTokenizer": "evil.Tokenizer"},
    {"AutoTokenizer": ["x/y--evil.Tokenizer", None]},
    {"AutoTokenizer": None},
    ["evil.Tokenizer", None],
    "evil.Tokenizer",
    {},
]
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": CLASSES,
    "auto_map": AUTO_MAPS,
    "model_max_length": [0, -1, 1, 10**30, "linear", None, 1e30, 512],
    "bos_token": [None, "", "<s>", "x" * 300, 7, {"content": "<s>", "__type": "AddedToken"}, {}, ["<s>"]],
    "eos_token": [None, "", "</s>", "nothing", 7, {"content": "</s>"}, [], ["</s>"]],
    "unk_token": [None, "<unk>", 1],
    "pad_token": [None, "", "</s>"],
    "chat_template": [None, "", "{{ messages[0].content }}", [{"name": "default", "template": "a"}], [{}], [1], {}, 7],
    "added_tokens_decoder": [
        None,
        {},
        {"0": {"content": "<s>"}},
        {"x": {"content": "a"}},
        {"-1": {"content": "a"}},
        {"1": 2},
    ],
    "additional_special_tokens": [None, [], ["<a>"], [1], "x", [{}], {"a": 1}],
    "add_bos_token": [True, False, None, "x"],
    "clean_up_tokenization_spaces": [True, False],
    "legacy": [True, False, None],
    "use_fast": [True, False],
    "backend": ["tokenizers", "sentencepiece", "x"],
}
TOKENIZER_CONFIG_EXTRA = {
    "auto_map": AUTO_MAPS[0],
    "vocab_file": "/etc/passwd",
    "tokenizer_file": "{outside}/secret.json",
    "name_or_path": "x/y",
    "_commit_hash": "0" * 40,
    "trust_remote_code": True,
    "fast_tokenizer_files": ["tokenizer.json", "tokenizer.9.json"],
    "extra_special_tokens": {"image_token": "<i>"},
    "from_slow": True,
    "gguf_file": "x.gguf",
    "subfolder": "../outside",
    "processor_class": "X",
    "padding_side": "up",
    "truncation_side": "left",
    "split_special_tokens": True,
    "response_schema": {"type": "object"},
}
SLOW_SPLIT = {"type": "Split", "pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated", "invert": False}
SWELLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}
FIXED = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
TOKENIZER: dict[str, Any] = {
    "type": "BPE WordPiece WordLevel Unigram ByteLevel Whitespace Sequence Replace Split X".split(),
    "content": ["", "a", "<s>", " ", "\0", "x" * 300],
    "id": [0, -1, 1, 319, 320, 10**6, 2**32 - 1, 2**32],
    "pattern": [{"Regex": regex} for regex in ("(a+)+$", "(", "", "(?=(.*))" * 20)] + [{"String": ""}],
    "pre_tokenizer": [None, SLOW_SPLIT, {"type": "Whitespace"}],
    "normalizer": [None, SWELLING, {"type": "NFKC"}, {"type": "Prepend", "prepend": ""}],
    "decoder": [
        None,
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Strip", "content": " ", "start": 10**9, "stop": 0},
        {"type": "ByteFallback"},
    ],
    "post_processor": [
        None,
        {"type": "ByteLevel"},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    ],
    "padding": [None, FIXED | {"pad_to_multiple_of": None}, FIXED | {"pad_to_multiple_of": 0}],
    "truncation": [
        None,
        {"max_length": 0, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        {"max_length": 1, "strategy": "OnlyFirst", "stride": 5, "direction": "Left"},
    ],
    "version": ["1.0", "9.9", 1, None],
    "merges": [[], ["a b"], [["a", "b"]], ["a"], [["a"]], [1], None],
    "vocab": [{}, {"a": 0}, {"a": -1}, {"a": 2**40}, [["a", 0.0]], [], None],
    "dropout": [0.5, 1.0, 2.0, None],
    "byte_fallback": [True, False],
    "unk_token": [None, "nothing", ""],
}
GENERATION: dict[str, Any] = {
    "eos_token_id": [None, 2, [2, 3], [], "2", ["</s>"], [[1]], True, -1, 10**9, 2**63, 1.0, [None], {}],
    "bos_token_id": [None, 1, "x"],
}
MERGES = ("#version: 0.2\n", "a b\n", "a\n", "a b c\n", "\n", "x y\n", "\0 \0\n", "é é\n")


def _opened(journey: Journey) -> None:
    """Open a folder and use its tokenizer; with ``deep`` also save it."""
    if journey.deep and journey.rng.random() < 0.3:
        hugging_face(journey)
        return
    checkpoint = Checkpoint.from_hugging_face(journey.folder)
    journey.done("opened")
    if journey.deep:
        journey.save(checkpoint.save)
        journey.done("saved")
    engine = checkpoint.build(BuildConfig(max_batch_size=2, max_num_tokens=64), plan=False)
    with engine, engine.session(backend="torch", device="cpu") as session:
        if journey.rng.random() < 0.2:
            require(len(session.generate([1, 2, 3]).token_ids) > 0, "no token from token ids")
        use_text(session, journey)
    journey.done("ran")


def _merges(files: Files, rng: Random) -> str:
    text = files.get("merges.txt")
    if not isinstance(text, bytes):
        return "nothing"
    lines = text.decode("utf-8", "replace").splitlines(keepends=True)
    if rng.random() < 0.5:
        lines[rng.randrange(len(lines) + 1) :] = [rng.choice(MERGES) for _ in range(rng.randrange(5))]
        files["merges.txt"] = "".join(lines).encode()
        return "merges.txt: lines"
    files["merges.txt"], what = broken_text(text, rng)
    return f"merges.txt: {what}"


def _plant(files: Files, rng: Random) -> str:
    """Code in the folder, and a setting that asks for it."""
    config = files.get("tokenizer_config.json")
    try:
        values = json.loads(config) if isinstance(config, bytes) else {}
    except (ValueError, RecursionError):
        values = {}
    values = values if isinstance(values, dict) else {}
    values["auto_map"] = rng.choice(AUTO_MAPS)
    if rng.random() < 0.5:
        values["tokenizer_class"] = rng.choice(("Tokenizer", "EvilTokenizer", "evil.Tokenizer"))
    files["tokenizer_config.json"] = json.dumps(values).encode()
    files["evil.py"] = files["__init__.py"] = EVIL
    return f"code, and auto_map {values['auto_map']}"


def _lost(files: Files, rng: Random) -> str:
    """Take one file out, or give it another one's content."""
    names = [name for name in files if name not in ("config.json", "model.safetensors")]
    if not names:
        return "nothing"
    name = rng.choice(names)
    if rng.random() < 0.6:
        del files[name]
        return f"no {name}"
    other = rng.choice([*names, "config.json"])
    files[name] = files[other]
    return f"{name} is {other}"


def with_tokenizer(kind: str = "byte level", **config: Any) -> Files:
    """A model with a tokenizer."""
    return bases.hugging_face(vocab_size=VOCAB, **config) | bases.tokenizer(kind)


def without_tokenizer_json() -> Files:
    """The layout of vocab.json and merges.txt."""
    files = with_tokenizer()
    model = json.loads(files.pop("tokenizer.json"))["model"]  # type: ignore[arg-type]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}  # type: ignore[arg-type]
    return files | {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}).encode(),
    }


def _tokenizer_bases() -> list[Base]:
    generation = {"generation_config.json": json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1}).encode()}
    special = {"special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).encode()}
    template = {"chat_template.jinja": b"{% for m in messages %}<s>{{ m.content }}{% endfor %}"}
    return [
        Base("byte level", {**with_tokenizer(), **generation, **template}, _opened),
        Base("byte fallback", {**with_tokenizer("byte fallback"), **special, **generation}, _opened),
        Base("vocab and merges", {**without_tokenizer_json(), **template}, _opened),
    ]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    changed: list[tuple[float, Edit]] = [
        (4, json_edit("tokenizer.json", JsonEdits(TOKENIZER))),
        (3, json_edit("tokenizer_config.json", JsonEdits(TOKENIZER_CONFIG, TOKENIZER_CONFIG_EXTRA))),
        (1, json_edit("special_tokens_map.json", JsonEdits(TOKENIZER_CONFIG, TOKENIZER_CONFIG_EXTRA))),
        (1, json_edit("generation_config.json", JsonEdits(GENERATION))),
        (1, json_edit("vocab.json", JsonEdits())),
        (1, _merges),
        (1, _plant),
        (1, _lost),
    ]
    return {"tokenizer": Kind(_tokenizer_bases, changed, deep=0.2)}
