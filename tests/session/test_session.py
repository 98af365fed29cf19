"""A session: batches, chunks, streams and stops give what one prompt alone gives, and nothing leaks."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab import (
    BuildConfig,
    Checkpoint,
    ConfigError,
    Engine,
    EngineError,
    RequestError,
    SamplingParams,
    SessionConfig,
    TrtlabError,
    tiny,
)
from trtlab.model.names import EMBEDDING
from trtlab.ops.cpu.weights import has_loops
from trtlab.runtime import loop
from trtlab.storage.lazy import in_memory

PROMPTS = [[5, 17, 3, 0, 96], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [98, 0], [41] * 9, [3, 3], [64, 8, 2]]
BOUNDS = {"max_seq_len": 64, "max_input_len": 48}


def tokens(answers):
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def one_by_one(random_model):
    """Each prompt's answer when it runs alone."""
    engine = Checkpoint.from_hugging_face(random_model()).build(BuildConfig(**BOUNDS), plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        return [session.generate(p, SamplingParams(max_new_tokens=10 + i)) for i, p in enumerate(PROMPTS)]


def test_more_prompts_than_slots_come_back_in_their_order(random_model, open_session):
    session = open_session(random_model(), max_batch_size=2, **BOUNDS)
    params = SamplingParams(max_new_tokens=6)
    together = session.generate(PROMPTS * 2, params)
    assert tokens(together) == tokens([session.generate(p, params) for p in PROMPTS]) * 2
    assert [answer.prompt_token_ids for answer in together] == [tuple(p) for p in PROMPTS] * 2


@pytest.mark.parametrize("chunk", [1, 2, 5, 47])
def test_a_context_in_chunks_has_the_logits_of_one_shot(chunk, random_model, open_session):
    ids = torch.randint(0, 99, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = open_session(random_model(), max_num_tokens=64, **BOUNDS).logits(ids)
    parts = open_session(random_model(), max_batch_size=1, max_num_tokens=chunk, **BOUNDS)
    torch.testing.assert_close(parts.logits(ids), whole, atol=2e-5, rtol=0)
    assert whole.shape == (48, 99) and whole.dtype == torch.float32


def test_chunks_can_be_forbidden(random_model):
    engine = Checkpoint.from_hugging_face(random_model()).build(BuildConfig(max_num_tokens=8, **BOUNDS), plan=False)
    with engine.session(SessionConfig(enable_chunked_context=False), backend="torch", device="cpu") as session:
        assert session.generate([1] * 8).token_ids
        with pytest.raises(RequestError, match="9 tokens exceeds max_num_tokens 8"):
            session.generate([1] * 9)


def test_logits_beside_running_requests_disturb_nobody(random_model, open_session, one_by_one):
    session = open_session(random_model(), **BOUNDS)
    requests = [session.submit(p, SamplingParams(max_new_tokens=10 + i)) for i, p in enumerate(PROMPTS)]
    expected = open_session(random_model(), **BOUNDS).logits(PROMPTS[2])
    while session.step():
        torch.testing.assert_close(session.logits(PROMPTS[2]), expected, atol=2e-5, rtol=0)
    assert tokens([request.result() for request in requests]) == tokens(one_by_one)


prompts = st.text(alphabet="the cat日🙂é", min_size=1, max_size=8)


@settings(max_examples=25)
@given(prompts, st.integers(1, 24), st.integers(0, 5), st.booleans())
def test_a_stream_joins_to_exactly_the_text_of_generate(talk, prompt, new, seed, drawn):
    params = SamplingParams(
        max_new_tokens=new, ignore_eos=True, seed=seed, **({"temperature": 1.5, "top_k": 50} if drawn else {})
    )
    answer = talk.generate(prompt, params)
    assert "".join(talk.stream(prompt, params)) == answer.text == talk.decode(answer.token_ids)
    assert len(answer.token_ids) == new and answer.finish_reason == "length"


@settings(max_examples=25)
@given(prompts, st.data())
def test_stop_words_taken_from_the_answer_end_it_there(talk, prompt, data):
    params = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 1.5, "seed": data.draw(st.integers(0, 9))}
    free = talk.generate(prompt, SamplingParams(**params))
    starts = data.draw(st.lists(st.integers(0, max(0, len(free.text) - 1)), min_size=1, max_size=3))
    stop = [w for w in (free.text[i : i + data.draw(st.integers(1, 5))] for i in starts) if w] or ["never"]
    answer = talk.generate(prompt, SamplingParams(stop=stop, **params))
    assert "".join(talk.stream(prompt, SamplingParams(stop=stop, **params))) == answer.text
    assert not any(word in answer.text for word in stop)
    assert free.text.startswith(answer.text)
    if answer.finish_reason == "stop":
        assert answer.stop_reason in stop
        assert free.text[len(answer.text) :].startswith(answer.stop_reason)
    else:
        assert answer.text == free.text and answer.stop_reason is None
    assert (talk.running, talk.waiting) == (0, 0)


def test_a_single_stop_word_may_be_given_bare(talk):
    free = talk.generate("the", SamplingParams(max_new_tokens=12, ignore_eos=True))
    word = free.text[3:5]
    assert (
        talk.generate("the", SamplingParams(max_new_tokens=12, ignore_eos=True, stop=word)).text
        == (free.text[: free.text.index(word)])
    )


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(talk):
    free = talk.generate("the", SamplingParams(max_new_tokens=12, ignore_eos=True))
    end = free.token_ids[4]
    tokenizer = talk._prompts.require_tokenizer()
    before = tokenizer.end_ids
    tokenizer.__dict__["end_ids"] = frozenset({end})
    try:
        answer = talk.generate("the", SamplingParams(max_new_tokens=12, logprobs=True))
        assert answer.token_ids == free.token_ids[: free.token_ids.index(end)]
        assert answer.finish_reason == "stop" and answer.stop_reason is None
        assert len(answer.logprobs) == len(answer.token_ids)
        assert "".join(talk.stream("the", SamplingParams(max_new_tokens=12))) == answer.text
    finally:
        tokenizer.__dict__["end_ids"] = before


def test_logprobs_are_log_softmax_of_the_logits_at_each_token(random_model, open_session):
    session = open_session(random_model(), **BOUNDS)
    for params in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.5}):
        answer = session.generate(PROMPTS[0], SamplingParams(max_new_tokens=12, logprobs=True, **params))
        rows = session.logits([*PROMPTS[0], *answer.token_ids])[len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)
    assert session.generate(PROMPTS[0]).logprobs is None


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(random_model, open_session):
    session = open_session(random_model(), **BOUNDS)
    params = SamplingParams(max_new_tokens=16, temperature=1.0, seed=11)
    alone = session.generate(PROMPTS[0], params)
    assert session.generate(PROMPTS[0], params) == alone
    assert session.generate(PROMPTS, params)[0] == alone
    other = SamplingParams(max_new_tokens=16, temperature=1.0, seed=12)
    assert session.generate(PROMPTS[0], other).token_ids != alone.token_ids


def test_the_repetition_penalty_gives_the_tokens_of_transformers(random_model, hugging_face, open_session):
    folder, ids = random_model(), PROMPTS[2]
    with torch.inference_mode():
        expected = hugging_face(folder).generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=32,
            repetition_penalty=1.7,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :]
    params = SamplingParams(max_new_tokens=32, repetition_penalty=1.7)
    assert open_session(folder, **BOUNDS).generate(ids, params).token_ids == tuple(expected.tolist())


def test_a_conversation_goes_through_the_chat_template(talking_model, open_session, edited):
    folder = edited(talking_model)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    session = open_session(folder, **BOUNDS)
    chat = [{"role": "user", "content": "the cat"}]
    params = SamplingParams(max_new_tokens=4)
    assert session.generate(chat, params) == session.generate("user: the cat\nbot:", params)
    assert session.generate([chat, chat], params) == [session.generate(chat, params)] * 2
    with pytest.raises(RequestError, match="no chat template"):
        open_session(talking_model, **BOUNDS).generate(chat)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses this conversation: roles must alternate"):
        open_session(folder, **BOUNDS).generate(chat)


def test_half_a_character_is_refused_with_its_place(talking_model, open_session):
    with pytest.raises(RequestError, match="half of a character at place 4"):
        open_session(talking_model, **BOUNDS).generate("the " + chr(0xD83D))


@pytest.mark.parametrize(
    "form", [tuple, np.array, torch.tensor, lambda ids: list(np.array(ids))], ids=["tuple", "array", "tensor", "numpy"]
)
def test_token_ids_may_come_in_any_sequence(form, random_model, open_session):
    session = open_session(random_model(), **BOUNDS)
    expected = session.generate(PROMPTS[0])
    assert session.generate(form(PROMPTS[0])) == expected
    assert session.generate([form(PROMPTS[0]), form(PROMPTS[1])])[0] == expected
    assert torch.equal(session.logits(form(PROMPTS[0])), session.logits(PROMPTS[0]))


# --- life


def test_an_abandoned_stream_frees_its_slot(talk):
    for _ in range(5):
        stream = talk.stream("the", SamplingParams(max_new_tokens=20, ignore_eos=True))
        next(stream)
        assert talk.running == 1
        stream.close()
        assert (talk.running, talk.waiting) == (0, 0)


def test_a_stream_that_is_dropped_frees_its_slot(talk):
    next(talk.stream("the", SamplingParams(max_new_tokens=20, ignore_eos=True)))
    gc.collect()
    assert (talk.running, talk.waiting) == (0, 0)


def test_a_stream_that_nobody_reads_takes_no_slot(talk):
    for _ in range(5):
        talk.stream("the", SamplingParams(max_new_tokens=20, ignore_eos=True))
    gc.collect()
    assert (talk.running, talk.waiting) == (0, 0)


def test_a_stream_is_checked_before_it_is_read(talk):
    with pytest.raises(RequestError, match="max_new_tokens 500"):
        talk.stream("the", SamplingParams(max_new_tokens=500))


def test_a_stream_that_another_call_finishes_loses_no_text(talk):
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    expected = talk.generate("the", params).text
    stream = talk.stream("the", params)
    first = next(stream)
    talk.generate("a cat", SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert first + "".join(stream) == expected


def test_streams_side_by_side_each_give_their_own_text(talk):
    params = SamplingParams(max_new_tokens=15, ignore_eos=True)
    texts = ["the cat", "日本", "é"]
    expected = [talk.generate(text, params).text for text in texts]
    pieces = itertools.zip_longest(*[talk.stream(text, params) for text in texts], fillvalue="")
    assert ["".join(column) for column in zip(*pieces, strict=True)] == expected


def failing(session, calls, times):
    """Make a step fail ``times`` times, after so many calls."""
    run = session._loop.backend.ranks.run
    numbers = itertools.count()

    def broken(step):
        if calls <= next(numbers) < calls + times:
            raise RuntimeError("out of memory")
        return run(step)

    session._loop.backend.ranks.run = broken


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_error_inside_a_step_frees_the_slots_and_the_session_goes_on(calls, random_model, open_session, one_by_one):
    session = open_session(random_model(), max_batch_size=2, **BOUNDS)
    failing(session, calls, times=3)
    with pytest.raises(RequestError, match="RuntimeError: out of memory"):
        session.generate(PROMPTS, SamplingParams(max_new_tokens=10))
    assert (session.running, session.waiting) == (0, 0)
    again = [session.generate(p, SamplingParams(max_new_tokens=10 + i)) for i, p in enumerate(PROMPTS)]
    assert tokens(again) == tokens(one_by_one)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_step_that_fails_once_is_made_up_for(calls, random_model, open_session, one_by_one):
    session = open_session(random_model(), max_batch_size=2, **BOUNDS)
    failing(session, calls, times=1)
    requests = [session.submit(p, SamplingParams(max_new_tokens=10 + i)) for i, p in enumerate(PROMPTS)]
    assert tokens([request.result() for request in requests]) == tokens(one_by_one)


@pytest.mark.parametrize("where", ["sampler", "ranks"])
def test_an_error_ends_the_request_whose_it_is_and_no_other(where, talk, monkeypatch):
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    expected = talk.generate("the", params).text
    stream = talk.stream("the", params)
    first = next(stream)
    compute, choose = talk._loop.backend.ranks.run, loop.sample

    def run(step):
        if any(chunk.slot != 0 for chunk in step.chunks):
            raise RuntimeError("no choice")
        return compute(step)

    def choice(logits, requests):
        if any(request.slot != 0 for request in requests):
            raise RuntimeError("no choice")
        return choose(logits, requests)

    with monkeypatch.context() as patch:
        patch.setattr(talk._loop.backend.ranks, "run", run) if where == "ranks" else patch.setattr(
            loop, "sample", choice
        )
        with pytest.raises(RequestError, match=r"request \d+ failed in step \d+: RuntimeError: no choice") as caught:
            talk.generate("a cat", params)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert talk.running == 1
    assert first + "".join(stream) == expected


def test_a_rank_that_fails_reports_its_own_error_and_frees_the_slots(random_model, open_session, monkeypatch):
    from trtlab import Mapping

    session = open_session(random_model(), Mapping(tp_size=2), **BOUNDS)
    expected = session.generate(PROMPTS[0])

    def broken(step, comm):
        raise RuntimeError("rank 1 ran out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session._loop.backend.ranks.ranks[1], "run", broken)
        with pytest.raises(RequestError, match="rank 1 ran out of memory"):
            session.generate(PROMPTS[0])
    assert session.running == 0
    assert session.generate(PROMPTS[0]) == expected


def test_two_sessions_of_one_engine_live_side_by_side(random_model):
    engine = Checkpoint.from_hugging_face(random_model()).build(BuildConfig(**BOUNDS), plan=False)
    with engine.session(backend="torch", device="cpu") as a, engine.session(backend="torch", device="cpu") as b:
        requests = [x.submit(PROMPTS[i], SamplingParams(max_new_tokens=8)) for i, x in enumerate((a, b))]
        while a.step() or b.step():
            pass
        assert requests[0].result() == a.generate(PROMPTS[0], SamplingParams(max_new_tokens=8))
        assert requests[1].result() == a.generate(PROMPTS[1], SamplingParams(max_new_tokens=8))
        a.close()
        assert b.generate(PROMPTS[0]).token_ids


def test_a_session_outlives_its_engine_and_the_other_way_round(random_model):
    engine = Checkpoint.from_hugging_face(random_model()).build(BuildConfig(**BOUNDS), plan=False)
    session = engine.session(backend="torch", device="cpu")
    engine.close()
    assert session.generate(PROMPTS[0]).token_ids
    session.close()


def test_after_close_every_use_is_an_error_and_a_second_close_is_none(talking_model, open_session):
    session = open_session(talking_model, **BOUNDS)
    stream = session.stream("the")
    next(stream)
    session.close()
    session.close()
    uses = (
        lambda: session.generate("the"),
        lambda: session.stream("the"),
        lambda: session.logits([1]),
        lambda: session.step(),
        lambda: next(stream),
        lambda: session.__enter__(),
    )
    for use in uses:
        with pytest.raises(RequestError, match="closed") as caught:
            use()
        assert caught.value.remedy


# --- what cannot be served


REFUSED = {
    "empty list": ([], {}, "no prompt in an empty list.*expected a str, a list of token ids.*at least one of these"),
    "empty text": ("", {}, "the prompt is empty"),
    "an empty one among others": ([[1], []], {}, "the prompt is empty"),
    "id beyond the vocabulary": ([1, 320], {}, "320 is outside the vocabulary.*0 to 319"),
    "negative id": ([1, -1], {}, "-1 is outside"),
    "prompt too long": ([1] * 49, {}, "49 tokens exceeds max_input_len 48"),
    "text too long": ("日本" * 60, {}, "exceeds max_input_len 48"),
    "answer too long": ([1] * 40, {"max_new_tokens": 25}, "max_seq_len 64; lower max_new_tokens to 24"),
    "fractions": ([1, 2.5], {}, "token ids"),
    "fractions alone": ([1.5, 2.5], {}, "token ids"),
    "numbers as words among ids": ([1, "2"], {}, "token ids"),
    "nothing": ([None], {}, "token ids|prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_beyond_a_bound_is_refused_with_what_to_do(name, talking_model, open_session):
    prompt, params, words = REFUSED[name]
    session = open_session(talking_model, **BOUNDS)
    with pytest.raises(RequestError, match=words) as caught:
        session.generate(prompt, SamplingParams(**params))
    assert caught.value.remedy or caught.value.expected
    assert (session.running, session.waiting) == (0, 0)


def test_a_bad_prompt_among_good_ones_runs_none(talk):
    with pytest.raises(RequestError):
        talk.generate(["the cat", [999]])
    assert (talk.running, talk.waiting) == (0, 0)


def test_a_full_context_says_shorten(random_model, open_session):
    session = open_session(random_model(), max_seq_len=16, max_input_len=16)
    assert len(session.generate([1] * 15, SamplingParams(max_new_tokens=1)).token_ids) == 1
    with pytest.raises(RequestError, match="shorten the prompt"):
        session.generate([1] * 16, SamplingParams(max_new_tokens=1))


@pytest.mark.parametrize("ids", [[], [99], [-1], [0] * 49])
def test_logits_refuse_what_generate_refuses(ids, random_model, open_session):
    with pytest.raises(RequestError):
        open_session(random_model(), **BOUNDS).logits(ids)


def test_without_a_tokenizer_text_is_refused_and_ids_are_answered(random_model, open_session):
    session = open_session(random_model(), **BOUNDS)
    for use in (
        lambda: session.generate("text"),
        lambda: session.stream([1, 2]),
        lambda: session.encode("text"),
        lambda: session.decode([1]),
        lambda: session.generate([1], SamplingParams(stop="x")),
        lambda: session.generate([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(RequestError, match="tokenizer") as caught:
            use()
        assert caught.value.remedy
    assert session.generate([1, 2]).text == ""


def test_a_damaged_tokenizer_is_named(talking_model, open_session, edited):
    folder = edited(talking_model)
    (folder / "tokenizer.json").write_text("{")
    session = open_session(folder, **BOUNDS)
    with pytest.raises(TrtlabError, match="tokenizer"):
        session.generate("the")


@pytest.mark.no_gpu
def test_backends_and_devices_that_are_not_here_are_named(random_model, monkeypatch):
    engine = Checkpoint.from_hugging_face(random_model()).build(BuildConfig(**BOUNDS), plan=False)
    for backend, device, words in (
        ("cuda", "cpu", "backend is not valid; got 'cuda'.*tensorrt"),
        ("torch", "nowhere", "unknown device"),
        ("torch", "cuda", "no CUDA device"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.session(backend=backend, device=device)
    monkeypatch.setenv("TRTLAB_BACKEND", "nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        engine.session(device="cpu")
    with engine.session(backend="torch", device="cpu") as session:
        assert session.backend == "torch"
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.session(backend="torch", device="cpu")


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_end_ids_are_those_of_the_models_files_wherever_they_stand(tmp_path, where):
    from trtlab.runtime.tokenizer import listed_end_ids

    folder = tmp_path / "model"
    shutil.copytree(tiny.llama_dir(), folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = 7 if where == "config.json" else 9
    (folder / "config.json").write_text(json.dumps(config))
    if where == "generation_config.json":
        (folder / where).write_text('{"eos_token_id": [7]}')
    assert listed_end_ids(folder) == [7]
    engine = Checkpoint.from_hugging_face(folder).build(plan=False)
    engine.save(tmp_path / "engine")
    assert listed_end_ids(tmp_path / "engine") == [7], "an engine's folder keeps them"
    with Engine.load(tmp_path / "engine").session(backend="torch", device="cpu") as session:
        assert 7 in session._prompts.require_tokenizer().end_ids


@pytest.mark.parametrize(
    ("backend", "loops"),
    [("torch", True), ("torch", False), pytest.param("interpreter", True, marks=pytest.mark.tensorrt)],
)
def test_numbers_that_a_failed_request_left_spoil_nobody(random_model, monkeypatch, backend, loops):
    monkeypatch.setattr("trtlab.runtime.torch_backend.has_loops", lambda: loops and has_loops())
    checkpoint = Checkpoint.from_hugging_face(random_model())
    table = checkpoint.tensors[EMBEDDING].read().clone()
    table[5] = torch.nan
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, EMBEDDING: in_memory(table)})
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    prompts = [[9, 8, 7], [11] * 9, [13, 14], [15, 16, 17, 18, 19, 20]]
    bounds = BuildConfig(max_batch_size=3, max_seq_len=64, max_input_len=32, tokens_per_block=8)

    def opened():
        return checkpoint.build(bounds, plan=False).session(backend=backend, device="cpu")

    alone = []
    for prompt in prompts:
        with opened() as session:
            alone.append(session.generate(prompt, params).token_ids)
    with opened() as session:
        for _ in range(3):
            for length in (20, 3, 11):
                with pytest.raises(RequestError, match="not a number"):
                    session.generate([6] * length + [5] + [6] * 4, params)
            together = [answer.token_ids for answer in session.generate(prompts, params)]
            assert together == alone
            session.kv_cache.clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda session: session.generate(None), "unknown kind of prompt; got None; expected a str"),
        (lambda session: session.generate(5), "unknown kind of prompt; got 5"),
        (
            lambda session: session.generate({"role": "user", "content": "hi"}),
            "a dict is no prompt; got {'content': 'hi', 'role'",
        ),
        (
            lambda session: session.generate([3], 5),
            "got 5; expected a SamplingParams or None; use SamplingParams(max_new_tokens=5)",
        ),
        (lambda session: session.submit([3], {"max_new_tokens": 3}), "use SamplingParams(max_new_tokens=3)"),
        (lambda session: session.submit([3], allotted_time_ms="x"), "got 'x'; expected a number above 0 or None"),
    ],
)
def test_what_is_no_prompt_and_no_params_is_refused_by_name(open_session, random_model, call, message):
    with pytest.raises(TrtlabError, match=re.escape(message)):
        call(open_session(random_model()))
