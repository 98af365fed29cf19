"""llama.cpp's GGUF files: each architecture and type gives transformers' logits; what is not supported is named."""

from __future__ import annotations

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torch

from trtlab import Checkpoint, CheckpointError, ConfigError, QuantConfig, SamplingParams
from trtlab.cli import main
from trtlab.convert.gguf import read_gguf
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.storage import gguf_file as reader
from trtlab.storage.gguf_file import open_gguf

from ..gguf_files import BLOCKS, FLOATS, K_BLOCKS, QWEN3, SIZES, byte_level_keys, write_gguf

PROMPT = [5, 17, 3, 88, 41, 9, 2, 70]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LOUDER = 1.2 * (1 + 0.1 * torch.log(torch.tensor(4.0)).item())
MODELS = {  # architecture, changes of its config, further keys of the file
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 4}, {}),
    "grouped heads": ("LlamaForCausalLM", {}, {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, {}),
    "another base": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}, {}),
    "qwen2": ("Qwen2ForCausalLM", {}, {}),
    "qwen3": ("Qwen3ForCausalLM", QWEN3, {}),
}
# What transformers' reader of GGUF files does not read: here the reference is the folder that the file is written from.
UNREAD = {
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, {}),
    "linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR}, {}),
    "linear by default": ("LlamaForCausalLM", {"rope_parameters": LINEAR}, {"{}.rope.scaling.type": ...}),
    "linear of the oldest files": (
        "LlamaForCausalLM",
        {"rope_parameters": LINEAR},
        {"{}.rope.scaling.type": ..., "{}.rope.scaling.factor": ..., "{}.rope.scale_linear": 2.0},
    ),
    "no scaling": ("LlamaForCausalLM", {}, {"{}.rope.scaling.type": "none", "{}.rope.scaling.factor": 4.0}),
    "yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}, {}),
    "louder yarn": (
        "LlamaForCausalLM",
        {"rope_parameters": {**YARN, "attention_factor": LOUDER, "beta_fast": 16.0, "beta_slow": 2.0}},
        {
            "{}.rope.scaling.attn_factor": 1.2,
            "{}.rope.scaling.yarn_beta_fast": 16.0,
            "{}.rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "llama 3.1": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}, {}),
    "wide heads": ("LlamaForCausalLM", {"head_dim": 96}, {}),
}


@pytest.fixture(scope="module")
def gguf_file(random_model, tmp_path_factory):
    """``gguf_file(architecture, changes, kind, keys)`` is a GGUF file and the folder that it is written from."""
    folder, files = tmp_path_factory.mktemp("gguf"), {}

    def make(architecture="LlamaForCausalLM", changes=None, kind="F32", keys=None):
        model = random_model(architecture, **SIZES, **(changes or {}))
        key = (model, kind, str(keys))
        if key not in files:
            files[key] = write_gguf(folder / f"{len(files)}.gguf", model, kind, keys=keys)
        return files[key], model

    return make


@pytest.fixture
def transformers_gguf():
    """The reference: a GGUF file by transformers' reader, in float32."""
    from transformers import AutoModelForCausalLM

    def load(file):
        kwargs = {"gguf_file": file.name, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=False, **kwargs).eval()

    return load


def assert_same_answers(session, reference):
    """The logits of a prompt and its answer agree, and each of 64 tokens is the one that the reference would choose.

    Sums of a few hundred float32 products differ by about 1e-5 here, whatever their order, and the two likeliest of
    the 99 tokens by more than ten times as much, so that no processor chooses another one.
    """
    answer = list(session.generate(PROMPT, SamplingParams(max_new_tokens=64)).token_ids)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT + answer])).logits[0]
    torch.testing.assert_close(session.logits(PROMPT + answer), expected, atol=1e-3, rtol=0)
    assert answer == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert -expected.topk(2).values.diff().max() > 1e-4 and expected.std() > 0.5


@pytest.mark.parametrize("model", MODELS)
def test_each_architecture_gives_the_logits_and_tokens_of_transformers(
    model, gguf_file, open_session, transformers_gguf
):
    architecture, changes, keys = MODELS[model]
    file, _ = gguf_file(architecture, changes, keys=keys)
    assert_same_answers(open_session(Checkpoint.from_gguf(file)), transformers_gguf(file))


@pytest.mark.parametrize("kind", (*FLOATS[1:], *BLOCKS, *K_BLOCKS))
def test_each_type_gives_the_logits_and_tokens_of_transformers(kind, gguf_file, open_session, transformers_gguf):
    file, _ = gguf_file(kind=kind)
    assert_same_answers(open_session(Checkpoint.from_gguf(file, "float32")), transformers_gguf(file))


@pytest.mark.parametrize("model", UNREAD)
def test_what_transformers_does_not_read_gives_the_logits_of_the_folder(model, gguf_file, open_session, hugging_face):
    architecture, changes, keys = UNREAD[model]
    file, folder = gguf_file(architecture, changes, keys=keys)
    assert_same_answers(open_session(Checkpoint.from_gguf(file)), hugging_face(folder))


@pytest.mark.parametrize("model", [*MODELS, *UNREAD])
def test_a_file_of_floats_is_the_folder_that_it_is_written_from(model, gguf_file):
    architecture, changes, keys = (MODELS | UNREAD)[model]
    file, folder = gguf_file(architecture, changes, keys=keys)
    ours, source = Checkpoint.from_gguf(file), Checkpoint.from_hugging_face(folder)
    family = {"architecture": ours.config.architecture}  # a Mistral's file says llama
    scaling = {"rotary_scaling": ours.config.rotary_scaling}
    assert ours.config.norm_epsilon == pytest.approx(source.config.norm_epsilon, rel=1e-6)  # float32 in the file
    same = {**family, **scaling, "norm_epsilon": ours.config.norm_epsilon}
    assert ours.config == source.config.replace(**same)
    assert (ours.config.rotary_scaling is None) == (source.config.rotary_scaling is None)
    assert set(ours.tensors) == set(source.tensors)
    assert all(torch.equal(ours.tensors[name].read(), tensor.read()) for name, tensor in source.tensors.items())


def test_llama_31s_scaling_is_found_in_its_divisors(gguf_file):
    file, folder = gguf_file(changes={"rope_parameters": LLAMA3})
    ours = Checkpoint.from_gguf(file).config.rotary_scaling
    assert ours == Checkpoint.from_hugging_face(folder).config.rotary_scaling


def test_another_scaling_in_the_divisors_is_refused(random_model, tmp_path):
    folder = random_model("LlamaForCausalLM", **SIZES, rope_parameters={**LLAMA3, "high_freq_factor": 3.0})
    with pytest.raises(CheckpointError, match=r"a\.gguf.*rope_freqs\.weight is another scaling.*Hugging Face folder"):
        Checkpoint.from_gguf(write_gguf(tmp_path / "a.gguf", folder))


@pytest.mark.parametrize(
    ("kind", "auto"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_1", "bfloat16")]
)
def test_the_type_is_that_of_most_matrices_or_the_one_asked_for(kind, auto, gguf_file):
    file, _ = gguf_file(kind=kind)
    assert Checkpoint.from_gguf(file).config.dtype == auto
    reference = Checkpoint.from_gguf(file, "float32")
    for dtype in ("float32", "float16", "bfloat16"):
        checkpoint = Checkpoint.from_gguf(file, dtype)
        assert checkpoint.config.dtype == dtype
        for name, tensor in checkpoint.tensors.items():
            wanted = reference.tensors[name].read().to(checkpoint.config.torch_dtype)
            assert tensor.dtype == wanted.dtype and torch.equal(tensor.read(), wanted)
            assert torch.equal(tensor.narrow(0, 3, 50).read(), wanted[3:53])
    with pytest.raises(ConfigError, match="dtype"):
        Checkpoint.from_gguf(file, "int8")


def test_the_card_says_what_is_dequantized(random_model, gguf_file, tmp_path):
    kinds = {"token_embd.weight": "Q8_0", "output.weight": "Q6_K", "blk.1.ffn_down.weight": "Q4_1"}
    file = write_gguf(tmp_path / "mixed.gguf", random_model("LlamaForCausalLM", **SIZES), "Q4_K", kinds=kinds)
    assert "GGUF file mixed.gguf, dequantized from Q8_0 and Q4_1 and Q4_K and Q6_K" in repr(Checkpoint.from_gguf(file))
    assert "dequantized" not in repr(Checkpoint.from_gguf(gguf_file()[0]))


def test_a_pickle_opens_the_file_again_and_a_changed_file_is_refused(gguf_file, tmp_path):
    source, _ = gguf_file(kind="Q5_1")
    file = tmp_path / "a.gguf"
    shutil.copy(source, file)
    checkpoint = Checkpoint.from_gguf(file, "float16")
    again = pickle.loads(pickle.dumps(checkpoint))
    assert (again.config, again.source) == (checkpoint.config, checkpoint.source)
    assert all(torch.equal(again.tensors[name].read(), tensor.read()) for name, tensor in checkpoint.tensors.items())
    other, _ = gguf_file(kind="Q5_0")
    shutil.copy(other, file)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        next(iter(checkpoint.tensors.values())).read()


def test_saving_and_loading_keeps_numbers_tokenizer_and_end_ids(talking_model, open_session, tmp_path):
    tokenizer = byte_level_keys(talking_model, "gpt-2", bos_token_id=0, eos_token_id=1, eot_token_id=2)
    file = write_gguf(tmp_path / "model", talking_model, "Q8_0", tokenizer=tokenizer, kinds={"output.weight": "F16"})
    opened = Checkpoint.from_gguf(file, "float32")
    main(["convert", "--gguf_file", str(file), "--dtype", "float32", "--output_dir", str(tmp_path / "converted")])
    for folder in (opened.save(tmp_path / "saved"), tmp_path / "converted"):
        loaded = Checkpoint.load(folder)
        assert loaded.config == opened.config and loaded.source == opened.source
        assert all(torch.equal(loaded.tensors[name].read(), tensor.read()) for name, tensor in opened.tensors.items())
        ours, theirs = open_session(opened), open_session(loaded)
        assert ours.encode("the cat 🙂") == theirs.encode("the cat 🙂")
        assert ours.generate("the cat").token_ids == theirs.generate("the cat").token_ids
        assert Tokenizer(opened.tokenizer_path).end_ids == Tokenizer(loaded.tokenizer_path).end_ids == {1, 2}


def test_it_quantizes_and_splits_as_the_folder_that_it_is_written_from(gguf_file):
    file, folder = gguf_file()
    ours, theirs = (
        c.quantize(QuantConfig(quant_algo="W8A16"))
        for c in (Checkpoint.from_gguf(file), Checkpoint.from_hugging_face(folder))
    )
    assert all(torch.equal(ours.tensors[name].read(), tensor.read()) for name, tensor in theirs.tensors.items())


REFUSED = {
    "another architecture": ({"general.architecture": "phi3"}, r"architecture 'phi3' is not supported.*llama \| qwen2"),
    "no keys": ({"{}.block_count": ..., "{}.attention.head_count": ...}, "block_count.*convert the model to GGUF"),
    "experts": ({"{}.expert_count": 8}, "not supported: expert_count=8"),
    "partial rotary": ({"{}.rope.dimension_count": 32}, "rope.dimension_count 32 is not the width of a head, 64"),
    "values of another width": ({"{}.attention.value_length": 32}, "value_length 32 is not the width of a head, 64"),
    "heads that differ": ({"{}.attention.head_count": [4, 2]}, r"head_count differs from layer to layer.*\[4, 2\]"),
    "K and V that differ": ({"{}.attention.head_count_kv": [2, 4]}, r"head_count_kv differs from layer to layer"),
    "sizes that differ": ({"{}.feed_forward_length": [256, 128]}, "feed_forward_length differs from layer to layer"),
    "softcapping": ({"{}.attn_logit_softcapping": 30.0}, "not supported: attn_logit_softcapping=30.0"),
    "another scaling": ({"{}.rope.scaling.type": "longrope"}, "rope.scaling.type.*longrope"),
    "yarn without a factor": ({"{}.rope.scaling.type": "yarn"}, "rope.scaling.factor is missing, which yarn needs"),
    "more layers": ({"{}.block_count": 3}, "missing blk.2.attn_norm.weight"),
    "many layers": ({"{}.block_count": 2**31}, "2147483648 layers and 21 tensors"),
    "other sizes": ({"{}.embedding_length": 512, "{}.rope.dimension_count": ...}, r"token_embd.weight is \[99, 256\]"),
    "text for a number": ({"{}.block_count": "two"}, "block_count.*two"),
    "a key within another": ({"{}.rope": 1}, "key 'llama.rope' beside one that it begins with|llama.rope"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case, random_model, tmp_path):
    keys, message = REFUSED[case]
    file = write_gguf(tmp_path / "a.gguf", random_model("LlamaForCausalLM", **SIZES), keys=keys)
    with pytest.raises(CheckpointError, match=rf"(?s)a\.gguf.*{message}") as refused:
        Checkpoint.from_gguf(file)
    assert refused.value.remedy


@pytest.mark.parametrize("value", [None, 7, ["llama"], np.array([1, 2])], ids=["missing", "number", "list", "array"])
def test_an_architecture_that_is_no_text_is_refused(value, gguf_file):
    file = open_gguf(gguf_file()[0])
    with pytest.raises(CheckpointError, match=r"the architecture .* is not supported.*llama \| qwen2 \| qwen3"):
        read_gguf(dataclasses.replace(file, metadata={**file.metadata, "general.architecture": value}))


def test_a_list_of_equal_numbers_is_one_number(random_model, tmp_path):
    keys = {
        "{}.attention.head_count": [4, 4],
        "{}.attention.head_count_kv": [2, 2],
        "{}.feed_forward_length": [256] * 2,
    }
    folder = random_model("LlamaForCausalLM", **SIZES)
    config = Checkpoint.from_gguf(write_gguf(tmp_path / "a.gguf", folder, keys=keys)).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 256)


def test_a_key_that_no_one_knows_is_a_warning_or_an_error(random_model, tmp_path, caplog):
    folder = random_model("LlamaForCausalLM", **SIZES)
    file = write_gguf(tmp_path / "a.gguf", folder, keys={"{}.rope.new_setting": 3})
    with pytest.raises(CheckpointError, match=r"rope\.new_setting"):
        Checkpoint.from_gguf(file, allow_unknown_config=False)
    assert not caplog.records
    Checkpoint.from_gguf(file)
    assert "unknown keys, which are ignored: rope.new_setting=3" in caplog.text


def test_a_folder_is_refused_with_the_file_in_it(gguf_file, tmp_path):
    shutil.copy(gguf_file()[0], tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"is a folder; expected a GGUF file.*give .*model\.gguf"):
        Checkpoint.from_gguf(tmp_path)
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"is a folder; expected a GGUF file.*Hugging Face folder"):
        Checkpoint.from_gguf(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing.*give the path of a \.gguf file"):
        Checkpoint.from_gguf(tmp_path / "model.gguf")


def test_each_type_that_is_read_is_in_this_test():
    assert set(FLOATS) == set(reader.FLOATS) and {*BLOCKS, *K_BLOCKS} == set(reader.BLOCKS)
