"""Which algorithm quantizes what: QuantConfig, frozen and validated, by TensorRT-LLM's names."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from trtlab.config.algorithms import KV_ALGORITHMS, KV_RECIPES, KV_SCALES, RECIPES, KvRecipe, Recipe
from trtlab.config.base import Settings, check_types
from trtlab.errors import ConfigError

GROUP_SIZES = (64, 128)


@dataclass(frozen=True)
class QuantConfig(Settings):
    """What to quantize and how; both algorithms None leave the model as it is.

    ``quant_algo`` and ``kv_cache_quant_algo`` are TensorRT-LLM's strings. ``smoothquant_val`` is SmoothQuant's alpha,
    None to search it for each input; ``group_size`` belongs to AWQ. ``kv_cache_scales`` is ``"merged"``
    (TensorRT-LLM's one scale a layer), ``"split"`` or ``"per_head"``; FP8 caches always have the scale 1.
    ``exclude_modules`` are shell patterns over names such as ``transformer.layers.3.mlp.proj``; the head and the
    embedding are never quantized.
    """

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    smoothquant_val: float | None = 0.5
    group_size: int = 128
    kv_cache_scales: str = "split"
    exclude_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        _one_of("quant_algo", self.quant_algo, (None, *RECIPES))
        _one_of("kv_cache_quant_algo", self.kv_cache_quant_algo, (None, *KV_ALGORITHMS))
        _one_of("kv_cache_scales", self.kv_cache_scales, KV_SCALES)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        object.__setattr__(self, "exclude_modules", tuple(self.exclude_modules))
        alpha = self.smoothquant_val
        if alpha is not None and not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise ConfigError(
                "smoothquant_val (alpha) lies outside [0, 1]",
                got=alpha,
                remedy="0 leaves all the difficulty to the activations, 1 moves it to the weights; None searches",
            )

    @property
    def active(self) -> bool:
        """Whether anything is quantized."""
        return self.quant_algo is not None or self.kv_cache_quant_algo is not None

    @property
    def recipe(self) -> Recipe | None:
        """The weights' algorithm."""
        return None if self.quant_algo is None else RECIPES[self.quant_algo]

    @property
    def kv_recipe(self) -> KvRecipe | None:
        """The cache's algorithm."""
        algo = self.kv_cache_quant_algo
        return None if algo is None else KV_RECIPES[algo, self.kv_cache_scales]

    @property
    def reads_texts(self) -> str:
        """What is taken from calibration texts, empty when none are needed."""
        parts = [recipe.reads_texts for recipe in (self.recipe, self.kv_recipe) if recipe is not None]
        return "; ".join(part for part in parts if part)

    def recipe_of(self, module: str) -> Recipe | None:
        """The algorithm of one linear by its full name, None when it is excluded."""
        excluded = any(fnmatch.fnmatchcase(module, pattern) for pattern in self.exclude_modules)
        return None if excluded else self.recipe


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name}", got=repr(value), expected=" | ".join(map(str, known)))
