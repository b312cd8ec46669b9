# SPDX-License-Identifier: Apache-2.0
"""A made-up country: passages about its towns and people, and what they answer.

No model can know it, so what is answered was read. Every town was founded by one of the
people, everyone was born in one of the towns, and no two names are the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_STEMS = [
    "Bram",
    "Corr",
    "Dunn",
    "Elv",
    "Fenn",
    "Garr",
    "Hest",
    "Irm",
    "Kell",
    "Lorn",
    "Marr",
    "Nord",
    "Oss",
    "Pell",
    "Quen",
    "Ross",
    "Stav",
    "Thorn",
    "Ulm",
    "Vess",
]
_ENDS = [
    "aby",
    "bridge",
    "burgh",
    "dale",
    "field",
    "ford",
    "gate",
    "ham",
    "hurst",
    "ley",
    "mere",
    "mouth",
    "ness",
    "port",
    "stead",
    "thorpe",
    "ton",
    "well",
    "wick",
    "wold",
]
_FIRST = [
    "Ada",
    "Boris",
    "Carla",
    "Denis",
    "Edith",
    "Felix",
    "Greta",
    "Hugo",
    "Irma",
    "Jonas",
    "Karin",
    "Lukas",
    "Mina",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Sven",
    "Tilda",
    "Viktor",
]
_LAST = [
    "Alder",
    "Brook",
    "Croft",
    "Drake",
    "Ekman",
    "Frost",
    "Gale",
    "Holm",
    "Ingram",
    "Jansen",
    "Keller",
    "Lund",
    "Moss",
    "Norris",
    "Oakes",
    "Penn",
    "Reed",
    "Stone",
    "Thorne",
    "Voss",
]
_TOWNS = [f"{stem}{end}" for stem in _STEMS for end in _ENDS]
_PEOPLE = [f"{first} {last}" for first in _FIRST for last in _LAST]
MOST = min(len(_TOWNS), len(_PEOPLE))
"""Towns, and people, of the largest country."""

_RIVERS = ("Aune", "Breck", "Cald", "Derrow", "Eska", "Frome", "Ilse", "Nidd", "Tarn")
_GOODS = ("glass", "rope", "cheese", "paper", "pottery", "barrels", "honey", "clocks")
_SIGHTS = ("a stone windmill", "a round tower", "an iron pier", "a covered market")
_TRADES = ("baker", "surveyor", "printer", "physician", "watchmaker", "botanist")
_WORKS = ("a book on tides", "a pump for mines", "a map of the coast", "a new loom")
_INSTRUMENTS = ("cello", "flute", "harp", "oboe", "trumpet", "zither")


@dataclass(frozen=True)
class Town:
    """What a passage says of a town; ``founder`` is the number of a person."""

    name: str
    founder: int
    river: str
    goods: str
    sight: str
    year: int


@dataclass(frozen=True)
class Person:
    """What a passage says of a person; ``birthplace`` is the number of a town."""

    name: str
    birthplace: int
    trade: str
    work: str
    instrument: str
    year: int


@dataclass(frozen=True)
class Question:
    """A question with one answer, which stands in the last passage that it needs."""

    text: str
    answer: str


class World:
    """A country of ``size`` towns and ``size`` people, up to ``MOST``.

    Args:
        seed: of all draws; a larger country of the same seed is another one.
    """

    def __init__(self, seed: str, size: int) -> None:
        rng = random.Random(f"{seed}/{size}")
        towns, people = rng.sample(_TOWNS, size), rng.sample(_PEOPLE, size)
        founders, birthplaces = (rng.sample(range(size), size) for _ in range(2))
        self.towns = [
            Town(
                name,
                founder,
                rng.choice(_RIVERS),
                rng.choice(_GOODS),
                rng.choice(_SIGHTS),
                rng.randrange(1310, 1690),
            )
            for name, founder in zip(towns, founders, strict=True)
        ]
        self.people = [
            Person(
                name,
                birthplace,
                rng.choice(_TRADES),
                rng.choice(_WORKS),
                rng.choice(_INSTRUMENTS),
                rng.randrange(1710, 1890),
            )
            for name, birthplace in zip(people, birthplaces, strict=True)
        ]
        self._order = rng.sample(range(2 * size), 2 * size)
        self._rng = rng

    def text(self) -> str:
        """All passages in an order of their own, numbered."""
        passages = [*map(self._town, self.towns), *map(self._person, self.people)]
        return "\n\n".join(
            f"Passage {number}:\n{passages[one]}"
            for number, one in enumerate(self._order, 1)
        )

    def simple_question(self) -> Question:
        """Ask for what one passage says."""
        town, person = self._rng.choice(self.towns), self._rng.choice(self.people)
        return self._rng.choice(
            [
                *self._of_town(f"the town of {town.name}", town),
                *self._of_person(person.name, person),
            ]
        )

    def linked_question(self) -> Question:
        """Ask for what one passage says of whom, or what, another one names."""
        town, person = self._rng.choice(self.towns), self._rng.choice(self.people)
        founder, home = self.people[town.founder], self.towns[person.birthplace]
        return self._rng.choice(
            [
                *self._of_town(f"the town in which {person.name} was born", home),
                *self._of_person(f"the founder of the town of {town.name}", founder),
            ]
        )

    def _of_town(self, called: str, town: Town) -> list[Question]:
        founder = self.people[town.founder].name
        return [
            Question(f"On which river does {called} lie?", town.river),
            Question(f"Who founded {called}?", founder),
            Question(f"What do the workshops of {called} make?", town.goods),
        ]

    def _of_person(self, called: str, person: Person) -> list[Question]:
        home = self.towns[person.birthplace].name
        return [
            Question(f"What was the trade of {called}?", person.trade),
            Question(f"Which instrument did {called} play?", person.instrument),
            Question(f"In which town was {called} born?", home),
        ]

    def _town(self, town: Town) -> str:
        founder = self.people[town.founder].name
        return (
            f"{town.name} is a town on the river {town.river}. It was founded by "
            f"{founder} and has had a council of its own since {town.year}. Visitors "
            f"come to see {town.sight}, and its workshops make {town.goods}."
        )

    def _person(self, person: Person) -> str:
        home = self.towns[person.birthplace].name
        return (
            f"{person.name} was born in {home} and became a {person.trade} there. Best "
            f"known for {person.work}, finished in {person.year}, {person.name} also "
            f"played the {person.instrument} in the evenings."
        )
