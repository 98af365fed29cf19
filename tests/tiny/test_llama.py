import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from trtlab.tiny import EXAMPLES, corpus, evaluate, llama_dir
from trtlab.tiny.batches import ANSWER, Batches
from trtlab.tiny.train import OUTLIER_CHANNELS, Training, learning_rate


@pytest.fixture(scope="module")
def loaded():
    return evaluate.load()


def test_importing_the_package_and_its_corpus_imports_no_torch():
    code = (
        "import sys, types, pathlib; package = types.ModuleType('trtlab'); "
        f"package.__path__ = [{str(llama_dir().parents[1])!r}]; sys.modules['trtlab'] = package; "
        "import trtlab.tiny.corpus; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_folder_is_standard_small_and_bfloat16():
    names = {file.name for file in llama_dir().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "chat_template.jinja"} <= names
    assert sum(file.stat().st_size for file in llama_dir().iterdir()) < 9.5e6
    with safe_open(llama_dir() / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 2e6 < sum(tensor.numel() for tensor in tensors) < 6e6


def test_every_dimension_of_a_linear_layer_is_divisible_by_128():
    config = json.loads((llama_dir() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == 8192
    widths = [config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")]
    widths += [config["head_dim"] * config[key] for key in ("num_attention_heads", "num_key_value_heads")]
    assert [width % 128 for width in widths] == [0] * 5


def test_digits_are_tokens_of_their_own_and_any_text_survives(loaded):
    tokenizer = loaded.tokenizer
    plain = tokenizer("", add_special_tokens=False).input_ids
    assert plain == [] and tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer.tokenize("is 04217.")[-6:] == ["0", "4", "2", "1", "7", "."]
    for text in ("The pass key is 04217.", "Grüße, 世界!\n\tx  y", "a < b > c"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_chat_template_gives_the_corpus_form(loaded):
    document = next(d for d in corpus.documents(0) if d.kind == "story" and len(d.turns) == 2)
    messages = [{"role": "system", "content": document.opening}]
    for question, answer in document.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "<s>" + document.text
    prompt = loaded.tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>" + document.questions[0].prompt


def test_held_out_documents_are_as_likely_as_training_ones(loaded):
    held_out, train = (evaluate.perplexity(loaded, split, count=60) for split in ("held_out", "train"))
    assert train < held_out < 1.8


def test_held_out_questions_are_answered_word_for_word(loaded):
    asked = corpus.questions("held_out", 24, seed=5)
    assert len(evaluate.exact_match(loaded, asked)) <= 1


def test_a_wrong_answer_counts_as_missed(loaded):
    question = corpus.questions("held_out", 2)[1]
    wrong = corpus.Question(question.kind, question.prompt, question.answer + "?")
    assert evaluate.exact_match(loaded, [question, wrong]) == [wrong]


@pytest.mark.parametrize(("length", "depth"), [(2048, 0.1), (2048, 0.7), (8192, 0.5)])
def test_a_passkey_is_found(loaded, length, depth):
    assert evaluate.passkey_found(loaded, length, depth, seed=1)


def test_the_longest_passkey_prompt_fills_the_context(loaded):
    prompt = corpus.passkey_of_length(loaded.count, 8192 - evaluate.PASSKEY_TOKENS, 0.5, seed=1).prompt
    assert 8192 - 24 < loaded.count(prompt) + evaluate.PASSKEY_TOKENS <= 8192


def test_every_norm_has_outlier_channels_where_training_began_with_them(loaded):
    found = evaluate.outliers(loaded, count=64)
    assert len(found) == 12
    assert sum(norm.ratio >= 7.5 for norm in found) >= 11
    for norm in found:
        assert norm.ratio >= 6, norm
        assert set(norm.channels) <= set(OUTLIER_CHANNELS), norm


def test_margins_along_the_examples_are_wide(loaded):
    assert min(min(evaluate.margins(loaded, prompt)) for prompt in EXAMPLES) > 0.1


def test_a_batch_depends_on_seed_and_step_alone_and_weighs_answers():
    file = str(llama_dir() / "tokenizer.json")
    one, two = (Batches(file, seed=0, steps=10, tokens=2048, lengths=(256, 512, 1024)) for _ in range(2))
    two(3)
    first, again = one(0), two(0)
    assert first.tokens.shape == (8, 257)
    assert (first.tokens == again.tokens).all() and (first.weights == again.weights).all()
    text = one.tokenizer.decode(first.tokens[first.weights == ANSWER].tolist(), skip_special_tokens=False)
    assert text.endswith("</s>") and "Question" not in text
    assert any(one(step).tokens.shape[1] == 1025 for step in range(5, 10))


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate(Training(), step) for step in range(Training.steps)]
    top = rates.index(max(rates))
    assert 90 < top < 110 and rates[0] < rates[50] < rates[top] > rates[700] > rates[-1] > 0


def test_unknown_parts_of_the_report_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", "size", "speed"])
    with pytest.raises(evaluate.TrtlabError, match=r"unknown part of the report; got \['speed'\]"):
        evaluate.main()
