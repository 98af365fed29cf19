"""The keys by which Hugging Face and TensorRT-LLM store how rotary frequencies are stretched."""

from __future__ import annotations

from trtlab.storage.json_files import Count, Positive, StoredObject


class StoredScaling(StoredObject):
    """A scaling by its names in config.json; what a kind does not use is left out or null."""

    rope_type: str | None = None
    type: str | None = None
    """``rope_type`` in the oldest files."""
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = True
