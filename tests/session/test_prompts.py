"""What a prompt may be, what ends an answer, and that everything else is refused by name before anything runs."""

from __future__ import annotations

import array
import copy
import itertools
import json
import pickle
import re
import time

import numpy as np
import pytest
import torch

from trtlab import BuildConfig, Checkpoint, Engine, RequestError, SamplingParams
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.session.request import Completion

FREE = SamplingParams(max_new_tokens=12, ignore_eos=True)


# --- kinds of prompts

IDS = [5, 17, 3]


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        array.array("i", IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.uint8),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        [np.int64(5), torch.tensor(17), 3],
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_ids_in_any_ordered_container_are_one_prompt(prompt, talk):
    answer = talk.generate(prompt, FREE)
    assert isinstance(answer, Completion)
    assert answer.prompt_token_ids == tuple(int(token) for token in prompt)


@pytest.mark.parametrize("rows", [[IDS, [1]], [np.array(IDS), "the"], np.array([IDS, IDS]), torch.tensor([IDS, IDS])])
def test_a_list_or_matrix_of_ids_is_several_prompts(rows, talk):
    answers = talk.generate(rows, FREE)
    assert isinstance(answers, list) and len(answers) == 2
    assert answers[0].prompt_token_ids == tuple(IDS)


NO_PROMPTS = {
    "bytes": (b"Hello", "bytes are no prompt.*decode"),
    "bytearray": (bytearray(b"Hello"), "bytes are no prompt.*decode"),
    "memoryview": (memoryview(b"Hello"), "bytes are no prompt.*decode"),
    "bytes among prompts": (["Hello", b"Hello"], "bytes are no prompt"),
    "set": ({1, 2}, "unknown kind of prompt; got {1, 2}; expected a str"),
    "frozenset": (frozenset({1}), "unknown kind of prompt"),
    "set among prompts": ([[1], {1, 2}], "unknown kind of prompt; got {1, 2}"),
    "generator": ((i for i in IDS), "unknown kind of prompt"),
    "dict": ({"role": "user", "content": "x"}, "a dict is no prompt.*put it in a list"),
    "dict of ids": ({1: 2}, "a dict is no prompt"),
    "keys": ({1: 2}.keys(), "unknown kind of prompt"),
    "number": (5, "unknown kind of prompt; got 5"),
    "float": (1.5, "unknown kind of prompt"),
    "None": (None, "unknown kind of prompt; got None"),
    "numpy floats": (np.array([1.0, 2.0]), "integers; got ndarray of float64"),
    "torch floats": (torch.tensor([1.0]), r"integers; got Tensor of torch\.float32"),
    "numpy bools": (np.array([True]), "integers; got ndarray of bool"),
    "torch bools": (torch.tensor([True]), r"integers; got Tensor of torch\.bool"),
    "numpy words": (np.array(["a"]), "integers; got ndarray of <U1"),
    "numpy objects": (np.array([object()]), "integers; got ndarray of object"),
    "a scalar array": (np.array(5), "a single number is no prompt; got array\\(5\\)"),
    "a scalar tensor": (torch.tensor(5), "a single number is no prompt"),
    "a cube": (np.zeros((2, 2, 2), int), "cannot be read as token ids"),
    "bools": ([True, False], "cannot be read as token ids: a bool"),
    "numpy bools in a list": ([np.True_], "cannot be read as token ids"),
    "fractions": ([1, 2.5], "cannot be read as token ids"),
    "whole floats": ([1.0], "cannot be read as token ids"),
    "ids in words": ([1, "2"], "cannot be read as token ids"),
    "a number among prompts": (["the", 5], "unknown kind of prompt; got 5"),
    "nothing": ([], "no prompt in an empty list.*a list of at least one"),
    "an empty array": (np.array([], dtype=int), "no prompt in an empty list"),
}


@pytest.mark.parametrize("kind", NO_PROMPTS)
def test_what_is_no_prompt_is_refused_by_what_it_is(kind, talk):
    prompt, message = NO_PROMPTS[kind]
    with pytest.raises(RequestError, match=message):
        talk.generate(prompt, FREE)
    assert talk.running == talk.waiting == 0


@pytest.mark.parametrize("use", ["submit", "stream"])
@pytest.mark.parametrize("prompt", [b"Hello", {1, 2}, np.array([1.5]), [True], None], ids=str)
def test_submit_and_stream_refuse_what_generate_refuses(use, prompt, talk):
    with pytest.raises(RequestError, match=r"no prompt|unknown kind|integers|token ids"):
        getattr(talk, use)(prompt, FREE)


@pytest.mark.parametrize("ids", ["the", b"the", [1.5], [320], [-1], np.array([1.0]), []], ids=str)
def test_logits_take_ids_only(ids, talk):
    with pytest.raises(RequestError, match=r"token id|bytes|integers|outside|empty"):
        talk.logits(ids)


# --- text of ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([-1], "-1 is outside the vocabulary; expected 0 to 319"),
        ([320], "320 is outside the vocabulary"),
        ([2**40], "outside the vocabulary"),
        ([1.5], "cannot be read as token ids"),
        ([True], "a bool"),
        (5, "unknown kind"),
        (b"a", "bytes"),
        ("the", "cannot be read as token ids"),
    ],
)
def test_decode_refuses_what_is_no_id_of_the_model(ids, message, talk):
    with pytest.raises(RequestError, match=message):
        talk.decode(ids)


def test_decode_takes_what_the_model_can_write(talk):
    assert talk.decode([]) == ""
    assert talk.decode(np.array(talk.encode("the cat"))) == "the cat"
    assert isinstance(talk.decode(range(320)), str)


# --- length


def test_ten_million_characters_are_refused_unread(talk):
    text = "the cat " * 1_250_000
    talk.generate("the", FREE)  # loads the tokenizer
    for use in (talk.generate, talk.submit, talk.stream, lambda prompt, params: talk.generate([prompt] * 2, params)):
        start = time.perf_counter()
        with pytest.raises(RequestError, match="10000000 characters exceeds max_input_len 64; got at least"):
            use(text, FREE)
        assert time.perf_counter() - start < 2  # reading it takes many seconds


def test_ten_million_ids_are_refused_by_their_count(talk):
    with pytest.raises(RequestError, match="prompt of 10000000 tokens exceeds max_input_len 64"):
        talk.generate([1] * 10_000_000, FREE)


def test_the_longest_text_that_fits_is_served(talk):
    longest = max(
        (" ".join(["the cat sat on the mat"] * n)[:end] for n in (3, 4, 5, 6) for end in range(40, 140)),
        key=lambda text: (len(talk.encode(text)) <= 64, len(text)),
    )
    assert len(talk.generate(longest, FREE).prompt_token_ids) <= 64 < len(longest)


# --- what ends an answer


@pytest.fixture(scope="module")
def free(talk):
    """The ids of an answer that nothing ends, and the place of the first id that is new in it, past the second."""
    ids = talk.generate("the", FREE).token_ids
    return ids, next(place for place in range(2, 12) if ids[place] not in ids[:place])


def test_a_stop_token_ends_the_answer_before_it(talk, free):
    ids, place = free
    answer = talk.generate("the", SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=[ids[place], 319]))
    assert answer.token_ids == ids[:place]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ids[place])
    assert answer.text == talk.decode(ids[:place])


def test_the_end_id_replaces_the_models_own(talk, free, monkeypatch):
    ids, place = free
    answer = talk.generate("the", SamplingParams(max_new_tokens=12, end_id=ids[place]))
    assert answer.token_ids == ids[:place]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    monkeypatch.setitem(vars(talk._prompts.require_tokenizer()), "end_ids", frozenset({ids[0]}))
    assert talk.generate("the", SamplingParams(max_new_tokens=12)).token_ids == ()
    assert talk.generate("the", SamplingParams(max_new_tokens=12, end_id=-1)).token_ids == ids
    assert talk.generate("the", SamplingParams(max_new_tokens=12, end_id=ids[place])).token_ids == ids[:place]


@pytest.mark.parametrize("params", [{"stop_token_ids": [320]}, {"end_id": 320}])
def test_an_id_that_the_model_cannot_write_ends_nothing_and_is_refused(params, talk):
    with pytest.raises(RequestError, match="320 is outside the vocabulary"):
        talk.generate("the", SamplingParams(**params))


@pytest.fixture
def says(talk, monkeypatch):
    """``says(ids)`` makes the model write these ids, whatever it would have written."""
    from trtlab.runtime import loop

    def write(ids):
        written = itertools.cycle(ids)
        monkeypatch.setattr(loop, "sample", lambda logits, requests: [(next(written), None) for _ in requests])

    return write


def special(talk, text):
    return talk._prompts.require_tokenizer().special_texts[text]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_special_token_by_its_text_is_a_stop_word(ignore_eos, talk, says):
    words = talk.encode("the cat")
    says([*words, special(talk, "<|sep|>"), *words])
    params = SamplingParams(max_new_tokens=20, stop="<|sep|>", ignore_eos=ignore_eos)
    answer = talk.generate("the", params)
    assert (answer.text, answer.token_ids) == ("the cat", tuple(words))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "<|sep|>")
    says([*words, special(talk, "<|sep|>"), *words])
    assert "".join(talk.stream("the", params)) == "the cat"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("cat<|sep|>", "the "),
        ("<|sep|> sat", "the cat"),
        ("t<|sep|> s", "the ca"),
        ("<|sep|> mat", "the cat sat mat"),
        ("</s> sat", "the cat sat mat"),
    ],
)
def test_a_stop_word_may_have_a_special_token_within(stop, text, talk, says):
    ids = [*talk.encode("the cat"), special(talk, "<|sep|>"), *talk.encode(" sat"), *talk.encode(" mat")]
    says(ids)
    answer = talk.generate("the", SamplingParams(max_new_tokens=len(ids), stop=[stop]))
    assert answer.text == text
    assert answer.stop_reason == (stop if text != "the cat sat mat" else None)


def test_a_special_token_written_as_plain_text_stops_too(talk, says):
    ids = [token for part in ("the <", "|se", "p|", "> cat") for token in talk.encode(part)]
    says(ids)
    answer = talk.generate("the", SamplingParams(max_new_tokens=len(ids), stop=["<|sep|>"]))
    assert (answer.text, answer.stop_reason) == ("the ", "<|sep|>")


# --- tokenizers that cannot be read


@pytest.fixture
def broken(talking_model, edited):
    """An engine whose tokenizer.json is damaged, with an end id in its generation_config.json."""
    folder = edited(talking_model)
    (folder / "tokenizer.json").write_text("{")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    return Checkpoint.from_hugging_face(folder).build(BuildConfig(max_seq_len=64, max_batch_size=2), plan=False)


def test_ids_run_without_a_readable_tokenizer_and_the_reason_is_said(broken, talk):
    expected = talk.generate(IDS, FREE).token_ids
    with broken.session(backend="torch", device="cpu") as session:
        with pytest.warns(RuntimeWarning, match="the answers have no text: the tokenizer in edited cannot be read"):
            answer = session.generate(IDS, FREE)
        assert (answer.token_ids, answer.text) == (expected, "")
        assert session._prompts.end_ids(SamplingParams()) == {7, 8}
        for use in (
            lambda: session.generate("the"),
            lambda: session.stream(IDS),
            lambda: session.encode("the"),
            lambda: session.decode(IDS),
            lambda: session.generate(IDS, SamplingParams(stop="a")),
        ):
            with pytest.raises(RequestError, match="the tokenizer in edited cannot be read"):
                use()


def test_a_saved_engine_with_a_tokenizer_that_cannot_be_read_opens(broken, tmp_path):
    broken.save(tmp_path / "engine")
    with (
        Engine.load(tmp_path / "engine").session(backend="torch", device="cpu") as session,
        pytest.warns(RuntimeWarning),
    ):
        assert len(session.generate(IDS, FREE).token_ids) == 12


END_IDS = ["2", ["</s>"], True, [[1]], [True], 2.5, [2, "3"], {"a": 1}]


@pytest.mark.parametrize("stored", END_IDS, ids=json.dumps)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_ids_that_are_no_ids_are_refused_by_name(stored, file, talking_model, edited):
    from trtlab import CheckpointError

    folder = edited(talking_model)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"eos_token_id": stored}))
    first = re.escape(repr(stored)[:6])
    with pytest.raises(
        CheckpointError, match=rf"{file}.*eos_token_id is {first}.*expected an int or a list or tuple of int"
    ):
        _ = Tokenizer(folder).end_ids


# --- copies


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_session_and_a_request_say_why_they_cannot_be_copied(make, talk):
    with pytest.raises(RequestError, match=r"a session cannot be copied or pickled.*open another session"):
        make(talk)
    request = talk.submit("the", FREE)
    with pytest.raises(RequestError, match=r"a request cannot be copied or pickled.*result\(\)"):
        make(request)
    answer = request.result()
    assert pickle.loads(pickle.dumps(answer)) == answer
