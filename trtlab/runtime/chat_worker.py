"""Renders chat templates in a process of its own that may be killed. Started by path: imports nothing of trtlab.

A template is a program that came with a model. A thread cannot end its nested loops, and nothing can end one operation
that holds the interpreter's lock, such as ``"x" * 10**10``. So this process has limits of memory and time, and its
parent kills it when it does not answer. The sandbox stays: a template may compute, but reaches no file.

A message is eight bytes with its length, then JSON in UTF-8 (lone surrogates pass, for the parent to refuse).
"""

from __future__ import annotations

import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import IO, Any


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(body).to_bytes(8, "big") + body)
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read one message; None when the stream ends."""
    size = stream.read(8)
    if len(size) < 8:
        return None
    length = int.from_bytes(size, "big")
    body = stream.read(length)
    if len(body) < length:
        return None
    return json.loads(body.decode("utf-8", "surrogatepass"))  # type: ignore[no-any-return]


def main(memory_bytes: int, cpu_seconds: float, longest: int) -> None:
    """Answer requests ``{"template", "variables"}`` with ``{"text"}`` or ``{"refusal"}`` until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's matter
    compiled = functools.lru_cache(maxsize=8)(environment().from_string)
    limit_time = _limits(memory_bytes)
    send(sys.stdout.buffer, {"ready": True})
    while True:
        limit_time(cpu_seconds)
        try:
            request = receive(sys.stdin.buffer)
            if request is None:
                return
            answer = {"text": _render(compiled(request["template"]), request["variables"], longest)}
            send(sys.stdout.buffer, answer)
        except MemoryError:
            send(sys.stdout.buffer, {"limit": f"needs more than {memory_bytes >> 20} MiB of memory"})
            return
        except _TooLong:
            send(sys.stdout.buffer, {"limit": f"writes more than {longest} characters"})
            return
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            send(sys.stdout.buffer, {"refusal": f"{error}"[:1000] or type(error).__name__})


class _TooLong(Exception):
    """The rendered text is longer than any prompt."""


def _render(template: Any, variables: dict[str, Any], longest: int) -> str:
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > longest:
            raise _TooLong
        parts.append(part)
    return "".join(parts)


def _limits(memory_bytes: int) -> Callable[[float], None]:
    """Limit this process's memory; returns what allows it so many more seconds of processor time."""
    try:
        import resource
    except ImportError:  # Windows: the parent's deadline is the only limit
        return lambda seconds: None

    def at_most(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    at_most(resource.RLIMIT_CORE, 0)
    at_most(resource.RLIMIT_AS, memory_bytes)
    return lambda seconds: at_most(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))


def environment() -> Any:
    """The environment that chat templates are written for: what transformers gives them, in jinja2's sandbox."""
    import jinja2
    from jinja2 import constants, nodes  # noqa: F401 - lipsum imports constants when it is called
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks what a model said, for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """jinja2's namespace without names that begin with an underscore, as in transformers."""

        def __init__(*args: Any, **named: Any) -> None:  # a template may have a name "self" of its own
            namespace, *pairs = args
            values = dict(*pairs, **named)
            for name in values:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(namespace, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")

    def raise_exception(message: object) -> None:
        raise jinja2.exceptions.TemplateError(message if message is None else str(message))

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": Namespace,
    }
    return sandbox


class _Dict:
    """``dict`` of a template: its two constructors, and no class to reach through."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    sys.path += json.loads(sys.argv[1])
    main(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
