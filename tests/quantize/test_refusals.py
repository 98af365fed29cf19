"""A quantization that is not possible is refused with the reason, before anything is written."""

import pytest
import torch

from trtlab import Checkpoint, ConfigError, QuantConfig, QuantizeError
from trtlab.tiny import llama_dir

from .conftest import CONFIG, random_checkpoint

STATIC = QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN")


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_lies_between_0_and_1(alpha):
    with pytest.raises(ConfigError, match=r"smoothquant_val is not valid.*at least 0 and at most 1"):
        QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN", smoothquant_val=alpha)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_algo": "W3A16"},
        {"kv_cache_quant_algo": "INT4"},
        {"kv_cache_scales": "both"},
        {"group_size": 48},
        {"exclude_modules": "lm_head"},
    ],
)
def test_an_unknown_setting_names_the_known_ones(settings):
    with pytest.raises(ConfigError, match="expected"):
        QuantConfig(**settings)


def test_a_recipe_that_quantizes_nothing_is_refused(checkpoint):
    with pytest.raises(QuantizeError, match="quantizes nothing"):
        checkpoint.quantize(QuantConfig())


@pytest.mark.parametrize("pattern", ["transformer.layers.9.*", "mlp.fc", "*.mlp.down_proj", ""])
def test_a_pattern_that_excludes_nothing_is_refused(checkpoint, pattern):
    with pytest.raises(QuantizeError, match=r"matches no module.*transformer\.layers\.0\.mlp\.fc"):
        checkpoint.quantize(QuantConfig("W8A16", exclude_modules=("*.mlp.fc", pattern)))


def test_patterns_that_exclude_everything_are_refused(checkpoint):
    with pytest.raises(QuantizeError, match="W8A16 has nothing to quantize"):
        checkpoint.quantize(QuantConfig("W8A16", exclude_modules=("transformer.layers.*",)))
    assert checkpoint.quantize(QuantConfig("W8A16", exclude_modules=("lm_head",))).report.linears


def test_weight_only_says_that_it_needs_no_texts(checkpoint, texts):
    with pytest.raises(QuantizeError, match="W8A16 needs no calibration texts"):
        checkpoint.quantize(QuantConfig(quant_algo="W8A16"), calibration=texts)


@pytest.mark.parametrize(
    ("quant", "step"),
    [
        (STATIC, "the largest magnitude of each linear's input"),
        (QuantConfig(quant_algo="W8A16", kv_cache_quant_algo="INT8"), "K and of V as they are cached, after rotary"),
        (QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales="merged"), "Q, K and V together, before rotary"),
        (QuantConfig(quant_algo="W4A16_AWQ"), "alpha search"),
    ],
)
def test_what_needs_texts_says_which_step_reads_them(checkpoint, quant, step):
    with pytest.raises(QuantizeError, match=f"needs calibration texts: this step reads .*{step}"):
        checkpoint.quantize(quant)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        ("one text", "needs a list of texts"),
        ([[1, 2], [5]], "text 1 is too short: 1 tokens"),
        ([[1, 99]], "text 0 has token id 99"),
        (["words"], "no tokenizer"),
        ([None], "text 0 is neither a string nor a list of token ids; got None"),
        ([1, 2, 3], "text 0 is neither a string nor a list of token ids; got 1"),
        ([[1, 2], [0.5, 1.5]], "text 1 is neither"),
        (5, "needs a list of texts"),
        ({"text": "words"}, "needs a list of texts"),
    ],
)
def test_useless_texts_are_refused(checkpoint, tmp_path, texts, message):
    with pytest.raises(QuantizeError, match=message):
        checkpoint.quantize(STATIC, calibration=texts, output_dir=tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


def test_texts_may_come_one_by_one(checkpoint, texts):
    quantized = checkpoint.quantize(STATIC, calibration=(text for text in texts))
    assert quantized.report == checkpoint.quantize(STATIC, calibration=texts).report


def test_texts_of_unknown_tokens_only_are_refused():
    tiny = Checkpoint.from_hugging_face(llama_dir())
    with pytest.raises(QuantizeError, match="no token that the tokenizer knows"):
        tiny.quantize(STATIC, calibration=["</s></s></s>", "<s><s>"])


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoint):
    quantized = checkpoint.quantize(QuantConfig(quant_algo="W8A16"))
    with pytest.raises(QuantizeError, match=r"already quantized \(W8A16\)"):
        quantized.quantize(QuantConfig(quant_algo="W4A16"))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_weight_is_named_and_nothing_is_written(tmp_path, poison):
    tensors = {name: tensor.read().clone() for name, tensor in random_checkpoint().tensors.items()}
    tensors["transformer.layers.1.mlp.gate.weight"][3, 5] = poison
    with pytest.raises(QuantizeError, match=r"layers\.1\.mlp\.gate\.weight holds 1 values that are NaN or infinite"):
        Checkpoint.from_weights(CONFIG, tensors).quantize(QuantConfig(quant_algo="W8A16"), output_dir=tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"])
@pytest.mark.parametrize("quant", [QuantConfig(quant_algo="W8A16"), STATIC], ids=["W8A16", "SmoothQuant"])
def test_a_poisoned_weight_outside_the_layers_is_named_too(tmp_path, texts, name, quant):
    tensors = {name: tensor.read().clone() for name, tensor in random_checkpoint().tensors.items()}
    tensors[name].flatten()[3] = torch.nan
    texts = texts if quant.reads_texts else None
    with pytest.raises(QuantizeError, match=rf"{name} holds 1 values that are NaN or infinite"):
        Checkpoint.from_weights(CONFIG, tensors).quantize(quant, calibration=texts, output_dir=tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_are_named(texts, tmp_path):
    tensors = {name: tensor.read().clone() for name, tensor in random_checkpoint().tensors.items()}
    tensors["transformer.layers.0.mlp.fc.weight"] *= 1e30
    tensors["transformer.layers.0.mlp.gate.weight"] *= 1e30
    with pytest.raises(QuantizeError, match="activations of layer 0"):
        Checkpoint.from_weights(CONFIG, tensors).quantize(STATIC, calibration=texts, output_dir=tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "algorithm", ["W8A16", "W4A16", "W8A8_SQ_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_CHANNEL", "FP8", "W4A16_AWQ"]
)
def test_all_zero_channels_quantize_to_zeros(texts, algorithm):
    tensors = {name: tensor.read().clone() for name, tensor in random_checkpoint().tensors.items()}
    tensors["transformer.layers.0.mlp.fc.weight"][7] = 0
    tensors["transformer.layers.0.mlp.fc.weight"][:, 9] = 0
    tensors["transformer.layers.0.mlp.proj.weight"][:] = 0
    quant = QuantConfig(quant_algo=algorithm, group_size=64)
    quantized = Checkpoint.from_weights(CONFIG, tensors).quantize(
        quant, calibration=texts if quant.reads_texts else None
    )
    for name, tensor in quantized.tensors.items():
        assert torch.isfinite(tensor.read().float()).all(), name
    with quantized.build(plan=False).session(backend="torch", device="cpu") as session:
        assert torch.isfinite(session.logits(texts[0])).all()


def test_one_rank_alone_is_not_quantized(checkpoint, tmp_path):
    from trtlab import CheckpointError, Mapping

    checkpoint.save(tmp_path / "ckpt", mapping=Mapping(tp_size=2))
    with pytest.raises(CheckpointError, match="rank 1 of 2 alone cannot be quantized"):
        Checkpoint.load(tmp_path / "ckpt", rank=1).quantize(QuantConfig(quant_algo="W8A16"))
