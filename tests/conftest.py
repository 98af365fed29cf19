"""What a test may use of the machine, and fixtures that all tests share: folders of small models, closed sessions."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

import trtlab.session.open as session_opening
from trtlab import BuildConfig, Checkpoint, Mapping, Session, TrtlabError
from trtlab.tensorrt.library import library

from .models import write_byte_level_tokenizer, write_random_model

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts a job in the background like that
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("TRTLAB_TEST_THREADS", "1")))
os.environ["TRTLAB_BACKEND"] = "torch"
QUIET = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
for name, examples in (("quick", 50), ("thorough", 1000)):
    hypothesis.settings.register_profile(
        name, deadline=None, derandomize=name == "quick", max_examples=examples, suppress_health_check=QUIET
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, with the reason."""
    for mark, lacks in (("gpu", _lacks_gpu), ("tensorrt", _lacks_tensorrt), ("plans", _lacks_plans)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := lacks()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _lacks_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device"


def _lacks_tensorrt() -> str | None:
    try:
        library()
    except TrtlabError as error:
        return f"TensorRT is missing: {error}"
    return None


def _lacks_plans() -> str | None:
    if reason := _lacks_tensorrt():
        return reason
    verdict = library().builds(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    return None if verdict else verdict.reason


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test says where it runs, and does the same on a machine with a GPU as on one without.

    One marked ``gpu`` has the GPU. One marked ``no_gpu`` runs as if there were none, for functions that choose the
    device. Every other one names the device of each session; a session without fails, on any machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("no_gpu"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that the test starts
        elif not item.get_closest_marker("gpu"):
            patch.setattr(session_opening, "_device", _named(session_opening._device))
        return (yield)


def _named(device_of: Callable[[str | None], torch.device]) -> Callable[[str | None], torch.device]:
    def checked(name: str | None) -> torch.device:
        assert name is not None, 'a test names the device of a session, device="cpu", or is marked gpu or no_gpu'
        return device_of(name)

    return checked


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``random_model(architecture, **changes)`` is a Hugging Face folder, the same one for the same arguments."""
    folders: dict[str, Path] = {}

    def make(architecture: str = "LlamaForCausalLM", **changes: Any) -> Path:
        key = json.dumps([architecture, changes], sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("model")
            write_random_model(folders[key], architecture, **changes)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def hugging_face() -> Callable[[Path], Any]:
    """The reference: the model of a folder in transformers, in float32."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()

    return load


@pytest.fixture
def open_session() -> Iterator[Callable[..., Session]]:
    """``open_session(folder or checkpoint, mapping, **build)`` is a session in torch, closed after the test."""
    opened: list[Session] = []

    def start(source: Path | Checkpoint, mapping: Mapping | None = None, **build: Any) -> Session:
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.from_hugging_face(source)
        engine = checkpoint.build(BuildConfig(**build), mapping=mapping, plan=False)
        opened.append(engine.session(backend="torch", device="cpu"))
        return opened[-1]

    yield start
    for session in opened:
        session.close()


@pytest.fixture(scope="session")
def talking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level tokenizer; its answers are texts with many invalid characters."""
    folder = tmp_path_factory.mktemp("talking")
    write_byte_level_tokenizer(folder)
    write_random_model(folder, "LlamaForCausalLM", vocab_size=320, seed=3)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under a folder, hidden files included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """``files_of(folder)`` is the folder's content, for comparison before and after."""
    return snapshot


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """``edited(folder, key=value)`` copies a model folder and changes its config.json; ``...`` removes a key."""
    import shutil

    def copy(folder: Path, **changes: Any) -> Path:
        target = tmp_path / "edited"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        config = json.loads((target / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not ...}
        (target / "config.json").write_text(json.dumps(kept))
        return target

    return copy
