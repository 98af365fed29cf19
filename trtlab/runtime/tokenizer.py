"""Turns text into token ids and back, with the tokenizer in a model folder. Knows no model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from trtlab.errors import RequestError
from trtlab.storage.json_files import Listed, OpenObject, read_model
from trtlab.storage.paths import has_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

Message = Mapping[str, str]


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The tokenizer files in a folder; an empty list for None. CheckpointError for a link out of the folder."""
    return [] if folder is None else [folder / name for name in TOKENIZER_FILES if has_file(folder / name)]


def find_tokenizer(folder: Path) -> Path | None:
    """The folder itself if it holds a tokenizer, else None."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES[:2]) else None


def _as_list(ids: object) -> object:
    return ids if ids is None or isinstance(ids, list) else [ids]


class _EndIds(OpenObject):
    eos_token_id: Annotated[Listed[int] | None, BeforeValidator(_as_list)] = None


def listed_end_ids(folder: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json, or without that file of config.json, as in transformers."""
    for name in ("generation_config.json", "config.json"):
        if has_file(folder / name):
            stored = read_model(folder / name, _EndIds, remedy="copy it again, or remove it")
            return list(stored.eos_token_id or ())
    return []


def copy_tokenizer(source: Path | None, target: Path) -> None:
    """Copy a tokenizer's files; end ids that only config.json holds are written to a generation_config.json."""
    for file in tokenizer_files(source):
        shutil.copy2(file, target / file.name)
    if source is not None and not (source / "generation_config.json").is_file() and listed_end_ids(source):
        ids = json.dumps({"eos_token_id": listed_end_ids(source)})
        (target / "generation_config.json").write_text(ids, encoding="utf-8")


@lru_cache(maxsize=4)
def _loaded(folder: Path, stamps: tuple[object, ...]) -> Any:
    """A folder's tokenizer; ``stamps`` (names, times, sizes of its files) make changed files a new cache entry."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class Tokenizer:
    """Hugging Face's tokenizer of a folder: loaded at first use, and shared by all users of the same files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _inner(self) -> Any:
        stamps = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in tokenizer_files(self.folder)]
        try:
            return _loaded(self.folder.resolve(), tuple(stamps))
        except Exception as error:
            raise RequestError(
                f"the tokenizer in {self.folder.name} cannot be read: {error}",
                remedy="give token ids, or copy the model's tokenizer files again",
            ) from error

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, and those that the model's files list."""
        return frozenset({self._inner.eos_token_id, *listed_end_ids(self.folder)} - {None})

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids without text of their own: begin, end, padding, unknown."""
        return frozenset(self._inner.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer adds."""
        return self._ids(text, special=True)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half of a character at place {error.start}",
                got=repr(text[error.start]),
                expected="Unicode text without lone surrogates",
                remedy='text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") joins or replaces them',
            ) from error
        ids: list[int] = self._inner(text, add_special_tokens=special)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation by the tokenizer's chat template, ready for the answer."""
        if not self._inner.chat_template:
            raise RequestError("this tokenizer has no chat template", remedy="give the prompt as text")
        try:
            text = self._inner.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the model's own and raises what it likes
            raise RequestError(
                f"the tokenizer's chat template refuses this conversation: {error}",
                expected='[{"role": "user", "content": "..."}], roles in the order that the model knows',
                remedy="change the conversation, or give the prompt as text",
            ) from error
        return self._ids(text, special=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._inner.decode(
            list(token_ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # the text of one piece must not depend on the next
        )
        return text

    def ends_open(self, token_ids: Sequence[int]) -> bool:
        """Whether the last id that is not special is a single byte of a tokenizer with byte fallback, as Llama 2's.

        Such a tokenizer decodes consecutive bytes together. Byte-level tokenizers have no such ids.
        """
        return next((i in self._byte_ids for i in reversed(token_ids) if i not in self.special_ids), False)

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        return frozenset(i for token, i in self._inner.get_vocab().items() if BYTE_TOKEN.fullmatch(token))
