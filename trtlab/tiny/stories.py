"""Short stories from a simulated state, and questions with answers from that state. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trtlab.tiny.world import COLOURS, OBJECTS, PEOPLE, PLACES, Dice, Resident, residents

FRUITS = ("apples", "pears", "plums", "cherries", "nuts", "figs", "lemons", "peaches")
_ONE = dict(zip(FRUITS, ("apple", "pear", "plum", "cherry", "nut", "fig", "lemon", "peach"), strict=True))
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
_WEATHER = ((5.0, "sunny"), (2.0, "rainy"), (1.0, "windy"), (1.0, "cold"), (1.0, "warm"))
_TIMES = ((6.0, "morning"), (2.5, "evening"), (1.5, "afternoon"))
_CLOSINGS = (
    (6.0, "Then it was time to go home."),
    (3.0, "In the end everyone was tired and happy."),
    (1.0, "That was a good day."),
)
_LENGTHS = ((0.12, 3), (0.12, 4), (0.60, 5), (0.13, 6), (0.03, 7))  # mostly five: a story rarely ends by surprise


def tell(dice: Dice) -> tuple[str, list[tuple[str, str]]]:
    """A story and every (question, answer) that follows from its final state, the most natural question first."""
    world = _World(dice)
    sentences = [world.open()]
    for _ in range(dice.weighted(_LENGTHS)):
        sentences.append(world.event())
    sentences.append(dice.weighted(_CLOSINGS))
    return " ".join(sentences), world.questions()


def quantity(count: int, fruit: str) -> str:
    """A count in words: "one apple", "no apples", "three apples"."""
    return f"{NUMBERS[count]} {_ONE[fruit] if count == 1 else fruit}"


@dataclass
class _World:
    """The state of one story: where people are, what they hold, and where objects are."""

    dice: Dice
    cast: list[Resident] = field(default_factory=list)
    at: dict[str, str] = field(default_factory=dict)  # person -> place
    holds: dict[str, str] = field(default_factory=dict)  # person -> object, one at a time
    lies: dict[str, str] = field(default_factory=dict)  # object -> place
    colour: dict[str, str] = field(default_factory=dict)  # object -> colour
    fruit: dict[str, tuple[int, str]] = field(default_factory=dict)  # person -> count, kind

    def open(self) -> str:
        dice, people = self.dice, residents()
        first = people[dice.below(len(people))]
        friend = people[PEOPLE.index(first.friend)]
        self.cast = [first, friend if dice.chance(0.5) else self._other([first])]
        if dice.chance(0.25):
            self.cast.append(self._other(self.cast))
        place = self._thing(PLACES, [first.home], [])
        self.at = {person.name: place for person in self.cast}
        names = " and ".join([", ".join(person.name for person in self.cast[:-1]), self.cast[-1].name])
        return f"One {dice.weighted(_WEATHER)} {dice.weighted(_TIMES)}, {names} met at the {place}."

    def event(self) -> str:
        actor = self.cast[0] if self.dice.chance(0.6) else self.dice.pick(self.cast[1:])
        thing = self.holds.get(actor.name)
        if thing is None:
            return self.dice.weighted(((8.0, self._take), (4.0, self._go), (2.0, self._count)))(actor)
        if thing not in self.colour:
            return self.dice.weighted(
                ((8.0, self._give), (3.5, self._go), (2.0, self._paint), (1.0, self._count), (1.0, self._leave))
            )(actor)
        return self.dice.weighted(((8.0, self._give), (3.5, self._go), (1.5, self._count), (1.5, self._leave)))(actor)

    def questions(self) -> list[tuple[str, str]]:
        """Every question that the state can answer; those about the holders of objects come first."""
        holding = [(f"Who has the {thing}?", f"{who} has the {thing}.") for who, thing in self.holds.items()]
        having = [(f"What does {who} have?", f"{who} has the {thing}.") for who, thing in self.holds.items()]
        lying = [(f"Where is the {thing}?", f"The {thing} is at the {place}.") for thing, place in self.lies.items()]
        where = [(f"Where is {who}?", f"{who} is at the {place}.") for who, place in self.at.items()]
        colours = [(f"What colour is the {x}?", f"The {x} is {colour}.") for x, colour in self.colour.items()]
        counts = [
            (f"How many {fruit} does {who} have?", f"{who} has {quantity(count, fruit)}.")
            for who, (count, fruit) in self.fruit.items()
        ]
        return [*holding, *where, *self.dice.shuffled([*having, *lying, *colours, *counts])]

    def _go(self, actor: Resident) -> str:
        place = self._thing(PLACES, [actor.home], [self.at[actor.name]])
        self.at[actor.name] = place
        return f"{actor.name} {self.dice.weighted(((3.0, 'went'), (1.0, 'walked')))} to the {place}."

    def _take(self, actor: Resident) -> str:
        thing = self._thing(OBJECTS, actor.habits, [*self.holds.values(), *self.lies])
        self.holds[actor.name] = thing
        return f"{actor.name} {self.dice.weighted(((3.0, 'picked up'), (1.0, 'took')))} the {thing}."

    def _give(self, actor: Resident) -> str:
        thing = self.holds[actor.name]
        for other in self.cast:
            if other is actor or other.name in self.holds:
                continue
            if self.at[other.name] == self.at[actor.name]:
                self.holds[other.name] = self.holds.pop(actor.name)
                return f"{actor.name} gave the {thing} to {other.name}."
            self.at[actor.name] = self.at[other.name]
            return f"{actor.name} followed {other.name} to the {self.at[actor.name]}."
        return self._leave(actor)

    def _leave(self, actor: Resident) -> str:
        thing, place = self.holds.pop(actor.name), self.at[actor.name]
        self.lies[thing] = place
        return f"{actor.name} left the {thing} at the {place}."

    def _paint(self, actor: Resident) -> str:
        thing = self.holds[actor.name]
        self.colour[thing] = self._thing(COLOURS, [actor.colour], [])
        return f"{actor.name} painted the {thing} {self.colour[thing]}."

    def _count(self, actor: Resident) -> str:
        dice, name = self.dice, actor.name
        if name not in self.fruit:
            fruit = self._thing(FRUITS, [FRUITS[actor.index % len(FRUITS)]], [])
            count = 3 if dice.chance(0.4) else 2 + dice.below(7)
            self.fruit[name] = (count, fruit)
            return f"{name} had {quantity(count, fruit)}."
        count, fruit = self.fruit[name]
        change = 1 if dice.chance(0.5) else 2 + dice.below(2)
        if dice.chance(0.7) and count + change < len(NUMBERS):
            self.fruit[name] = (count + change, fruit)
            return f"{name} found {NUMBERS[change]} more and then had {quantity(count + change, fruit)}."
        change = min(change, count) or 1
        if count == 0:
            self.fruit[name] = (change, fruit)
            return f"{name} found {NUMBERS[change]} more and then had {quantity(change, fruit)}."
        self.fruit[name] = (count - change, fruit)
        return f"{name} ate {NUMBERS[change]} of the {fruit}."

    def _other(self, cast: list[Resident]) -> Resident:
        return self.dice.pick([person for person in residents() if person not in cast])

    def _thing(self, things: Sequence[str], usual: Sequence[str], without: Sequence[str]) -> str:
        """With probability one half the first usual thing that is free, else any free thing."""
        free = [thing for thing in usual if thing not in without]
        if free and self.dice.chance(0.5):
            return free[0]
        return self.dice.pick([thing for thing in things if thing not in without])
