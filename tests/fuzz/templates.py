"""Chat templates that loop, swell, reach for Python, or make no sense: sentences of a small random grammar."""

from __future__ import annotations

import json
from random import Random

from trtlab import BuildConfig, Checkpoint, TrtlabError

from .folder import Files
from .journeys import Journey, check_error, require
from .kinds import Base, Kind
from .tokenizers import with_tokenizer

VALUES = r"""
messages
messages[0].content
messages[99].content
messages | length
messages[0].__dict__
bos_token
add_generation_prompt
tools
ns
ns.t
x
'x'
'a' ~ 'b'
'<s>' * 100
'\ud800'
1
-1
1 / 0
true
none
{}
dict(a=1)
namespace(t='a')
joiner(',')
cycler('a', 'b')
loop.index
caller()
undefined_name.x
lipsum(1)
lipsum(10**7)
range(5) | list
range(10**6)
range(10**8) | list
range(10**10)
'ab' * 10**9
[0] * 10**9
(1,) * 10**8
10**9
9**9**9
10**10**8
8192**8192**2
1 << 10**10
1e308 * 10
'%09999999999d' % 1
'{:9999999999}'.format(1)
'x'.ljust(10**9)
'x'.zfill(10**10)
'a'.replace('', 'b' * 10**9)
'a'.encode()
''.join(messages | map(attribute='content'))
['a'] | sum
strftime_now('%Y')
raise_exception('no')
''.__class__.__mro__
self.__init__.__globals__
cycler.__init__.__globals__.os.popen('touch canary').read()
lipsum.__globals__['os'].system('touch canary')
"""
FILTERS = """
upper
list
length
join
tojson
string
center(10**9)
indent(10**9)
replace('', 'x' * 10**6)
batch(2) | list
batch(10**9, 'x') | list
format
int
float
pprint
sort
unique | list
sum
e
wordwrap(1)
urlize
xmlattr
reverse | list
random
map('upper') | join
map(attribute='a.b') | list
tojson(indent=10**9)
truncate(10**9)
slice(10**9) | list
slice(3) | list
trim
striptags
dictsort
attr('__class__')
map('attr', '__class__') | list
groupby(0) | list
default('x')
select | list
nope
filesizeformat
round(10**9)
first
last
items | list
safe
min
max
title
wordcount
"""
STATEMENTS = """
{% for x in VALUE %}INNER{% endfor %}
{% for x in range(10**TIMES) %}INNER{% endfor %}
{% for m in messages %}INNER{% endfor %}
{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}
{% for x in range(9) %}{% break %}{% endfor %}INNER
{% for x in range(10**9) %}{% continue %}{% endfor %}INNER
{% for x in VALUE %}
{% if VALUE %}INNER{% else %}INNER{% endif %}
{% set x = VALUE %}INNER
{% set ns = namespace(t='ab') %}{% for i in range(10**TIMES) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}INNER
{% set ns = namespace(t=[0]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}INNER
{% set l = [] %}{% for x in range(10**8) %}{% set _ = l.append('a' * 10000) %}{% endfor %}INNER
{% set messages = messages * 10**9 %}INNER
{% set _ = messages.clear() %}INNER
{% do messages.append(messages) %}INNER
{% macro f(a) %}INNER{{ f(a) }}{% endmacro %}{{ f(1) }}
{% macro f() %}INNER{% endmacro %}{{ f() }}
{% filter FILTER %}INNER{% endfilter %}
{% call lipsum() %}INNER{% endcall %}
{% generation %}INNER{% endgeneration %}
{% include '/etc/passwd' %}INNER
{% import 'evil' as evil %}INNER
{% extends 'evil' %}INNER
{% block a %}INNER{% endblock %}
{% raw %}INNER{% endraw %}
{% with a = VALUE %}INNER{% endwith %}
{{ DEEP VALUE DEEPER }}
{{ LONG }}
MANY
"""
OPERATORS = "+ ~ * - % ** // in == and or < /"
MARKS = {
    "DEEPER": ")" * 5000,
    "DEEP": "(" * 5000,
    "LONG": "a+" * 5000 + "1",
    "MANY": "{% if 1 %}" * 200 + "{% endif %}" * 200,
}


class Grammar:
    """Random templates by the tables of this file."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def block(self, depth: int = 0) -> str:
        """One to three statements."""
        return "".join(self._statement(depth) for _ in range(self.rng.choice((1, 1, 2, 3))))

    def _statement(self, depth: int) -> str:
        if depth > 3 or self.rng.random() < 0.35:
            return self.rng.choice(("text ", "{{ " + self._value() + " }}", "{{ messages[0].content }}", "{# a #}"))
        text = self._one_of(STATEMENTS)
        for mark, long in MARKS.items():
            text = text.replace(mark, long)
        text = text.replace("TIMES", self.rng.choice("1259"))
        return (
            text.replace("VALUE", self._value())
            .replace("FILTER", self._one_of(FILTERS))
            .replace("INNER", self.block(depth + 1))
        )

    def _value(self, depth: int = 0) -> str:
        value = self._one_of(VALUES)
        if depth < 3 and self.rng.random() < 0.3:
            value = f"({value}) {self.rng.choice(OPERATORS.split())} ({self._value(depth + 1)})"
        return f"({value}) | {self._one_of(FILTERS)}" if self.rng.random() < 0.3 else value

    def _one_of(self, lines: str) -> str:
        return self.rng.choice(lines.strip().splitlines())


def _template(files: Files, rng: Random) -> str:
    template = Grammar(rng).block()
    if rng.random() < 0.8:
        files["chat_template.jinja"] = template.encode()
    else:
        del files["chat_template.jinja"]
        config = json.loads(files["tokenizer_config.json"])  # type: ignore[arg-type]
        forms = (template, [{"name": "default", "template": template}], {"default": template})
        config["chat_template"] = rng.choice(forms)
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return f"template {template[:300]}"


def _chat(journey: Journey) -> None:
    """One conversation through the folder's template; whatever becomes of it, token ids still run."""
    checkpoint = Checkpoint.from_hugging_face(journey.folder)
    engine = checkpoint.build(BuildConfig(max_batch_size=1, max_num_tokens=64), plan=False)
    journey.done("opened")
    with engine, engine.session(backend="torch", device="cpu") as session:
        try:
            answer = session.generate([{"role": "user", "content": "hello"}])
            require(isinstance(answer.text, str), "an answer without text")
            journey.done("answered")
        except TrtlabError as error:
            check_error(error)
            journey.done("refused")
        require(session.running == session.waiting == 0, "a request is left over")
        require(len(session.generate([1, 2]).token_ids) > 0, "no token from token ids")
        journey.done("ran")


def _make_bases() -> list[Base]:
    files = {**with_tokenizer(), "chat_template.jinja": b"{{ messages[0].content }}"}
    return [Base("byte level", files, _chat, ends="answered")]


def kinds() -> dict[str, Kind]:
    """The kinds of this file by name."""
    return {"template": Kind(_make_bases, [(1, _template)], most_edits=1)}
