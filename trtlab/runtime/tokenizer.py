"""Turns text into token ids and back, with the tokenizer of a model's folder or GGUF file. Knows no model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from trtlab.errors import RequestError, TrtlabError
from trtlab.runtime.chat_template import ChatRenderer, Message
from trtlab.runtime.text_bound import TextBound, text_bound
from trtlab.runtime.tokenizer_loading import REPAIR, Loaded, is_gguf, load_tokenizer
from trtlab.storage.json_files import Listed, OpenObject, read_model
from trtlab.storage.paths import has_file

LAYOUTS = (  # the files of which one group makes a tokenizer
    ("tokenizer.json",),
    ("tokenizer.model",),  # sentencepiece, or tiktoken's
    ("vocab.json", "merges.txt"),
    ("tekken.json",),
    ("tiktoken.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
)
TOKENIZER_FILES = (
    *(name for layout in LAYOUTS for name in layout),
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder. CheckpointError for a link out of the folder."""
    return [folder / name for name in TOKENIZER_FILES if has_file(folder / name)]


def find_tokenizer(folder: Path) -> Path | None:
    """The folder itself if it has the files of a tokenizer, which may be links to nothing, else None."""
    return folder if any(all(os.path.lexists(folder / name) for name in layout) for layout in LAYOUTS) else None


class _EndIds(OpenObject):
    eos_token_id: int | Listed[int] | None = None


def listed_end_ids(folder: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json, or without that file of config.json, as in transformers."""
    for name in ("generation_config.json", "config.json"):
        if has_file(folder / name):
            stored = read_model(folder / name, _EndIds, remedy="copy it again, or remove it")
            ids = stored.eos_token_id
            return [ids] if isinstance(ids, int) else list(ids or ())
    return []


def copy_tokenizer(source: Path | None, target: Path) -> None:
    """Copy a folder's tokenizer, or write that of a GGUF file.

    End ids that a folder's config.json or a GGUF file holds are written to a generation_config.json.
    """
    if source is None:
        return
    ends: Collection[int]
    if is_gguf(source):
        tokenizer = Tokenizer(source)
        tokenizer.save(target)
        ends = sorted(tokenizer.end_ids)
    else:
        for file in tokenizer_files(source):
            shutil.copy2(file, target / file.name)
        ends = () if (target / "generation_config.json").is_file() else listed_end_ids(source)
    if ends:
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")


@lru_cache(maxsize=4)
def _loaded(path: Path, stamps: tuple[object, ...]) -> Loaded:
    """A model's tokenizer; ``stamps`` (names, times, sizes of its files) make changed files a new cache entry."""
    return load_tokenizer(path)


class Tokenizer:
    """Hugging Face's tokenizer of a folder or a GGUF file: loaded at first use, shared by all users of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chat = ChatRenderer()

    @cached_property
    def _loaded(self) -> Loaded:
        files = [self.path] if is_gguf(self.path) else [*tokenizer_files(self.path), *self.path.glob("config.json")]
        stamps = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        with _wrapped(f"the tokenizer in {self.path.name} cannot be read", REPAIR):
            return _loaded(self.path.resolve(), tuple(stamps))

    @property
    def _inner(self) -> Any:
        return self._loaded.inner

    @cached_property
    def problem(self) -> TrtlabError | None:
        """Why the files cannot be read; None when they can."""
        try:
            self._loaded  # noqa: B018 - loads it
        except TrtlabError as error:
            return error
        return None

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, where it can be read, and those that the model's files list."""
        own = frozenset() if self.problem else self._loaded.end_ids
        return own if is_gguf(self.path) else own | frozenset(listed_end_ids(self.path))

    def save(self, folder: Path) -> None:
        """Write it as tokenizer.json and its companions; RequestError when it cannot be read."""
        with _wrapped(f"the tokenizer in {self.path.name} cannot be written", REPAIR):
            self._inner.save_pretrained(folder)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids without text of their own: begin, end, padding, unknown, the marks of a conversation."""
        return frozenset(self.special_texts.values())

    @property
    def special_texts(self) -> dict[str, int]:
        """The special tokens' texts, which ``decode`` leaves out, with their ids."""
        return self._loaded.special_texts

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer adds.

        Args:
            text: Any text without lone surrogates.
            most: More ids than this are of no use: a text that certainly has more is refused unread.
        """
        return self._ids(text, most, special=True)

    def _ids(self, text: str, most: int | None, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half of a character at place {error.start}",
                got=repr(text[error.start]),
                expected="Unicode text without lone surrogates",
                remedy='text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") joins or replaces them',
            ) from error
        if most is not None and len(text) > most and self._bound and self._bound.least_tokens(text) > most:
            raise RequestError(
                f"prompt of {len(text)} characters exceeds max_input_len {most}",
                got=f"at least {self._bound.least_tokens(text)} tokens",
                remedy="shorten the prompt, or build with a larger max_input_len",
            )
        with _wrapped("the tokenizer cannot encode this text", REPAIR):
            ids: list[int] = self._inner(text, add_special_tokens=special)["input_ids"]
        return ids

    @cached_property
    def _bound(self) -> TextBound | None:
        backend = getattr(self._inner, "backend_tokenizer", None)
        return None if backend is None else text_bound(backend)

    def encode_chat(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """The ids of a conversation by the tokenizer's chat template, ready for the answer; ``most``: as for encode."""
        with _wrapped("this tokenizer has no chat template to use", "give the prompt as text"):
            template = self._inner.get_chat_template() if self._inner.chat_template else None
            special_tokens = self._inner.special_tokens_map
        if not isinstance(template, str):
            raise RequestError("this tokenizer has no chat template", remedy="give the prompt as text")
        text = self._chat.render(template, messages, special_tokens)
        return self._ids(text, most, special=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        with _wrapped("the tokenizer cannot decode these tokens", REPAIR):
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
        byte_ids = self._loaded.byte_ids
        return next((i in byte_ids for i in reversed(token_ids) if i not in self.special_ids), False)


@contextlib.contextmanager
def _wrapped(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of another library into a RequestError; a panic of its Rust code is no ``Exception``."""
    try:
        yield
    except TrtlabError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"{what}: {error}", remedy=remedy) from error
