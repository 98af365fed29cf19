"""The command line that builds an engine. Runs nothing."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from trtlab.config.build import BuildConfig
from trtlab.config.model import ModelConfig

ALWAYS_NAMED = ("max_seq_len", "dtype")  # their defaults depend on the model


def build_command(
    config: ModelConfig, bounds: BuildConfig, checkpoint_dir: Path | None, engine_dir: Path | None, *, plan: bool
) -> str:
    """The ``trtlab build`` that gives an engine these bounds; capitals stand for a folder that is None."""
    usual = BuildConfig(max_seq_len=bounds.max_seq_len).resolve(config)
    words = ["trtlab", "build", "--checkpoint_dir", str(checkpoint_dir or "CHECKPOINT_DIR")]
    words += ["--output_dir", str(engine_dir or "ENGINE_DIR")]
    for field in dataclasses.fields(bounds):
        value = getattr(bounds, field.name)
        if field.name == "notes" or (value == getattr(usual, field.name) and field.name not in ALWAYS_NAMED):
            continue
        words.append(f"--{field.name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words if plan else [*words, "--no_plan"])
