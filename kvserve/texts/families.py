# SPDX-License-Identifier: Apache-2.0
"""What is hidden in haystacks.

Head profiles are measured with ``PROFILING``, quality with the others: no wording,
name, word or haystack of theirs is in it, so that a profile cannot look good because
it saw the test.

* ``MAGIC_NUMBERS`` is the single-needle task as RULER (arXiv 2404.06654) made it
  common: the reply is begun for the model, and one number completes it.
* ``FACTS`` is harder: seven wordings, answers of several words, and the model must
  find the form of its reply by itself.
"""

from __future__ import annotations

from kvserve.texts.needles import Family, Wording

_PROFILING_WORDS = {
    "city": ("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Cairo", "Lima", "Seoul"),
    "name": ("Arthur", "Beatrice", "Clement", "Dorothea", "Edmund", "Flora"),
    "surname": ("Hollis", "Marchetti", "Okafor", "Pemberton", "Quist", "Rasmussen"),
    "colour": ("green", "yellow", "purple", "silver", "orange", "white"),
    "thing": ("umbrella", "violin", "lantern", "trumpet", "compass", "saddle"),
    "food": ("melon", "cheese", "pepper", "walnuts", "honey", "rice", "spinach"),
    "room": ("kitchen", "cellar", "library", "stable", "chapel", "attic"),
    "place": ("cupboard", "staircase", "barrel", "piano", "carpet", "fireplace"),
    "animal": ("tiger", "parrot", "camel", "otter", "donkey", "penguin"),
}

_EVALUATION_WORDS = {
    "city": ("Prague", "Bogota", "Manila", "Dakar", "Vienna", "Tunis", "Havana"),
    "name": ("Gregory", "Harriet", "Ivan", "Josephine", "Leonard", "Matilda"),
    "surname": ("Abernathy", "Castellano", "Dupont", "Fitzroy", "Gunderson"),
    "object": ("safe", "locker", "garage", "vault", "elevator", "warehouse"),
    "word": ("basket", "copper", "dolphin", "engine", "forest", "guitar", "island"),
    "job": ("baker", "plumber", "dentist", "pilot", "carpenter", "librarian"),
    "drink": ("lemonade", "cocoa", "buttermilk", "cider", "ginger ale"),
    "spice": ("mustard", "cinnamon", "vanilla", "nutmeg", "paprika"),
    "machine": ("tractor", "submarine", "balloon", "telescope", "bicycle"),
}

PROFILING = Family(
    "profiling",
    "northanger_abbey",
    (
        Wording(
            "secret number",
            "The secret number of {city} is {number}.",
            "What is the secret number of {city}?",
            "{number}",
        ),
        Wording(
            "ship",
            "The ship called the {colour} {animal} carries {food1}, {food2} and "
            "{food3}.",
            "What does the ship called the {colour} {animal} carry?",
            "{food1}, {food2} and {food3}",
        ),
        Wording(
            "best thing",
            "The best thing to do in {city} is to eat {food} and look for the "
            "{colour} {animal} behind the {room}.",
            "What is the best thing to do in {city}?",
            "eat {food} and look for the {colour} {animal} behind the {room}",
        ),
        Wording(
            "hidden thing",
            "The {colour} {thing} of {name} {surname} is hidden under the {place} in "
            "the {room}.",
            "Where is the {colour} {thing} of {name} {surname} hidden?",
            "under the {place} in the {room}",
        ),
        Wording(
            "soup",
            "The famous soup of {city} is made of {food1}, {food2} and {food3}.",
            "What is the famous soup of {city} made of?",
            "{food1}, {food2} and {food3}",
        ),
        Wording(
            "trainer",
            "The name of the man who trains the {animal} of {city} is {name} "
            "{surname}.",
            "What is the name of the man who trains the {animal} of {city}?",
            "{name} {surname}",
        ),
        Wording(
            "telephone",
            "The telephone number of the {animal} club is {number}.",
            "What is the telephone number of the {animal} club?",
            "{number}",
        ),
    ),
    _PROFILING_WORDS,
)

FACTS = Family(
    "facts",
    "persuasion",
    (
        Wording(
            "magic number",
            "The special magic number for {city} is {number}.",
            "What is the special magic number for {city}?",
            "{number}",
        ),
        Wording(
            "access code",
            "The access code for the {object} of Mr. {surname} is {number}.",
            "What is the access code for the {object} of Mr. {surname}?",
            "{number}",
        ),
        Wording(
            "job",
            "{name} {surname} works as a {job} in {city}.",
            "What does {name} {surname} work as, and in which city?",
            "{job} in {city}",
        ),
        Wording(
            "password",
            "The password for the {machine} is {word1} {word2} {word3}.",
            "What is the password for the {machine}?",
            "{word1} {word2} {word3}",
        ),
        Wording(
            "drink",
            "The favourite drink of {name} {surname} is {drink} with {spice1} and "
            "{spice2}.",
            "What is the favourite drink of {name} {surname}?",
            "{drink} with {spice1} and {spice2}",
        ),
        Wording(
            "gift",
            "The birthday gift for {name} {surname} is a {machine} and a {word}.",
            "What is the birthday gift for {name} {surname}?",
            "a {machine} and a {word}",
        ),
        Wording(
            "flight",
            "The flight number of the plane to {city} is {number}.",
            "What is the flight number of the plane to {city}?",
            "{number}",
        ),
    ),
    _EVALUATION_WORDS,
)

MAGIC_NUMBERS = Family(
    "magic numbers",
    "persuasion",
    (
        Wording(
            "magic number",
            "One of the special magic numbers for {word} is: {number}.",
            "What are all the special magic numbers for {word} mentioned above?",
            "{number}",
            reply="One of the special magic numbers for {word} is:",
        ),
    ),
    {"word": _EVALUATION_WORDS["word"]},
)
