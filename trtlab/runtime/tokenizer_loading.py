"""Opens the tokenizer of a folder, in each layout that transformers reads and in Meta's own, or of a GGUF file.

Runs no code of the folder.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtlab.errors import RequestError
from trtlab.runtime.sentencepiece_model import read_sentencepiece, splits_as, take_over
from trtlab.storage.gguf_file import open_gguf
from trtlab.storage.json_files import read_object

REPAIR = "give token ids, or copy the model's tokenizer files again"
TIKTOKEN_CACHE = "TIKTOKEN_CACHE_DIR"  # tiktoken caches nothing where this is empty
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}\r?\n")
UNLIMITED = 1 << 62  # the engine's bounds hold, not the length that a tokenizer was trained with

GGUF_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # end a turn, or a call of a tool
LLAMA3_RESERVED = 256
LLAMA3_SPECIAL = (  # Meta's names of the first special ids of Llama 3; those behind them are reserved
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Loaded:
    """transformers' tokenizer of a folder, and what is asked of it while tokens become text.

    It is asked when the folder is opened: of damaged files transformers may recurse without end, or have no vocabulary.
    """

    inner: Any
    end_ids: frozenset[int]
    """The ids by which it ends an answer."""
    special_texts: dict[str, int]
    """The special tokens' texts, which its ``decode`` leaves out, with their ids."""
    byte_ids: frozenset[int]
    """The ids of single bytes, in a tokenizer with byte fallback."""

    @classmethod
    def of(cls, inner: Any, end_ids: frozenset[int]) -> Loaded:
        """Ask a tokenizer for its special tokens and its bytes."""
        named = zip(inner.all_special_tokens, inner.all_special_ids, strict=True)
        added = {token.content: number for number, token in inner.added_tokens_decoder.items() if token.special}
        bytes_ = (number for token, number in inner.get_vocab().items() if BYTE_TOKEN.fullmatch(token))
        return cls(inner, end_ids, dict(named) | added, frozenset(bytes_))


def load_tokenizer(place: Path) -> Loaded:
    """Open the tokenizer of a folder, or that of a GGUF file.

    Raises:
        RequestError: when the tokenizer is a program of the folder's own, or a library is missing that reads it.
        Exception: of any class that transformers raises for files that it cannot read.
    """
    if is_gguf(place):
        return _of_gguf(place)
    folder, config = place, _json(place / "tokenizer_config.json")
    _refuse_own_code(folder, config)
    model = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").is_file() and model.is_file():
        if is_tiktoken(model):
            return _by_transformers(folder, config) if config else _meta_llama3(model)
        _require("sentencepiece", model)
        _require("google.protobuf", model)
        return _by_sentencepiece(folder, config) if config else _meta_llama2(model)
    return _by_transformers(folder, config)


def is_gguf(place: Path) -> bool:
    """Whether a tokenizer's place is a GGUF file, of whatever name, and not a folder."""
    return place.is_file()


def is_tiktoken(path: Path) -> bool:
    """Whether a file is a list of base64 tokens with their ranks, as OpenAI's tiktoken and Meta's Llama 3 write it."""
    with path.open("rb") as file:
        return TIKTOKEN_LINE.fullmatch(file.readline(2000)) is not None


def _by_transformers(folder: Path, config: dict[str, Any]) -> Loaded:
    from transformers import AutoTokenizer

    more = {} if config or not (folder / "tokenizer.model").is_file() else {"add_bos_token": True}  # as Meta's code
    with _without_tiktokens_cache():
        inner = AutoTokenizer.from_pretrained(
            folder,
            config=_model_config(folder),
            trust_remote_code=False,
            local_files_only=True,
            model_max_length=UNLIMITED,
            **more,
        )
    return Loaded.of(inner, frozenset({inner.eos_token_id} - {None}))


@contextlib.contextmanager
def _without_tiktokens_cache() -> Iterator[None]:
    """Keep tiktoken from copying a vocabulary into the temporary folder, where it finds it again by its path alone.

    A folder whose tokenizer has changed would get the old one, even in another process.
    """
    before = os.environ.get(TIKTOKEN_CACHE)
    os.environ[TIKTOKEN_CACHE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[TIKTOKEN_CACHE]
        else:
            os.environ[TIKTOKEN_CACHE] = before


def _by_sentencepiece(folder: Path, config: dict[str, Any]) -> Loaded:
    """transformers' tokenizer; where this version of transformers converts the model wrongly, by our conversion."""
    loaded, model = _by_transformers(folder, config), folder / "tokenizer.model"
    backend = getattr(loaded.inner, "backend_tokenizer", None)  # without one it runs sentencepiece's own code
    if backend is None or splits_as(backend, model):
        return loaded
    tokenizer, _ = read_sentencepiece(model, legacy=config.get("legacy") is not False)
    take_over(backend, tokenizer)
    return Loaded.of(loaded.inner, loaded.end_ids)


def _model_config(folder: Path) -> Any:
    """The model's config for transformers, which chooses a tokenizer's class by it: the kind of model, nothing else.

    A folder that trtlab wrote has a config.json of its own, with the name of the architecture.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    stored = _json(folder / "config.json")
    architecture = (stored.get("pretrained_config") or stored).get("architecture") or "LlamaForCausalLM"
    kind = stored.get("model_type") or str(architecture).removesuffix("ForCausalLM").lower()
    config = CONFIG_MAPPING[kind]() if isinstance(kind, str) and kind in CONFIG_MAPPING else PreTrainedConfig()
    if isinstance(name := stored.get("tokenizer_class"), str):
        config.tokenizer_class = name
    return config


def _of_gguf(file: Path) -> Loaded:
    """transformers' tokenizer from the vocabulary, merges or scores, and chat template in a GGUF file.

    Its constructor reads that file alone; ``from_pretrained`` would take a tokenizer.json that lies beside it.
    """
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    inner = make(name_or_path=str(file.parent), gguf_file=file.name, local_files_only=True, model_max_length=UNLIMITED)
    ends = {inner.eos_token_id, *map(open_gguf(file).metadata.get, GGUF_ENDS)}
    return Loaded.of(inner, frozenset(ends - {None}))


def _meta_llama2(path: Path) -> Loaded:
    """The tokenizer of Meta's folders up to Llama 2: a sentencepiece model, and a first token before each text."""
    tokenizer, model = read_sentencepiece(path)
    spec, pieces = model.trainer_spec, model.pieces
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    special = {name: pieces[number].piece for name, number in ids.items() if number >= 0}
    return Loaded.of(_with_first(tokenizer, special), frozenset({spec.eos_id} - {-1}))


def _with_first(tokenizer: Any, special: dict[str, str]) -> Any:
    """transformers' tokenizer around one of the tokenizers library, with ``bos_token`` before each text."""
    from tokenizers.processors import Sequence, TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if begin := special.get("bos_token"):
        first = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
        earlier = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = Sequence([*earlier, first])
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, **special)


def _meta_llama3(path: Path) -> Loaded:
    """The tokenizer of Meta's Llama 3 folders: tiktoken's ranks, and special tokens that only Meta's program names."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """transformers' converter without tiktoken, whose cache keeps a file's content by its path alone."""

        @staticmethod
        def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
                raise ValueError(f"{path} does not list every byte, or its ranks have gaps")
            return ranks

    reserved = (f"<|reserved_special_token_{number}|>" for number in range(3, LLAMA3_RESERVED))
    special = [*LLAMA3_SPECIAL, *reserved][:LLAMA3_RESERVED]
    convert: Any = Converter
    tokenizer = convert(vocab_file=str(path), extra_special_tokens=special).converted()
    inner = _with_first(tokenizer, {"bos_token": LLAMA3_SPECIAL[0], "eos_token": LLAMA3_ENDS[0]})
    return Loaded.of(inner, frozenset(inner.convert_tokens_to_ids(list(LLAMA3_ENDS))))


def _refuse_own_code(folder: Path, config: dict[str, Any]) -> None:
    """A tokenizer that is a program in the folder is not run: its author's code would have this user's rights."""
    entry = config.get("auto_map")
    own = entry.get("AutoTokenizer") if isinstance(entry, dict) else entry
    if own:
        raise RequestError(
            f"the tokenizer in {folder.name} is a program of the folder's own, which is never run",
            got=f"auto_map {own!r} in tokenizer_config.json",
            remedy="give token ids; or remove auto_map from tokenizer_config.json if tokenizer.json says the same",
        )


def _require(module: str, file: Path) -> None:
    try:
        present = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        present = False
    if not present:
        raise RequestError(
            f"{file.name} is a sentencepiece model, and reading one needs {module}",
            remedy="pip install sentencepiece protobuf",
        )


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, remedy=REPAIR, error=RequestError) if path.is_file() else {}
