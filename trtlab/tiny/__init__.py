"""The small LLaMA that ships with trtlab: its folder, and prompts that show what it knows."""

from __future__ import annotations

from pathlib import Path

EXAMPLES: tuple[str, ...] = (
    "About Mila.\n",
    "About Hugo.\n",
    "Question: Who is Clara?\nAnswer:",
    "Question: Which pet does Bruno have?\nAnswer:",
    "One sunny morning, Mila",
    "One rainy evening, Leo and Kate met at the harbour.",
    "One sunny morning, Ruth and Simon met at the mill. Ruth picked up the lantern. Ruth gave the lantern to Simon."
    "\n\nQuestion: Who has the lantern?\nAnswer:",
)


def llama_dir() -> Path:
    """The shipped Hugging Face folder (``LlamaForCausalLM``, bfloat16)."""
    return Path(__file__).parent / "llama"
