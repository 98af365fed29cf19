"""Whole folders in disorder: files missing, swapped, linked, cut short, in another's place, or of another format."""

from __future__ import annotations

from functools import cache
from random import Random

from trtlab import Mapping

from . import bases
from .configs import hugging_face, meta, stored
from .folder import Directory, Files, Link, Pipe
from .journeys import Journey, open_engine
from .kinds import Base, Kind
from .tokenizers import with_tokenizer

TARGETS = [
    "x" * 250,
    *"""
    {outside}/secret.json ../outside/secret.json {outside} {outside}/model.safetensors nowhere . .. /dev/zero /dev/null
    /etc/hostname /proc/self/mem config.json tokenizer.json
    """.split(),
]
NAMES = [
    "x" * 255,
    "a b\n.json",
    *"""
    config.json params.json report.json model.safetensors model.safetensors.index.json model-00001-of-00002.safetensors
    pytorch_model.bin pytorch_model.bin.index.json consolidated.00.pth consolidated.01.pth rank0.safetensors
    rank1.safetensors rank7.safetensors rank0.engine tokenizer.json tokenizer.model tokenizer_config.json vocab.json
    special_tokens_map.json generation_config.json chat_template.jinja chat_templates/default.jinja added_tokens.json
    merges.txt tekken.json adapter_config.json preprocessor_config.json hf_quant_config.json configuration_evil.py
    .hidden ä.json
    """.split(),
]
CONTENTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\0" * 100,
    b"\xff\xfe",
    b"x",
    b'{"weight_map": {}}',
    b'{"a": 1}',
    b"PK\3\4",
    b"\x80\x02}.",
)


def _name(files: Files, rng: Random) -> str:
    return rng.choice(list(files)) if files else "config.json"


def _removed(files: Files, rng: Random) -> str:
    name = _name(files, rng)
    files.pop(name, None)
    return f"no {name}"


def _swapped(files: Files, rng: Random) -> str:
    first, second = _name(files, rng), _name(files, rng)
    if first in files and second in files:
        files[first], files[second] = files[second], files[first]
    return f"{first} and {second} are swapped"


def _copied(files: Files, rng: Random) -> str:
    source, target = _name(files, rng), rng.choice(NAMES)
    if source in files:
        files[target] = files[source]
    return f"{target} is a copy of {source}"


def _linked(files: Files, rng: Random) -> str:
    name, target = rng.choice((_name(files, rng), rng.choice(NAMES))), rng.choice(TARGETS)
    files[name] = Link(rng.choice((target, target, name)))
    return f"{name} links to {files[name].target}"  # type: ignore[union-attr]


def _aside(files: Files, rng: Random) -> str:
    """The file itself lies in a folder below, and a link has its name."""
    name = _name(files, rng)
    if name in files:
        files[f"real/{name}"] = files.pop(name)
        files[name] = Link(f"real/{name}")
    return f"{name} lies in a folder below"


def _other_kind(files: Files, rng: Random) -> str:
    name = rng.choice((_name(files, rng), rng.choice(NAMES)))
    files[name] = rng.choice((Directory(), Pipe()))
    return f"{name} is a {type(files[name]).__name__.lower()}"


def _cut(files: Files, rng: Random) -> str:
    name = _name(files, rng)
    content = files.get(name)
    if isinstance(content, bytes):
        files[name] = content[: rng.choice((0, 1, len(content) // 2, max(0, len(content) - 1)))]
    return f"{name} is cut short"


def _added(files: Files, rng: Random) -> str:
    name = rng.choice(NAMES)
    files[name] = rng.choice(CONTENTS)
    return f"{name} is {files[name]!r:.40}"


def _renamed(files: Files, rng: Random) -> str:
    name = _name(files, rng)
    new = rng.choice(
        (name.upper(), name + ".bak", "." + name, name.replace("0", "1"), f"below/{name}", name.replace(".", "-"))
    )
    if name in files:
        files[new] = files.pop(name)
    return f"{name} is called {new}"


def _mixed(files: Files, rng: Random) -> str:
    """Files of a folder of another format."""
    other = rng.choice(_make_bases())
    names = rng.sample(sorted(other.files), rng.randrange(1, len(other.files) + 1))
    files.update({name: other.files[name] for name in names})
    return f"with {', '.join(names)} of {other.name}"


def _any_opener(journey: Journey) -> None:
    """Open a folder in a way that is meant for another format."""
    journey.rng.choice((hugging_face, meta, stored, open_engine))(journey)


def _either(right: object) -> object:
    def use(journey: Journey) -> None:
        (right if journey.rng.random() < 0.85 else _any_opener)(journey)  # type: ignore[operator]

    return use


@cache
def _make_bases() -> list[Base]:
    return [
        Base("hugging face", with_tokenizer(), hugging_face),
        Base("vocab", {**with_tokenizer(), "special_tokens_map.json": b'{"bos_token": "<s>"}'}, hugging_face),
        Base("shards", bases.sharded(), hugging_face),
        Base("hub cache", bases.in_a_hub_cache(with_tokenizer()), hugging_face, at="snapshots/abc"),
        Base("meta", bases.meta(), meta),
        Base("two ranks", bases.checkpoint(Mapping(tp_size=2)), stored),
        Base("quantized", bases.quantized("W8A16"), stored),
        Base("engine", bases.engine(), open_engine),
        Base("engine of two ranks", bases.engine(Mapping(pp_size=2)), open_engine),
        Base("engine with a plan", bases.engine_with_plan(), open_engine),
    ]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    edits = (_removed, _swapped, _copied, _linked, _linked, _aside, _other_kind, _cut, _added, _renamed, _mixed)
    return {"folder": Kind(_make_bases, [(1, edit) for edit in edits])}
