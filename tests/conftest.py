"""Fixtures that all tests share: folders of small models, made once in a run, and sessions that are closed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from trtlab import BuildConfig, Checkpoint, Mapping, Session

from .models import write_byte_level_tokenizer, write_random_model

torch.set_num_threads(1)
os.environ["TRTLAB_BACKEND"] = "torch"
QUIET = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
for name, examples in (("quick", 50), ("thorough", 1000)):
    hypothesis.settings.register_profile(
        name, deadline=None, derandomize=name == "quick", max_examples=examples, suppress_health_check=QUIET
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


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
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

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
