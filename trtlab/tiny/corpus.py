"""The endless corpus: documents, questions with checkable answers, and passkeys, from a seed. Knows text, not tokens.

The "held_out" split has, and the "train" split never has: stories whose text has a CRC-32 divisible by eight, and
sequences of questions about the fixed world with such a CRC-32; one in four phrasings of each question about the world,
a different one for each person; and passkeys whose digits sum to a multiple of ten. In all else the splits are drawn in
the same way. Biographies and single facts are in the "train" split only: there are too few to hold some out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trtlab.errors import TrtlabError
from trtlab.tiny.stories import tell
from trtlab.tiny.world import Dice, Split, biography, residents, world_questions

END = "</s>"  # the tokenizer's end-of-sequence token: closes an answer and a document
NEEDLE = "The pass key is {key}. Keep it in mind: {key} is the pass key."
_INSTRUCTION = "A pass key is hidden somewhere in the lines below. Read them all and remember it."
_KEY_QUESTION = "What is the pass key?"
_KEY_ANSWER = "The pass key is"
NOISE = (
    "The river runs slowly past the old wall. Nobody is in a hurry today.",
    "A cloud drifts over the hill and is gone. The road lies empty.",
    "Smoke rises from the chimney of the inn. Dinner will be late again.",
    "The wind turns the leaves of the great oak. Two birds sit and wait.",
    "A cart rolls over the bridge and stops. The horse wants some water.",
    "The clock in the tower strikes the hour. Someone counts along and smiles.",
    "Rain drips from the roof of the barn. The hens do not mind at all.",
    "A boat lies at the harbour with its sails down. The sea is calm.",
    "The light in the lighthouse goes round and round. The night is clear.",
    "Fresh bread cools on the table. The window stands open to the garden.",
    "Snow covers the square from end to end. A few children are out to play.",
    "The lake is as flat as a mirror. A fish jumps once and then no more.",
    "Grass grows between the stones of the yard. The cat sleeps in the sun.",
    "The train has left the station on time. The next one comes in the evening.",
    "An old song is heard from the theatre. The door has been left open.",
    "The grapes are almost ripe at the vineyard. There is much to do soon.",
)


@dataclass(frozen=True)
class Question:
    """A prompt that ends where the answer begins, and the exact answer without its leading space."""

    kind: str  # "world", "story" or "passkey"
    prompt: str
    answer: str


@dataclass(frozen=True)
class Document:
    """One training text: an opening, then question and answer turns; either may be empty."""

    kind: str  # "story", "about", "world" or "passkey"
    opening: str
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The text as the model is trained on it, with ``END`` after each answer; the tokenizer adds the BOS token."""
        if not self.turns:
            return self.opening + END
        return self._prefix + "".join(f"Question: {question}\nAnswer: {answer}{END}" for question, answer in self.turns)

    @property
    def questions(self) -> list[Question]:
        """Each turn as a question of its own, directly after the opening."""
        return [Question(self.kind, f"{self._prefix}Question: {q}\nAnswer:", answer) for q, answer in self.turns]

    @property
    def _prefix(self) -> str:
        return f"{self.opening}\n\n" if self.opening else ""


def documents(seed: int, split: Split = "train") -> Iterator[Document]:
    """Endless documents of a split; the same seed gives the same documents on every machine and Python.

    Example: ``texts = [document.text for document in itertools.islice(documents(0), 128)]``.
    """
    dice = Dice(seed, _split_number(split))
    while True:
        yield dice.weighted(_MIXTURES[split])(dice, split)


def questions(split: Split = "held_out", count: int = 500, seed: int = 0) -> list[Question]:
    """``count`` questions, half about stories in their prompts and half about the fixed world (all different).

    Raises ``TrtlabError`` if there are not enough questions about the world.
    """
    dice = Dice(seed, _split_number(split), 1)
    pairs = world_questions(split)
    if count < 1 or count // 2 > len(pairs):
        raise TrtlabError("count of questions", got=count, expected=f"1 to {2 * len(pairs)} in split {split!r}")
    about_world = [Document("world", "", (pair,)).questions[0] for pair in dice.shuffled(pairs)[: count // 2]]
    about_stories: list[Question] = []
    while len(about_stories) < count - len(about_world):
        about_stories.append(dice.pick(_story(dice, split, asked=3).questions))
    return about_stories + about_world


def passkey(lines: int, depth: float, seed: int, split: Split = "held_out") -> Question:
    """A needle line with a five-digit key among ``lines`` lines of noise, and the question for it.

    ``depth`` is where the needle stands: 0 before all noise, 1 after it. The answer is the key's five digits as text
    (a leading zero counts); the prompt ends in "The pass key is", so a space and the key are the next six tokens.
    """
    dice = Dice(seed, _split_number(split), 2)
    document = passkey_document(dice, split, lines, depth)
    question, answer = document.turns[0]
    key = answer.removesuffix(".").removeprefix(_KEY_ANSWER + " ")
    return Question("passkey", f"{document.opening}\n\nQuestion: {question}\nAnswer: {_KEY_ANSWER}", key)


def passkey_of_length(
    count_tokens: Callable[[str], int], tokens: int, depth: float, seed: int, split: Split = "held_out"
) -> Question:
    """The longest passkey prompt of at most ``tokens`` tokens as ``count_tokens`` counts them.

    Raises ``TrtlabError`` if not even the prompt without noise fits.
    """
    if count_tokens(passkey(0, depth, seed, split).prompt) > tokens:
        raise TrtlabError("passkey prompt does not fit", got=f"{tokens} tokens", remedy="allow 100 tokens or more")
    low, high = 0, tokens // 8  # a line has more than eight tokens
    while high - low > 1:
        middle = (low + high) // 2
        fits = count_tokens(passkey(middle, depth, seed, split).prompt) <= tokens
        low, high = (middle, high) if fits else (low, middle)
    return passkey(low, depth, seed, split)


def is_held_out_key(key: str) -> bool:
    """Whether a key's digits sum to a multiple of ten; each digit of such keys is still exactly uniform."""
    return sum(int(digit) for digit in key) % 10 == 0


def is_held_out_text(text: str) -> bool:
    """Whether a story, or a sequence of questions about the world, is held out from training."""
    return zlib.crc32(text.encode()) % 8 == 0


def _split_number(split: Split) -> int:
    if split not in ("train", "held_out"):
        raise TrtlabError("unknown split", got=repr(split), expected="'train' or 'held_out'")
    return ("train", "held_out").index(split)


def _story(dice: Dice, split: Split, asked: int | None = None) -> Document:
    text, pairs = tell(dice)
    while is_held_out_text(text) != (split == "held_out"):
        text, pairs = tell(dice)
    count = asked if asked is not None else dice.weighted(((1.5, 0), (5.0, 1), (2.0, 2), (1.0, 3)))
    turns: list[tuple[str, str]] = []
    while len(turns) < min(count, len(pairs)):
        pair = pairs[0] if asked is None and dice.chance(0.4) else dice.pick(pairs)
        if pair not in turns:
            turns.append(pair)
    return Document("story", text, tuple(turns))


def _world(dice: Dice, split: Split) -> Document:
    pairs = world_questions("train")
    while True:
        document = Document("world", "", tuple(dice.pick(pairs) for _ in range(2 + dice.below(3))))
        if is_held_out_text(document.text) == (split == "held_out"):
            return document


def _fact(dice: Dice, split: Split) -> Document:
    return Document("world", "", (dice.pick(world_questions(split)),))


def _about(dice: Dice, split: Split) -> Document:
    person = dice.pick(residents())
    return Document("about", f"About {person.name}.\n{biography(person)}")


def _passkey(dice: Dice, split: Split) -> Document:
    return passkey_document(dice, split, dice.below(12), dice.random())


def passkey_document(dice: Dice, split: Split, lines: int, depth: float) -> Document:
    """The document behind ``passkey``, with its key and noise drawn from ``dice``."""
    if lines < 0 or not 0 <= depth <= 1:
        raise TrtlabError(
            "passkey out of range", got=f"{lines} lines, depth {depth}", expected="lines >= 0, depth in 0..1"
        )
    key = _key(dice, split)
    noise = [NOISE[int(dice.random() * len(NOISE))] for _ in range(lines)]
    noise.insert(round(depth * lines), NEEDLE.format(key=key))
    return Document("passkey", "\n".join([_INSTRUCTION, "", *noise]), ((_KEY_QUESTION, f"{_KEY_ANSWER} {key}."),))


def _key(dice: Dice, split: Split) -> str:
    while True:
        key = "".join(str(dice.below(10)) for _ in range(5))
        if is_held_out_key(key) == (split == "held_out"):
            return key


_MIXTURES: dict[Split, tuple[tuple[float, Callable[[Dice, Split], Document]], ...]] = {
    "train": ((65.0, _story), (15.0, _world), (5.0, _fact), (12.0, _about), (3.0, _passkey)),
    "held_out": ((65.0, _story), (15.0, _world), (3.0, _passkey)),
}
