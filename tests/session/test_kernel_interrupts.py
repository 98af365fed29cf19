"""The stop button of a notebook: a real Jupyter kernel is interrupted while a cell generates, and goes on after it."""

from __future__ import annotations

import os
import random
import textwrap
import time

import pytest

TIMES = int(os.environ.get("TRTLAB_INTERRUPTS", "12")) // 3

SET_UP = """
import signal
from trtlab import BuildConfig, Checkpoint, SamplingParams
bounds = BuildConfig(max_seq_len=96, max_batch_size=2, tokens_per_block=8)
session = Checkpoint.from_hugging_face({folder!r}).build(bounds, plan=False).session(backend="torch", device="cpu")
params, texts = SamplingParams(max_new_tokens=24, ignore_eos=True), ["the cat", "more of it", "x"]
expected = [answer.text for answer in session.generate(texts, params)]
before = signal.getsignal(signal.SIGINT)
"""

CHECK = """
session.run()
session._loop.check_integrity()
assert session.running == session.waiting == session.kv_cache.used == 0
assert signal.getsignal(signal.SIGINT) is before
assert [answer.text for answer in session.generate(texts, params)] == expected
"""

CELLS = {
    "generate": """
        while True:
            assert [answer.text for answer in session.generate(texts, params)] == expected
    """,
    "stream": """
        while True:
            assert "".join(session.stream(texts[0], params)) == expected[0]
    """,
    "await": """
        while True:
            assert (await session.submit(texts[1], params)).text == expected[1]
    """,
}


@pytest.fixture(scope="module")
def kernel(talking_model):
    manager_module = pytest.importorskip("jupyter_client.manager", reason="needs Jupyter")
    manager, client = manager_module.start_new_kernel(startup_timeout=120)
    try:
        run(client, SET_UP.format(folder=str(talking_model)))
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run(client, code):
    reply = client.execute_interactive(textwrap.dedent(code), timeout=240, output_hook=lambda message: None)
    assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", ()))


@pytest.mark.parametrize("cell", CELLS)
def test_a_session_outlives_the_stop_button(kernel, cell):
    manager, client = kernel
    dice = random.Random(cell)
    for _ in range(TIMES):
        number = client.execute(textwrap.dedent(CELLS[cell]), stop_on_error=False)
        while client.get_iopub_msg(timeout=120)["content"].get("execution_state") != "busy":
            pass
        time.sleep(0.05 + dice.random() / 4)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=120)
        assert reply["parent_header"]["msg_id"] == number
        assert reply["content"]["status"] == "error"
        assert reply["content"]["ename"] in ("KeyboardInterrupt", "CancelledError"), reply["content"]
        run(client, CHECK)
