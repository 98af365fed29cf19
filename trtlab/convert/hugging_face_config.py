"""Reads a Hugging Face config.json, in the spelling of transformers 4 or 5, into a ModelConfig. Opens no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from trtlab.config.model import DtypeName, ModelConfig, PositiveFloat32, RotaryKind, RotaryScaling
from trtlab.convert.families import FAMILIES, find_architecture
from trtlab.convert.families.family import Family
from trtlab.convert.folder_kinds import HUGGING_FACE, refuse_other_kind
from trtlab.convert.hugging_face_keys import IGNORED, IGNORED_ENDINGS, ROPE_UNSUPPORTED, SCALES, UNSUPPORTED
from trtlab.convert.rope_scaling import StoredScaling
from trtlab.errors import CheckpointError
from trtlab.ops.torch import ACTIVATIONS
from trtlab.storage.foreign_objects import ForeignObject, read_foreign
from trtlab.storage.json_files import Count, Listed, PlainName, naming, parse_model
from trtlab.validation import shorten

REMEDY = "copy the model's own config.json"
SLIDING, FULL = "sliding_attention", "full_attention"
OTHER_NAMES = {"swish": "silu"}  # of activations


def _dtype_of_torch(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("the name of a torch dtype, such as bfloat16")
    return name


TorchDtype = Annotated[str, AfterValidator(_dtype_of_torch)]


class RopeParameters(StoredScaling):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (transformers 4)."""

    unsupported: ClassVar[frozenset[str]] = ROPE_UNSUPPORTED

    rope_theta: PositiveFloat32 | None = None
    partial_rotary_factor: PositiveFloat32 | None = None


class _Header(ForeignObject):
    """The keys that are checked first: architecture and quantization."""

    architectures: Listed[str] | None = None
    model_type: str | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def architecture(self) -> str:
        """The name of the supported architecture; CheckpointError when the config names no such one."""
        return find_architecture(self.architectures, self.model_type)

    def family(self) -> Family:
        """The family of the architecture; CheckpointError when there is none, or for a quantized source."""
        family = FAMILIES[self.architecture]
        if self.quantization_config:
            method = self.quantization_config.get("quant_method", "unnamed")
            raise CheckpointError(
                f"the folder is quantized already (quantization_config, method {method!r:.80}); "
                "this is not supported yet",
                remedy="start from the unquantized model and use checkpoint.quantize()",
            )
        return family


class HuggingFaceConfig(_Header):
    """The keys that are read. A key that the file leaves out has its family's default."""

    unsupported: ClassVar[frozenset[str]] = UNSUPPORTED

    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None
    """None: as many as query heads."""
    head_dim: Count | None
    """None: ``hidden_size // num_attention_heads``."""
    intermediate_size: Count
    max_position_embeddings: Count
    original_max_position_embeddings: Count | None = None
    """Wins over the key of the same name in the rotary scaling."""
    hidden_act: str
    rms_norm_eps: PositiveFloat32
    rope_theta: PositiveFloat32 | None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    partial_rotary_factor: PositiveFloat32 | None = None
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    mlp_bias: bool | None
    sliding_window: Count | None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    """The first layer with a window, where ``layer_types`` is left out."""
    layer_types: Listed[str] | None = None
    torch_dtype: TorchDtype | None = None
    """``dtype`` of transformers 4."""
    dtype: TorchDtype | None = None
    transformers_weights: Annotated[PlainName, Field(pattern=r"\.safetensors(\.index\.json)?$")] | None = None
    """The file of the weights, where it is not the usual one."""
    eos_token_id: int | Listed[int] | None = None
    """Checked here, so that a session does not stop at the wrong token; the tokenizer reads it."""

    @classmethod
    def _is_accepted(cls, key: str, value: object) -> bool:
        ignored = key in IGNORED or key.startswith("_") or key.endswith(IGNORED_ENDINGS)
        return ignored or (key in SCALES and value == 1) or super()._is_accepted(key, value)

    @model_validator(mode="before")
    @classmethod
    def _add_family_defaults(cls, raw: dict[str, Any], info: ValidationInfo[str]) -> dict[str, Any]:
        refuse_other_kind(raw, HUGGING_FACE, info.context)
        header = parse_model(raw, _Header, info.context, remedy=REMEDY)
        with naming(info.context, remedy=REMEDY):
            family = header.family()
        return {**family.defaults, **raw}

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that the file names, in either spelling."""
        return self.dtype or self.torch_dtype

    def to_model_config(self, dtype: DtypeName) -> ModelConfig:
        """The model's shape; CheckpointError for values that are not supported or contradict each other."""
        family = self.family()
        self._check()
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
            hidden_act=OTHER_NAMES.get(self.hidden_act, self.hidden_act),
            norm_epsilon=self.rms_norm_eps,
            rotary_base=base,
            rotary_scaling=scaling,
            attn_bias=bias,
            dense_bias=bias and family.attn_bias is None,
            mlp_bias=family.mlp_bias and bool(self.mlp_bias),
            qk_layernorm=family.qk_layernorm,
            tie_word_embeddings=bool(self.tie_word_embeddings),
            sliding_window=self._window(family),
            **family.settings,
        )

    def _check(self) -> None:
        if OTHER_NAMES.get(self.hidden_act, self.hidden_act) not in ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act {self.hidden_act!r:.80} is not supported yet", expected=" | ".join(ACTIVATIONS)
            )
        if self.head_dim is None and self.hidden_size < self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} attention heads",
                remedy=REMEDY,
            )

    def _window(self, family: Family) -> int | None:
        """The attention window of some layer in tokens, None when every layer has full attention.

        Each family reads the keys that its class in transformers reads: LLaMA none of them. There the cache of
        transformers 5 drops tokens by these keys while it generates; the model itself, and so trtlab, attends to all.
        """
        if family.window == "none":
            return None
        if family.window == "every layer":
            return self.sliding_window
        kinds = set(self.layer_types if self.layer_types is not None else self._default_layer_types())
        others = kinds - {SLIDING, FULL}
        if others:
            raise CheckpointError(
                f"layer_types has kinds of attention that are not supported: {shorten(sorted(others))}",
                expected=f"{FULL} | {SLIDING}",
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"{len(self.layer_types)} layer_types do not fit num_hidden_layers {self.num_hidden_layers}",
                remedy=REMEDY,
            )
        if SLIDING not in kinds:
            return None
        if not self.use_sliding_window or self.sliding_window is None:
            raise CheckpointError(
                f"layer_types has {SLIDING}, but the window is switched off",
                got=f"use_sliding_window={self.use_sliding_window}, sliding_window={self.sliding_window}",
                remedy=REMEDY,
            )
        return self.sliding_window

    def _default_layer_types(self) -> tuple[str, ...]:
        """One of each kind that the switches give: the first ``max_window_layers`` layers are full."""
        switched_on = self.use_sliding_window and self.sliding_window is not None
        return (SLIDING,) if switched_on and (self.max_window_layers or 0) < self.num_hidden_layers else (FULL,)

    def _rope(self) -> tuple[float, RotaryScaling | None]:
        """Base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
        new, old = ({} if rope is None else rope.stored_values() for rope in (self.rope_parameters, self.rope_scaling))
        if new and old and new != old:
            raise CheckpointError(
                f"rope_parameters {new} and rope_scaling {old} contradict each other",
                remedy="remove the wrong one",
            )
        rope = (self.rope_parameters if new else self.rope_scaling) or RopeParameters()
        present = rope.model_fields_set
        partial = rope.partial_rotary_factor if "partial_rotary_factor" in present else self.partial_rotary_factor
        if partial not in (None, 1.0):
            raise CheckpointError(f"partial_rotary_factor={partial} is not supported yet", expected=1.0)
        base = rope.rope_theta if "rope_theta" in present else self.rope_theta
        if base is None:
            raise CheckpointError("rope_theta is null", expected="a number", remedy=REMEDY)
        name = "rope_type" if "rope_type" in present else "type"
        kind = getattr(rope, name)
        if kind is None and name in present:
            raise CheckpointError(f"{name} of the rotary scaling is null", expected="default | linear | llama3 | yarn")
        if kind in (None, "default"):
            return base, None
        longest = self.max_position_embeddings
        trained = self.original_max_position_embeddings or rope.original_max_position_embeddings or longest
        return base, _scaling(kind, rope, longest, trained)


def _scaling(kind: str, rope: RopeParameters, longest: int, trained: int) -> RotaryScaling:
    factor = rope.factor or (longest / trained if kind == "yarn" else None)
    if factor is None:
        raise CheckpointError(f"{kind} rotary scaling lacks its factor", remedy=REMEDY)
    return RotaryScaling(
        kind=cast(RotaryKind, kind),  # RotaryScaling refuses any other
        factor=factor,
        original_max_position_embeddings=None if kind == "linear" else trained,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        attention_factor=rope.attention_factor,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
        truncate=bool(rope.truncate),
    )


def read_config(model_dir: Path, *, allow_unknown: bool = True) -> HuggingFaceConfig:
    """Read config.json of a folder.

    Args:
        model_dir: The folder.
        allow_unknown: Whether a key that is not known is a warning rather than an error.

    Raises:
        CheckpointError: For an unknown architecture, a quantized source, missing keys, values of the wrong type, and
            keys that change the numbers and are not supported.
    """
    return read_foreign(model_dir / "config.json", HuggingFaceConfig, remedy=REMEDY, allow_unknown=allow_unknown)
