"""Interrupts and kills of a build in a process of its own, and the bar of one that succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trtlab.tensorrt.build import watch as watch_module
from trtlab.tensorrt.build.plans import Scratch
from trtlab.tensorrt.build.watch import Watch, run_watched
from trtlab.tensorrt.library import library

ROOT = Path(__file__).parents[3]
BUILD = """
import os, signal, sys
from tests.models import small_config, telling_weights
from trtlab import BuildConfig, Checkpoint
from trtlab.tensorrt import log
from trtlab.tensorrt.build import watch

moment, afterwards = sys.argv[1:]
config = small_config(num_hidden_layers=6)
checkpoint = Checkpoint.from_weights(config, telling_weights(config))

def once(kind, name):
    plain, signals = getattr(kind, name), [signal.SIGKILL if afterwards == "killed" else signal.SIGINT]
    def then_interrupt(*arguments):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return plain(*arguments)
    setattr(kind, name, then_interrupt)

class Watched(watch.Watch):
    steps = property(lambda self: self.counted, lambda self, count: self.count(count))
    counted = 0
    def count(self, count):
        self.counted = count
        if count == 20:
            self.twentieth()
    def twentieth(self):
        pass

if moment == "set-up":
    once(log.Log, "write")
elif moment == "steps":
    watch.Watch = Watched
    from trtlab.tensorrt.build import plan
    plan.Watch = Watched
    once(Watched, "twentieth")
else:
    once(watch.Writer, "write")
try:
    checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=32))
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
if afterwards == "again":
    with checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=32)) as engine:
        print("built", engine.plans.files[0].stat().st_size == engine.plans.records[0].plan_bytes)
"""

pytestmark = pytest.mark.plans


def build(moment: str, afterwards: str, temp: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", BUILD, moment, afterwards],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temp), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("moment", "afterwards"), [("set-up", "again"), ("steps", "exit"), ("steps", "again"), ("writing", "exit")]
)
def test_an_interrupted_process_exits_cleanly_and_can_build_again(moment, afterwards, tmp_path):
    ended = build(moment, afterwards, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["interrupted"] + ["built True"] * (afterwards == "again")
    assert list(tmp_path.glob("trtlab-plan-*")) == []


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path, monkeypatch):
    assert build("writing", "killed", tmp_path).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("trtlab-plan-*")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running = Scratch()
    assert not left.exists()
    other = Scratch()
    assert running.folder.is_dir(), "its build still runs"
    for scratch in (running, other):
        scratch.close()
    assert list(tmp_path.glob("trtlab-plan-*")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_ends_leaves_its_parents_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch = Scratch()
    child = os.fork()
    if child == 0:
        scratch.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert scratch.folder.is_dir()
    scratch.close()
    assert not scratch.folder.exists()


class Bar:
    """Stands for tqdm's bar."""

    def __init__(self) -> None:
        self.n, self.total = 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def refresh(self):
        pass


@pytest.fixture
def bar(monkeypatch):
    drawn = Bar()
    monkeypatch.setattr(watch_module, "progress", lambda *_, **__: drawn)
    return drawn


def watch_of(steps: int, total: int) -> Watch:
    watch = Watch(library().trt)
    watch.steps, watch.total = steps, total
    return watch


def test_a_successful_build_ends_with_a_full_bar_and_a_failed_one_does_not(bar):
    assert run_watched(lambda: True, watch_of(612, 615), "building plan")
    assert (bar.n, bar.total) == (615, 615)
    bar.n = 0
    assert not run_watched(lambda: False, watch_of(612, 615), "building plan")
    assert bar.n < 615


def test_any_exception_in_the_wait_cancels_the_build_and_waits_for_its_end(bar):
    """A SIGTERM handler that raises, for example: the plan's file is closed after it."""
    watch, ended = watch_of(0, 0), []
    bar.refresh = lambda: pytest.fail("not reached") if ended else sys.exit(3)
    watch_started = threading.Event()

    def work():
        watch_started.set()
        while not watch.cancelled:
            watch_started.wait(0.01)
        ended.append(True)
        return False

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watch_module, "PATIENCE_S", -1.0)
        with pytest.raises(SystemExit):
            run_watched(work, watch, "building plan")
    assert ended == [True]
