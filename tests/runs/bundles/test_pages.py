"""report.html of a real adaptation on a tiny model: what it shows, and that no text of the data is markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tinymodel import SETTINGS

import nslora
from nslora.runs.bundles import report
from nslora.runs.store import read_json
from nslora.runs.verdict import Verdict
from nslora.types import Prompt

NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quoted" \'single\''
EAGER = {**SETTINGS, "method": "lora", "epochs": 8, "moves": 2, "max_new_tokens": 8}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; every tag must be closed."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def put(path: Path, word: str, count: int) -> Path:
    rows = [{"question": f"{word} {n}? {NASTY}", "answer": "aa"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapted(tiny_loaded, tmp_path_factory: pytest.TempPathFactory):
    """A bundle whose texts are all nasty."""
    root = tmp_path_factory.mktemp("report")
    result = nslora.adapt(
        put(root / "mine.jsonl", "Mood", 20),
        test=str(put(root / "test.jsonl", "Feel", 10)),
        out=root / "out",
        backbone=tiny_loaded.name,
        grader="exact",
        system=f"Be brief. {NASTY}",
        **EAGER,
    )
    yield result
    from tinymodel import bare

    bare(tiny_loaded)


def test_a_bundle_has_a_page_that_needs_nothing_else(adapted) -> None:
    text = (adapted.folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name[:2] == "on"]
    assert "http" not in text and "@import" not in text and "url(" not in text
    # the data's own words are there, as words
    assert NASTY in page.text and "<script>" not in text


def test_it_says_what_the_receipt_says(adapted) -> None:
    page = Page((adapted.folder / "report.html").read_text(encoding="utf-8"))
    said = " ".join(page.text.split())
    verdict = adapted.verdict
    assert verdict.sentence[1:] in said and verdict.forgotten in said
    assert f"fixed: {round(10 * (verdict.after - verdict.before))}" in said and "broken: 0" in said
    for cell in verdict.factorial.values():
        assert f"{cell:.2f}" in said
    cost = read_json(adapted.folder / "record" / "run.json")["cost"]
    assert f"{cost['train_tokens']:,.0f}" in said
    # a point per move, the start included
    assert page.tags.count("circle") == 3 + 1


def test_rows_are_sorted_by_what_became_of_them(adapted) -> None:
    groups = report.groups(adapted.folder / "record", "success")
    assert sum(len(group["rows"]) for group in groups) == 10
    fixed = groups[0]["rows"]
    assert fixed and all(row["before"] == 0 and row["after"] == 1 for row in fixed)
    assert {row["answer"] for row in fixed} == {"aa"}


@pytest.mark.pure
def test_the_prompt_is_compared_word_by_word() -> None:
    system, question = report.changes(
        Prompt("Be a <b>helpful</b> one.", "{question}"), Prompt("Be a brief one.", "{question}")
    )
    assert system["parts"] == [
        ("=", "Be a "),
        ("-", "<b>helpful</b>"),
        ("+", "brief"),
        ("=", " one."),
    ]
    assert (system["changed"], question["changed"]) == (True, False)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.6, "4 s"), (185, "3 min 05 s"), (3725, "1 h 02 min"), (59.9, "1 min 00 s")],
)
def test_times_are_in_words(seconds: float, words: str) -> None:
    assert report.duration(seconds) == words


def test_nothing_that_changed_is_a_page_too(tiny, tmp_path: Path) -> None:
    """One test row less than an interval needs, a frozen model, and an empty system prompt."""
    options = {**EAGER, "method": "frozen", "system": ""}
    data = put(tmp_path / "mine.jsonl", "Mood", 12)
    result = nslora.adapt(data, out=tmp_path / "out", backbone=tiny.name, **options)
    assert not result.verdict.changed
    said = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    assert "Not better: nothing that was tried" in said and "System prompt, unchanged" in said


def test_an_interval_that_is_not_known_is_drawn_as_a_point() -> None:
    verdict = Verdict.__new__(Verdict)
    nan = float("nan")
    difference = type("Estimate", (), {"low": nan, "mean": 0.5, "high": nan})
    object.__setattr__(verdict, "difference", difference)
    assert report.interval(verdict) == {"low": 50, "mean": 75, "high": 50}
