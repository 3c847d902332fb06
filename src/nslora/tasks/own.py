"""Own data: a file of questions and answers, checked whole before anything is spent on it.

`inspect` finds all that is wrong with a file, each with its line and the remedy; `read` refuses what
`inspect` finds, and `describe` says what a run will do with the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from nslora.tasks import functions, graders, reading, rules
from nslora.tasks.grading import grade
from nslora.types import Example, Hidden, Item, Need, Reward, Rule, UserError

# so that train, dev and test each get two
MIN_ROWS = 10
# shares of train, and of train and dev
CUTS = (0.6, 0.8)
# where test has rows of its own
CUTS_WITHOUT_TEST = (0.75, 1.0)
# rows of a test file, so that a difference has an interval
LEAST_TEST_ROWS = 2
# rows that a label needs to be in every split
ROWS_IN_EACH_SPLIT = 5
# what opens the group of a row of the test file
TEST = "test line"
# labels of a set that is asked for, at most
MOST_LABELS = 100
# characters of an answer that few models repeat as it stands
LONG = 200
# characters that a sentence shows of a text
SHOWN = 60
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
# no reply can keep both
CLASHES = (
    {"lower_case", "upper_case"},
    {"json", "quotes"},
    {"json", "bullet"},
    {"json", "start_phrase"},
    {"json", "end_phrase"},
)


@dataclass(frozen=True)
class Row:
    """A row whose texts are sound; `grader` is "" where the row names none."""

    line: int
    question: str
    answer: str
    rules: tuple[Rule, ...]
    grader: str


@dataclass
class Data:
    """What a file holds, and all that is wrong with it.

    Attributes:
        kind: format and encoding, in words.
        unit: what rows are counted by: "line" or "row".
        faults: lines by what no run could use there; no lines where it is the file as a whole.
        remarks: lines by what is left out or may surprise there.
        items: usable rows, repeats left out.
        choose: answer -> its grader, where the row names none.
        test: the rows of their own to test on.
    """

    path: Path
    kind: str = ""
    unit: str = "line"
    faults: dict[str, list[int]] = field(default_factory=dict)
    remarks: dict[str, list[int]] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    choose: Callable[[str], str] | None = None
    test: Data | None = None

    @property
    def cuts(self) -> tuple[float, float]:
        """Shares of train, and of train and dev."""
        return CUTS_WITHOUT_TEST if self.test else CUTS

    @property
    def problems(self) -> list[str]:
        """All faults as sentences with file and lines, in the order of the file."""
        problems = []
        for fault, lines in sorted(self.faults.items(), key=lambda pair: pair[1][:1]):
            where = f", {reading.listed(lines, self.unit)}" if lines else ""
            problems.append(f"{self.path}{where}: {fault}")
        return problems + (self.test.problems if self.test else [])

    def refuse(self, line: int, sentence: str) -> None:
        """Note a fault of a line; of the whole file if it is 0."""
        # a text of the file may hold line breaks, a sentence none
        lines = self.faults.setdefault(" ".join(sentence.split()), [])
        lines.extend([line] * bool(line))

    def remark(self, line: int, remark: str) -> None:
        """Note what a reader should know of a line."""
        lines = self.remarks.setdefault(remark, [])
        # question and answer may both give rise to it
        if line not in lines[-1:]:
            lines.append(line)


def read(path: Path, grader: str = "auto", columns: str = "", test: str = "") -> Data:
    """Return what a file holds; raises UserError for the first of its problems."""
    data = inspect(path, grader, columns, test)
    require(data.problems)
    return data


def require(problems: Sequence[str]) -> None:
    """Raise UserError for the first problem, if there is one."""
    if problems:
        more = f" ({len(problems) - 1} more: see nslora check)." if len(problems) > 1 else "."
        raise UserError(problems[0].rstrip(".") + more)


def inspect(
    path: Path, grader: str = "auto", columns: str = "", test: str = "", least: int = MIN_ROWS
) -> Data:
    """Check a whole file.

    Args:
        grader: of all rows that name none: "auto", or as `graders` has it.
        columns: other names of columns, as in "question=ask,answer=reply".
        test: a file of rows to test on, none of which is in the first; "" for a part of that one.
        least: how many rows there must be.

    Raises UserError for a file that cannot be read at all, an unknown grader or a bad mapping.
    """
    grader, names = graders.complete(grader), reading.mapping(columns)
    data, rows = _load(path, names)
    _require_rows(data, rows, least)
    try:
        data.choose = _chooser(rows, grader)
    except UserError as error:
        data.refuse(0, str(error))
        return data
    _add_items(data, rows, data.choose, "line")
    if test:
        data.test, tested = _load(Path(test), names)
        _refuse_known(data.test, tested, data)
        # the graders are those that the other rows made known
        _add_items(data.test, tested, data.choose, TEST)
    return data


def _load(path: Path, names: Mapping[str, str]) -> tuple[Data, list[Row]]:
    """Return a file's rows of different questions, and all that is wrong with the others."""
    table = reading.load(path)
    data = Data(path, table.kind, table.unit)
    rows = []
    for line, raw in table.rows:
        try:
            if isinstance(raw, UserError):
                raise raw
            rows.append(_row(data, line, raw, names))
        except UserError as error:
            data.refuse(line, str(error))
    return data, _distinct(data, rows)


def _refuse_known(data: Data, rows: list[Row], trained: Data) -> None:
    """Refuse test rows that could be learned by heart, and too few of them."""
    lines = {graders.same_question(item.example.question): line(item) for item in trained.items}
    for row in rows:
        if known := lines.get(graders.same_question(row.question)):
            where = f"{trained.path}, {trained.unit} {known}"
            data.refuse(row.line, f"the question is in {where}, too; keep one of them.")
    _require_rows(data, rows, LEAST_TEST_ROWS)


def _require_rows(data: Data, rows: list[Row], least: int) -> None:
    """Refuse a file of fewer than `least` rows, unless it is refused for what the others are."""
    if len(rows) < least and not data.faults:
        data.refuse(0, f"has {len(rows)} questions; at least {least} are needed.")


# ---- one row


def _row(data: Data, line: int, raw: object, names: Mapping[str, str]) -> Row:
    """Check the texts and rules of a row; raises UserError."""
    values, remarks = reading.fields(raw, names)
    for remark in sorted(remarks):
        data.remark(line, remark)
    question, answer = (_text(data, line, name, values[name]) for name in ("question", "answer"))
    asked = _rules(values.get("rules"))
    return Row(line, question, answer, asked, _grader(values.get("grader", "auto")))


def _text(data: Data, line: int, name: str, value: object) -> str:
    """Return a question or an answer as text without blanks around it; raises UserError."""
    if name == "answer" and isinstance(value, dict):
        value = _json_text(value)
    # `type`, because isinstance takes true for an int
    elif name == "answer" and type(value) in (bool, int, float) and not _is_infinite(value):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{name} is {_kind(value)}; give one text.")
    if half := HALF_CHARACTER.search(value):
        raise UserError(
            f"{name} holds half a character ({ascii(half[0])[1:-1]}), as of an emoji cut in two."
        )
    text = value.strip()
    if not text:
        raise UserError(f"{name} is empty.")
    if text != value:
        data.remark(line, "blanks around a text are left out")
    if "\ufffd" in text:
        data.remark(line, "a text holds \ufffd, which stands for letters that an earlier step lost")
    return text


def _json_text(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError("answer is an object with NaN or Infinity, which is no JSON.") from None


def _grader(value: object) -> str:
    """Return the grader that a row names, or "" where it takes the file's; raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"grader must be text such as 'exact', not {_kind(value)}.")
    grader = graders.complete(value.strip())
    if grader == "labels":
        raise UserError("the grader of a row must name its labels, as in labels:yes|no.")
    return "" if grader == "auto" else grader


def _is_infinite(value: object) -> bool:
    """Tell whether a value is NaN or an infinity, which JSON does not have."""
    return isinstance(value, float) and not math.isfinite(value)


def _kind(value: object) -> str:
    """Return what a value is that is no text, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, float) and _is_infinite(value):
        return "NaN" if math.isnan(value) else "Infinity"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else "no text")


def _rules(listing: object) -> tuple[Rule, ...]:
    """Return the rules of a row; raises UserError where they are no rules, or exclude each other."""
    problem = UserError('rules must be a list of {"name": ..., "kwargs": {...}}.')
    if isinstance(listing, str):
        # a cell of a table
        try:
            listing = json.loads(listing)
        except ValueError:
            raise problem from None
    if listing is None:
        return ()
    if not isinstance(listing, list):
        raise problem
    asked = []
    for entry in listing:
        if not isinstance(entry, dict) or not set(entry) <= {"name", "kwargs"}:
            raise problem
        kwargs = entry.get("kwargs")
        if isinstance(kwargs, dict):
            # a column of Parquet has the arguments of all rules in every row
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
        asked.append(rules.make(str(entry.get("name")), kwargs))
    names = {rule.name for rule in asked}
    if len(names) < len(asked):
        raise UserError("a rule comes twice; keep one.")
    for clash in CLASHES:
        if clash <= names:
            raise UserError(f"rules {' and '.join(sorted(clash))} exclude each other; keep one.")
    return tuple(asked)


# ---- all rows


def _distinct(data: Data, rows: list[Row]) -> list[Row]:
    """Return rows of different questions: a question that comes twice would be in two splits."""
    asked: dict[str, list[Row]] = {}
    kept = []
    for row in rows:
        likes = asked.setdefault(graders.same_question(row.question), [])
        same = [like for like in likes if _demands(like) == _demands(row)]
        spelled = graders.fold(row.question, cased=True)
        equal = [like for like in likes if graders.fold(like.question, cased=True) == spelled]
        if same:
            data.remark(row.line, "repeats of an earlier row are left out")
            continue
        if equal:
            data.refuse(row.line, _contradiction(data.unit, row, equal[0]))
        elif likes:
            near = f"nearly the question of {data.unit} {likes[0].line}, with another answer"
            data.remark(row.line, near)
        likes.append(row)
        kept.append(row)
    return kept


def _demands(row: Row) -> tuple:
    """Return what a row asks of a reply."""
    return graders.fold(row.answer, cased=True), row.rules, row.grader


def _contradiction(unit: str, row: Row, earlier: Row) -> str:
    question = f"repeats the question of {unit} {earlier.line}"
    if row.answer != earlier.answer:
        answers = f"{row.answer[:SHOWN]!r}, there {earlier.answer[:SHOWN]!r}"
        return f"{question} with another answer ({answers}); keep one of them."
    return f"{question} with other rules or another grader; keep one of them."


def _add_items(data: Data, rows: list[Row], choose: Callable[[str], str], file: str) -> None:
    """Add the items of the rows, each with its grader; refuse rows that no reply can satisfy."""
    for row in rows:
        line_id = f"{file}:{row.line}"
        example_id = f"own:{line_id if file == TEST else row.line}"
        example = Example(example_id, row.question, row.answer, fact=line_id)
        need = Need.BOTH if row.rules else Need.CONTENT
        spec = row.grader or choose(row.answer)
        item = Item(example, Hidden(row.rules, need, line_id, f"{graders.OWN}{spec}"))
        if problem := _unsatisfiable(item):
            data.refuse(row.line, problem)
        elif remark := _doubtful(item):
            data.remark(row.line, remark)
        data.items.append(item)
    _remark_spellings(data)


def _remark_spellings(data: Data) -> None:
    """Note answers that a grader takes for others of the file, since case and accents do not count."""
    spellings: dict[str, set[str]] = {}
    names = [item for item in data.items if graders.of(item) in graders.FORGIVING]
    for item in names:
        answer = graders.fold(item.example.answer, cased=True)
        spellings.setdefault(graders.unaccented(graders.fold(answer)), set()).add(answer)
    for item in names:
        if len(spellings[graders.unaccented(graders.fold(item.example.answer))]) > 1:
            remark = (
                "answers that differ in case or accents only count as equal, but with contains:case"
            )
            data.remark(line(item), remark)


def line(item: Item) -> int:
    """Return the line of an item's row, in the file that it is of."""
    return int(item.hidden.group.rpartition(":")[2])


def reward(item: Item, reply: str) -> Reward:
    """Return the reward of a reply; raises UserError, with the row, where a function gives none."""
    try:
        return grade(item, reply)
    except UserError as error:
        raise UserError(f"{item.hidden.group.replace(':', ' ')}: {error}") from error


def expect(pairs: Iterable[tuple[Item, str]]) -> None:
    """Tell the functions that grade replies which come next: a judge grades them together."""
    asked: dict[str, list[tuple[Example, str]]] = {}
    for item, reply in pairs:
        if _by_function(item):
            _, argument = graders.of(item)
            asked.setdefault(argument, []).append((item.example, reply))
    for argument, replies in asked.items():
        functions.find(argument).expect(replies)


def is_test(item: Item) -> bool:
    """Tell whether an item is of the file of test rows."""
    return item.hidden.group.startswith(TEST)


def _chooser(rows: list[Row], grader: str) -> Callable[[str], str]:
    """Return answer -> grader for the rows that name none."""
    answers = [row.answer for row in rows if not row.grader]
    if grader == "auto":
        return graders.choose(answers)
    if grader == "labels":
        labels = list({graders.fold(answer): answer for answer in answers}.values())
        if len(labels) > MOST_LABELS or any("|" in label for label in labels):
            raise UserError(
                f"grader labels: the answers are of {len(labels)} kinds; "
                f"at most {MOST_LABELS} can be labels, none with a '|'."
            )
        grader = f"labels:{'|'.join(labels)}"
    return lambda answer: grader


def _unsatisfiable(item: Item) -> str:
    """Return why no reply can satisfy a row; "" if one can."""
    answer, asked = item.example.answer, item.hidden.rules
    if _is_dear(item):
        return ""
    try:
        content = grade(item, answer).parts["content"]
    except UserError as error:
        # somebody's own function gives no reward
        return str(error)
    grader = ":".join(filter(None, graders.of(item)))
    if not content and not _by_function(item):
        return f"the answer {answer[:SHOWN]!r} fails its own grader ({grader[:SHOWN]}); change one of them."
    words = len(re.findall(r"\w+", answer))
    limits = [rule.kwargs["n"] for rule in asked if rule.name == "max_words"]
    for limit in limits:
        # only a whole text must keep all of its words
        if isinstance(limit, int) and words > limit and _whole_text(item):
            return f"the answer has {words} words and its rule allows {limit}; change one of them."
    return ""


def _doubtful(item: Item) -> str:
    """Return what may be wrong with a row's rules: the answer written in their style breaks one."""
    asked = item.hidden.rules
    reply = rules.demonstrate(asked, item.example.answer)
    broken = sorted(rule.name for rule in asked if not rules.follows(rule, reply))
    if broken:
        return f"the bare answer cannot be written to keep rule {' and '.join(broken)}"
    if (
        _by_function(item)
        and not _is_dear(item)
        and not grade(item, item.example.answer).parts["content"]
    ):
        return "the bare answer earns nothing from the reward"
    return ""


def _by_function(item: Item) -> bool:
    return graders.of(item)[0] == graders.FUNCTION


def _is_dear(item: Item) -> bool:
    """Tell whether a grade costs something: then it is not asked for before a run."""
    return _by_function(item) and not functions.find(graders.of(item)[1]).free


# ---- what a run does with it


def label_set(items: Sequence[Item]) -> frozenset[str]:
    """Return the labels that answers are one of, as they are spelled: a prompt may list them."""
    labelled = [item for item in items if graders.of(item)[0] == "labels"]
    sets = {graders.of(item)[1] for item in labelled}
    labels = {label for joined in sets for label in joined.split("|")}
    return frozenset(labels | {item.example.answer for item in labelled})


def splits(data: Data, rng: np.random.Generator) -> tuple[list[Item], ...]:
    """Return train, dev and test in random order: 60, 20 and 20%, of each label where there are any.

    Where test has rows of its own, 75 and 25% of the others are train and dev.
    """
    items = data.items
    shuffled = [items[i] for i in rng.permutation(len(items))]
    if labels := label_set(items):
        # each label is spread evenly over the whole, so that every cut has its share
        label_of = _labels_of(shuffled, labels)
        sizes, seen = Counter(label_of), Counter[str]()
        places = []
        for label in label_of:
            places.append((seen[label] + 0.5) / sizes[label])
            seen[label] += 1
        shuffled = [shuffled[i] for i in np.argsort(places, kind="stable")]
    first, second = (round(cut * len(items)) for cut in data.cuts)
    test = data.test.items if data.test else shuffled[second:]
    return shuffled[:first], shuffled[first:second], test


def _labels_of(items: Sequence[Item], labels: frozenset[str]) -> list[str]:
    """Return the label of each item, or "" where its answer is none."""
    spelled = {graders.fold(label): label for label in sorted(labels)}
    return [spelled.get(graders.fold(item.example.answer), "") for item in items]


def describe(data: Data) -> list[str]:
    """Return what is in a file and what a run makes of it, a sentence each."""
    lines = [f"{data.path}: {data.kind}."]
    for remark, numbers in data.remarks.items():
        lines.append(f"note: {remark} ({len(numbers)}: {reading.listed(numbers, data.unit)}).")
    items = data.items
    if not items:
        return lines
    first, second = (round(cut * len(items)) for cut in data.cuts)
    counts = f"{len(items)} rows: {first} to train on, {second - first} to choose by"
    rest = f"{len(items) - second} to test on"
    if data.test:
        rest = f"{len(data.test.items)} of {data.test.path} to test on"
    lines.append(f"{counts}, {rest}.")
    for name in ("question", "answer"):
        sizes = [len(getattr(item.example, name)) for item in items]
        lines.append(
            f"{name}s have {min(sizes)} to {max(sizes)} characters, half of them {median(sizes):.0f} or more."
        )
    lines += _about_labels(data)
    lines += _about_graders(data)
    # a text of the file may hold line breaks, a sentence none
    return [" ".join(line.split()) for line in lines]


def _about_labels(data: Data) -> list[str]:
    counts = Counter(_labels_of(data.items, label_set(data.items)))
    # rows whose answer is no label
    del counts[""]
    if not counts:
        return []
    counted = ", ".join(f"{label} ({n})" for label, n in counts.most_common())
    lines = [f"answers are one of {len(counts)} labels: {counted}."]
    rare = [label for label, n in counts.items() if n < ROWS_IN_EACH_SPLIT]
    if rare:
        lines.append(f"note: too rare to be in every split: {', '.join(rare)}.")
    return lines


def _about_graders(data: Data) -> list[str]:
    """Return a sentence for each grader with its first row: a right and a wrong reply."""
    first: dict[str, Item] = {}
    counts: Counter[str] = Counter()
    for item in data.items:
        name, _ = graders.of(item)
        counts[name] += 1
        first.setdefault(name, item)
    lines = []
    for name, item in first.items():
        answer = item.example.answer
        place = f"in {data.unit} {line(item)}"
        if _is_dear(item):
            lines.append(f"judge ({counts[name]} rows): the external LLM grades each reply.")
            continue
        if _by_function(item):
            value = grade(item, answer).value
            who = f"reward {functions.find(graders.of(item)[1]).name} ({counts[name]} rows)"
            lines.append(f"{who}: {place} the answer {answer[:SHOWN]!r} earns {value:.2f}.")
            continue
        example = f"{place} the reply {answer[:SHOWN]!r} is right"
        if wrong := _wrong_reply(data.items, item):
            example += f", {wrong[:SHOWN]!r} is wrong"
        lines.append(f"grader {name} ({counts[name]} rows): {example}.")
    whole = [len(item.example.answer) > LONG for item in first.values() if _whole_text(item)]
    if any(whole):
        lines.append(
            "note: answers are long, and a reply must hold the whole text; grade their form or a part "
            "of them instead, as by --grader regex:PATTERN."
        )
    return lines


def _whole_text(item: Item) -> bool:
    name, _ = graders.of(item)
    return name in ("contains", "exact")


def _wrong_reply(items: Sequence[Item], item: Item) -> str:
    """Return a reply that earns no content: a hedge between labels, else another row's answer."""
    others = [other.example.answer for other in items[:50]]
    labels = sorted(label_set([item]))
    replies = [" or ".join(labels[:2])] * bool(labels) + others + ["I do not know."]
    # what is shown of it must show the difference
    differ = [reply for reply in replies if reply[:SHOWN] != item.example.answer[:SHOWN]]
    wrong = (reply for reply in differ if not grade(item, reply).parts["content"])
    return next(wrong, "")
