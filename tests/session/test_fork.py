"""Sessions and os.fork: what belongs to the parent is refused in the child, and nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")

SCRIPT = """
import multiprocessing, os, signal, sys, threading
import torch
from trtlab import BuildConfig, Checkpoint, SamplingParams, TrtlabError

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
bounds = BuildConfig(max_seq_len=96, max_batch_size=2, tokens_per_block=8)
torch.set_num_threads(2)

def engine():
    return Checkpoint.from_hugging_face(sys.argv[1]).build(bounds, plan=False)

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is killed
        try:
            work()
        except TrtlabError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""

OPENED_BEFORE = """
session = engine().session(device="cpu")
whole = session.generate("the cat", PARAMS)
running = session.submit("the cat", PARAMS)
session.step()
holder = threading.Thread(target=lambda: session._loop.exclusive._lock.acquire() and threading.Event().wait())
holder.daemon = True
uses = [
    lambda: session.generate("the cat", PARAMS),
    lambda: list(session.stream("the cat", PARAMS)),
    lambda: session.submit("the cat", PARAMS),
    lambda: session.logits([1, 2]),
    session.run,
    running.result,
    lambda: list(running.stream()),
    lambda: engine().session(device="cpu"),
]
for use in uses:
    in_child(use)
in_child(lambda: print("cancelled", running.cancel(), "closed", session.close(), flush=True))
print(running.result() == whole, flush=True)
holder.start()
in_child(lambda: session.generate("the cat", PARAMS))
"""

OPENED_IN_CHILD = """
torch.relu(torch.randn(1 << 22)).sum()  # starts torch's threads
built = engine()

def use():
    with built.session(device="cpu") as session:
        print(session.generate("the cat", PARAMS).text == session.generate("the cat", PARAMS).text, flush=True)

in_child(use)
use()
"""


def run(script, folder):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(SCRIPT + script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_session_of_the_parent_is_refused_in_the_child_and_goes_on_in_the_parent(talking_model):
    lines, _ = run(OPENED_BEFORE, talking_model)
    assert all("RequestError: this session was opened before the process was forked" in line for line in lines[:7])
    assert "spawn" in lines[0]
    assert lines[7].startswith("EngineError: a session cannot be opened in a forked child") and "spawn" in lines[7]
    assert lines[8] == "cancelled False closed None"
    assert lines[9] == "True"
    assert "RequestError: this session was opened before the process was forked" in lines[10]  # although a lock is held


def test_a_session_that_is_opened_in_the_child_runs_and_says_with_how_many_threads(talking_model):
    lines, log = run(OPENED_IN_CHILD, talking_model)
    assert lines == ["True", "True"]
    assert "computes with one thread" in log
