"""The predicted memory of a quantization; benchmarks/quantize.py compares it with the measured memory."""

import gc
import weakref

import pytest
import torch

from trtlab import QuantConfig, QuantizeError
from trtlab.model.tensor_specs import tensor_specs
from trtlab.published import SHAPES
from trtlab.quantize.peak import predict
from trtlab.quantize.run import Quantization
from trtlab.quantize.texts import batches
from trtlab.storage.lazy import LazyTensor


def test_70_billion_parameters_need_a_fraction_of_the_usual_210_gigabytes():
    config = SHAPES["LLaMA-2-70B"]
    tensors = {n: LazyTensor(s.shape, torch.float16, lambda: torch.empty(0)) for n, s in tensor_specs(config).items()}
    fp8 = config.replace(quantization=QuantConfig("FP8"))
    peak = predict(fp8, tensors, batches([[0] * 512] * 512), in_memory=False)
    assert 200e9 < peak.whole_model < 212e9 < peak.at_once
    assert peak.total < 25e9


@pytest.mark.parametrize(
    ("algorithm", "on_disk", "remedy"),
    [
        ("W8A16", False, "give output_dir"),
        ("W8A16", True, "free memory, or quantize on a machine that has more"),
        ("FP8", False, "give output_dir, fewer texts or shorter ones"),
        ("FP8", True, "give fewer texts or shorter ones"),
    ],
)
def test_a_quantization_that_does_not_fit_is_refused_before_a_weight_is_read(
    checkpoint, texts, monkeypatch, tmp_path, algorithm, on_disk, remedy
):
    def refuse():
        raise AssertionError("a weight was read")

    unread = {name: LazyTensor(t.shape, t.dtype, refuse) for name, t in checkpoint.tensors.items()}
    monkeypatch.setattr("trtlab.quantize.peak.free_bytes", lambda: 10_000)
    quant = QuantConfig(algorithm)
    with pytest.raises(QuantizeError, match=r"quantizing takes about .*this machine has free; ") as caught:
        type(checkpoint)(checkpoint.config, unread, "unread").quantize(
            quant, texts if quant.reads_texts else None, tmp_path / "x" if on_disk else None
        )
    assert caught.value.remedy == remedy
    assert list(tmp_path.iterdir()) == []


def test_one_layer_is_freed_before_the_next_is_read(checkpoint, texts, monkeypatch):
    read, earlier = Quantization._read, []

    def watched(self, *arguments):
        gc.collect()
        assert not [block for block in earlier if block() is not None]
        layer = read(self, *arguments)
        earlier.append(weakref.ref(layer.weights["mlp.fc.weight"]))
        return layer

    monkeypatch.setattr(Quantization, "_read", watched)
    copied = {
        name: LazyTensor(t.shape, t.dtype, lambda t=t: t.read().clone()) for name, t in checkpoint.tensors.items()
    }
    lazy = type(checkpoint)(checkpoint.config, copied, "copies")
    lazy.quantize(QuantConfig("W8A8_SQ_PER_CHANNEL"), calibration=texts)
    assert len(earlier) == 2
