"""Statistics of ObservingOps against Hugging Face's own model with forward hooks."""

import pytest
import torch
import transformers
from packaging.version import Version

from trtlab import Checkpoint
from trtlab.model.blocks import SITES
from trtlab.model.names import EMBEDDING
from trtlab.quantize.calibrate import Calibration
from trtlab.quantize.texts import SAMPLE_ROWS, batches

from ..models import write_fresh_model

HF_PARTS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    write_fresh_model(path, intermediate_size=112)
    return path


# transformers 5.24 renamed it
CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def hooked(folder, texts):
    """Every linear's inputs and outputs over all texts ``{name: [(x, y), ...]}``, and K and V as they are cached."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    passes_of, caches = {}, []
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _m, x, y, name=name: passes_of.setdefault(name.removeprefix("model."), []).append(
                    (x[0][0], y[0])
                )
            )
    with torch.inference_mode():
        for ids in texts:
            cache = DynamicCache(config=model.config)
            model(torch.tensor([ids]), **{CACHE_ARGUMENT: cache})
            caches.append([(layer.keys[0], layer.values[0]) for layer in cache.layers])
    return passes_of, caches


@pytest.fixture(scope="module")
def both(folder, texts):
    checkpoint = Checkpoint.from_hugging_face(folder)
    calibration = Calibration(checkpoint.config, batches(texts), checkpoint.tensors[EMBEDDING].read(), gram=True)
    ours = []
    for layer in range(2):
        prefix = f"transformer.layers.{layer}."
        weights = {n.removeprefix(prefix): t.read() for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        ours.append(calibration.run_layer(layer, weights))
    return ours, *hooked(folder, texts)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("linear", HF_PARTS)
def test_inputs_and_outputs_are_what_hooks_see(both, layer, linear):
    ours, passes_of, _ = both
    passes = [passes_of[f"layers.{layer}.{part}"] for part in HF_PARTS[linear]]
    x = [x for x, _ in passes[0]]
    actual = ours[layer].input_of(linear)
    assert torch.allclose(actual.amax, torch.cat(x).abs().amax(0), rtol=1e-4)
    assert torch.allclose(actual.mean, torch.stack([part.abs().mean(0) for part in x]).mean(0), rtol=1e-4)
    gram = torch.stack([part.T @ part / len(part) for part in x]).mean(0)
    assert torch.allclose(actual.gram, gram, atol=1e-5 * float(gram.abs().max()))
    outputs = torch.cat([torch.cat([y for _, y in part]).abs().amax(0) for part in passes])
    assert torch.allclose(ours[layer].outputs[linear], outputs, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_keys_and_values_are_those_that_the_cache_holds(both, layer):
    ours, _, caches = both
    for place, actual in enumerate((ours[layer].keys, ours[layer].values)):
        expected = torch.stack([cache[layer][place].abs().amax((1, 2)) for cache in caches]).amax(0)
        assert torch.allclose(actual, expected, rtol=1e-4)


def test_linears_that_share_an_input_are_recorded_once(both):
    assert set(both[0][0].inputs) == {SITES[linear].reads for linear in HF_PARTS}


def test_rows_are_sampled_over_all_texts():
    rows = [[1] * 300, [2] * 1900, [3] * 500]
    packed = batches(rows)
    assert len(packed) == 3
    picked = [len(batch.sampled) for batch in packed]
    assert sum(picked) <= SAMPLE_ROWS
    assert all(picked)
    assert sum(float(batch.shares.sum()) for batch in packed) == pytest.approx(1.0)
