"""A public call with arguments that do not fit says what was meant, and its remedy works."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from trtlab.widgets import EngineLayers, KVBlocks, ScaleExplorer

import trtlab
from trtlab import BuildConfig, Checkpoint, ConfigError, TrtlabError, evaluate
from trtlab.config.calls import _call, public
from trtlab.tiny import llama_dir

OBJECTS = (trtlab.Checkpoint, trtlab.QuantizedCheckpoint, trtlab.Engine, trtlab.Session)
WIDGETS = (EngineLayers, KVBlocks, ScaleExplorer)
NAMES = [getattr(module, name) for module in (trtlab, evaluate) for name in module.__all__]
FUNCTIONS = [item for item in NAMES if inspect.isfunction(item) and item is not trtlab.card]  # card takes any value


@pytest.fixture(scope="module")
def objects():
    checkpoint = Checkpoint.from_hugging_face(llama_dir())
    engine = checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=64), plan=False)
    with engine, engine.session(backend="torch", device="cpu") as session:
        yield {"checkpoint": checkpoint, "engine": engine, "session": session, "prompt": "Who"}


def refusal(call, objects):
    """The ConfigError of a call that is given as Python code."""
    with pytest.raises(ConfigError) as caught:
        eval(call, vars(trtlab), objects)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            "session.generate(prompt, max_new_tokens=4)",
            "Session.generate has no argument max_new_tokens; use params=SamplingParams(max_new_tokens=4)",
        ),
        (
            "session.generate(prompt, SamplingParams(seed=3), max_tokens=4, top_k=2)",
            "Session.generate has no arguments max_tokens, top_k; "
            "use params=SamplingParams(max_new_tokens=4, top_k=2, seed=3)",
        ),
        (
            "session.stream(prompt, temprature=0.5)",
            "Session.stream has no argument temprature; use params=SamplingParams(temperature=0.5)",
        ),
        (
            "checkpoint.build(max_batch_size=4)",
            "Checkpoint.build has no argument max_batch_size; use build_config=BuildConfig(max_batch_size=4)",
        ),
        (
            "checkpoint.build(max_batch_size='x')",
            "Checkpoint.build has no argument max_batch_size; use build_config=BuildConfig(max_batch_size='x')",
        ),
        (
            "checkpoint.build(gemm_plugin='auto')",
            "Checkpoint.build has no argument gemm_plugin; "
            "use BuildConfig.from_trtllm(gemm_plugin=...), which takes the old flags",
        ),
        (
            "checkpoint.quantize(quant_algo='w8a16')",
            "Checkpoint.quantize has no argument quant_algo; use quant_config=QuantConfig(quant_algo='W8A16')",
        ),
        (
            "engine.session(max_tokens=64)",
            "Engine.session has no argument max_tokens; "
            "use session_config=SessionConfig(max_tokens_in_paged_kv_cache=64)",
        ),
        (
            "engine.session(max_batch_size=64)",
            "Engine.session has no argument max_batch_size; "
            "max_batch_size belongs to BuildConfig: use checkpoint.build(BuildConfig(max_batch_size=64))",
        ),
        ("engine.session(devise='cpu')", "Engine.session has no argument devise; did you mean device?"),
        (
            "checkpoint.build(zebra=1)",
            "Checkpoint.build has no argument zebra; expected build_config | mapping | plan",
        ),
        ("session.step(zebra=1)", "Session.step has no argument zebra; expected none"),
        (
            "checkpoint.build(3)",
            "Checkpoint.build: build_config is not valid; got 3; expected a BuildConfig or None; "
            "use BuildConfig(max_batch_size=3)",
        ),
        (
            "checkpoint.quantize('W8A16')",
            "Checkpoint.quantize: quant_config is not valid; got 'W8A16'; expected a QuantConfig; "
            "use QuantConfig(quant_algo='W8A16')",
        ),
        (
            "session.generate(prompt, {'max_new_tokens': 5})",
            "Session.generate: params is not valid; got {'max_new_tokens': 5}; expected a SamplingParams or None; "
            "use SamplingParams(max_new_tokens=5)",
        ),
        (
            "engine.session('torch')",
            "Engine.session: session_config is not valid; got 'torch'; expected a SessionConfig or None; "
            "use backend='torch'",
        ),
        (
            "checkpoint.build(plan='no')",
            "Checkpoint.build: plan is not valid; got 'no'; expected a bool",
        ),
        (
            "engine.session(backend='pytorch')",
            "Engine.session: backend is not valid; got 'pytorch'; "
            "expected auto | tensorrt | torch | interpreter; did you mean 'torch'?",
        ),
        (
            "Checkpoint.from_hugging_face('nowhere', dtype='fp16')",
            "Checkpoint.from_hugging_face: dtype is not valid; got 'fp16'; "
            "expected float32 | float16 | bfloat16 or auto; did you mean 'float16'?",
        ),
        (
            "session.submit(prompt, priority='high')",
            "Session.submit: priority is not valid; got 'high'; expected an int",
        ),
        ("session.generate()", "Session.generate needs prompts"),
        (
            "checkpoint.quantize()",
            'Checkpoint.quantize needs quant_config; use checkpoint.quantize(QuantConfig(quant_algo="W8A16"))',
        ),
        (
            "checkpoint.build(None, None, True, 4)",
            "Checkpoint.build takes at most 3 arguments by position; give the others by name",
        ),
        (
            "checkpoint.build(None, build_config=None)",
            "Checkpoint.build: build_config is given twice, by position and by name",
        ),
        (
            "estimate(checkpoint.config, tp_size=2)",
            "estimate has no argument tp_size; use mapping=Mapping(tp_size=2)",
        ),
        ("benchmark(session, warmup=1)", "benchmark has no argument warmup; did you mean warm_up?"),
    ],
)
def test_a_call_that_does_not_fit_says_what_was_meant(call, line, objects):
    assert refusal(call, objects) == line


REPAIRED = {  # a call, and how its remedy is put into it
    "session.generate(prompt, max_new_tokens=4)": "session.generate(prompt, {})",
    "session.generate(prompt, {'max_new_tokens': 5})": "session.generate(prompt, {})",
    "session.generate(prompt, 5)": "session.generate(prompt, {})",
    "checkpoint.build(max_batch_size=4)": "checkpoint.build({}, plan=False)",
    "checkpoint.build(BuildConfig(max_seq_len=64), max_batch_size=4)": "checkpoint.build({}, plan=False)",
    "checkpoint.build(3)": "checkpoint.build({}, plan=False)",
    "checkpoint.build(Mapping(tp_size=2))": "checkpoint.build({}, plan=False)",
    "checkpoint.quantize(quant_algo='int8_wo')": "checkpoint.quantize({})",
    "checkpoint.quantize('W8A16')": "checkpoint.quantize({})",
    "engine.session(max_tokens=64)": "engine.session({})",
    "engine.session('torch')": "engine.session({})",
    "engine.session(max_batch_size=2)": "{}",
    "BuildConfig(tp_size=2)": "{}",
    "SessionConfig(max_new_tokens=2)": "{}",
    "QuantConfig(max_new_tokens=2)": "{}",
}


@pytest.mark.no_gpu
@pytest.mark.parametrize("call", REPAIRED)
def test_a_remedy_that_is_followed_works(call, objects, capsys):
    remedy = re.search(r"\buse (.*)", refusal(call, objects))[1]
    eval(REPAIRED[call].format(remedy), vars(trtlab), objects)


def test_settings_given_beside_a_stray_field_keep_their_fields(objects):
    line = refusal("checkpoint.build(BuildConfig(max_seq_len=64), max_batch_size=4)", objects)
    assert line.endswith("use build_config=BuildConfig(max_batch_size=4, max_seq_len=64)")


def test_scalars_of_numpy_and_torch_are_plain_values():
    @public
    def call(count: int, share: float = 0.5, name: str = "", flag: bool = False) -> tuple[object, ...]:
        return count, share, name, flag

    given = call(np.int64(3), torch.tensor(0.25), np.str_("x"), flag=np.True_)
    assert given == (3, 0.25, "x", True) and [type(value) for value in given] == [int, float, str, bool]
    with pytest.raises(ConfigError, match=r"call: flag is not valid; got 1; expected a bool"):
        call(1, flag=1)


def test_a_type_error_inside_a_function_is_its_own():
    @public
    def broken(value: object) -> None:
        len(5)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        broken(3)


def test_names_by_keyword_only_or_any_are_taken():
    @public
    def free(first: int, *rest: object, last: int = 0, **others: object) -> tuple[object, ...]:
        return first, rest, last, others

    assert free(1, 2, 3, last=4, zebra=5) == (1, (2, 3), 4, {"zebra": 5})


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_public_method_is_checked_and_keeps_its_signature(kind):
    for name, member in vars(kind).items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and not name.startswith("_"):
            assert function.__wrapped__, name
            assert inspect.signature(function) == inspect.signature(function.__wrapped__)
            call = _call(function.__wrapped__)  # the annotations can be read
            assert set(call.hints) <= set(call.signature.parameters)


@pytest.mark.parametrize("widget", WIDGETS)
def test_a_widget_of_another_object_is_refused_by_its_argument(widget, objects):
    with pytest.raises(ConfigError, match=rf"{widget.__name__}: \w+ is not valid; got Checkpoint"):
        widget(objects["checkpoint"])
    with pytest.raises(ConfigError, match=rf"{widget.__name__} has no argument zebra"):
        widget(zebra=1)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_public_function_is_checked(function):
    assert _call(function.__wrapped__).name == function.__name__
    with pytest.raises(ConfigError, match="has no argument zebra"):
        function(zebra=1)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("session.fork(3)", "Session.fork: request is not valid; got 3; expected a Request"),
        ("benchmark(checkpoint)", "benchmark: session is not valid; got Checkpoint"),
        ("benchmark(session, batch_size=[0])", "benchmark: batch_size[0] is not valid; got 0; expected an int"),
        ("benchmark(session, input_output_len=[(8,)])", "benchmark: input_output_len"),
        ("benchmark(session, num_runs=0)", "benchmark: num_runs is not valid; got 0; expected an int of at least 1"),
        ("engine.layer_table(tokens=10**400)", "Engine.layer_table: tokens is not valid"),
        ("engine.compare(3, prompt)", "Engine.compare: checkpoint is not valid; got 3; expected"),
        ("engine.compare(checkpoint, prompt, op_set=int)", "Engine.compare: op_set is not valid; got <class 'int'>"),
        ("Checkpoint.from_weights(checkpoint.config, 3)", "Checkpoint.from_weights: weights is not valid; got 3"),
        (
            "Checkpoint.from_weights(3, {})",
            "Checkpoint.from_weights: config is not valid; got 3; expected a ModelConfig",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_argument(call, line, objects):
    assert refusal(call, objects).startswith(line)


JUNK = [3, -1, 10**400, 1.5, float("nan"), "x", "", b"x", None, True, object(), [], [3.5], {}, {"a": 1}, {1, 2}, int]
CALLS = {  # a call with one argument left open
    "checkpoint.build({}, plan=False)",
    "checkpoint.build(mapping={}, plan=False)",
    "checkpoint.build(plan={})",
    "checkpoint.quantize({})",
    "checkpoint.quantize(QuantConfig('W8A16'), calibration={})",
    "checkpoint.save('nowhere', mapping={})",
    "Checkpoint.from_weights(checkpoint.config, {})",
    "Checkpoint.from_weights({}, weights)",
    "Checkpoint.load('nowhere', rank={})",
    "engine.session({}, device='cpu')",
    "engine.session(backend={}, device='cpu')",
    "engine.compare({}, prompt)",
    "engine.compare(checkpoint, {})",
    "engine.layer_table(rank={})",
    "engine.save('nowhere', weights={})",
    "session.generate({}, short)",
    "session.generate(prompt, {})",
    "session.submit(prompt, short, priority={})",
    "session.submit(prompt, short, allotted_time_ms={})",
    "session.stream({}, short)",
    "session.fork({})",
    "session.logits({})",
    "session.encode({})",
    "session.decode({})",
    "estimate({})",
    "benchmark({})",
    "benchmark(session, {}, num_runs=1)",
    "benchmark(session, [1], {}, num_runs=1)",
    "evaluate.perplexity({}, ['a b c'])",
    "evaluate.perplexity(session, {})",
    "evaluate.accuracy(session, {})",
}


@pytest.mark.no_gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("call", sorted(CALLS))
def test_whatever_is_given_is_taken_or_refused_by_an_error_of_trtlab(call, objects, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {**objects, "short": trtlab.SamplingParams(max_new_tokens=1), "evaluate": evaluate}
    names["weights"] = {name: tensor.read() for name, tensor in objects["checkpoint"].tensors.items()}
    for junk in JUNK:
        try:
            result = eval(call.replace("{}", "junk"), vars(trtlab), {**names, "junk": junk})
        except TrtlabError as error:
            assert len(str(error)) < 2000
            continue
        if isinstance(result, (trtlab.Session, trtlab.Engine)):
            result.close()


def test_a_parameter_that_takes_anything_takes_anything():
    @public
    def show(value: Any, other: Any | None = None) -> Any:
        return value

    thing = object()
    assert show(thing) is thing and show(value=3, other=thing) == 3
