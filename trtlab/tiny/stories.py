"""Short stories told from a simulated state, and questions whose answers that state gives. Knows no tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtlab.tiny.world import COLOURS, OBJECTS, PEOPLE, PLACES, Dice, Resident, Split, is_held_out_pair, residents

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
_LENGTHS = ((0.12, 3), (0.12, 4), (0.60, 5), (0.13, 6), (0.03, 7))  # so that going on or ending is seldom a coin toss


def tell(dice: Dice, split: Split) -> tuple[str, list[tuple[str, str]]]:
    """A story and every (question, answer) that its final state supports, in the order of asking.

    In the held-out split each pair of a person with a place, object or fruit, and of an object with a colour, is one
    that no training story contains.
    """
    world = _World(dice, split)
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
    """What is true so far in one story: where people are, what they carry, what lies about."""

    dice: Dice
    split: Split
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
        others = [friend] if self.split == "train" and dice.chance(0.5) else []
        size = 2 if dice.chance(0.75) else 3
        while len(others) < size - 1:
            other = self._other(first)
            if other is not first and other not in others:
                others.append(other)
        self.cast = [first, *others]
        place = self._thing(self.cast, PLACES, first.home, 0.5)
        self.at = {person.name: place for person in self.cast}
        names = " and ".join([", ".join(person.name for person in self.cast[:-1]), self.cast[-1].name])
        return f"One {dice.weighted(_WEATHER)} {dice.weighted(_TIMES)}, {names} met at the {place}."

    def event(self) -> str:
        actor = self.cast[0] if self.dice.chance(0.6) else self.dice.pick(self.cast[1:])
        kinds = [(2.0, self._go)]
        kinds.append((5.0, self._give) if actor.name in self.holds else (6.0, self._take))
        kinds.append((3.0, self._count))
        if actor.name in self.holds:
            kinds.append((1.2, self._leave))
            if self.holds[actor.name] not in self.colour:
                kinds.append((2.5, self._paint))
        return self.dice.weighted(kinds)(actor)

    def questions(self) -> list[tuple[str, str]]:
        """Those about things that changed hands first, then shuffled kinds; the first is asked most often."""
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
        place = self._thing([actor], PLACES, actor.home, 0.5, without=self.at[actor.name])
        self.at[actor.name] = place
        return f"{actor.name} {self.dice.weighted(((3.0, 'went'), (1.0, 'walked')))} to the {place}."

    def _take(self, actor: Resident) -> str:
        taken = [*self.holds.values(), *self.lies]
        thing = self._thing([actor], OBJECTS, actor.habit, 0.4)
        while thing in taken:
            thing = self._thing([actor], OBJECTS, actor.habit, 0.0)
        self.holds[actor.name] = thing
        return f"{actor.name} {self.dice.weighted(((3.0, 'picked up'), (1.0, 'took')))} the {thing}."

    def _give(self, actor: Resident) -> str:
        thing = self.holds[actor.name]
        for other in self.cast:
            if other is actor or other.name in self.holds or not self._fits([other], OBJECTS, thing):
                continue
            if self.at[other.name] == self.at[actor.name]:
                self.holds[other.name] = self.holds.pop(actor.name)
                return f"{actor.name} gave the {thing} to {other.name}."
            if self._fits([actor], PLACES, self.at[other.name]):
                self.at[actor.name] = self.at[other.name]
                return f"{actor.name} followed {other.name} to the {self.at[actor.name]}."
        return self._leave(actor)

    def _leave(self, actor: Resident) -> str:
        thing, place = self.holds.pop(actor.name), self.at[actor.name]
        self.lies[thing] = place
        return f"{actor.name} left the {thing} at the {place}."

    def _paint(self, actor: Resident) -> str:
        thing = self.holds[actor.name]
        number = OBJECTS.index(thing)
        held_out = self.split == "held_out"
        fits = [colour for index, colour in enumerate(COLOURS) if is_held_out_pair(number, index) == held_out]
        colour = actor.colour if actor.colour in fits and self.dice.chance(0.4) else self.dice.pick(fits)
        self.colour[thing] = colour
        return f"{actor.name} painted the {thing} {colour}."

    def _count(self, actor: Resident) -> str:
        dice, name = self.dice, actor.name
        if name not in self.fruit:
            fruit = self._thing([actor], FRUITS, FRUITS[(actor.index + actor.index // 8 + 1) % len(FRUITS)], 0.4)
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

    def _other(self, first: Resident) -> Resident:
        people = residents()
        if self.split == "train":
            return self.dice.pick(people)
        return self.dice.pick(people[first.index % 8 :: 8])  # held-out things of one are held out for all

    def _fits(self, people: list[Resident], things: tuple[str, ...] | list[str], thing: str) -> bool:
        held_out, number = self.split == "held_out", things.index(thing)
        return all(is_held_out_pair(person.index, number) == held_out for person in people)

    def _thing(
        self, people: list[Resident], things: tuple[str, ...] | list[str], usual: str, often: float, without: str = ""
    ) -> str:
        """The usual thing with probability ``often`` where the split allows it, else any that it allows."""
        if usual != without and self.dice.chance(often) and self._fits(people, things, usual):
            return usual
        return self.dice.pick([thing for thing in things if thing != without and self._fits(people, things, thing)])
