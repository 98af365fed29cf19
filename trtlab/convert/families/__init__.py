"""The supported families, by Hugging Face's name of the architecture; one file for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trtlab.convert.families.family import Family
from trtlab.convert.families.llama import LLAMA
from trtlab.convert.families.mistral import MISTRAL
from trtlab.convert.families.qwen import QWEN2, QWEN3
from trtlab.errors import CheckpointError

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


def find_architecture(architectures: Sequence[str] | None, model_type: str | None) -> str:
    """The architecture that a Hugging Face config names, by its class or else by ``model_type``.

    The spelling of the first conversions, ``LLaMAForCausalLM``, is understood, and a model that was saved without its
    head, ``LlamaModel``: its tensors show whether it has one.

    Raises:
        CheckpointError: It is unknown, or the two keys name different families.
    """
    if architectures:
        what = f"unknown architecture {architectures[0]!r:.80}"
        written = architectures[0].lower().replace("forcausallm", "model")
        named = next((name for name in FAMILIES if name.lower().replace("forcausallm", "model") == written), None)
    elif model_type:
        what = f"unknown model_type {model_type!r:.80}"
        named = next((name for name, family in FAMILIES.items() if family.model_type == model_type), None)
    else:
        what, named = "it names neither architectures nor model_type", None
    if named is None:
        raise CheckpointError(what, expected=" | ".join(FAMILIES), remedy="convert one of these")
    expected = FAMILIES[named].model_type
    if model_type and expected is not None and model_type != expected:
        raise CheckpointError(
            f"architecture {named} and model_type {model_type!r} contradict each other",
            expected=f"model_type {expected!r}",
            remedy="correct the wrong one",
        )
    return named
