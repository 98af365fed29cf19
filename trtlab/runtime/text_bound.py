"""The most characters that some tokens can stand for, so that a text that is far too long is refused unread.

Reading ten million characters takes seconds and gigabytes, counting them nothing. The bound never refuses a text that
would fit, because each step from text to tokens is looked at, and without a bound on one of them there is none at all:

- A token stands for at most as many characters as its own name has: a byte-level name has one for each byte, and a
  character is at least a byte; ``<0x41>`` is a byte and has six. This needs a vocabulary that leaves no character out
  and that does not join unknown ones into a single token.
- A normalizer may shorten a text. NFC and NFKC join at most 4 characters into one (the longest canonical decomposition
  of Unicode); a replacement that is as long as what it replaces shortens nothing.
- A tokenizer may drop white space, between words or beside an added token: then only the other characters count.
- What comes after the tokens only adds some.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

LONGEST_DECOMPOSITION = 4
SHORTENING = {"NFC": LONGEST_DECOMPOSITION, "NFKC": LONGEST_DECOMPOSITION}
LENGTHENING = frozenset({"NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"})
TRIMMING = frozenset({"Strip"})  # white space alone
SPLITTING = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "Split", "Punctuation"})
SPLITTING_AT_SPACES = frozenset({"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})
AT_THE_BEGINNING = re.compile(r"\\A([^\\.^$*+?{}\[\]|()]*)")  # a regular expression that matches one known text, once


@dataclass(frozen=True)
class TextBound:
    """How many characters a token stands for at most, and whether white space counts."""

    per_token: int
    drops_spaces: bool

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text certainly exceeds or equals."""
        length = len("".join(text.split())) if self.drops_spaces else len(text)
        return -(-length // self.per_token)


def text_bound(tokenizer: Any) -> TextBound | None:
    """The bound of a ``tokenizers.Tokenizer``; None where it has a part that may shorten a text without one."""
    factor, drops_spaces = 1, False
    for part in _parts(tokenizer.normalizer, "normalizers"):
        shortens = _shortens(part)
        if shortens is None:
            return None
        factor *= shortens
        drops_spaces |= part["type"] in TRIMMING
    byte_level = "ByteLevel" in {part["type"] for part in _parts(tokenizer.normalizer, "normalizers")}
    for part in _parts(tokenizer.pre_tokenizer, "pretokenizers"):
        if part["type"] not in SPLITTING | SPLITTING_AT_SPACES or part.get("behavior") == "Removed":
            return None
        drops_spaces |= part["type"] in SPLITTING_AT_SPACES
        byte_level |= part["type"] == "ByteLevel"
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not _covers_all(tokenizer.model, vocabulary, byte_level):
        return None
    drops_spaces |= any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    return TextBound(factor * max(map(len, vocabulary)), drops_spaces)


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, as they are written to tokenizer.json."""
    if component is None:
        return []
    stored = json.loads(component.__getstate__())
    pending, parts = [stored], []
    while pending:
        part = pending.pop()
        if part["type"] == "Sequence":
            pending += part[name]
        else:
            parts.append(part)
    return parts


def _shortens(normalizer: dict[str, Any]) -> int | None:
    """The factor by which a normalizer shortens a text at most, None where that is not known."""
    kind = normalizer["type"]
    if kind == "Replace":
        pattern = normalizer["pattern"]
        literal = pattern.get("String")
        if literal is None and (match := AT_THE_BEGINNING.fullmatch(pattern["Regex"])):
            literal = match[1]
        return 1 if literal is not None and len(normalizer["content"]) >= len(literal) else None
    return 1 if kind in LENGTHENING | TRIMMING else SHORTENING.get(kind)


def _covers_all(model: Any, vocabulary: dict[str, int], byte_level: bool) -> bool:
    """Whether every character becomes at least a token of its own, whatever the text."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    if not isinstance(model, BPE):
        return False
    if byte_level and all(byte in vocabulary for byte in ByteLevel.alphabet()):
        return True
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
