"""The choice of a token against transformers' own logits processors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtlab import SamplingParams
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.sampler import filtered_probabilities, penalize, sample

logits = st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=40).map(torch.tensor)


def warped(scores, params):
    """Probabilities by transformers: temperature, then top-k, then top-p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rows = scores[None].clone()
    if params.temperature is not None and params.temperature != 1:
        rows = TemperatureLogitsWarper(float(params.temperature))(None, rows)
    if params.top_k:
        rows = TopKLogitsWarper(params.top_k)(None, rows)
    if params.top_p is not None and params.top_p < 1:
        rows = TopPLogitsWarper(params.top_p)(None, rows)
    return rows[0].softmax(-1)


@given(
    logits,
    st.none() | st.floats(0.05, 4),
    st.none() | st.integers(0, 50),
    st.none() | st.floats(0.01, 1.0),
)
def test_filtered_probabilities_are_those_of_transformers(scores, temperature, top_k, top_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    actual, expected = filtered_probabilities(scores, params), warped(scores, params)
    differing = (actual > 0) != (expected > 0)
    if differing.any():  # both are right at a tie, and where a sum rounds to either side of top_p
        edge = filtered_probabilities(scores, SamplingParams(temperature=temperature, top_k=top_k))
        masses = edge.sort(descending=True).values.cumsum(-1)
        tied = scores.unique().numel() < scores.numel()
        assert tied or float((masses - top_p).abs().min()) < 1e-5
    else:
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@given(logits, st.lists(st.integers(0, 3), max_size=6), st.floats(0.1, 5))
def test_the_repetition_penalty_is_that_of_transformers(scores, seen, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    if not seen:
        assert torch.equal(penalize(scores, [0], 1.0), scores)
        return
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), scores[None].clone())[0]
    torch.testing.assert_close(penalize(scores, seen, penalty), expected)


def request(**params) -> RequestState:
    return RequestState(1, (1, 2), SamplingParams(**params))


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 1}, {"temperature": 1.2e-38}])
def test_the_best_token_is_taken(params):
    scores = torch.tensor([[0.0, 3.0, 2.9, -1.0]])
    assert sample(scores, [request(**params)]) == [(1, None)]


def test_rows_of_one_step_each_follow_their_own_parameters():
    scores = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 4.0], [0.0, 1.0, 0.9]])
    rows = [
        request(),
        request(repetition_penalty=100.0, temperature=0),
        request(logprobs=True),
    ]
    tokens = [token for token, _ in sample(scores, rows)]
    assert tokens == [1, 0, 1]
    assert sample(scores, rows)[2][1] == pytest.approx(float(scores[2].log_softmax(-1)[1]))


def test_the_penalty_counts_prompt_and_answer():
    subject = request(repetition_penalty=10.0)
    subject.token_ids.append(3)
    scores = torch.tensor([[0.5, 4.0, 3.0, 3.5]])
    assert sample(scores, [subject])[0][0] == 0


def test_logprobs_are_those_of_the_unfiltered_logits():
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    for params in ({}, {"temperature": 0.3, "top_k": 5, "seed": 1}, {"repetition_penalty": 2.0}):
        ((token, logprob),) = sample(scores, [request(logprobs=True, **params)])
        assert logprob == pytest.approx(float(scores[0].log_softmax(-1)[token]), abs=1e-6)


def test_draws_follow_the_probabilities():
    scores, subject = torch.tensor([[0.0, math.log(3.0), -30.0]]), request(temperature=1.0, seed=0)
    draws = [sample(scores, [subject])[0][0] for _ in range(4000)]
    assert draws.count(1) / 4000 == pytest.approx(0.75, abs=0.03)
    assert draws.count(2) == 0


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_a_seed_fixes_the_draws_of_a_request_whatever_runs_beside_it(seed):
    scores = torch.randn(1, 30, generator=torch.Generator().manual_seed(2))

    def draws(beside):
        subject, other = request(temperature=1.0, seed=seed), request(temperature=1.0)
        rows = [subject, other] if beside else [subject]
        return [sample(scores.expand(len(rows), -1), rows)[0][0] for _ in range(20)]

    assert draws(False) == draws(False) == draws(True)


def test_requests_without_a_seed_differ():
    scores = torch.zeros(1, 1000)
    first, second = ([sample(scores, [request(temperature=1.0)])[0][0] for _ in range(4)] for _ in range(2))
    assert first != second


EXTREME = [
    {"temperature": 1.2e-38},
    {"temperature": 3.4e38},
    {"top_p": 1.2e-38, "seed": 1},
    {"temperature": 1.2e-38, "top_p": 1.2e-38, "top_k": 5},
    {"repetition_penalty": 1.2e-38, "temperature": 1.0},
    {"repetition_penalty": 3.4e38, "temperature": 1.0},
    {"repetition_penalty": 1.2e-38},
    {"repetition_penalty": 3.4e38, "temperature": 1.2e-38, "top_p": 0.5, "top_k": 3},
    {"seed": 2**64 - 1, "temperature": 1.0},
    {"seed": -(2**63), "temperature": 1.0},
]


@pytest.mark.parametrize("params", EXTREME, ids=str)
def test_params_at_the_edge_of_float32_and_64_bits_choose_a_token(params):
    scores = torch.tensor([[30.0, -30.0, 29.0, 0.0, -1e4, 1e4]])
    ((token, logprob),) = sample(scores, [request(**params, logprobs=True)])
    assert 0 <= token < 6 and math.isfinite(logprob)


def test_a_strong_penalty_hides_no_infinite_logit():
    for value in (math.inf, math.nan):
        scores = torch.tensor([[0.0, value, 1.0]])  # token 1 is in the prompt
        with pytest.raises(ValueError, match="not a number"):
            sample(scores, [request(repetition_penalty=2.0, temperature=1.0)])
