"""The shape of one decoder layer and of the head, as data: norms, linears, what each reads and how ranks cut it.

Everything that walks over linears (tensors, cuts, calibration, smoothing, reports, pictures) follows
from these tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtlab.config.model import ModelConfig
from trtlab.config.quant import HEAD_MODULE


@dataclass(frozen=True)
class LinearSite:
    """One linear of a layer, or the head, by TensorRT-LLM's names.

    ``split`` is how tensor parallelism cuts it: ``"qkv"`` (the output, by heads), ``"rows"`` (the output), ``"head"``
    (the output, padded until the ranks divide it) or ``"columns"`` (the input). ``reads`` names the activation at its
    input: linears that read the same one are calibrated and smoothed together. ``norm_before`` is the norm that writes
    this activation, into whose gain a smoothing factor can be folded; None where another linear's output is read, and
    for the head.
    """

    part: str
    split: str
    reads: str
    norm_before: str | None = None

    @property
    def block(self) -> str:
        """``attention``, ``mlp`` or ``lm_head``."""
        return self.part.split(".")[0]

    @property
    def name(self) -> str:
        """The name within the block, which is that of the field in ``LayerWeights``."""
        return self.part.split(".")[-1]

    @property
    def cuts_input(self) -> bool:
        """Whether each rank holds some of the input's columns, so that the outputs of all ranks are summed."""
        return self.split == "columns"

    @property
    def input_scale(self) -> str:
        """The name of the tensor with the input's static scale in TensorRT-LLM's SmoothQuant, original to quantized."""
        return f"{self.norm_before}.scale_to_int" if self.norm_before else f"{self.block}.quantization_scaling_factor"

    def stores_input_scale(self, per_token: bool) -> bool:
        """Whether SmoothQuant stores ``input_scale``: with scales per token only a norm has one, which is always 1."""
        return self.norm_before is not None or not per_token


QKV = LinearSite("attention.qkv", "qkv", reads="attention.input", norm_before="input_layernorm")
DENSE = LinearSite("attention.dense", "columns", reads="attention.context")
FC = LinearSite("mlp.fc", "rows", reads="mlp.input", norm_before="post_layernorm")
GATE = LinearSite("mlp.gate", "rows", reads="mlp.input", norm_before="post_layernorm")
PROJ = LinearSite("mlp.proj", "columns", reads="mlp.inner")

ATTENTION = (QKV, DENSE)
MLP = (FC, PROJ)
GATED_MLP = (FC, GATE, PROJ)  # ``fc`` is Hugging Face's gate_proj and ``gate`` its up_proj

LM_HEAD = LinearSite(HEAD_MODULE, "head", reads="lm_head.input")

LAYER_SITES = {site.part: site for site in (*ATTENTION, *GATED_MLP)}  # every linear that a layer of any family has
SITES = {**LAYER_SITES, LM_HEAD.part: LM_HEAD}


@dataclass(frozen=True)
class LayerPlan:
    """The parts of one layer of a model.

    ``norm`` is ``"rms_norm"`` or ``"layer_norm"`` (which has a bias); ``attention`` and ``mlp`` list the linears of
    the two blocks. Attention runs first. Each block reads the normalized residual stream and adds its output to the
    residual stream.
    """

    norm: str
    attention: tuple[LinearSite, ...]
    mlp: tuple[LinearSite, ...]

    @property
    def linears(self) -> tuple[LinearSite, ...]:
        """All linears, in execution order."""
        return self.attention + self.mlp

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the linears within the layer."""
        return tuple(site.part for site in self.linears)

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the norms in front of the blocks, within the layer."""
        return tuple(dict.fromkeys(site.norm_before for site in self.linears if site.norm_before is not None))


def by_input(sites: Sequence[LinearSite]) -> dict[str, tuple[LinearSite, ...]]:
    """Linears, grouped by the activation that they read."""
    names = dict.fromkeys(site.reads for site in sites)
    return {name: tuple(site for site in sites if site.reads == name) for name in names}


def layer_plan(config: ModelConfig) -> LayerPlan:
    """The plan of a model's layers; all layers of a model have the same one."""
    return LayerPlan(config.norm, ATTENTION, GATED_MLP if config.gated_mlp else MLP)
