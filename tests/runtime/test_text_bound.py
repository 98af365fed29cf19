"""The bound on a text's length is never above the number of its tokens, and there is none where it could be."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trtlab.runtime.text_bound import LONGEST_DECOMPOSITION, text_bound

BYTES = pre_tokenizers.ByteLevel.alphabet()
WORDS = ["the", "cat", "Ġcat", "catĠcatĠcat", "ĠĠĠĠĠĠĠĠ", "aaaaaaaaaaaaaaaa", "Ã©"]


def byte_level(normalizer=None, pre_tokenizer=None, bytes_known=BYTES, **model):
    """A tokenizer whose merges build each of ``WORDS``."""
    vocabulary = dict.fromkeys(bytes_known)
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary and word[end - 1] in vocabulary and word[: end - 1] in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = None
    numbered = {token: number for number, token in enumerate([*vocabulary, *model.pop("more", ())])}
    inner = Tokenizer(models.BPE(numbered, merges, **model))
    inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return inner


def with_added(token, **more):
    inner = byte_level()
    inner.add_special_tokens([AddedToken(token, **more)])
    return inner


def bytes_for_characters(words=("▁the", "cat", "aaaaaaaa"), **more):
    """A tokenizer of Llama 2's kind."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "▁"]
    inner = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


SPLIT = r"\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+|\p{L}+"
BOUNDED = {
    "byte level": byte_level(),
    "NFC": byte_level(normalizers.NFC()),
    "NFKC": byte_level(normalizers.NFKC()),
    "NFD and lower case": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])),
    "NFC twice": byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])),
    "a split": byte_level(
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
    ),
    "trimmed": byte_level(normalizers.Strip()),
    "words at spaces": byte_level(
        None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    ),
    "an added token": with_added("<|a long name of a token|>"),
    "an added token that takes spaces": with_added("<|x|>", lstrip=True, rstrip=True),
    "bytes for characters": bytes_for_characters(),
    "ignored merges": byte_level(ignore_merges=True, more=["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]),
    "one unknown token a character": byte_level(bytes_known=["a", "t"], unk_token="?", more=["?"]),
    "the beginning replaced": byte_level(normalizers.Replace(Regex(r"\Aa"), "aa")),
}
texts = st.text(
    st.sampled_from("a cat the \t\n\u3000é日🙂\u1fb3ﷺ\u0301") | st.characters(codec="utf-8"), max_size=200
) | st.builds(
    lambda part, times: part * times,
    st.sampled_from(["cat ", "a", " ", "ᾂ", "α\u0313\u0300\u0345", "<|x|>   ", "<|a long name of a token|>", "é", "ﷺ"]),
    st.integers(1, 100),
)


@pytest.mark.parametrize("kind", BOUNDED)
@given(texts)
@example("")
def test_no_text_has_fewer_tokens_than_the_bound(kind, text):
    tokenizer = BOUNDED[kind]
    assert text_bound(tokenizer).least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_long_text_is_known_to_be_long(kind):
    assert text_bound(BOUNDED[kind]).least_tokens("cat the " * 100_000) > 2000


def ready(inner, **parts):
    for name, part in parts.items():
        setattr(inner, name, part)
    return inner


UNBOUNDED = {
    "a normalizer that deletes": byte_level(normalizers.Replace("a", "")),
    "one that deletes by a pattern": byte_level(normalizers.Replace(Regex("a+"), "a")),
    "accents removed": byte_level(normalizers.StripAccents()),
    "control characters removed": byte_level(normalizers.BertNormalizer()),
    "a pre-tokenizer that deletes": byte_level(
        None, pre_tokenizers.Sequence([pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(False)])
    ),
    "a delimiter": byte_level(
        None, pre_tokenizers.Sequence([pre_tokenizers.CharDelimiterSplit("a"), pre_tokenizers.ByteLevel(False)])
    ),
    "unknown bytes dropped": byte_level(bytes_known=["a", "t"]),
    "unknown characters joined": byte_level(bytes_known=["a", "t"], unk_token="?", fuse_unk=True, more=["?"]),
    "words": ready(Tokenizer(models.WordLevel({"?": 0}, "?")), pre_tokenizer=pre_tokenizers.Whitespace()),
    "word pieces": ready(
        Tokenizer(models.WordPiece({"?": 0}, unk_token="?")), pre_tokenizer=pre_tokenizers.Whitespace()
    ),
    "unigrams": Tokenizer(models.Unigram([("?", 0.0), ("a", -1.0)], unk_id=0)),
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_there_is_no_bound_where_a_part_may_shorten_a_text(kind):
    assert text_bound(UNBOUNDED[kind]) is None


@pytest.mark.parametrize("kind", ["a normalizer that deletes", "unknown bytes dropped", "unknown characters joined"])
def test_the_parts_without_a_bound_do_shorten_texts(kind):
    """Else the list of them would be too long."""
    letter = "a" if kind == "a normalizer that deletes" else "b"
    assert len(UNBOUNDED[kind].encode(letter * 1000).ids) <= 1


def test_what_comes_after_the_tokens_changes_no_bound():
    inner = byte_level()
    before = text_bound(inner)
    inner.add_special_tokens(["<s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    inner.decoder = decoders.ByteLevel()
    assert text_bound(inner) == before


def test_no_character_decomposes_into_more_than_the_constant_says():
    longest = max(len(unicodedata.normalize("NFD", chr(code))) for code in range(sys.maxunicode + 1))
    assert longest == LONGEST_DECOMPOSITION
