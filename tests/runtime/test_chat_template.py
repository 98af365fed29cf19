"""Chat templates: the text of transformers, within bounds of time, memory and length, from any thread."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils import chat_template_utils

from trtlab import RequestError
from trtlab.runtime import chat_template
from trtlab.runtime.chat_template import ChatRenderer

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "größe 日本 🙂 <b>&amp;</b>\n"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "think"},
    {"role": "user", "content": "And now?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}
  {%- set rest = messages[1:] -%}{%- set system = messages[0].content -%}
{%- else -%}{%- set rest = messages -%}{%- set system = false -%}{%- endif -%}
{%- for message in rest -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate user/assistant') -}}
  {%- endif -%}
  {%- if loop.index0 == 0 and system != false -%}
    {%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] -%}
  {%- else -%}{%- set content = message['content'] -%}{%- endif -%}
  {%- if message['role'] == 'user' -%}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
  {%- elif message['role'] == 'assistant' -%}{{- ' ' + content | trim + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y %B") %}{%- else %}
        {%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
MISTRAL = """{%- set loop_messages = messages if messages[0]["role"] != "system" else messages[1:] %}
{%- set ns = namespace(index=0, last=none) %}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}{%- set ns.index = ns.index + 1 %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}{{- ns.index }}/{{ ns.last }}
{%- for message in loop_messages if message.role != "tool" %}
    {%- if loop.index > 2 %}{%- continue %}{%- endif %}
    {%- if message["role"] == "user" %}{{- "[INST]" + message["content"] + "[/INST]" }}
    {%- else %}{{- message["content"]|tojson + eos_token }}{%- endif %}
{%- endfor %}"""
QWEN = """{%- macro show(content) %}{%- if content is string %}{{- content }}{%- else %}
  {%- for item in content %}{%- if 'text' in item %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}
{%- if tools %}{{- 'tools: ' }}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
  {%- set index = (messages|length - 1) - loop.index0 %}
  {%- if ns.multi_step and message.role == "user" %}
    {%- set ns.multi_step = false %}{%- set ns.last = index %}
  {%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
  {{- '<|im_start|>' + message.role + '\n' }}
  {%- if reasoning %}{{- '<think>\n' + reasoning.strip('\n') + '\n</think>' }}{%- endif %}
  {{- show(message.content).lstrip('\n') + '<|im_end|>\n' }}
{%- endfor %}
{{- messages | map(attribute='role') | join(',') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- {'a': [1, 2.5, none, true, 'é<']} | tojson(indent=2) }}
{{- dict(a=1).items() | list }}{{- '%5.2f|%s' % (1.234, 'x') }}"""
TRAINING = """{%- for message in messages %}{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{%- endif %}{%- endfor %}"""
TEMPLATES = {n: t for n, t in globals().items() if isinstance(t, str) and n.isupper() and "{" in t}


def transformers_text(template, messages):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **TOKENS)
    return empty.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.fixture(scope="module")
def renderer():
    return ChatRenderer()


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[3:]], ids=["with system", "without", "short"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, messages, renderer):
    text = renderer.render(TEMPLATES[name], messages, TOKENS)
    assert text == transformers_text(TEMPLATES[name], messages)
    assert "And now?" in text or name == "MISTRAL"


USER = {"role": "user", "content": "x"}
ODD = {  # a message, and what a template gets
    "None": ({"role": "user", "content": None}, {"role": "user"}),
    "parts": ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, None),
    "thinking": ({**USER, "thinking": "t"}, {"thinking": "t", **USER, "reasoning_content": "t"}),
    "reasoning": (
        {**USER, "reasoning": "t"},
        {"thinking": "t", **USER, "reasoning": "t", "reasoning_content": "t"},
    ),
    "other types": ({**USER, "n": 3, "f": 0.5, "ok": True, "nested": ["a", {"b": None}]}, None),
}
SEEN = "{% for m in messages %}{{ m | tojson }}{{ m.items() | list }}{% endfor %}{{ tools }}{{ documents }}"


@pytest.mark.parametrize("kind", ODD)
def test_values_of_a_message_arrive_alike_with_every_transformers(kind, renderer):
    given, arrives = ODD[kind]
    text = renderer.render(SEEN, [given, USER], TOKENS)
    assert text == transformers_text(SEEN, [given if arrives is None else arrives, USER])
    names = getattr(chat_template_utils, "_REASONING_FIELDS", None)  # 5.24 has it, 5.17 hands a message on unchanged
    if names is not None:
        assert names == chat_template.REASONING and text == transformers_text(SEEN, [given, USER])


UNBOUNDED = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a filter that writes": "{{ lipsum(10**7) }}",
    "repetition": "{{ 'x' * 10**10 }}",
    "a huge integer": "{{ 10 ** (10 ** 9) }}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "a method": "{{ 'a'.ljust(10**10) }}",
    "doubling": "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling of lists": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "nesting of lists": "{% set n = namespace(s=1) %}{% for i in range(50) %}{% set n.s = [n.s]*2 %}{% endfor %}{{n}}",
    "macros": "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "long output": "{{ 'ab' * 10000000 }}",
    "long output in pieces": "{% for a in range(3000) %}{{ 'abcdefgh' * 1000 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def strict():
    """A renderer with little time, so that the tests need little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "CPU_SECONDS", 0.1)
        yield ChatRenderer()


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_a_template_without_bounds_is_refused(kind, strict):
    with pytest.raises(RequestError, match=r"chat template (takes|needs|writes) more than"):
        strict.render(UNBOUNDED[kind], TALK, TOKENS)
    assert strict.render(CHATML, TALK, TOKENS) == transformers_text(CHATML, TALK)


REFUSING = {
    "its own error": (
        "{{ raise_exception('roles must alternate') }}",
        "refuses this conversation: roles must alternate",
    ),
    "a name that is missing": ("{{ message.role }}", "'message' is undefined"),
    "a syntax error": ("{% for %}", "refuses"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a deep expression": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "recursion"),
    "a large range": ("{{ range(10**9) | join }}", "Range too big"),
    "private names of a namespace": ("{% set n = namespace(__class__=1) %}", "underscore"),
    "the inside of Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
    "the inside of a method": ("{{ messages.append.__globals__['x'] }}", "refuses"),
    "a change of the conversation": ("{{ messages.append(1) }}", "refuses"),
}


@pytest.mark.parametrize("kind", REFUSING)
def test_what_a_template_raises_is_a_request_error(kind, renderer):
    template, message = REFUSING[kind]
    with pytest.raises(RequestError, match=message):
        renderer.render(template, TALK, TOKENS)


def test_the_wall_clock_ends_a_worker_that_uses_no_processor(monkeypatch):
    renderer = ChatRenderer()
    renderer.render("x", TALK, {})
    os.kill(renderer._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.3)
    with pytest.raises(RequestError, match="takes more than"):
        renderer.render("x", TALK, {})


def test_a_worker_that_was_killed_starts_again():
    renderer = ChatRenderer()
    renderer.render("x", TALK, {})
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait()
    assert renderer.render("y", TALK, {}) == "y"


def test_any_thread_may_render_and_one_bad_template_spoils_no_other(renderer):
    def work(number):
        if number % 4 == 3:
            with pytest.raises(RequestError, match="needs more than"):
                renderer.render(UNBOUNDED["repetition"], TALK, {})
            return str(number)
        return renderer.render("{{ messages[0].content }}", [{"role": "user", "content": str(number)}], {})

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(16))) == [str(number) for number in range(16)]


def test_an_interrupt_leaves_no_answer_to_the_next_question():
    renderer = ChatRenderer()
    renderer.render("x", TALK, {})
    timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                renderer.render(
                    "{% for a in range(99999) %}{% for b in range(9) %}{% endfor %}{% endfor %}late", TALK, {}
                )
    finally:
        signal.signal(signal.SIGINT, before)
        timer.join()
    assert renderer.render("now", TALK, {}) == "now"


def test_the_worker_ends_with_its_renderer():
    renderer = ChatRenderer()
    renderer.render("x", TALK, {})
    process = renderer._process
    del renderer
    gc.collect()
    assert process.returncode is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_starts_a_worker_of_its_own():
    script = """
import os, sys, warnings
from trtlab.runtime.chat_template import ChatRenderer
renderer = ChatRenderer()
talk = [{"role": "user", "content": "x"}]
assert renderer.render("a", talk, {}) == "a"
if (child := os.fork()) == 0:
    assert renderer.render("b", talk, {}) == "b"
    sys.exit()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert renderer.render("c", talk, {}) == "c"
print("both", renderer._process.poll())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "both None\n", done.stderr


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], "message 0 is a str"),
        ([{"role": "user", "content": b"hi"}], r"message 0\['content'\] is a bytes"),
        ([{"role": "user", "content": [{"text": {1, 2}}]}], r"message 0\['content'\]\[0\]\['text'\] is a set"),
        ([{"role": "user", 3: "x"}], "has the key 3"),
    ],
)
def test_what_is_no_conversation_is_refused_by_place(messages, message, renderer):
    with pytest.raises(RequestError, match=message):
        renderer.render("x", messages, TOKENS)


def test_a_conversation_of_many_millions_of_characters_is_refused_unread():
    start = time.perf_counter()
    renderer = ChatRenderer()
    with pytest.raises(RequestError, match="20000004 characters"):
        renderer.render("x", [{"role": "user", "content": "x" * 19999989}], TOKENS)
    assert renderer._process is None
    assert time.perf_counter() - start < 1
