from collections.abc import Callable

import pytest

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
    """``quantized_by(quant)`` is the small checkpoint quantized by a recipe, made once; no test changes it."""
    results: dict[QuantConfig, QuantizedCheckpoint] = {}

    def make(quant: QuantConfig) -> QuantizedCheckpoint:
        if quant not in results:
            results[quant] = checkpoint.quantize(quant, calibration=texts if quant.reads_texts else None)
        return results[quant]

    return make
