"""Perplexity and answers against transformers, and the order of recipes that theory predicts."""

import math
from itertools import islice

import pytest
import torch

from trtlab import Checkpoint, QuantConfig, RequestError
from trtlab.evaluate import accuracy, compare_recipes, divergence, perplexity
from trtlab.evaluate.quantization import recipe_title
from trtlab.tiny import llama_dir
from trtlab.tiny.corpus import documents, questions

pytestmark = pytest.mark.no_gpu  # a checkpoint's session is on the device that evaluation chooses


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.from_hugging_face(llama_dir())


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return [document.text for document in islice(documents(1, "held_out"), 8)]


@pytest.fixture(scope="module")
def measured(tiny, held_out):
    """KL from the original by recipe title."""
    per_tensor = "W8A8_SQ_PER_TENSOR_PLUGIN"
    recipes = [
        QuantConfig(quant_algo="W8A16"),
        QuantConfig(quant_algo="W4A16"),
        QuantConfig(quant_algo="W4A16_AWQ", group_size=64),
        QuantConfig(quant_algo="FP8"),
        *(QuantConfig(quant_algo=per_tensor, smoothquant_val=alpha) for alpha in (0.0, 0.5)),
        QuantConfig(quant_algo="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
        *(QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales=scales) for scales in ("merged", "split")),
    ]
    calibration = [document.text for document in islice(documents(1, "train"), 16)]
    asked = list(questions("held_out", 8))
    return compare_recipes(tiny, recipes, calibration=calibration, texts=held_out, questions=asked)


def test_perplexity_is_that_of_transformers(tiny, held_out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_dir(), dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_dir(), trust_remote_code=False)
    total, tokens = 0.0, 0
    for text in held_out[:3]:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert perplexity(tiny, held_out[:3]) == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(tiny, held_out):
    assert divergence(tiny, tiny, held_out[:1]) == pytest.approx(0.0, abs=1e-6)


def test_the_tiny_model_answers_what_it_was_trained_on(tiny):
    assert accuracy(tiny, list(questions("held_out", 16))) == 1.0, "the longest answer has room"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("W8A16", "W4A16_AWQ g64"),
        ("W4A16_AWQ g64", "W4A16"),
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN alpha 0.5", "W8A8_SQ_PER_TENSOR_PLUGIN alpha 0.5"),
        ("W8A8_SQ_PER_TENSOR_PLUGIN alpha 0.5", "W8A8_SQ_PER_TENSOR_PLUGIN alpha 0"),
        ("FP8", "W8A8_SQ_PER_TENSOR_PLUGIN alpha 0.5"),
    ],
)
def test_recipes_come_in_the_order_that_theory_predicts(measured, better, worse):
    by_title = {row.title: row.divergence for row in measured.rows}
    assert 0 < by_title[better] < by_title[worse]


def test_int8_caches_cost_less_than_any_eight_bit_activation(measured):
    """Merged and split scales lie within noise of each other here: this model's Q is no larger than its K."""
    by_title = {row.title: row.divergence for row in measured.rows}
    caches = [by_title["INT8 KV merged"], by_title["INT8 KV split"]]
    assert max(caches) < by_title["W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN alpha 0.5"]


def test_every_recipe_stays_within_two_percent_of_the_perplexity(measured):
    plain = measured.rows[0]
    assert plain.quant is None
    assert all(abs(row.perplexity / plain.perplexity - 1) < 0.02 for row in measured.rows)
    assert all(row.nbytes < plain.nbytes for row in measured.rows if row.quant and row.quant.quant_algo)
    assert "INT8 KV split" in repr(measured)


def test_a_title_names_what_matters_to_its_recipe():
    quant = QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN", smoothquant_val=None, kv_cache_quant_algo="FP8")
    assert recipe_title(quant) == "W8A8_SQ_PER_TENSOR_PLUGIN alpha searched · FP8 KV"


@pytest.mark.parametrize("texts", ["one string", [], [[1]]])
def test_texts_without_a_token_to_predict_are_refused(tiny, texts):
    with pytest.raises(RequestError):
        perplexity(tiny, texts)
    with pytest.raises(RequestError, match="no questions"):
        accuracy(tiny, [])
