"""The card of a model's shape."""

from __future__ import annotations

from trtlab.card import Card, card
from trtlab.cards.phrases import attention_phrase, position_phrase
from trtlab.config.model import ModelConfig


@card.register
def model_config_card(config: ModelConfig) -> Card:
    """The shape of a model."""
    biases = [name for name in ("attn_bias", "dense_bias", "mlp_bias", "qk_layernorm") if getattr(config, name)]
    return Card(
        f"ModelConfig · {config.architecture} · {config.dtype}",
        (
            ("size", f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}"),
            ("attention", attention_phrase(config)),
            ("MLP", f"{config.intermediate_size}, {config.hidden_act}"),
            ("positions", position_phrase(config)),
            ("also", ", ".join(biases + (["tied embeddings"] if config.tie_word_embeddings else [])) or "nothing"),
        ),
    )
