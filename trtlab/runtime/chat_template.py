"""Turns a conversation into text by a model's chat template, within bounds of time, memory and length."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtlab.errors import RequestError
from trtlab.runtime import chat_worker

Message = Mapping[str, Any]

CPU_SECONDS = 1.0  # an ordinary template takes a thousandth; the system counts whole seconds, so it is up to 2
WALL_SECONDS = 10.0  # for a loaded machine, and where the system limits no processor time
START_SECONDS = 60.0
MEMORY_BYTES = 3 << 28
LONGEST = 1 << 24  # characters of a conversation and of its text: some four million tokens
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the usual one first

CONVERSATION = '[{"role": "user", "content": "..."}], roles in the order that the model knows'
AS_TEXT = "change the conversation, or give the prompt as text"


class ChatRenderer:
    """Renders chat templates in a worker process, which starts at first use and again after it was killed.

    Any thread may call it. The process ends with this object, or with its parent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started the worker: a forked child shares its pipes and must not use them
        self._end: weakref.finalize[Any, ChatRenderer] | None = None

    def render(self, template: str, messages: Sequence[Message], special_tokens: Mapping[str, Any]) -> str:
        """The text of a conversation, ready for the answer.

        Args:
            template: A jinja2 template.
            messages: The conversation, oldest message first. Values that are None are left out, and a message's
                reasoning stands under ``reasoning_content`` and ``thinking``, with every version of transformers.
            special_tokens: Further variables of the template: ``bos_token``, ``eos_token``, ...

        Raises:
            RequestError: when the template refuses the conversation, or exceeds its bounds.
        """
        variables = {
            **_plain(dict(special_tokens), "special_tokens"),
            "messages": [_message(message, number) for number, message in enumerate(messages)],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        length = _characters(variables["messages"])
        if length > LONGEST:
            raise RequestError(
                f"the conversation has {length} characters", expected=f"at most {LONGEST}", remedy="shorten it"
            )
        answer = self._ask({"template": template, "variables": variables})
        if "limit" in answer:
            self._stop()
            raise RequestError(
                f"the tokenizer's chat template {answer['limit']}",
                remedy="give the prompt as text, or repair the template in the tokenizer's folder",
            )
        if "refusal" in answer:
            raise RequestError(
                f"the tokenizer's chat template refuses this conversation: {answer['refusal']}",
                expected=CONVERSATION,
                remedy=AS_TEXT,
            )
        return str(answer["text"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            process = self._started()
            try:
                with _killed_after(process, WALL_SECONDS):
                    answer = _exchange(process, request)
            except BaseException:  # an interrupt between question and answer would leave this answer to the next one
                self._stop()
                raise
            if answer is None:
                code = self._stop()
                ended = f"ended its process (exit status {code})"
                return {"limit": f"takes more than {CPU_SECONDS:g} s" if code and code < 0 else ended}
            return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._stop()
        import jinja2
        import markupsafe

        paths = sorted({str(Path(str(module.__file__)).parent.parent) for module in (jinja2, markupsafe)})
        limits = [json.dumps(paths), str(MEMORY_BYTES), str(CPU_SECONDS), str(LONGEST)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", chat_worker.__file__, *limits],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _end, process, self._owner)
        with _killed_after(process, START_SECONDS):
            assert process.stdout is not None
            ready = chat_worker.receive(process.stdout)
        if ready is None:
            code = self._stop()
            raise RequestError(
                f"the process for chat templates did not start (exit status {code}): {sys.executable}",
                remedy="check that this Python runs scripts and that jinja2 3.1.6 or later is installed",
            )
        return process

    def _stop(self) -> int | None:
        process, self._process = self._process, None
        if self._end is not None:
            self._end()
        return None if process is None else process.returncode


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any] | None:
    """The worker's answer; None when it ended before."""
    assert process.stdin is not None and process.stdout is not None
    try:
        chat_worker.send(process.stdin, request)
        return chat_worker.receive(process.stdout)
    except BrokenPipeError:
        return None


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """Kill the process when the block takes longer, from a thread: signals reach only the main thread."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not sent yet has no reader
                stream.close()
    process.wait()


def _message(message: object, number: int) -> dict[str, Any]:
    """One message for a template: plain values, none of them None, and reasoning under each of its names."""
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}", expected=CONVERSATION)
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any, where: str) -> Any:
    """The value made of JSON's own types; RequestError where it holds anything else."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        if odd := next((key for key in value if not isinstance(key, str)), None):
            raise RequestError(f"{where} has the key {odd!r}", expected="keys that are str", remedy=AS_TEXT)
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RequestError(
        f"{where} is a {type(value).__name__}", expected="str, numbers, lists and dicts of these", remedy=AS_TEXT
    )


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, items))
