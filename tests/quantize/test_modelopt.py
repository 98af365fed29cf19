"""trtlab's scales and integers against ModelOpt's on a small random LLaMA; deliberate differences are named."""

import sys

import pytest
import torch

from trtlab import (
    Checkpoint,
    CheckpointError,
    Mapping,
    MissingDependency,
    QuantConfig,
    QuantizedCheckpoint,
    QuantizeError,
)
from trtlab.model.scales import unpack_int4
from trtlab.quantize import modelopt
from trtlab.quantize.modelopt import check_modelopt, export_with_modelopt

from ..models import write_fresh_model

VOCABULARY = 128  # ModelOpt's AWQ quantizes a head whose rows its groups divide
ALGORITHMS = ["FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    write_fresh_model(path, hidden_size=256, intermediate_size=256, vocab_size=VOCABULARY)
    return path


@pytest.fixture(scope="module", params=[(algorithm, head) for head in (False, True) for algorithm in ALGORITHMS])
def both(request, folder, texts, tmp_path_factory):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is the other route: pip install trtlab[modelopt]")
    algorithm, head = request.param
    quant = QuantConfig(quant_algo=algorithm, group_size=64, smoothquant_val=1.0, quantize_lm_head=head)
    theirs = QuantizedCheckpoint.from_modelopt(folder, quant, texts, tmp_path_factory.mktemp("mo") / "ckpt")
    return Checkpoint.from_hugging_face(folder).quantize(quant, calibration=texts), theirs


def test_names_and_shapes_are_modelopts(both):
    ours, theirs = ({name: tensor.shape for name, tensor in checkpoint.tensors.items()} for checkpoint in both)
    assert ours == theirs


def test_dtypes_are_modelopts(both):
    """ModelOpt exports a float32 model in float16; dtypes that the algorithm fixes are the same."""
    for name, tensor in both[1].tensors.items():
        ours = both[0].tensors[name].dtype
        assert ours == tensor.dtype or (ours, tensor.dtype) == (torch.float32, torch.float16), name


def scales(both, suffix):
    for name, tensor in both[1].tensors.items():
        if name.endswith(suffix):
            yield name, both[0].tensors[name].read().float(), tensor.read().float()


def differs_on_purpose(name, algorithm):
    """Whether a linear shares its input with another one in the MLP, where trtlab and ModelOpt differ.

    trtlab averages the prequant scales of fc and gate, which TensorRT-LLM's fused linears need; ModelOpt averages only
    those of q, k and v. ModelOpt gives fc and gate one FP8 weight scale, trtlab gives them one each.
    """
    return ".mlp.proj." not in name and ".mlp." in name and algorithm != "W8A8_SQ_PER_CHANNEL"


@pytest.mark.parametrize("suffix", ["prequant_scaling_factor", "weights_scaling_factor", "activation_scaling_factor"])
def test_scales_agree_to_the_rounding_of_their_storage(both, suffix):
    algorithm = both[0].config.quantization.quant_algo
    tolerance = 1e-3 if suffix.startswith("prequant") else 1e-5  # the former are float16 in the export
    for name, ours, theirs in scales(both, suffix):
        if name.endswith("qkv.activation_scaling_factor") and algorithm == "W4A8_AWQ":
            assert torch.allclose(ours, theirs, rtol=0.2), name  # ModelOpt computes it before q, k and v are averaged
        elif not differs_on_purpose(name, algorithm):
            assert torch.allclose(ours, theirs, rtol=tolerance), name


def test_what_fc_and_gate_share_is_their_mean_or_their_own(both):
    ours, theirs = ({n: t.read().float() for n, t in c.tensors.items() if "_factor" in n} for c in both)
    for layer in range(2):
        fc, gate = (f"transformer.layers.{layer}.mlp.{name}" for name in ("fc", "gate"))
        if "AWQ" in both[0].config.quantization.quant_algo:
            suffix = "prequant_scaling_factor"
            mean = (theirs[f"{fc}.{suffix}"] + theirs[f"{gate}.{suffix}"]) / 2
            assert torch.allclose(ours[f"{fc}.{suffix}"], mean, rtol=1e-3)
            assert torch.equal(ours[f"{fc}.{suffix}"], ours[f"{gate}.{suffix}"])
        elif both[0].config.quantization.quant_algo == "FP8":
            suffix = "weights_scaling_factor"
            largest = torch.maximum(ours[f"{fc}.{suffix}"], ours[f"{gate}.{suffix}"])
            assert torch.allclose(theirs[f"{fc}.{suffix}"], largest)


def test_the_second_scale_of_w4a8_is_theirs(both):
    for name, ours, theirs in scales(both, "weights_scaling_factor_2"):
        assert torch.allclose(ours, theirs, rtol=1e-3) or differs_on_purpose(name, "W4A8_AWQ"), name


def numbers(checkpoint, name):
    """A stored weight before its scale, in float32: INT4 and INT8 as integers, FP8 on the grid of E4M3."""
    stored, scale = (checkpoint.tensors[f"{name}.{kind}"].read() for kind in ("weight", "weights_scaling_factor"))
    packed = checkpoint.config.quantization.algorithm.packed
    return (unpack_int4(stored.view(torch.uint8), scale.shape[0]) if packed else stored).float()


def grid_step(x, dtype):
    """The step from a number on the grid to the next: E4M3 has three mantissa bits, and is subnormal below 2^-6."""
    if dtype != torch.float8_e4m3fn:
        return torch.ones_like(x)
    return torch.exp2(x.abs().clamp(min=2.0**-6).log2().floor() - 3)


ROUNDING = 2.0**-11  # relative, of float16, in which the export stores some scales


def test_weights_agree_but_for_ties(both):
    """On any machine: a number moves by one step of its grid, and only where it lay beside a tie.

    The scales agree (above) but for the order of float32 sums, which is the machine's. Two numbers that differ by a
    relative ``r`` are ``r |q| / step`` steps apart, and that is the share of them that has a tie between: far below
    one step in a hundred, where another rounding or another range moves every second number.
    """
    ours, theirs = both
    names = [name.removesuffix(".weight") for name in theirs.tensors if "norm" not in name]
    for name in {name for name in names if f"{name}.weights_scaling_factor" in theirs.tensors}:
        if not differs_on_purpose(f"{name}.weight", ours.config.quantization.quant_algo):
            a, b = numbers(ours, name), numbers(theirs, name)
            step = grid_step(torch.maximum(a.abs(), b.abs()), theirs.tensors[f"{name}.weight"].dtype)
            assert ((a - b).abs() <= step).all(), name
            assert (a != b).float().mean() <= ROUNDING * (b.abs() / step).mean(), name


def test_what_modelopt_exports_runs(both, texts):
    ours, theirs = both
    with (
        ours.build(plan=False).session(backend="torch", device="cpu") as left,
        theirs.build(plan=False).session(device="cpu") as right,
    ):
        a, b = left.logits(texts[0]), right.logits(texts[0])
    assert a.shape == b.shape == (len(texts[0]), VOCABULARY)
    assert (a - b).norm() < 0.15 * b.norm()  # because of random weights, 4 bits, and the deliberate differences


def test_a_bare_export_says_that_it_lacks_the_rotary_base(folder, texts, tmp_path):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is the other route: pip install trtlab[modelopt]")
    config = Checkpoint.from_hugging_face(folder).config
    export_with_modelopt(folder, config, QuantConfig(quant_algo="FP8"), texts, tmp_path)
    with pytest.raises(CheckpointError, match=r"leaves rotary_base out.*hf_config="):
        Checkpoint.load(tmp_path)
    assert Checkpoint.load(tmp_path, hf_config=folder).config.rotary_base == config.rotary_base


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_export_for_two_ranks_is_the_one_for_one_rank_when_joined(folder, texts, tmp_path, monkeypatch, algorithm):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is the other route: pip install trtlab[modelopt]")
    quantizers, export = modelopt._modelopt()
    quant = QuantConfig(quant_algo=algorithm, group_size=64, smoothquant_val=1.0)
    config = Checkpoint.from_hugging_face(folder).config
    exported = []
    for ranks in (1, 2):

        def export_for(*model, inference_tensor_parallel, ranks=ranks, **where):
            export(*model, inference_tensor_parallel=ranks, **where)

        monkeypatch.setattr(modelopt, "_modelopt", lambda export_for=export_for: (quantizers, export_for))
        target = tmp_path / str(ranks)
        target.mkdir()
        export_with_modelopt(folder, config, quant, texts, target)
        exported.append(Checkpoint.load(target, hf_config=folder))
    one, two = exported
    assert two.mapping == Mapping(tp_size=2)
    assert one.config == two.config
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.read().view(torch.uint8), two.tensors[name].read().view(torch.uint8)), name


@pytest.mark.parametrize(
    "settings", [{"quant_algo": "W8A16"}, {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, {}]
)
def test_a_recipe_that_modelopt_cannot_take_is_refused(settings):
    with pytest.raises(QuantizeError, match="ModelOpt takes one weight algorithm"):
        check_modelopt(QuantConfig(**settings))


def test_without_modelopt_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(MissingDependency, match="pip install nvidia-modelopt requests"):
        check_modelopt(QuantConfig(quant_algo="FP8"))
