import itertools
import re
import zlib

import pytest

from trtlab.errors import TrtlabError
from trtlab.tiny import corpus, stories, world
from trtlab.tiny.corpus import END, documents, is_held_out_key, is_held_out_text, passkey, questions
from trtlab.tiny.world import Dice, world_questions


def some(split, count, seed=3):
    return list(itertools.islice(documents(seed, split), count))


def test_documents_are_the_same_on_every_machine_and_python():
    prints = [zlib.crc32("".join(d.text for d in some(split, 500)).encode()) for split in ("train", "held_out")]
    assert prints == [1368372926, 3817413357]
    assert passkey(0, 0.5, 0).answer == "34904"


def test_a_seed_repeats_and_another_differs():
    assert some("train", 50) == some("train", 50)
    assert some("train", 50) != some("train", 50, seed=4)
    assert questions(seed=1, count=20) == questions(seed=1, count=20) != questions(seed=2, count=20)


def test_no_held_out_story_or_key_is_in_training():
    for split in ("train", "held_out"):
        for document in some(split, 3000):
            held_out = split == "held_out"
            if document.kind == "story":
                assert is_held_out_text(document.opening) == held_out
            elif document.kind == "passkey":
                key = re.search(r"\d{5}", document.text)
                assert is_held_out_key(key.group()) == held_out
            elif document.kind == "world" and len(document.turns) > 1:
                assert is_held_out_text(document.text) == held_out


def test_no_held_out_phrasing_is_in_training():
    train, held_out = (dict(world_questions(split)) for split in ("train", "held_out"))
    assert not train.keys() & held_out.keys()
    assert len(train) == 3 * len(held_out) == 3 * len(world.PEOPLE) * 7
    asked = {turn[0] for document in some("train", 5000) if document.kind == "world" for turn in document.turns}
    assert asked and not asked & held_out.keys()


def test_every_held_out_fact_is_taught_in_another_phrasing():
    assert set(dict(world_questions("held_out")).values()) <= set(dict(world_questions("train")).values())


def test_answers_to_stories_follow_from_the_text():
    checked = dict.fromkeys(("Who has", "Where is", "What colour", "How many"), 0)
    for seed in range(2000):
        text, pairs = stories.tell(Dice(seed))
        for question, answer in pairs:
            kind = next((kind for kind in checked if question.startswith(kind)), None)
            if kind:
                assert answer == retold(text, question), (text, question)
                checked[kind] += 1
    assert min(checked.values()) > 200


def retold(text, question):
    """The answer from the words of the story only: from the last sentence that is about the question."""
    subject = question.removesuffix("?").removesuffix(" have").split()[-1]
    sentences = text[:-1].split(". ")
    if question.startswith("Who has"):
        last = [s for s in sentences if re.search(rf"(picked up|took|gave) the {subject}\b", s)][-1]
        return f"{last.split()[-1] if ' gave ' in last else last.split()[0]} has the {subject}."
    if question.startswith("What colour"):
        last = [s for s in sentences if f" painted the {subject} " in s][-1]
        return f"The {subject} is {last.split()[-1]}."
    if question.startswith("How many"):
        return counted(sentences, subject, question.split()[2])
    if question.startswith("Where is the"):
        last = [s for s in sentences if f" left the {subject} at " in s][-1]
        return f"The {subject} is at the {last.split()[-1]}."
    moves = [s for s in sentences if re.match(rf"{subject} (went|walked|followed)", s)]
    return f"{subject} is at the {(moves or sentences[:1])[-1].split()[-1]}."


def counted(sentences, name, fruit):
    count = None
    for sentence in (s for s in sentences if s.startswith(f"{name} ")):
        if found := re.fullmatch(r"\w+ (?:found \w+ more and then )?had (\w+) (\w+)", sentence):
            count = stories.NUMBERS.index(found.group(1))
        elif eaten := re.fullmatch(r"\w+ ate (\w+) of the \w+", sentence):
            count -= stories.NUMBERS.index(eaten.group(1))
    return f"{name} has {stories.quantity(count, fruit)}."


def test_things_are_given_only_between_people_in_one_place():
    for seed in range(500):
        text, _ = stories.tell(Dice(seed))
        opening, *events = text.split(". ")
        start = opening.split()[-1]
        at = dict.fromkeys(re.findall(r"\b[A-Z]\w+", opening.split(", ", 1)[1]), start)
        for event in events:
            if move := re.fullmatch(r"(\w+) (?:went|walked|followed \w+) to the (\w+)", event):
                at[move.group(1)] = move.group(2)
            if gift := re.fullmatch(r"(\w+) gave the \w+ to (\w+)", event):
                assert at[gift.group(1)] == at[gift.group(2)], text


def test_half_the_questions_are_about_stories_and_none_about_the_world_repeats():
    asked = questions(count=300)
    about_world = [question for question in asked if question.kind == "world"]
    assert len(asked) == 300 and len({question.prompt for question in about_world}) == len(about_world) == 150
    assert all(question.prompt.endswith("\nAnswer:") for question in asked)


def test_a_document_is_its_questions_and_answers_joined():
    document = next(d for d in some("train", 200) if d.kind == "story" and len(d.turns) == 1)
    question = document.questions[0]
    assert f"{question.prompt} {question.answer}{END}" == document.text


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_stands_at_its_depth(depth):
    question = passkey(20, depth, seed=1)
    lines = question.prompt.split("\n\n")[1].split("\n")
    assert len(lines) == 21
    assert question.answer in lines[round(depth * 20)]
    assert question.prompt.count(question.answer) == 2
    assert question.prompt.endswith("The pass key is")


def test_each_digit_of_a_key_is_uniform_and_leading_zeros_occur():
    keys = [passkey(0, 0, seed).answer for seed in range(4000)]
    assert all(re.fullmatch(r"\d{5}", key) for key in keys)
    for position in range(5):
        counts = [sum(key[position] == digit for key in keys) for digit in "0123456789"]
        assert min(counts) > 320 and max(counts) < 480  # 400 expected, standard deviation 19


def test_a_passkey_prompt_fills_the_length_asked_for():
    question = corpus.passkey_of_length(lambda text: len(text.split()), 500, 0.5, seed=1)
    words = len(question.prompt.split())
    assert 500 - 20 < words <= 500


def test_out_of_range_requests_say_what_was_expected():
    with pytest.raises(TrtlabError, match="lines, depth"):
        passkey(3, 1.5, 0)
    with pytest.raises(TrtlabError, match="unknown split; got 'test'"):
        next(documents(0, "test"))
    with pytest.raises(TrtlabError, match="count of questions; got 0"):
        questions(count=0)
    with pytest.raises(TrtlabError, match="does not fit"):
        corpus.passkey_of_length(len, 10, 0.5, 0)
