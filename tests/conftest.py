"""What the tests share: small random Hugging Face models, a byte-level tokenizer, sessions that close themselves."""

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

torch.set_num_threads(1)
os.environ["TRTLAB_BACKEND"] = "torch"
QUIET = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
for name, examples in (("quick", 50), ("thorough", 1000)):
    hypothesis.settings.register_profile(
        name, deadline=None, derandomize=name == "quick", max_examples=examples, suppress_health_check=QUIET
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def write_random_model(
    folder: Path, architecture: str, *, seed: int = 0, dtype: str = "float32", **changes: Any
) -> None:
    """A Hugging Face folder whose logits have spread: normal weights, norms around one, biases that matter."""
    import transformers

    kind = getattr(transformers, architecture)
    config = kind.config_class(**{**SMALL, **changes}, architectures=[architecture])
    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.08, generator=generator)
        model.get_input_embeddings().weight.normal_(0.0, 0.5, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


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


TRAINING_TEXT = ["the cat sat on the mat", "größe füße straße", "日本語 の 文章", "🙂🙃 naïve café", "aaa bbb abab"] * 4


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 320 ids with special tokens; any id sequence is some bytes, few are valid UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|sep|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TRAINING_TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="session")
def talking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that comes with a byte-level tokenizer, so that its answers are text full of broken characters."""
    folder = tmp_path_factory.mktemp("talking")
    write_tokenizer(folder)
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
