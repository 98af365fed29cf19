"""The table of algorithms: what each stores, what it needs, and which step reads texts. Data, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
COLUMN_CUT = ("attention.dense", "mlp.proj")  # tensor parallelism cuts their input, the others' output
INPUT_OF = {"mlp.gate": "mlp.fc"}  # gate reads what fc reads; every other linear has an input of its own
NORM_BEFORE = {
    "attention.qkv": "input_layernorm",
    "mlp.fc": "post_layernorm",
    "mlp.gate": "post_layernorm",
}
STATIC_SCALE = {  # where TensorRT-LLM keeps the scale of a linear's input, original to quantized
    "attention.qkv": "input_layernorm.scale_to_int",
    "attention.dense": "attention.quantization_scaling_factor",
    "mlp.fc": "post_layernorm.scale_to_int",
    "mlp.gate": "post_layernorm.scale_to_int",
    "mlp.proj": "mlp.quantization_scaling_factor",
}


@dataclass(frozen=True)
class Recipe:
    """One algorithm.

    ``family`` names the file that quantizes and the weight type that runs. ``reads_texts`` says which numbers of the
    calibration texts it takes, empty when it takes none. ``per_channel`` and ``per_token`` are SmoothQuant's switches.
    """

    name: str
    family: str
    weight_bits: int
    activation_bits: int = 16
    per_channel: bool = True
    per_token: bool = False
    grouped: bool = False
    reads_texts: str = ""

    @property
    def packed(self) -> bool:
        """Whether two weights share a byte."""
        return self.weight_bits == 4


def _smoothquant(name: str, *, per_channel: bool, per_token: bool) -> Recipe:
    reads = "the largest magnitude of each linear's input, by channel" + ("" if per_token else ", and of its output")
    return Recipe(name, "smoothquant", 8, 8, per_channel=per_channel, per_token=per_token, reads_texts=reads)


_AWQ_READS = "the mean magnitude of each linear's input, by channel, and the errors of the alpha search"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("W8A16", "weight_only", 8),
        Recipe("W4A16", "weight_only", 4),
        _smoothquant("W8A8_SQ_PER_TENSOR_PLUGIN", per_channel=False, per_token=False),
        _smoothquant("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", per_channel=True, per_token=False),
        _smoothquant("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", per_channel=False, per_token=True),
        _smoothquant("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", per_channel=True, per_token=True),
        Recipe(
            "W8A8_SQ_PER_CHANNEL",
            "smoothquant_modelopt",
            8,
            8,
            reads_texts="the largest magnitude of each linear's input, by channel",
        ),
        Recipe("FP8", "fp8", 8, 8, per_channel=False, reads_texts="the largest magnitude of each linear's input"),
        Recipe("W4A16_AWQ", "awq", 4, grouped=True, reads_texts=_AWQ_READS),
        Recipe("W4A8_AWQ", "awq_fp8", 4, 8, grouped=True, reads_texts=_AWQ_READS),
    )
}


@dataclass(frozen=True)
class KvRecipe:
    """One way to store the KV cache: the scale tensors of a layer and what they take from the calibration texts."""

    tensors: tuple[str, ...]
    reads_texts: str = ""


_MERGED = ("attention.kv_cache_scaling_factor",)
_SPLIT = ("attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor")
KV_RECIPES: dict[tuple[str, str], KvRecipe] = {  # by kv_cache_quant_algo and kv_cache_scales
    ("INT8", "merged"): KvRecipe(_MERGED, "the largest magnitude of Q, K and V together, before rotary"),
    ("INT8", "split"): KvRecipe(_SPLIT, "the largest magnitudes of K and of V as they are cached, after rotary"),
    ("INT8", "per_head"): KvRecipe(_SPLIT, "the largest magnitudes of K and of V as they are cached, by head"),
    ("FP8", "merged"): KvRecipe(_MERGED),
    ("FP8", "split"): KvRecipe(_MERGED),
    ("FP8", "per_head"): KvRecipe(_MERGED),
}
KvScales = Literal["merged", "split", "per_head"]
KV_SCALES: tuple[KvScales, ...] = get_args(KvScales)
