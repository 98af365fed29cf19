"""Text piece by piece: whatever the tokens and however they arrive, the pieces join to the whole text."""

from __future__ import annotations

import itertools
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import RequestError
from trtlab.runtime.text_stream import TextStream
from trtlab.runtime.tokenizer import Tokenizer

from ..models import write_byte_fallback_tokenizer

WORDS = ["the", "cat", "größe", "日本", "🙂", "a", "b", ".", "é", "ab"]


@pytest.fixture(scope="module")
def byte_level(talking_model) -> Tokenizer:
    return Tokenizer(talking_model)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("fallback")
    write_byte_fallback_tokenizer(folder, WORDS)
    return Tokenizer(folder)


def stream(tokenizer, ids, stop=(), sizes=(1,)):
    """The text, and the pieces that came, when the ids arrive in groups of the given sizes."""
    text, pieces, start = TextStream(tokenizer, stop), [], 0
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text.feed(ids[start : start + size]))
        start += size
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    assert text.finish() == ""
    return text


@cache
def vocabulary(tokenizer: Tokenizer) -> int:
    return len(tokenizer._inner)


@given(st.data())
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_any_ids_in_any_groups_join_to_what_the_tokenizer_says_of_the_whole(kind, request, data):
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, vocabulary(tokenizer) - 1), max_size=30))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    assert stream(tokenizer, ids, sizes=sizes).text == tokenizer.decode(ids)


@given(st.lists(st.sampled_from([*WORDS, " ", "\n", "😀", "ñ", "한"]) | st.characters(codec="utf-8"), max_size=12))
def test_text_of_many_byte_characters_comes_back_whole(byte_level, parts):
    text = "".join(parts)
    assert stream(byte_level, byte_level.encode(text)).text == text


def test_runs_of_byte_tokens_wait_until_no_later_byte_can_spoil_them(byte_fallback):
    euro = [1 + byte for byte in "€".encode()]
    text = TextStream(byte_fallback)
    assert [text.feed([i]) for i in euro] == ["", "", ""]
    assert text.feed([1 + 0x82]) == ""
    assert text.finish() == text.text == byte_fallback.decode([*euro, 1 + 0x82])


def test_a_special_token_within_a_run_of_bytes_does_not_settle_it(byte_fallback):
    end = byte_fallback._inner.eos_token_id
    ids = [1 + 0x41, end, 1 + 0xE2]
    assert stream(byte_fallback, ids).text == byte_fallback.decode(ids) == "\ufffd\ufffd"


def test_a_special_token_between_words_swallows_no_space(byte_fallback):
    vocab = byte_fallback._inner.get_vocab()
    ids = [vocab["▁the"], vocab["</s>"], vocab["▁cat"]]
    assert byte_fallback.decode(ids) == "the cat"
    assert stream(byte_fallback, ids).text == "the cat"


def test_plain_text_is_given_out_at_once(byte_level):
    text = TextStream(byte_level)
    ids = byte_level.encode("the cat sat")
    assert [text.feed([token]) for token in ids] == [byte_level.decode([token]) for token in ids]


stops = st.lists(st.text(alphabet="ab é日", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.text(alphabet="ab é日", max_size=25), stops)
def test_a_stop_word_never_appears_and_nothing_before_it_is_lost(byte_level, text, stop):
    result = stream(byte_level, byte_level.encode(text), stop)
    assert not any(word in result.text for word in stop)
    assert text.startswith(result.text)
    if result.stopped_by is None:
        assert result.text == text
    else:
        assert result.stopped_by in stop
        assert text[len(result.text) :].startswith(result.stopped_by)


@given(st.text(alphabet="ab", max_size=20), stops)
def test_what_was_given_out_is_never_taken_back(byte_level, text, stop):
    whole = stream(byte_level, byte_level.encode(text), stop).text
    running, so_far = TextStream(byte_level, stop), ""
    for token in byte_level.encode(text):
        so_far += running.feed([token])
        assert whole.startswith(so_far)


def test_an_ended_stream_stays_ended(byte_level):
    text = TextStream(byte_level, ("cat",))
    for token in byte_level.encode("the cat sat"):
        text.feed([token])
    assert (text.text, text.stopped_by) == ("the ", "cat")
    assert text.feed(byte_level.encode(" more")) == text.finish() == ""


def test_a_beginning_of_a_stop_word_that_does_not_go_on_is_given_out(byte_level):
    text = TextStream(byte_level, ("cattle",))
    pieces = [text.feed([token]) for token in byte_level.encode("the cat sat")]
    assert "".join(pieces) == "the cat sat"


# --- special tokens within stop words


@given(st.data())
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_stop_word_with_a_special_token_ends_the_text_where_both_are_written_out(kind, request, data):
    """The reference decodes everything, special tokens included, and cuts at the first stop word."""
    tokenizer = request.getfixturevalue(kind)
    marks = sorted(tokenizer.special_texts)
    words = st.lists(st.sampled_from(["a", " the", "b", *marks]), min_size=1, max_size=3).map("".join)
    stop = data.draw(st.lists(words, min_size=1, max_size=2))
    parts = data.draw(
        st.lists(st.sampled_from([["a"], ["b"], [" the", "the"], *([mark] for mark in marks)]), max_size=12)
    )
    whole, ids, vocab = "", [], tokenizer._inner.get_vocab()
    for names in parts:
        found = next(vocab[name] for name in (*names, *(f"▁{n.strip()}" for n in names), "a") if name in vocab)
        ids.append(found)
    plain = stream(tokenizer, ids)  # without stop words: its text at each token
    positions, running = [], TextStream(tokenizer)
    for token in ids:
        piece = running.feed([token])
        whole += piece
        positions.append(len(whole))
    assert whole == plain.text
    written = "".join(
        {number: text for text, number in tokenizer.special_texts.items()}.get(token, whole[start:end])
        for token, start, end in zip(ids, [0, *positions], positions, strict=False)
    )
    cuts = [written.find(word) for word in stop if word in written]
    result = stream(tokenizer, ids, stop)
    expected = written[: min(cuts)] if cuts else written
    for text in marks:
        expected = expected.replace(text, "")
    assert result.text == expected
    assert (result.stopped_by is not None) == bool(cuts)


# --- interrupts and failing decoders


class Failing:
    """A tokenizer whose decoder fails at chosen calls."""

    def __init__(self, tokenizer: Tokenizer, failing: set[int]) -> None:
        self._tokenizer = tokenizer
        self._failing = failing
        self._calls = itertools.count()
        self.special_texts = tokenizer.special_texts
        self.ends_open = tokenizer.ends_open

    def decode(self, token_ids):
        if next(self._calls) in self._failing:
            raise RequestError("the decoder fails now")
        return self._tokenizer.decode(token_ids)


@given(st.data())
def test_after_a_failing_decode_the_same_tokens_can_be_fed_again(byte_level, data):
    ids = data.draw(st.lists(st.integers(0, vocabulary(byte_level) - 1), max_size=20))
    stop = data.draw(st.lists(st.text(alphabet="ab é日", min_size=1, max_size=3), max_size=2))
    tokenizer = Failing(byte_level, data.draw(st.sets(st.integers(0, 50), max_size=12)))
    text, pieces = TextStream(tokenizer, stop), []
    while text.fed < len(ids) and text.stopped_by is None:
        before = text.text, text.fed
        try:
            pieces.append(text.feed(ids[text.fed : text.fed + 3]))
        except RequestError:
            assert (text.text, text.fed) == before
    while True:
        try:
            pieces.append(text.finish())
            break
        except RequestError:
            pass
    assert "".join(pieces) == text.text == stream(byte_level, ids, stop).text


def test_an_interrupt_at_any_line_loses_and_doubles_nothing(byte_level):
    ids = byte_level.encode("the größe 日本 🙂 abab")
    expected = stream(byte_level, ids, ("ab日",)).text
    for line in range(1, 400):
        text, left = TextStream(byte_level, ("ab日",)), line

        def interrupt(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename.endswith("text_stream.py"):
                left -= event == "line"
                if left == 0 and event == "line":
                    raise KeyboardInterrupt
                return interrupt
            return None

        interrupts = 0
        while text.fed < len(ids):
            sys.settrace(interrupt)
            try:
                text.feed(ids[text.fed : text.fed + 2])
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                sys.settrace(None)
        while text.text != expected:
            text.finish()
        text.finish()
        assert text.text == expected
        if not interrupts:
            return  # every line was interrupted
    raise AssertionError("the text was never read without an interrupt")


def test_an_error_of_the_decoder_is_a_request_error(byte_level, monkeypatch):
    monkeypatch.setattr(type(byte_level._inner), "decode", lambda *_, **__: 1 / 0)
    with pytest.raises(RequestError, match="cannot decode these tokens: division by zero"):
        TextStream(byte_level).feed([5])
