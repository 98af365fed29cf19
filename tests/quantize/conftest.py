import pytest
import torch

from trtlab import Checkpoint, ModelConfig
from trtlab.model.weights import tensor_specs

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    dtype="float32",
    vocab_size=99,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_size=64,
    intermediate_size=256,
    max_position_embeddings=64,
)
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


def random_checkpoint(config: ModelConfig = CONFIG, seed: int = 0) -> Checkpoint:
    """Random weights with two loud channels in each norm, so that there is something to smooth."""
    dice = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in tensor_specs(config).items():
        noise = torch.randn(spec.shape, generator=dice)
        if "norm" in name or "ln_f" in name:
            weights[name] = 1 + 0.1 * noise
            weights[name][[3, 17]] *= 12
        else:
            weights[name] = noise * spec.shape[-1] ** -0.5
    return Checkpoint.from_weights(config, {name: w.to(config.torch_dtype) for name, w in weights.items()})


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return random_checkpoint()


@pytest.fixture(scope="session")
def texts() -> list[list[int]]:
    dice = torch.Generator().manual_seed(7)
    return [torch.randint(0, 99, (length,), generator=dice).tolist() for length in (24, 5, 40, 17, 33, 12)]
