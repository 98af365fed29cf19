"""Reads and writes TensorRT-LLM's config.json: a ModelConfig, a Mapping and the layout of the embedding."""

from __future__ import annotations

from collections import abc
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationInfo, model_validator

from trtlab.config.algorithms import WeightOnlyForm
from trtlab.config.mapping import MOST_RANKS, Mapping
from trtlab.config.model import ModelConfig, PositiveFloat32, RotaryScaling
from trtlab.convert.families import FAMILIES
from trtlab.convert.families.family import Family
from trtlab.convert.folder_kinds import CHECKPOINT, refuse_other_kind
from trtlab.convert.quantization import StoredQuantization, quantization_extras, quantization_to_json
from trtlab.convert.rope_scaling import StoredScaling, scaling_to_json
from trtlab.convert.trtllm_spellings import current_spelling
from trtlab.errors import CheckpointError
from trtlab.ops.torch import ACTIVATIONS
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.storage.json_files import Count, OpenObject, StoredObject, parse_model
from trtlab.version import VERSION

FORMAT = 1  # raised when an older trtlab cannot read what this version writes
REMEDY = "give a folder that checkpoint.save() wrote, or take out an unknown key that changes no number"


def _one(value: float) -> float:
    if value != 1:
        raise ValueError("1.0")
    return value


def _none_if_empty(raw: object) -> object:
    return None if raw == {} else raw


One = Annotated[float, AfterValidator(_one)]


class _Format(OpenObject):
    format: int = FORMAT


class _Producer(OpenObject):
    name: object = None


class _Header(OpenObject):
    """The keys that are checked first: they show which program wrote the file."""

    rotary_base: object = None
    producer: _Producer | None = None
    trtlab: _Format | None = None

    def check(self, where: str) -> None:
        """Raise CheckpointError for a file of ModelOpt or of a later trtlab; ``where`` names the file."""
        if self.trtlab is not None and self.trtlab.format > FORMAT:
            raise CheckpointError(
                f"{where} has format {self.trtlab.format}; this trtlab {VERSION} reads up to {FORMAT}",
                remedy="upgrade trtlab",
            )
        if self.producer is not None and self.producer.name == "modelopt" and self.rotary_base is None:
            raise CheckpointError(
                f"{where} comes from ModelOpt, which leaves rotary_base out",
                remedy="give the Hugging Face folder that was exported: Checkpoint.load(..., hf_config=...)",
            )


class ModelFields(StoredObject):
    """The fields of a ModelConfig that have the same name in config.json; None is ModelConfig's default."""

    architecture: str
    dtype: str
    vocab_size: Count
    max_position_embeddings: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_size: Count | None = None
    """None: ``hidden_size // num_attention_heads``."""
    hidden_act: str = "silu"
    intermediate_size: Count
    norm_epsilon: PositiveFloat32 | None = None
    rotary_base: PositiveFloat32 | None = None
    attn_bias: bool | None = None
    dense_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_layernorm: bool | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: Count | None = None
    position_embedding_type: Literal["rope_gpt_neox", "learned_absolute"] | None = None


class _Scaling(StoredScaling):
    model_config = ConfigDict(extra="forbid")

    factor: PositiveFloat32

    def to_rotary_scaling(self) -> RotaryScaling:
        fields = {name: value for name, value in self.stored_values().items() if value is not None}
        kinds = {fields.pop(key) for key in ("rope_type", "type") if key in fields}  # some versions write both
        if len(kinds) != 1:
            raise CheckpointError(
                "rotary_scaling is not valid", got=self.stored_values(), expected="a single rope_type"
            )
        return RotaryScaling(kind=kinds.pop(), **fields)


class _Mapping(OpenObject):
    world_size: int | None = None
    tp_size: Count = 1
    pp_size: Count = 1
    cp_size: int = 1
    enable_attention_dp: Literal[False] | None = None
    """Attention whole on each rank, with other tokens: another layout of the files."""

    def to_mapping(self) -> Mapping:
        if self.cp_size != 1:
            raise CheckpointError(f"cp_size={self.cp_size} is not supported yet", expected=1)
        if self.tp_size * self.pp_size > MOST_RANKS:
            raise CheckpointError(
                f"mapping has {self.tp_size * self.pp_size} ranks",
                expected=f"at most {MOST_RANKS}",
                remedy=REMEDY,
            )
        return Mapping(self.world_size, self.tp_size, self.pp_size)


class _Experts(OpenObject):
    num_experts: Literal[0, 1] | None = None
    """Exporters of Megatron write 1 for a model without experts."""


class Provenance(OpenObject):
    """The section that only trtlab writes."""

    source: str | None = None
    kv_cache_scales: str = "merged"
    scale_ranks: int = 1
    quantize_lm_head: bool = False


class TrtllmConfig(ModelFields):
    """config.json of a checkpoint. A key with one supported value must have that value or be absent."""

    neutral: ClassVar[frozenset[str]] = frozenset(
        """
        logits_dtype kv_dtype producer version runtime_defaults disable_weight_only_quant_plugin use_prompt_tuning
        has_partial_lora_mask remove_duplicated_kv_heads decoder rank gpus_per_node use_fused_mlp num_labels seq_length
        moe_top_k moe_tp_mode moe_normalization_mode
        max_lora_rank lora_target_modules hf_modules_to_trtllm_modules trtllm_modules_to_hf_modules
        """.split()
    )
    passes_empty: ClassVar[bool] = True

    rotary_scaling: Annotated[_Scaling | None, BeforeValidator(_none_if_empty)] = None
    use_parallel_embedding: bool | None = None
    embedding_sharding_dim: int | None = None
    share_embedding_table: bool | None = None
    mapping: _Mapping | None = None
    quantization: StoredQuantization | None = None
    moe: _Experts | None = None
    trtlab: Provenance | None = None
    rotary_pct: One | None = 1.0
    rotary_embedding_dim: int | None = None
    """Dimensions of a head that are rotated; None: all."""
    rotary_dim: int | None = None
    """``rotary_embedding_dim`` before version 0.16."""
    qwen_type: str | None = None
    """Hugging Face's ``model_type`` of a Qwen model."""
    embedding_multiplier: One = 1.0
    attention_multiplier: One = 1.0
    residual_multiplier: One = 1.0
    output_multiplier_scale: One = 1.0
    use_input_layernorm_in_first_layer: Literal[True] = True
    use_last_layernorm: Literal[True] = True
    rmsnorm: Literal[True] = True

    @model_validator(mode="before")
    @classmethod
    def _check_header(cls, raw: Any, info: ValidationInfo[str]) -> Any:
        if isinstance(raw, dict):
            refuse_other_kind(raw, CHECKPOINT, info.context)
            parse_model(raw, _Header, info.context, remedy=REMEDY).check(info.context)
            return current_spelling(raw, info.context)
        return raw

    @property
    def provenance(self) -> Provenance:
        """The origin of the weights; empty where the file does not say."""
        return self.trtlab or Provenance()

    def to_settings(self) -> tuple[ModelConfig, Mapping, EmbeddingLayout]:
        """The inverse of ``config_to_json``; missing keys have TensorRT-LLM's defaults.

        Raises:
            CheckpointError: For an architecture, an activation or an algorithm that is not supported.
            ConfigError: For values that contradict each other.
        """
        if self.architecture not in FAMILIES:
            raise CheckpointError(f"unknown architecture {self.architecture!r}", expected=" | ".join(FAMILIES))
        family = FAMILIES[self.architecture]
        if self.qwen_type not in (None, family.model_type):
            raise CheckpointError(
                f"qwen_type {self.qwen_type!r:.80} does not fit architecture {self.architecture}",
                expected=family.model_type,
            )
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act {self.hidden_act!r} is not supported yet", expected=" | ".join(ACTIVATIONS)
            )
        stored = {name: getattr(self, name) for name in ModelFields.model_fields}
        values = {name: value for name, value in stored.items() if value is not None}
        values = {**family.settings, **_fixed_parts(family), **values}
        values.setdefault("head_size", self.hidden_size // self.num_attention_heads)
        if self.share_embedding_table:
            values["tie_word_embeddings"] = True
        scaling = None if self.rotary_scaling is None else self.rotary_scaling.to_rotary_scaling()
        config = ModelConfig(
            **values,
            rotary_scaling=scaling,
            quantization=(self.quantization or StoredQuantization()).to_quant_config(
                self.provenance.kv_cache_scales,
                self.provenance.scale_ranks,
                quantize_lm_head=self.provenance.quantize_lm_head,
                own=self.trtlab is not None,
            ),
        )
        self._check_rotary_size(config)
        layout = EmbeddingLayout(
            bool(self.use_parallel_embedding), self.embedding_sharding_dim or 0, bool(self.share_embedding_table)
        )
        mapping = (self.mapping or _Mapping()).to_mapping()
        mapping.check(config)
        layout.check(config, mapping)
        return config, mapping, layout

    def _check_rotary_size(self, config: ModelConfig) -> None:
        for name in ("rotary_embedding_dim", "rotary_dim"):
            size = getattr(self, name)
            if config.uses_rotary and size not in (None, config.head_size):
                raise CheckpointError(
                    f"{name} {size} is not the head size: rotating a part of each head is not supported yet",
                    expected=config.head_size,
                )


def _fixed_parts(family: Family) -> dict[str, bool]:
    """The parts that every model of a family has, which the config.json of older versions leaves out."""
    parts = {"qk_layernorm": family.qk_layernorm}
    return parts if family.attn_bias is None else {**parts, "attn_bias": family.attn_bias}


def provenance(source: str, weight_only: WeightOnlyForm | None) -> dict[str, Any]:
    """The section ``trtlab`` of a checkpoint: where the weights come from, and the form of W8A16 and W4A16."""
    return {"source": source} if weight_only is None else {"source": source, "weight_only": weight_only}


def config_to_json(
    config: ModelConfig, mapping: Mapping, layout: EmbeddingLayout, provenance: abc.Mapping[str, Any]
) -> dict[str, Any]:
    """config.json in TensorRT-LLM's layout; its section ``trtlab`` holds our format number and ``provenance``."""
    scaling, family = config.rotary_scaling, FAMILIES.get(config.architecture)
    return {
        **{name: getattr(config, name) for name in ModelFields.model_fields},
        **({} if family is None else family.trtllm_keys),
        "logits_dtype": "float32",
        "rotary_scaling": None if scaling is None else scaling_to_json(scaling),
        "use_parallel_embedding": layout.use_parallel_embedding,
        "embedding_sharding_dim": layout.embedding_sharding_dim,
        "share_embedding_table": layout.use_embedding_sharing,
        "mapping": {
            "world_size": mapping.world_size,
            "tp_size": mapping.tp_size,
            "pp_size": mapping.pp_size,
        },
        "quantization": quantization_to_json(config.quantization),
        "producer": {"name": "trtlab", "version": VERSION},
        "trtlab": {"format": FORMAT, **quantization_extras(config.quantization), **provenance},
    }
