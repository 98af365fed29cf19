"""The fixed world: people with their homes and pets, and questions about them. Knows no stories and no tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

Split = Literal["train", "held_out"]
T = TypeVar("T")

PEOPLE = (
    "Mila Tom Anna Ben Clara David Ella Felix Grace Hugo Iris Jonas Kate Leo Lucy Max Nina Oscar Petra Quinn Rosa Sam "
    "Tessa Ugo Vera Walter Wendy Xaver Yara Zeno Alma Bruno Cora Dan Edith Frank Gina Henry Ida Jack Karla Lars Marta "
    "Nils Olga Paul Ruth Simon"
).split()
PLACES = (
    "mill bakery harbour library school market lighthouse orchard bridge castle garden station tower chapel forge barn "
    "inn theatre museum bathhouse quarry brewery meadow vineyard"
).split()
OBJECTS = (
    "kite lantern basket rope drum map bucket ladder hammer violin book umbrella clock coat scarf flute mirror candle "
    "blanket bell brush compass cup doll feather glove hat jar kettle letter net paddle pillow plate pot ring saw "
    "shell shovel spoon stone telescope tray trumpet vase wheel whistle bottle"
).split()
COLOURS = "red blue green yellow white black brown grey".split()
JOBS = (
    "baker teacher sailor gardener doctor painter tailor carpenter fisher farmer singer potter weaver smith cook guard "
    "courier printer barber mason shepherd nurse jeweller judge"
).split()
PETS = "dog cat rabbit parrot pony goat turtle hen duck goose mouse donkey".split()
PET_NAMES = (
    "Biscuit Pepper Mango Olive Pixie Rusty Shadow Sunny Toffee Waffle Ziggy Acorn Bubbles Clover Domino Echo Fudge "
    "Ginger Hazel Jasper Kiwi Lucky Maple Nutmeg"
).split()
FOODS = "soup pancakes cheese honey bread rice noodles porridge dumplings salad chocolate pie".split()
SPOTS = (
    "by the river",
    "on the hill",
    "near the lake",
    "behind the old wall",
    "at the end of the road",
    "beside the great oak",
    "under the cliff",
    "next to the square",
)
PHRASINGS = 4  # of each question; one in four is held out, a different one for each person

_RELATIONS: dict[str, tuple[str, str, str, str]] = {
    "home": (
        "Where does {name} live?",
        "What is the home of {name}?",
        "In which place does {name} live?",
        "Tell me where {name} lives.",
    ),
    "job": (
        "What is the job of {name}?",
        "What does {name} work as?",
        "What does {name} do for a living?",
        "Which job does {name} have?",
    ),
    "pet": (
        "Which pet does {name} have?",
        "What animal does {name} keep?",
        "What kind of pet lives with {name}?",
        "Tell me about the pet of {name}.",
    ),
    "friend": (
        "Who is the best friend of {name}?",
        "Which friend does {name} like most?",
        "Whom does {name} call the best friend?",
        "Tell me who the best friend of {name} is.",
    ),
    "food": (
        "What does {name} like to eat best?",
        "Which food does {name} like best?",
        "What is the favourite food of {name}?",
        "Tell me what {name} likes to eat.",
    ),
    "colour": (
        "What is the favourite colour of {name}?",
        "Which colour does {name} like best?",
        "What colour does {name} like most?",
        "Tell me the favourite colour of {name}.",
    ),
    "about": (
        "Who is {name}?",
        "What do you know about {name}?",
        "Can you tell me about {name}?",
        "Tell me all about {name}.",
    ),
}


class Dice:
    """Seeded choices that use only ``Random.random``, the method whose sequence Python promises to keep."""

    def __init__(self, *seeds: int) -> None:
        state = 0
        for seed in seeds:
            state = (state * 6364136223846793005 + seed + 1442695040888963407) % 2**64
        self.random = random.Random(state).random

    def below(self, count: int) -> int:
        return int(self.random() * count)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def weighted(self, items: Sequence[tuple[float, T]]) -> T:
        """One of the (weight, item) pairs; the weights need not sum to one."""
        left = self.random() * sum(weight for weight, _ in items)
        for weight, item in items:
            left -= weight
            if left < 0:
                return item
        return items[-1][1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [item for _, item in sorted(((self.random(), item) for item in items), key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Resident:
    """A person and the facts about them that never change."""

    index: int
    name: str
    home: str
    job: str
    pet: str
    pet_name: str
    friend: str
    food: str
    colour: str
    habits: tuple[str, str, str]  # the objects this person likes to pick up in a story, best first

    @property
    def pronoun(self) -> str:
        return "She" if self.index % 2 == 0 else "He"


@cache
def residents() -> tuple[Resident, ...]:
    """All people, in the order of ``PEOPLE``."""
    dice = Dice(2)
    jobs = dice.shuffled(JOBS * 2)
    pets = dice.shuffled(PETS * 4)
    pet_names = dice.shuffled(PET_NAMES * 2)
    people = []
    for index, name in enumerate(PEOPLE):
        habits = dice.shuffled(OBJECTS)
        friend = PEOPLE[(index + 1) if index % 2 == 0 else (index - 1)]
        people.append(
            Resident(
                index=index,
                name=name,
                home=dice.pick(PLACES),
                job=jobs[index],
                pet=pets[index],
                pet_name=pet_names[index],
                friend=friend,
                food=dice.pick(FOODS),
                colour=dice.pick(COLOURS),
                habits=(habits[0], habits[1], habits[2]),
            )
        )
    return tuple(people)


@cache
def place_facts(place: str) -> str:
    """Two sentences about a place: where it stands, and the colour of its door."""
    dice = Dice(3, PLACES.index(place))
    return f"The {place} stands {dice.pick(SPOTS)}. The door of the {place} is {dice.pick(COLOURS)}."


@cache
def biography(person: Resident) -> str:
    """Everything about one person, always in the same words."""
    return (
        f"{person.name} lives at the {person.home} and works as a {person.job}. "
        f"{person.pronoun} has a {person.pet} called {person.pet_name}. "
        f"The best friend of {person.name} is {person.friend}. {person.name} likes {person.food} best. "
        f"The favourite colour of {person.name} is {person.colour}. {place_facts(person.home)}"
    )


def fact(person: Resident, relation: str) -> str:
    """The sentence that answers a question about one relation of a person."""
    return {
        "home": f"{person.name} lives at the {person.home}.",
        "job": f"{person.name} works as a {person.job}.",
        "pet": f"{person.name} has a {person.pet} called {person.pet_name}.",
        "friend": f"The best friend of {person.name} is {person.friend}.",
        "food": f"{person.name} likes {person.food} best.",
        "colour": f"The favourite colour of {person.name} is {person.colour}.",
        "about": biography(person),
    }[relation]


@cache
def world_questions(split: Split) -> tuple[tuple[str, str], ...]:
    """Every (question, answer) about the fixed world in a split.

    Every fact is in the training split. Only phrasings are held out: of the four ways to ask for a relation, one is not
    in the training split for that person and relation.
    """
    held_out = split == "held_out"
    pairs = []
    for person in residents():
        for order, (relation, phrasings) in enumerate(_RELATIONS.items()):
            for number, phrasing in enumerate(phrasings):
                if ((person.index + order + number) % PHRASINGS == 0) == held_out:
                    pairs.append((phrasing.format(name=person.name), fact(person, relation)))
    return tuple(pairs)
