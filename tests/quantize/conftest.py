from collections.abc import Callable

import pytest
import torch

from trtlab import Checkpoint, ModelConfig, QuantConfig, QuantizedCheckpoint

from ..models import loud_checkpoint, random_texts, small_config

CONFIG = small_config(hidden_size=256, head_size=64, intermediate_size=256)
EVERY_CONFIG = [
    ("W8A16", None),
    ("W4A16", None),
    ("W8A8_SQ_PER_TENSOR_PLUGIN", None),
    ("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", None),
    ("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "INT8"),
    ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", None),
    ("W8A8_SQ_PER_CHANNEL", None),
    ("FP8", "FP8"),
    ("W4A16_AWQ", None),
    ("W4A8_AWQ", None),
    (None, "INT8"),
    ("W8A16", "INT8"),
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_checkpoint(config: ModelConfig = CONFIG) -> Checkpoint:
    return loud_checkpoint(config)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return random_checkpoint()


@pytest.fixture(scope="session")
def texts() -> list[list[int]]:
    return random_texts((24, 5, 40, 17, 33, 12))


@pytest.fixture(scope="session")
def quantized_by(checkpoint, texts) -> Callable[[QuantConfig], QuantizedCheckpoint]:
    """``quantized_by(quant)`` is the small checkpoint by a recipe, made once: tests look at it and change nothing."""
    made: dict[QuantConfig, QuantizedCheckpoint] = {}

    def make(quant: QuantConfig) -> QuantizedCheckpoint:
        if quant not in made:
            made[quant] = checkpoint.quantize(quant, calibration=texts if quant.reads_texts else None)
        return made[quant]

    return make
