"""Common questions that small models tend to answer, in two sets of templates that share none.

Each set maps a template to "key:answer" pairs, `_` standing for a space, best known first. All lists
are ours. A value is a name that no other value of its template contains, so that finding one in a
reply is not ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest

from nslora.types import Example, Hidden, Item, Need, Rule

# Asked to measure what is forgotten. Each was answered by at least two of three frozen backbones of
# 135M, 270M and 500M parameters: what nobody knows cannot be forgotten.
RETENTION = {
    "What is the opposite of {}?": "hot:cold big:small up:down left:right high:low inside:outside "
    "black:white before:after success:failure war:peace positive:negative maximum:minimum "
    "increase:decrease fast:slow wet:dry happy:sad full:empty day:night open:closed hard:soft "
    "early:late rich:poor strong:weak push:pull begin:end north:south heavy:light thick:thin "
    "deep:shallow always:never",
    "In which US state is the city of {}?": "Houston:Texas Miami:Florida Los_Angeles:California "
    "Seattle:Washington Boston:Massachusetts Denver:Colorado Atlanta:Georgia Phoenix:Arizona "
    "Las_Vegas:Nevada New_Orleans:Louisiana Nashville:Tennessee Cleveland:Ohio Milwaukee:Wisconsin "
    "Minneapolis:Minnesota Dallas:Texas Orlando:Florida Salt_Lake_City:Utah Omaha:Nebraska "
    "Albuquerque:New_Mexico Boise:Idaho Buffalo:New_York Memphis:Tennessee Austin:Texas "
    "Tampa:Florida Cincinnati:Ohio San_Diego:California Detroit:Michigan Philadelphia:Pennsylvania "
    "Baltimore:Maryland Honolulu:Hawaii Anchorage:Alaska Louisville:Kentucky",
    "What is the main language of {}?": "Germany:German France:French Italy:Italian Japan:Japanese "
    "Russia:Russian Portugal:Portuguese Spain:Spanish Austria:German China:Chinese Greece:Greek "
    "Turkey:Turkish Poland:Polish Sweden:Swedish Egypt:Arabic Vietnam:Vietnamese Thailand:Thai "
    "Hungary:Hungarian Denmark:Danish Norway:Norwegian Saudi_Arabia:Arabic Colombia:Spanish "
    "Romania:Romanian Iceland:Icelandic Bulgaria:Bulgarian Brazil:Portuguese Cuba:Spanish "
    "Australia:English Israel:Hebrew Mexico:Spanish Ukraine:Ukrainian Jamaica:English Chile:Spanish",
    # at most three words each, so that an answer can follow every rule
    "What does {} stand for?": "CPU:central_processing_unit GPS:global_positioning_system "
    "HTML:hypertext_markup_language UN:United_Nations EU:European_Union "
    "WHO:World_Health_Organization RAM:random_access_memory URL:uniform_resource_locator "
    "AI:artificial_intelligence PDF:portable_document_format SQL:structured_query_language "
    "IMF:International_Monetary_Fund LED:light_emitting_diode UFO:unidentified_flying_object "
    "VPN:virtual_private_network LAN:local_area_network BBC:British_Broadcasting_Corporation "
    "GPU:graphics_processing_unit USB:universal_serial_bus API:application_programming_interface "
    "HIV:human_immunodeficiency_virus NBA:National_Basketball_Association "
    "HTTP:hypertext_transfer_protocol WWW:World_Wide_Web DNA:deoxyribonucleic_acid "
    "CEO:chief_executive_officer CIA:Central_Intelligence_Agency GDP:gross_domestic_product "
    "CSS:cascading_style_sheets ATM:automated_teller_machine",
    "In which country is {}?": "the_Eiffel_Tower:France the_Taj_Mahal:India the_Great_Wall:China "
    "Machu_Picchu:Peru the_Colosseum:Italy Mount_Fuji:Japan the_Acropolis:Greece the_Kremlin:Russia "
    "Angkor_Wat:Cambodia Chichen_Itza:Mexico the_Great_Pyramid_of_Giza:Egypt the_Alhambra:Spain "
    "Neuschwanstein_Castle:Germany Mount_Kilimanjaro:Tanzania the_Leaning_Tower_of_Pisa:Italy "
    "Hagia_Sophia:Turkey the_Palace_of_Versailles:France the_Sydney_Opera_House:Australia "
    "the_Louvre:France the_Burj_Khalifa:United_Arab_Emirates the_Parthenon:Greece "
    "the_Brandenburg_Gate:Germany Mount_Vesuvius:Italy the_Forbidden_City:China "
    "the_Sagrada_Familia:Spain the_Grand_Canyon:United_States",
    "Who wrote '{}'?": "Romeo_and_Juliet:Shakespeare Pride_and_Prejudice:Austen The_Odyssey:Homer "
    "Don_Quixote:Cervantes The_Divine_Comedy:Dante Dracula:Stoker Harry_Potter:Rowling "
    "The_Lord_of_the_Rings:Tolkien To_Kill_a_Mockingbird:Lee Animal_Farm:Orwell Hamlet:Shakespeare "
    "On_the_Origin_of_Species:Darwin Moby-Dick:Melville The_Great_Gatsby:Fitzgerald "
    "The_Iliad:Homer 1984:Orwell Macbeth:Shakespeare The_Hobbit:Tolkien",
    "Which company makes {}?": "the_iPhone:Apple the_PlayStation:Sony the_Xbox:Microsoft "
    "the_Galaxy_phone:Samsung the_Kindle:Amazon the_Mustang:Ford the_Corolla:Toyota "
    "the_Photoshop_software:Adobe the_Chrome_browser:Google the_747_airplane:Boeing "
    "the_Air_Jordan_shoe:Nike Xeon_processors:Intel Ryzen_processors:AMD the_MacBook:Apple "
    "the_Excel_spreadsheet:Microsoft the_Prius:Toyota the_iPad:Apple Windows:Microsoft",
    "What was the first name of {}?": "the_physicist_Einstein:Albert the_physicist_Newton:Isaac "
    "the_playwright_Shakespeare:William the_painter_Picasso:Pablo President_Lincoln:Abraham "
    "the_astronomer_Galilei:Galileo the_explorer_Columbus:Christopher the_painter_Monet:Claude "
    "the_novelist_Hemingway:Ernest President_Kennedy:John President_Mandela:Nelson "
    "the_naturalist_Darwin:Charles President_Washington:George President_Obama:Barack "
    "the_chemist_Curie:Marie the_novelist_Austen:Jane the_economist_Marx:Karl "
    "the_composer_Mozart:Wolfgang the_composer_Beethoven:Ludwig the_painter_van_Gogh:Vincent "
    "the_mathematician_Turing:Alan the_novelist_Dickens:Charles",
}
# Trained on, as the frozen model answers them, so that its other abilities stay.
REPLAY = {
    "Which chemical element has the symbol {}?": "O:oxygen H:hydrogen C:carbon Fe:iron Ca:calcium "
    "Hg:mercury K:potassium He:helium Na:sodium Cu:copper Zn:zinc Mg:magnesium Al:aluminum "
    "U:uranium",
    "What is the plural of '{}'?": "child:children mouse:mice foot:feet knife:knives tooth:teeth "
    "person:people leaf:leaves wolf:wolves city:cities baby:babies box:boxes wife:wives",
    "What is the past tense of '{}'?": "break:broke begin:began find:found build:built see:saw "
    "take:took come:came buy:bought think:thought give:gave drive:drove make:made",
    "What color is {}?": "grass:green blood:red the_sky_on_a_clear_day:blue a_ripe_tomato:red "
    "a_stop_sign:red snow:white chocolate:brown a_lemon:yellow a_ruby:red a_polar_bear:white",
    "Which planet is {}?": "the_largest_in_the_solar_system:Jupiter the_one_we_live_on:Earth "
    "known_as_the_Red_Planet:Mars famous_for_its_rings:Saturn",
    "Which month comes after {}?": "January:February July:August November:December "
    "December:January February:March March:April April:May August:September September:October "
    "October:November",
    "Which season comes after {}?": "spring:summer winter:spring autumn:winter",
    "Which animal {}?": "gives_us_wool:sheep carries_its_baby_in_a_pouch:kangaroo barks:dog "
    "meows:cat makes_honey:bee is_the_largest_on_Earth:blue_whale is_the_tallest_on_Earth:giraffe "
    "is_called_the_king_of_the_jungle:lion spins_webs:spider is_the_fastest_on_land:cheetah "
    "says_moo:cow builds_dams:beaver lays_the_largest_eggs:ostrich",
    "Which gas {}?": "do_humans_need_to_breathe:oxygen do_plants_take_in_from_the_air:carbon_dioxide "
    "makes_up_most_of_the_air:nitrogen makes_balloons_float:helium",
    "Which organ {}?": "pumps_blood_through_the_body:heart do_we_breathe_with:lungs "
    "do_we_think_with:brain",
    "What is the {} in the world?": "highest_mountain:Everest largest_ocean:Pacific "
    "largest_hot_desert:Sahara largest_rainforest:Amazon largest_animal:blue_whale",
    "What is the study of {} called?": "living_things:biology stars_and_planets:astronomy "
    "the_human_mind:psychology numbers_and_shapes:mathematics rocks:geology plants:botany "
    "animals:zoology past_events:history",
    "Who discovered {}?": "penicillin:Fleming gravity:Newton radium:Curie America:Columbus "
    "the_theory_of_relativity:Einstein natural_selection:Darwin",
    "Who painted {}?": "the_Mona_Lisa:Leonardo_da_Vinci the_ceiling_of_the_Sistine_Chapel:Michelangelo "
    "The_Starry_Night:van_Gogh Guernica:Picasso",
    "Who was the first {}?": "president_of_the_United_States:Washington "
    "person_to_walk_on_the_Moon:Armstrong person_in_space:Gagarin",
    "In which city is {}?": "Big_Ben:London the_Vatican:Rome Notre-Dame_cathedral:Paris "
    "the_Golden_Gate_Bridge:San_Francisco the_Prado_museum:Madrid the_Hollywood_Sign:Los_Angeles "
    "the_Anne_Frank_House:Amsterdam Red_Square:Moscow Tiananmen_Square:Beijing "
    "the_Space_Needle:Seattle the_Blue_Mosque:Istanbul Buckingham_Palace:London",
    "Which country does {} come from?": "pizza:Italy the_samba:Brazil the_tango:Argentina "
    "flamenco:Spain the_baguette:France karate:Japan kung_fu:China tequila:Mexico sushi:Japan "
    "vodka:Russia bratwurst:Germany yoga:India the_haiku:Japan the_kangaroo:Australia",
    "How do you say '{}' in Spanish?": "hello:hola house:casa book:libro sun:sol night:noche "
    "thank_you:gracias black:negro water:agua cat:gato dog:perro",
    "How do you say '{}' in French?": "school:école dog:chien woman:femme night:nuit two:deux "
    "cheese:fromage red:rouge white:blanc",
    "Which sport does {} play?": "LeBron_James:basketball Roger_Federer:tennis Tiger_Woods:golf "
    "Tom_Brady:football Babe_Ruth:baseball Wayne_Gretzky:hockey Sachin_Tendulkar:cricket "
    "Michael_Jordan:basketball Serena_Williams:tennis Rafael_Nadal:tennis",
    "Who is the Greek god of {}?": "the_sea:Poseidon the_sky_and_thunder:Zeus wine:Dionysus "
    "the_underworld:Hades",
    "Which programming language has files that end in {}?": ".py:Python .rb:Ruby .hs:Haskell "
    ".js:JavaScript .rs:Rust .kt:Kotlin",
}


@dataclass(frozen=True)
class Question:
    """A question with its answer; `group` is what splits are disjoint by (a country, a template)."""

    text: str
    answer: str
    group: str

    def item(self, label: str, asked: tuple[Rule, ...] = ()) -> Item:
        """Return the question as an item under style rules; its id starts with `label`."""
        example = Example(f"{label}:{self.text}", self.text, self.answer, fact=self.text)
        need = Need.STYLE if asked else Need.CONTENT
        return Item(example, Hidden(asked, need, self.group))


def _pairs(listing: str) -> list[tuple[str, str]]:
    """Parse "key:answer key:answer" into pairs."""
    pairs = []
    # no key or answer holds a colon of its own
    for pair in listing.split():
        key, answer = pair.replace("_", " ").split(":")
        pairs.append((key, answer))
    return pairs


def questions(templates: Mapping[str, str]) -> list[list[Question]]:
    """Return the questions of a set of templates, one list per template, best known first."""
    return [
        [Question(template.format(key), answer, template) for key, answer in _pairs(listing)]
        for template, listing in templates.items()
    ]


def in_turn(lists: Iterable[list[Question]]) -> list[Question]:
    """Take one question of each list in turn: however short a start of the result holds all lists."""
    # short lists end first and leave None in the later rounds
    rounds = zip_longest(*lists)
    return [question for question in chain.from_iterable(rounds) if question is not None]


def kinds() -> list[frozenset[str]]:
    """Return the answers of each template: names of one kind."""
    listings = (RETENTION | REPLAY).values()
    return [frozenset(answer for _, answer in _pairs(listing)) for listing in listings]
