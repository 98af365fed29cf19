"""Settings that make ``pytest --nbval notebooks`` compare equal on every machine: one thread, torch on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
os.environ.setdefault("TRTLAB_BACKEND", "torch")
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
)


def pytest_configure(config: pytest.Config) -> None:
    """Use sanitize.cfg for addresses and times unless the command line names another file."""
    if getattr(config.option, "nbval_sanitize_with", None) is None:
        config.option.nbval_sanitize_with = str(HERE / "sanitize.cfg")


@pytest.hookimpl(hookwrapper=True)
def pytest_collect_file(file_path: Path) -> object:
    """Do not compare plotly figures, which contain random ids; the browser tests check the pictures."""
    outcome = yield
    collected = outcome.get_result()
    for item in collected if isinstance(collected, list) else [collected]:
        if hasattr(item, "skip_compare"):
            item.skip_compare = (*item.skip_compare, "application/vnd.plotly.v1+json")
