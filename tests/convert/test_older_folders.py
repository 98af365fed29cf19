"""Folders that earlier versions of trtlab wrote: they open, and give the same numbers as what is written now."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtlab import BuildConfig, Checkpoint, Engine, Mapping, QuantConfig, SamplingParams
from trtlab.storage.fingerprint import fingerprint
from trtlab.storage.lazy import open_safetensors

from ..models import normal_checkpoint, random_texts, small_config

TEXTS = random_texts((24, 5))
SPLITS = [Mapping(), Mapping(tp_size=4), Mapping(tp_size=2, pp_size=2)]
PER_TOKEN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
RECIPES = [
    {"kv_cache_scales": "split"},
    {"kv_cache_scales": "per_head"},
    {"quant_algo": "W4A16"},
    {"quant_algo": "W4A16_AWQ", "group_size": 64},
    {"quant_algo": PER_TOKEN},
    {"quant_algo": PER_TOKEN, "kv_cache_scales": "merged"},
]


def write_as_before(folder):
    """Give a folder the form of earlier versions.

    Packed INT4 was uint8, SmoothQuant per token had scales that nothing used, and beside the scales of K and of V stood
    no merged one. An engine had a fingerprint of each rank, and no digests.
    """
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("pretrained_config", config)["quantization"]
    files = sorted(folder.glob("rank*.safetensors"))
    for file in files:
        tensors = load_file(file)
        for name, tensor in list(tensors.items()):
            prefix = name.rpartition("attention.")[0]
            if name.endswith("attention.k_cache_scaling_factor"):
                del tensors[f"{prefix}attention.kv_cache_scaling_factor"]
            if name.endswith("attention.qkv.weight") and quantization["quant_algo"] == PER_TOKEN:
                tensors |= {
                    f"{prefix}{part}.quantization_scaling_factor": torch.ones(1) for part in ("attention", "mlp")
                }
            if tensor.dtype == torch.int8 and quantization["quant_algo"] in ("W4A16", "W4A16_AWQ"):
                tensors[name] = tensor.view(torch.uint8)
        file.unlink()  # it may be a link
        save_file(tensors, file)
    if "build_config" in config:
        del config["trtlab"]["digests"]
        config["trtlab"]["fingerprints"] = [fingerprint(open_safetensors(file)) for file in files]
        (folder / "config.json").write_text(json.dumps(config))


def model(**recipe):
    config = small_config(hidden_size=128, head_size=64, intermediate_size=256, num_hidden_layers=2)
    return normal_checkpoint(config).quantize(QuantConfig(kv_cache_quant_algo="INT8", **recipe), calibration=TEXTS)


def answer(engine):
    with engine.session(backend="torch", device="cpu") as session:
        tokens = session.generate(TEXTS[1], SamplingParams(max_new_tokens=8)).token_ids
        return tokens, session.logits(TEXTS[1])


@pytest.mark.parametrize("mapping", SPLITS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_checkpoints_and_engines_of_earlier_versions_open_with_equal_numbers(recipe, mapping, tmp_path, files_of):
    told = {"weight_only": "integers"} if recipe.get("quant_algo") == "W4A16" else {}
    now = model(**recipe).save(tmp_path / "now", mapping, **told)
    engine = Checkpoint.load(now).build(BuildConfig(max_seq_len=48), mapping=mapping, plan=False)
    expected, expected_logits = answer(engine)
    before = shutil.copytree(now, tmp_path / "before")
    built = engine.save(tmp_path / "engine", weights="copy")
    write_as_before(before)
    write_as_before(built)
    assert files_of(before) != files_of(now)

    assert files_of(Checkpoint.load(before).save(tmp_path / "again", mapping, **told)) == files_of(now)
    saved = Engine.load(built).save(tmp_path / "engine again")
    for folder, verify in ((built, False), (saved, True)):
        tokens, logits = answer(Engine.load(folder, verify=verify))
        assert tokens == expected
        assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("scales", ["split", "per_head"])
def test_one_rank_of_an_earlier_folder_opens_alone(scales, tmp_path):
    now = model(kv_cache_scales=scales).save(tmp_path / "now", Mapping(tp_size=2))
    before = shutil.copytree(now, tmp_path / "before")
    write_as_before(before)
    expected, tensors = (Checkpoint.load(folder, rank=1).tensors for folder in (now, before))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():  # the other rank's heads may have the largest scale
        heads_elsewhere = scales == "per_head" and name.endswith("attention.kv_cache_scaling_factor")
        assert heads_elsewhere or torch.equal(tensor.read(), expected[name].read())
