"""How a model is split over processes, under TensorRT-LLM's names: tensor-parallel ranks and pipeline stages."""

from __future__ import annotations

from trtlab.config.base import PositiveInt, Settings, settings
from trtlab.config.model import ModelConfig
from trtlab.errors import ConfigError

MOST_RANKS = 1024  # of one model


@settings
class Mapping(Settings):
    """How a model is split over processes: ``tp_size`` ranks share each layer, ``pp_size`` stages share the layers.

    Tensor-parallel ranks are neighbours: ``tp_rank = rank % tp_size``, ``pp_rank = rank // tp_size``.
    """

    world_size: PositiveInt | None = None
    """Number of processes; None becomes ``tp_size * pp_size``, and no other number is valid."""
    tp_size: PositiveInt = 1
    """Ranks that share each layer; it must divide the query heads and the intermediate size."""
    pp_size: PositiveInt = 1
    """Stages that share the layers; it must divide their number."""

    def __post_init__(self) -> None:
        product = self.tp_size * self.pp_size
        if product > MOST_RANKS:
            raise ConfigError("tp_size * pp_size is too large", got=product, expected=f"at most {MOST_RANKS}")
        if self.world_size is None:
            object.__setattr__(self, "world_size", product)
        elif self.world_size != product:
            raise ConfigError(
                f"world_size {self.world_size} is not tp_size {self.tp_size} x pp_size {self.pp_size}",
                expected=f"world_size={product}",
                remedy="leave world_size out, or start that many processes",
            )

    @property
    def ranks(self) -> range:
        """All ranks, 0 to world_size - 1."""
        return range(self.tp_size * self.pp_size)

    def tp_rank(self, rank: int) -> int:
        """The position of a rank in its tensor-parallel group."""
        return rank % self.tp_size

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.tp_size

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share this rank's layers, including itself."""
        first = self.pp_rank(rank) * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def layers(self, rank: int, num_hidden_layers: int) -> range:
        """The global layer numbers of this rank's stage."""
        per_stage = num_hidden_layers // self.pp_size
        first = self.pp_rank(rank) * per_stage
        return range(first, first + per_stage)

    def kv_heads(self, config: ModelConfig) -> int:
        """Number of key/value heads on a rank: its share, or one head that neighbouring ranks also hold."""
        return max(1, config.num_key_value_heads // self.tp_size)

    def is_first_stage(self, rank: int) -> bool:
        """Whether the rank holds the token embedding."""
        return self.pp_rank(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank holds the final norm and the head."""
        return self.pp_rank(rank) == self.pp_size - 1

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError, with the sizes that work, when the model cannot be split this way."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def fits(n: int) -> bool:
            return heads % n == 0 and config.intermediate_size % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

        if not fits(self.tp_size):
            raise ConfigError(
                f"{heads} query heads, {kv_heads} key/value heads and intermediate size {config.intermediate_size} "
                f"cannot be split over tp_size={self.tp_size}",
                remedy=f"use {_alternatives([n for n in range(1, min(heads, MOST_RANKS) + 1) if fits(n)])}",
            )
        layers = config.num_hidden_layers
        if layers % self.pp_size:
            stages = [n for n in range(1, min(layers, MOST_RANKS) + 1) if layers % n == 0]
            raise ConfigError(
                f"{config.num_hidden_layers} layers cannot be split over pp_size={self.pp_size}",
                remedy=f"use {_alternatives(stages)}",
            )


def _alternatives(values: list[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
