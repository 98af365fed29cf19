"""Reads a Hugging Face config.json, in the spelling of transformers 4 or 5, into a ModelConfig. Opens no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import ConfigDict, ValidationInfo, model_validator

from trtlab.config.model import DtypeName, ModelConfig, RotaryKind, RotaryScaling
from trtlab.convert.families import FAMILIES
from trtlab.convert.families.family import Family
from trtlab.convert.rope_scaling import StoredScaling
from trtlab.errors import CheckpointError
from trtlab.ops.torch import ACTIVATIONS
from trtlab.storage.json_files import Count, Listed, OpenObject, Positive, parse_model, read_model

REMEDY = "copy the model's own config.json, or take out an unknown key that changes no number"
NO_SCALING = ("default", None)
KINDS_OF_ATTENTION = {"full_attention", "sliding_attention"}


class RopeParameters(StoredScaling):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (transformers 4)."""

    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None


class _Header(OpenObject):
    """The keys that are checked first: architecture and quantization."""

    architectures: Listed[str] | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def architecture(self) -> str:
        return self.architectures[0] if self.architectures else "none"

    def family(self) -> Family:
        """The family of the architecture; CheckpointError when there is none, or for a quantized source."""
        if self.architecture not in FAMILIES:
            raise CheckpointError(
                f"unknown architecture {self.architecture!r}",
                expected=" | ".join(FAMILIES),
                remedy="convert one of these",
            )
        if self.quantization_config:
            method = self.quantization_config.get("quant_method", "unnamed")
            raise CheckpointError(
                f"the folder is quantized already (quantization_config, method {method!r}); this is not supported yet",
                remedy="start from the unquantized model and use checkpoint.quantize()",
            )
        return FAMILIES[self.architecture]


class HuggingFaceConfig(_Header):
    """The keys that are read, and in ``neutral`` those that change no number; any other must be empty or off.

    A key that the file leaves out has its family's default.
    """

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[frozenset[str]] = frozenset(
        """
        model_type max_window_layers
        _name_or_path transformers_version use_cache initializer_range bos_token_id eos_token_id pad_token_id
        attention_dropout pretraining_tp max_sequence_length torchscript output_attentions output_hidden_states
        return_dict is_decoder is_encoder_decoder chunk_size_feed_forward id2label label2id problem_type
        tokenizer_class finetuning_task prefix task_specific_params
        """.split()
    )
    passes_empty: ClassVar[bool] = True

    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None
    """None: as many as query heads, in a family that allows it."""
    head_dim: Count | None
    """None: ``hidden_size // num_attention_heads``."""
    intermediate_size: Count
    max_position_embeddings: Count
    hidden_act: str
    rms_norm_eps: Positive
    rope_theta: Positive | None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    partial_rotary_factor: Positive | None = None
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    mlp_bias: bool | None
    sliding_window: Count | None
    use_sliding_window: bool | None = None
    layer_types: Listed[str] | None = None
    torch_dtype: str | None = None
    """``dtype`` of transformers 4."""
    dtype: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _add_family_defaults(cls, raw: dict[str, Any], info: ValidationInfo[str]) -> dict[str, Any]:
        family = parse_model(raw, _Header, info.context, remedy=REMEDY).family()
        return {**family.defaults, **raw}

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that the file names, in either spelling."""
        return self.dtype or self.torch_dtype

    def to_model_config(self, dtype: DtypeName) -> ModelConfig:
        """The model's shape; CheckpointError for values that are not supported or contradict each other."""
        family = self.family()
        self._check(family)
        heads = self.num_attention_heads
        base, scaling = self._rope()
        bias = bool(self.attention_bias) if family.attn_bias is None else family.attn_bias
        return ModelConfig(
            architecture=self.architecture,
            dtype=dtype,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=self.num_key_value_heads or heads,
            head_size=self.head_dim or self.hidden_size // heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            hidden_act=self.hidden_act,
            norm_epsilon=self.rms_norm_eps,
            rotary_base=base,
            rotary_scaling=scaling,
            attn_bias=bias,
            dense_bias=bias and family.attn_bias is None,
            mlp_bias=bool(self.mlp_bias),
            qk_layernorm=family.qk_layernorm,
            tie_word_embeddings=bool(self.tie_word_embeddings),
            sliding_window=self._window(),
            **family.settings,
        )

    def _check(self, family: Family) -> None:
        if self.num_key_value_heads is None and "num_key_value_heads" not in family.defaults:
            raise CheckpointError("config.json lacks num_key_value_heads", remedy=REMEDY)
        if self.mlp_bias and not family.mlp_bias:
            raise CheckpointError(
                f"mlp_bias is not a setting of {self.architecture}", remedy="take it out of config.json"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act {self.hidden_act!r} is not supported yet", expected=" | ".join(ACTIVATIONS)
            )

    def _window(self) -> int | None:
        """The attention window of some layer in tokens, None when every layer has full attention."""
        kinds = set(self.layer_types or ())
        if kinds - KINDS_OF_ATTENTION:
            raise CheckpointError(
                f"layer_types has kinds of attention that are not supported: {sorted(kinds - KINDS_OF_ATTENTION)}",
                expected=" | ".join(sorted(KINDS_OF_ATTENTION)),
            )
        return None if self.use_sliding_window is False or kinds == {"full_attention"} else self.sliding_window

    def _rope(self) -> tuple[float, RotaryScaling | None]:
        """Base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
        new, old = ({} if rope is None else rope.stored_values() for rope in (self.rope_parameters, self.rope_scaling))
        if new and old and new != old:
            raise CheckpointError(
                f"config.json has both rope_parameters {new} and rope_scaling {old}",
                remedy="remove the wrong one",
            )
        rope = (self.rope_parameters if new else self.rope_scaling) or RopeParameters()
        present = rope.model_fields_set
        partial = rope.partial_rotary_factor if "partial_rotary_factor" in present else self.partial_rotary_factor
        if partial not in (None, 1.0):
            raise CheckpointError(f"partial_rotary_factor={partial} is not supported yet", expected=1.0)
        base = rope.rope_theta if "rope_theta" in present else self.rope_theta
        if base is None:
            raise CheckpointError("config.json lacks rope_theta", remedy=REMEDY)
        kind = rope.rope_type if "rope_type" in present else rope.type
        return base, None if kind in NO_SCALING else _scaling(str(kind), rope, self.max_position_embeddings)


def _scaling(kind: str, rope: RopeParameters, longest: int) -> RotaryScaling:
    trained = None if kind == "linear" else rope.original_max_position_embeddings or longest
    factor = rope.factor or (longest / trained if kind == "yarn" and trained else None)
    if factor is None:
        raise CheckpointError(f"{kind} rotary scaling lacks its factor", remedy=REMEDY)
    return RotaryScaling(
        kind=cast(RotaryKind, kind),  # RotaryScaling refuses any other
        factor=factor,
        original_max_position_embeddings=trained,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        attention_factor=rope.attention_factor,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
        truncate=bool(rope.truncate),
    )


def read_config(model_dir: Path) -> HuggingFaceConfig:
    """Read config.json of a folder.

    Raises:
        CheckpointError: For an unknown architecture, a quantized source, missing keys, values of the wrong type, and
            keys that may change the numbers and are not supported.
    """
    return read_model(model_dir / "config.json", HuggingFaceConfig, remedy=REMEDY)
