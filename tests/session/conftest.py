"""What several files of session tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from trtlab import BuildConfig, Checkpoint
from trtlab.session.session import Session


@pytest.fixture(scope="module")
def talk(talking_model: Path) -> Iterator[Session]:
    """A session that reads and writes text, three requests at a time."""
    bounds = BuildConfig(max_seq_len=96, max_input_len=64, max_batch_size=3)
    engine = Checkpoint.from_hugging_face(talking_model).build(bounds, plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        yield session
