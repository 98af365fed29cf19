"""The supported families, by Hugging Face's name of the architecture; one file for each."""

from __future__ import annotations

from collections.abc import Mapping

from trtlab.convert.families.family import Family
from trtlab.convert.families.llama import LLAMA
from trtlab.convert.families.mistral import MISTRAL
from trtlab.convert.families.qwen import QWEN2, QWEN3

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
