"""Ranks as threads of one process: whatever the split, the logits and the tokens are those of one rank."""

from __future__ import annotations

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, Engine, Mapping, SamplingParams
from trtlab.config.session import SessionConfig
from trtlab.parallel.shard import EmbeddingLayout, shard
from trtlab.session.open import open_session as start

SPLITS = [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
PROMPT = [5, 17, 3, 0, 96, 41, 98, 8, 23, 64]
MODELS = {
    "fewer key heads than ranks": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "every bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "query and key norms, tied": ("Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"tp{s[0]}-pp{s[1]}")
@pytest.mark.parametrize("name", MODELS)
def test_ranks_give_the_logits_and_tokens_of_one(name, split, random_model, open_session):
    architecture, changes = MODELS[name]
    folder = random_model(architecture, **changes)
    alone = open_session(folder, max_seq_len=64, max_input_len=48)
    ranks = open_session(folder, Mapping(tp_size=split[0], pp_size=split[1]), max_seq_len=64, max_input_len=48)
    torch.testing.assert_close(ranks.logits(PROMPT), alone.logits(PROMPT), atol=2e-5, rtol=0)
    prompts, params = [PROMPT, PROMPT[:3], [7]], SamplingParams(max_new_tokens=12)
    expected = [answer.token_ids for answer in alone.generate(prompts, params)]
    assert [answer.token_ids for answer in ranks.generate(prompts, params)] == expected


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_cut_table_gives_the_logits_of_a_replicated_one_exactly(tp, dim, random_model):
    """Only one rank adds to a row, and columns only lie side by side: no sum is taken in another order."""
    checkpoint = Checkpoint.from_hugging_face(random_model())
    mapping = Mapping(tp_size=tp)
    logits = []
    for layout in (EmbeddingLayout(), EmbeddingLayout(True, dim)):
        ranks = [shard(checkpoint.config, mapping, r, checkpoint.tensors, layout) for r in mapping.ranks]
        build = BuildConfig(max_seq_len=64, max_input_len=64).resolve(checkpoint.config)
        engine = Engine(checkpoint.config, build, mapping, layout, ranks, "test")
        with start(engine, SessionConfig(), "torch", "cpu") as session:
            logits.append(session.logits([*range(0, 99, 2), 98, 97]))
    assert torch.equal(logits[0], logits[1])


def test_a_shared_table_on_two_ranks_is_lookup_and_head_at_once(random_model, open_session):
    folder = random_model("LlamaForCausalLM", tie_word_embeddings=True)
    checkpoint = Checkpoint.from_hugging_face(folder)
    mapping, layout = Mapping(tp_size=2), EmbeddingLayout(True, 0, True)
    ranks = [shard(checkpoint.config, mapping, r, checkpoint.tensors, layout) for r in mapping.ranks]
    build = BuildConfig(max_seq_len=64, max_input_len=64).resolve(checkpoint.config)
    with start(
        Engine(checkpoint.config, build, mapping, layout, ranks, "test"), SessionConfig(), "torch", "cpu"
    ) as two:
        alone = open_session(folder, max_seq_len=64, max_input_len=64)
        torch.testing.assert_close(two.logits(PROMPT), alone.logits(PROMPT), atol=2e-5, rtol=0)
