"""compare_recipes against transformers and plain torch, without questions and with them."""

import math

import pytest
import torch

from trtlab import Checkpoint, QuantConfig, QuantizeError, RequestError, compare_recipes
from trtlab.evaluate import perplexity
from trtlab.model.quantized_weights import WeightOnly, quantized_linear
from trtlab.model.scales import dequantize

from ..models import random_texts, write_fresh_model

TEXTS = random_texts((24, 5, 40))
HF_PARTS = {
    "attention.dense": ["self_attn.o_proj"],
    "mlp.fc": ["mlp.gate_proj"],
    "mlp.gate": ["mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    write_fresh_model(path, hidden_size=256, intermediate_size=256)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder) -> Checkpoint:
    return Checkpoint.from_hugging_face(folder)


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def states(model):
    """The residual stream after each decoder layer, before the final norm, and the logits, for each text."""
    after: list[list[torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _x, y: after[-1].append((y if torch.is_tensor(y) else y[0])[0]))
        for layer in model.model.layers
    ]
    logits = []
    with torch.inference_mode():
        for ids in TEXTS:
            after.append([])
            logits.append(model(torch.tensor([ids])).logits[0])
    for hook in hooks:
        hook.remove()
    return after, logits


def with_weights_of(quantized, model):
    """The transformers model with W8A16's dequantized weights, which makes the same function of its input."""
    config = quantized.config
    size = [heads * config.head_size for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    for index, layer in enumerate(model.model.layers):
        prefix = f"transformer.layers.{index}."
        for linear in ("attention.qkv", *HF_PARTS):
            weight = quantized_linear(
                config.quantization.algorithm, linear, linear, lambda n, p=prefix: quantized.tensors[p + n].read(), None
            )
            assert isinstance(weight, WeightOnly)
            plain = dequantize(weight.integers, weight.scale.value.float())
            qkv = [f"self_attn.{name}_proj" for name in "qkv"]
            names, parts = (qkv, plain.split(size)) if linear == "attention.qkv" else (HF_PARTS[linear], [plain])
            for name, part in zip(names, parts, strict=True):
                layer.get_submodule(name).weight.data = part.clone()
    return model


def test_every_number_is_what_transformers_computes_with_the_same_weights(folder, checkpoint):
    """float32 on both sides: sums differ in their order alone, some 1e-6 of what is summed."""
    quant = QuantConfig("W4A16")
    plain, row = compare_recipes(checkpoint, [quant], texts=TEXTS).rows
    before, expected = states(transformers_model(folder))
    after, got = states(with_weights_of(checkpoint.quantize(quant), transformers_model(folder)))
    tokens = sum(map(len, TEXTS))
    for measured, logits in ((plain, expected), (row, got)):
        loss = sum(
            float(-after_token[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())
            for ids, after_token in zip(TEXTS, logits, strict=True)
        )
        assert measured.perplexity == pytest.approx(math.exp(loss / (tokens - len(TEXTS))), rel=1e-4)
    kl = sum(
        float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())
        for p, q in zip(expected, got, strict=True)
    )
    assert row.divergence == pytest.approx(kl / tokens, rel=1e-3)
    assert plain.divergence == 0.0
    assert plain.distances == (0.0, 0.0)
    for layer, distance in enumerate(row.distances):
        each = [(x[layer] - y[layer]).norm(dim=-1) / y[layer].norm(dim=-1) for x, y in zip(after, before, strict=True)]
        assert distance == pytest.approx(float(torch.cat(each).mean()), rel=1e-3)


@pytest.mark.no_gpu
def test_the_original_has_the_perplexity_of_its_session(checkpoint):
    (plain,) = compare_recipes(checkpoint, [], texts=TEXTS).rows
    assert plain.perplexity == pytest.approx(perplexity(checkpoint, TEXTS), rel=1e-4)


def test_the_cache_and_the_head_are_quantized_too(checkpoint):
    recipes = [
        QuantConfig(kv_cache_quant_algo="INT8"),
        QuantConfig("W8A16"),
        QuantConfig("W8A16", quantize_lm_head=True),
    ]
    _, cache, layers, head = compare_recipes(checkpoint, recipes, texts=TEXTS).rows
    assert all(distance > 0 for distance in cache.distances)
    assert head.distances == layers.distances
    assert head.divergence != layers.divergence


def test_without_calibration_texts_the_texts_calibrate(checkpoint):
    recipe = QuantConfig("W8A8_SQ_PER_CHANNEL")
    alone, given, other = (
        compare_recipes(checkpoint, [recipe], texts=TEXTS, calibration=texts).rows[1]
        for texts in (None, TEXTS, random_texts((9, 9)))
    )
    assert alone == given != other


def test_one_bar_counts_the_layers_of_all_recipes(checkpoint, monkeypatch):
    counted = []

    class Bar:
        def __init__(self, label, total, *, unit):
            counted.append([label, total, 0])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            counted[-1][2] += n

    for module in ("trtlab.evaluate.quantization", "trtlab.quantize.run"):
        monkeypatch.setattr(f"{module}.progress", Bar)
    compare_recipes(checkpoint, [QuantConfig("W8A16"), QuantConfig("FP8", quantize_lm_head=True)], texts=TEXTS)
    assert counted == [["comparing recipes", 2 + 2 * (2 + 2) + 1, 2 + 2 * (2 + 2) + 1]]


def test_the_card_shows_answers_only_where_questions_were_asked(checkpoint):
    compared = compare_recipes(checkpoint, [QuantConfig("W4A16")], texts=TEXTS)
    assert compared.rows[1].accuracy is None
    assert "answers" not in repr(compared)
    assert "distance from the original after layer" in repr(compared)
    assert f"{compared.rows[1].distances[-1]:.1%}" in repr(compared)
    assert "distance" not in repr(compare_recipes(checkpoint, [], texts=TEXTS))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["words"], "has no tokenizer"),
        ([[1]], "no text has two tokens"),
        ([[1, 2, 1000]], "token id 1000"),
        ([[1] * 5000], "5000 tokens"),
    ],
)
def test_texts_that_the_model_cannot_read_are_refused(checkpoint, texts, message):
    with pytest.raises(RequestError, match=message):
        compare_recipes(checkpoint, [], texts=texts)


def test_a_recipe_that_does_not_fit_is_refused_before_anything_runs(checkpoint, monkeypatch):
    monkeypatch.setattr("trtlab.evaluate.quantization.ForwardPass", None)
    with pytest.raises(QuantizeError, match="quantizes nothing"):
        compare_recipes(checkpoint, [QuantConfig("W8A16"), QuantConfig()], texts=TEXTS)
