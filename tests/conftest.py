"""What the tests share: folders of small models, made once a run, and sessions that close themselves."""

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
    """``random_model(architecture, **config changes)`` gives a Hugging Face folder, the same for the same question."""
    made: dict[str, Path] = {}

    def make(architecture: str = "LlamaForCausalLM", **changes: Any) -> Path:
        key = json.dumps([architecture, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            write_random_model(made[key], architecture, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def hugging_face() -> Callable[[Path], Any]:
    """The reference: transformers' own model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return load


@pytest.fixture
def open_session() -> Iterator[Callable[..., Session]]:
    """``open_session(folder or checkpoint, mapping, **build)`` gives a session on torch, closed after the test."""
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
    """A random model that comes with a byte-level tokenizer, so that its answers are text full of broken characters."""
    folder = tmp_path_factory.mktemp("talking")
    write_byte_level_tokenizer(folder)
    write_random_model(folder, "LlamaForCausalLM", vocab_size=320, seed=3)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """A folder's content, to be compared before and after."""
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
