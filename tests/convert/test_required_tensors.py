"""The tensors of our folders against those that TensorRT-LLM's loader requires, from its format's description."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trtlab import Checkpoint, CheckpointError, Mapping, QuantConfig
from trtlab.config.model import RotaryScaling

from ..models import loud_checkpoint, normal_checkpoint, random_texts, small_config

HIDDEN, HEADS, KV_HEADS, SIZE, INNER, VOCAB, GROUP = 256, 4, 2, 64, 384, 99, 64
SIZES = {"hidden_size": HIDDEN, "head_size": SIZE, "intermediate_size": INNER}

SMOOTHQUANT = {  # per channel, per token
    "W8A8_SQ_PER_TENSOR_PLUGIN": (False, False),
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": (True, False),
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": (False, True),
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": (True, True),
}
WEIGHT_ONLY = ["W8A16", "W4A16"]  # in the plain form: TensorRT-LLM quantizes the weights when it builds
OTHERS = ["W8A8_SQ_PER_CHANNEL", "FP8", "W4A16_AWQ", "W4A8_AWQ"]
OURS = {"attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor"}

Tensors = dict[str, tuple[str, list[int]]]  # dtype as safetensors spells it, shape


def linears(tp: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs on one rank."""
    return {
        "attention.qkv": ((HEADS + 2 * KV_HEADS) // tp * SIZE, HIDDEN),
        "attention.dense": (HIDDEN, HEADS * SIZE // tp),
        "mlp.fc": (INNER // tp, HIDDEN),
        "mlp.gate": (INNER // tp, HIDDEN),
        "mlp.proj": (HIDDEN, INNER // tp),
    }


def required_of_linear(algorithm: str | None, linear: str, out: int, width: int) -> Tensors:
    if algorithm is None or algorithm in WEIGHT_ONLY:
        return {"weight": ("F32", [out, width])}
    if algorithm in SMOOTHQUANT:
        per_channel, per_token = SMOOTHQUANT[algorithm]
        columns = out if per_channel or linear == "attention.qkv" else 1
        tensors = {"weight": ("I8", [out, width]), "per_channel_scale": ("F32", [1, columns])}
        if not per_token:
            tensors["act_scale"] = ("F32", [1, 1])
        if linear in ("attention.dense", "mlp.proj"):
            tensors["smoother"] = ("F32", [1, width])
        return tensors
    one = ("F32", [1])
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {
            "weight": ("I8", [out, width]),
            "weights_scaling_factor": ("F32", [out]),
            "activation_scaling_factor": one,
            "prequant_scaling_factor": ("F32", [width]),
        }
    if algorithm == "FP8":
        return {
            "weight": ("F8_E4M3", [out, width]),
            "weights_scaling_factor": one,
            "activation_scaling_factor": one,
        }
    tensors = {
        "weight": ("I8", [out // 2, width]),
        "weights_scaling_factor": ("F32", [out, width // GROUP]),
        "prequant_scaling_factor": ("F32", [width]),
    }
    if algorithm == "W4A8_AWQ":
        tensors |= {"weights_scaling_factor_2": one, "activation_scaling_factor": one}
    return tensors


def required(algorithm: str | None, cache: str | None, tp: int, layers: int = 2) -> Tensors:
    """The names, dtypes and shapes of one rank's file, of a float32 LLaMA with one pipeline stage."""
    rows = -(-VOCAB // tp)
    tensors: Tensors = {
        "transformer.vocab_embedding.weight": ("F32", [VOCAB, HIDDEN]),
        "transformer.ln_f.weight": ("F32", [HIDDEN]),
        "lm_head.weight": ("F32", [rows, HIDDEN]),
    }
    layer: Tensors = {f"{norm}.weight": ("F32", [HIDDEN]) for norm in ("input_layernorm", "post_layernorm")}
    for linear, (out, width) in linears(tp).items():
        own = required_of_linear(algorithm, linear, out, width)
        layer |= {f"{linear}.{suffix}": entry for suffix, entry in own.items()}
    if algorithm in SMOOTHQUANT:
        layer |= {f"{norm}.scale_to_int": ("F32", [1]) for norm in ("input_layernorm", "post_layernorm")}
        if not SMOOTHQUANT[algorithm][1]:
            layer |= {f"{block}.quantization_scaling_factor": ("F32", [1]) for block in ("attention", "mlp")}
    if cache is not None:
        layer["attention.kv_cache_scaling_factor"] = ("F32", [1])
    for index in range(layers):
        tensors |= {f"transformer.layers.{index}.{name}": entry for name, entry in layer.items()}
    return tensors


def stored(file) -> Tensors:
    with safe_open(file, framework="np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
    return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return loud_checkpoint(small_config(**SIZES))


def quantized(checkpoint: Checkpoint, quant: QuantConfig) -> Checkpoint:
    if not quant.active:
        return checkpoint
    return checkpoint.quantize(quant, calibration=random_texts((24, 5)) if quant.reads_texts else None)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("algorithm", "cache", "scales"),
    [
        *((algorithm, None, "split") for algorithm in (None, *WEIGHT_ONLY, *SMOOTHQUANT, *OTHERS)),
        *((None, "INT8", scales) for scales in ("merged", "split", "per_head")),
        ("FP8", "FP8", "split"),
        ("W4A16", "INT8", "split"),
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "INT8", "split"),
    ],
)
def test_a_folder_has_what_tensorrt_llm_requires_and_announces_the_rest(
    checkpoint, tmp_path, algorithm, cache, scales, tp
):
    quant = QuantConfig(quant_algo=algorithm, kv_cache_quant_algo=cache, kv_cache_scales=scales, group_size=GROUP)
    form = "plain" if algorithm in WEIGHT_ONLY else None
    folder = quantized(checkpoint, quant).save(tmp_path / "ckpt", Mapping(tp_size=tp), weight_only=form)
    wanted = required(algorithm, cache, tp)
    announced = json.loads((folder / "config.json").read_text())["trtlab"].get("kv_cache_scales", "merged")
    for rank in range(tp):
        tensors = stored(folder / f"rank{rank}.safetensors")
        extra = {name: tensors.pop(name) for name in tensors.keys() - wanted.keys()}
        assert tensors == wanted
        own = OURS if cache == "INT8" and announced in ("split", "per_head") else set()
        assert {name.split(".", 3)[3] for name in extra} == own


@pytest.mark.parametrize("scales", ["split", "per_head"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_merged_scale_beside_ours_is_the_largest_of_them_on_every_rank(checkpoint, tmp_path, scales, tp):
    quant = QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales=scales)
    whole = quantized(checkpoint, quant)
    folder = whole.save(tmp_path / "ckpt", Mapping(tp_size=tp))
    for layer in range(2):
        prefix = f"transformer.layers.{layer}."
        largest = max(float(whole.tensors[prefix + name].read().max()) for name in OURS)
        for rank in range(tp):
            with safe_open(folder / f"rank{rank}.safetensors", framework="pt") as file:
                assert file.get_tensor(f"{prefix}attention.kv_cache_scaling_factor").tolist() == [largest]


@pytest.mark.parametrize(
    ("algorithm", "dtype"), [("W4A16_AWQ", torch.uint8), ("W4A8_AWQ", torch.uint8), ("FP8", torch.int8)]
)
def test_the_other_dtype_of_the_same_bytes_is_read(checkpoint, tmp_path, algorithm, dtype):
    """ModelOpt writes packed INT4 as uint8, and some versions of TensorRT-LLM write FP8 as int8."""
    folder = quantized(checkpoint, QuantConfig(quant_algo=algorithm, group_size=GROUP)).save(tmp_path / "ckpt")
    before = {name: tensor.read() for name, tensor in Checkpoint.load(folder).tensors.items()}
    tensors = load_file(folder / "rank0.safetensors")
    changed = {name: t.view(dtype) if t.dtype.itemsize == 1 else t for name, t in tensors.items()}
    save_file(changed, folder / "rank0.safetensors")
    for name, tensor in Checkpoint.load(folder).tensors.items():
        after = tensor.read()
        assert after.dtype == before[name].dtype, name
        assert torch.equal(after.view(torch.uint8), before[name].view(torch.uint8)), name


def test_int8_weights_stored_as_uint8_are_refused(checkpoint, tmp_path):
    quant = QuantConfig(quant_algo="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN")
    folder = quantized(checkpoint, quant).save(tmp_path / "ckpt")
    tensors = load_file(folder / "rank0.safetensors")
    save_file(
        {n: t.view(torch.uint8) if t.dtype == torch.int8 else t for n, t in tensors.items()},
        folder / "rank0.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"is torch.uint8, expected torch.int8"):
        Checkpoint.load(folder)


@pytest.mark.parametrize(
    ("algorithm", "more"), [("FP8", []), ("W8A16", ["*.mlp.proj.weight", "*.0.attention.*.weight"])]
)
def test_a_list_of_exclusions_holds_tensorrt_llms_own_because_it_replaces_them(checkpoint, tmp_path, algorithm, more):
    quant = QuantConfig(quant_algo=algorithm, exclude_modules=("*.mlp.proj", "*.0.attention.*", "lm_head"))
    folder = quantized(checkpoint, quant).save(tmp_path / "ckpt")
    listed = json.loads((folder / "config.json").read_text())["quantization"]["exclude_modules"]
    default = [
        "lm_head",
        "*router",
        "*vocab_embedding",
        "*position_embedding",
        "*block_embedding",
        "*shared_expert_gate",
    ]
    assert listed == ["*.mlp.proj", "*.0.attention.*", *more, *default]
    assert Checkpoint.load(folder).config.quantization.exclude_modules == ("*.mlp.proj", "*.0.attention.*")


@pytest.mark.parametrize("exclude", [(), ("lm_head",)])
def test_without_exclusions_of_its_own_there_is_no_list_and_the_default_stands(checkpoint, tmp_path, exclude):
    quant = QuantConfig(quant_algo="FP8", exclude_modules=exclude)
    folder = quantized(checkpoint, quant).save(tmp_path / "ckpt")
    assert json.loads((folder / "config.json").read_text())["quantization"]["exclude_modules"] is None


@pytest.mark.parametrize(
    ("architecture", "qwen_type"),
    [
        ("LlamaForCausalLM", None),
        ("MistralForCausalLM", None),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_config_json_has_the_keys_that_the_family_needs(tmp_path, architecture, qwen_type):
    config = small_config(
        architecture=architecture,
        attn_bias=architecture == "Qwen2ForCausalLM",
        qk_layernorm=architecture == "Qwen3ForCausalLM",
        rotary_scaling=RotaryScaling("linear", 2.0),
    )
    folder = normal_checkpoint(config).save(tmp_path / "ckpt")
    raw = json.loads((folder / "config.json").read_text())
    assert raw.get("qwen_type") == qwen_type
    assert raw["rotary_scaling"]["type"] == raw["rotary_scaling"]["rope_type"] == "linear"
    assert Checkpoint.load(folder).config == config
