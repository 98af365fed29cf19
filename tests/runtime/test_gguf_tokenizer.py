"""Tokenizers of GGUF files: the ids of transformers' reader and of the tokenizer that each file was written from."""

from __future__ import annotations

import random
import shutil

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner

from trtlab import Checkpoint, RequestError
from trtlab.runtime.tokenizer import Tokenizer

from ..gguf_files import byte_level_keys, sentencepiece_keys, write_gguf
from ..models import LLAMA2_PIECES, TRAINING_TEXT, train_sentencepiece, write_random_model

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = Regex(ENDINGS + r"\p{N}{1,3}" + REST)
QWEN2 = Regex(ENDINGS + r"\p{N}" + REST)
SPLITS = {  # by llama.cpp's names
    "llama-bpe": pre_tokenizers.Split(LLAMA3, "isolated"),
    "qwen2": pre_tokenizers.Split(QWEN2, "isolated"),
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "gpt-2": None,
}
WORDS = [
    *TRAINING_TEXT,
    "it's 12345 and 67890, can't we'll DON'T",
    "x  y   z\n\n\tdef f():\n    return 1.50 + 2024",
] * 3
SPECIAL = ["<|begin|>", "<|end|>", "<|im_end|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
MESSAGES = [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": "größe 🙂 12345?"}]
ALPHABET = [
    *"abcdefg HIJ   \n\t0123456789éßÄ日本語🙂🙃'.,;!?-_/()[]{}",
    *(
        "\r\n",
        "    ",
        " the",
        "can't",
        "DON'T",
        "we'LL",
        "e\u0301",
        "\u00a0",
        "\u200b",
        "👩‍👩‍👧",
        "\U0001f1eb\U0001f1f7",
        "²Ⅷ٣",
    ),
]
PIECES = {"bos_id": 1, "eos_id": 2, "vocab_size": 400}


def random_texts(count, words, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choice(words) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def train_byte_level(folder, pre):
    """Write the tokenizer.json of a byte-level BPE tokenizer that splits as llama.cpp's rule ``pre`` says."""
    from transformers import PreTrainedTokenizerFast

    inner, split = Inner(models.BPE()), SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    inner.normalizer = normalizers.NFC() if pre == "qwen2" else None
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    inner.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    if pre == "llama-bpe":
        inner.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """``written(pre)`` is a GGUF file with a tokenizer, and the one that it was written from."""
    made, model = {}, tmp_path_factory.mktemp("model")
    write_random_model(model, "LlamaForCausalLM", vocab_size=600)

    def make(pre):
        if pre not in made:
            folder, file = tmp_path_factory.mktemp("original"), tmp_path_factory.mktemp("gguf") / "model.gguf"
            if pre == "sentencepiece":
                original = train_sentencepiece(**LLAMA2_PIECES)
                keys = sentencepiece_keys(original, add_bos_token=True) | {"tokenizer.chat_template": TEMPLATE}
            else:
                original = train_byte_level(folder, pre)
                ends = {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 2, "add_bos_token": pre == "llama-bpe"}
                keys = byte_level_keys(folder, pre, 600, **ends)
            made[pre] = write_gguf(file, model, tokenizer=keys), original
        return made[pre]

    return make


@pytest.fixture(scope="module")
def by_transformers():
    """The reference: transformers' reader of a file's tokenizer."""
    from transformers import AutoTokenizer

    return lambda file: AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


@pytest.mark.parametrize("pre", [*SPLITS, "sentencepiece"])
def test_ids_texts_and_chat_are_those_of_transformers(pre, written, by_transformers):
    file, _ = written(pre)
    ours, reference = Tokenizer(file), by_transformers(file)
    special = ["<s>", "</s>", "<unk>"] if pre == "sentencepiece" else [*SPECIAL, "<think>"]
    for text in random_texts(1000, [*ALPHABET, *special]):
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"], text
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    assert (
        ours.encode_chat(MESSAGES) == reference.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    )
    assert ours.special_texts.items() >= {token: ours.encode(token)[-1] for token in special[:2]}.items()


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_and_texts_are_those_of_the_byte_level_tokenizer_in_the_file(pre, written):
    """But for two rules that transformers does not read of a file, for which no text is drawn.

    ``smollm`` splits digits off before anything else, and spaces in front of a digit so stay together; ``qwen2``
    composes characters first.
    """
    file, original = written(pre)
    ours = Tokenizer(file)
    apart = {"smollm": [*"0123456789", "²Ⅷ٣"], "qwen2": ["e\u0301"]}.get(pre, [])
    words = [word for word in [*ALPHABET, *SPECIAL, "<think>"] if word not in apart]
    if pre == "smollm":
        words += [f"{letter}{digit}" for letter in "ab.," for digit in "0123456789"]
    for text in random_texts(1000, words, seed=1):
        ids = original(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=True), text
    chat = original.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.encode_chat(MESSAGES) == original(chat, add_special_tokens=False)["input_ids"]
    assert ours.end_ids == {1, 2}


def test_ids_and_texts_are_those_of_the_sentencepiece_model_in_the_file(written):
    """But for texts that begin with a space, of which transformers' reader loses one."""
    import sentencepiece

    file, model = written("sentencepiece")
    ours, original = Tokenizer(file), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in (f"x{text}" for text in random_texts(1000, ALPHABET, seed=2)):
        ids = original.encode(text)
        assert ours.encode(text) == [original.bos_id(), *ids], text
        assert ours.decode(ids) == original.decode(ids), text
    assert ours.end_ids == {original.eos_id()}
    assert ours.special_texts == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_a_tokenizer_that_lies_beside_the_file_is_not_used(written, tmp_path):
    file, _ = written("llama-bpe")
    expected = Tokenizer(file).encode("größe 12345 <|im_end|>")
    train_byte_level(tmp_path, "smollm")
    checkpoint = Checkpoint.from_gguf(shutil.copy(file, tmp_path / "model.gguf"))
    assert Tokenizer(checkpoint.tokenizer_path).encode("größe 12345 <|im_end|>") == expected
    assert Tokenizer(tmp_path).encode("größe 12345 <|im_end|>") != expected  # has no first token


@pytest.mark.parametrize("pre", ["llama-bpe", "sentencepiece"])
def test_saved_with_the_checkpoint_it_gives_the_same_ids(pre, written, tmp_path):
    file, _ = written(pre)
    ours = Tokenizer(file)
    saved = Tokenizer(Checkpoint.load(Checkpoint.from_gguf(file).save(tmp_path / "saved")).tokenizer_path)
    for text in random_texts(100, [*ALPHABET, "<s>", *SPECIAL, "<think>"], seed=3):
        ids = ours.encode(text)
        assert saved.encode(text) == ids and saved.decode(ids) == ours.decode(ids), text
    assert (saved.end_ids, saved.special_texts) == (ours.end_ids, ours.special_texts)
    assert saved.encode_chat(MESSAGES) == ours.encode_chat(MESSAGES)


def test_a_kind_of_tokenizer_that_transformers_does_not_read_is_named(written, random_model, tmp_path):
    keys = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a", "b"]}
    file = write_gguf(tmp_path / "a.gguf", random_model("LlamaForCausalLM"), keys=keys)
    tokenizer = Tokenizer(Checkpoint.from_gguf(file).tokenizer_path)
    with pytest.raises(RequestError, match=r"tokenizer in a\.gguf cannot be read.*bert.*give token ids"):
        tokenizer.encode("a")
    assert tokenizer.end_ids == frozenset()
    assert (
        Checkpoint.from_gguf(write_gguf(tmp_path / "b.gguf", random_model("LlamaForCausalLM"))).tokenizer_path is None
    )
