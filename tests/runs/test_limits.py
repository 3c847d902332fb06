"""Limits: nothing is begun that does not fit, and with more room a run ends as if it had had that room."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any, cast

import pytest
from faulty import KEY, Faulty, Step, completion, serving
from scripted import lowercase
from test_resume import contents
from tinymodel import SETTINGS, config

import nslora
from nslora import cli
from nslora.editor.client import Request, most_tokens
from nslora.runs import plan as plans
from nslora.runs.adapt import foresee
from nslora.runs.limits import Limits, Room, Taken
from nslora.runs.run import Timed, make_run
from nslora.runs.store import STATE, Store
from nslora.types import Move, UserError

MOVES = {"method": "fixed:SNSN", "moves": 4, "rule": "lower_case", "gate": False}


def scripted(body: dict[str, Any]) -> Step:
    """Answer as a good editor would."""
    *system, user = [message["content"] for message in body["messages"]]
    reply = lowercase(Request("".join(system), user, body["seed"]))
    tokens_in, tokens_out = len("".join(system) + user) // 4, len(reply) // 4
    SPENT.append(tokens_in + tokens_out)
    return 200, {}, completion(reply, prompt_tokens=tokens_in, completion_tokens=tokens_out)


# tokens of the calls of a test
SPENT: list[int] = []


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    with pytest.MonkeyPatch.context() as patch, serving() as endpoint:
        patch.setenv("NSLORA_EDITOR_KEY", KEY)
        endpoint.reply = scripted
        yield endpoint


@pytest.fixture
def endpoint(server: Faulty) -> Faulty:
    server.seen.clear()
    SPENT.clear()
    return server


def make(tiny, folder: Path, url: str, limits: Limits | None, watch=lambda step: None) -> Path:
    cfg = config(**MOVES, backbone=tiny.name, editor_url=url)
    place = Store(folder / "results", folder / "runs")
    return make_run(cfg, place, backbone=tiny, watch=watch, limits=limits)


def result(record: Path) -> tuple[dict[str, bytes], dict]:
    """Return what must be the same, whether a reply of the editor came from a recording or not."""
    files, receipt = contents(record)
    editor = receipt["editor"]
    editor |= {"calls": editor["calls"] + editor.pop("replayed")}
    return files, receipt


@pytest.fixture(scope="module")
def whole(server: Faulty, tiny_loaded, tmp_path_factory: pytest.TempPathFactory):
    record = make(tiny_loaded, tmp_path_factory.mktemp("whole"), server.url, None)
    return result(record)


@pytest.mark.parametrize(("share", "moves"), [(0.02, 0), (0.7, 2), (0.95, 2)])
def test_a_run_ends_before_it_exceeds_its_tokens_and_goes_on_with_more(
    whole, endpoint, tiny, tmp_path, share: float, moves: int
) -> None:
    editor = whole[1]["editor"]
    tokens = int(share * (editor["tokens_in"] + editor["tokens_out"]))
    record = make(tiny, tmp_path, endpoint.url, Limits(tokens=tokens))
    assert sum(SPENT) <= tokens
    receipt = json.loads((record / "run.json").read_text())
    assert receipt["stopped"] == f"{tokens} tokens"
    assert receipt["schedule"] == "SNSN"[:moves]
    # what was found until then is evaluated
    assert receipt["final"]["test"]["n"] == whole[1]["final"]["test"]["n"]
    again = make(tiny, tmp_path, endpoint.url, Limits(tokens=1e6))
    assert result(again) == whole
    assert not list(tmp_path.rglob(STATE))


def test_a_limit_of_money_ends_a_run_too(whole, endpoint, tiny, tmp_path) -> None:
    limits = Limits(money=0.002, price=(1.0, 2.0))
    record = make(tiny, tmp_path, endpoint.url, limits)
    receipt = json.loads((record / "run.json").read_text())
    assert receipt["stopped"] == "0.002 dollars"
    assert 0 < receipt["editor"]["money"] <= 0.002
    # a limit that is not in the way changes nothing but what was paid
    more = Limits(money=10, price=(1.0, 2.0))
    files, _ = result(make(tiny, tmp_path, endpoint.url, more))
    assert files == whole[0]


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_no_move_is_begun_that_does_not_fit_the_time(
    whole, endpoint, tiny, tmp_path, moves: int
) -> None:
    limits = Limits(minutes=10)

    def age(step: Timed) -> None:
        assert 0 < step.left_s <= 600
        if step.step == moves:
            # a move was so slow that the next does not fit
            object.__setattr__(limits, "since", time.perf_counter() - 600)

    record = make(tiny, tmp_path, endpoint.url, limits, age)
    receipt = json.loads((record / "run.json").read_text())
    assert receipt["stopped"] == "10 minutes"
    assert receipt["schedule"] == "SNSN"[:moves]
    steps: list[int] = []
    again = make(tiny, tmp_path, endpoint.url, None, lambda step: steps.append(step.step))
    assert result(again) == whole
    assert steps == list(range(moves + 1, 5))


# ---- what fits


def room(taken: list[Taken], left: float = inf, minutes: float = inf) -> Room:
    return Room(Limits(minutes), lambda: (left, "9 tokens"), replies=20, scored=10, taken=taken)


START = Taken("start", 5.0, 0.0)
NUMERICAL = Taken("numerical", 40.0, 3.0)


@pytest.mark.pure
def test_the_like_of_a_move_is_its_kind_else_any_move_else_the_start() -> None:
    slow = Taken("symbolic", 70.0, 8.0)
    assert room([START]).like(Move.SYMBOLIC) == Taken(Move.SYMBOLIC, 5.0, 0.0)
    assert room([START, NUMERICAL]).like(Move.SYMBOLIC) == Taken(Move.SYMBOLIC, 40.0, 0.0)
    assert room([START, slow, NUMERICAL]).like(Move.NUMERICAL).seconds == 40.0
    more = Taken("symbolic", 60.0, 9.0)
    assert room([START, slow, more]).like(Move.SYMBOLIC) == Taken(Move.SYMBOLIC, 70.0, 9.0)


@pytest.mark.pure
def test_a_move_must_fit_with_the_evaluation_after_it() -> None:
    # the evaluation: 20 replies as 10 took 5 seconds
    assert room([START, NUMERICAL], minutes=51 / 60).affords(Move.NUMERICAL)
    tight = room([START, NUMERICAL], minutes=49 / 60)
    assert not tight.affords(Move.NUMERICAL)
    assert tight.stopped == f"{49 / 60:.12g} minutes"
    poor = room([START, NUMERICAL], left=2)
    assert poor.affords(Move.SYMBOLIC)
    assert not poor.affords(Move.NUMERICAL) and poor.stopped == "9 tokens"
    # what other processes took counts
    spent = room([START, NUMERICAL], minutes=51 / 60)
    spent.earlier_s = 10.0
    assert not spent.affords(Move.NUMERICAL)


@pytest.mark.pure
def test_the_time_that_is_left_is_that_of_the_moves_and_the_evaluation() -> None:
    assert room([START]).until_end_s(2) == 20.0
    assert room([START, NUMERICAL]).until_end_s(3) == 130.0
    assert room([START, NUMERICAL], minutes=1).until_end_s(3) == pytest.approx(60, abs=1)


@pytest.mark.pure
@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("name", ["minutes", "tokens", "money"])
def test_a_limit_is_a_number_above_0(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"a limit of {name} must be above 0"):
        Limits(**cast(Any, {name: value}))


@pytest.mark.pure
def test_the_stricter_of_limit_and_environment_holds(monkeypatch) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_BUDGET", "calls=7,tokens=500,money=2")
    budget = Limits(tokens=300, money=5).budget
    assert (budget.calls, budget.tokens, budget.money) == (7, 300, 2)


# ---- own data


def own_rows(folder: Path, answer: str = "aa") -> Path:
    path = folder / "mine.jsonl"
    rows = [{"question": f"Mood {n}?", "answer": answer} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_an_adaptation_that_a_limit_ended_goes_on_in_its_folder(tmp_path: Path, tiny) -> None:
    path = own_rows(tmp_path)
    options = {**SETTINGS, "method": "lora", "moves": 3, "returned": "tuned"}
    options |= {"backbone": tiny.name, "max_new_tokens": 8}
    whole = nslora.adapt(path, out=tmp_path / "whole", **options)
    assert whole.stopped == whole.goes_on == ""

    out = tmp_path / "out"
    ended = nslora.adapt(path, out=out, limits=Limits(minutes=1e-6), **options)
    assert (ended.stopped, ended.moves) == ("1e-06 minutes", 0)
    assert ended.goes_on.startswith("stopped by the limit of 1e-06 minutes after 0 moves; ")
    assert not ended.verdict.better and (out / "metrics.json").exists()
    with pytest.raises(UserError, match="holds another run, which a limit has ended"):
        nslora.adapt(path, out=out, **{**options, "seed": 1})

    again = nslora.adapt(path, out=out, **options)
    assert contents(out / "record") == contents(tmp_path / "whole" / "record")
    assert (again.stopped, again.moves) == ("", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "out", "whole"]
    with pytest.raises(UserError, match="is not empty"):
        nslora.adapt(path, out=out, **options)


def test_the_command_says_which_limit_ended_it(tmp_path, tiny, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--set=moves=2", "--set=threads=1", "--set=replay_pool=6", "--method=lora"]
    command = ["adapt", str(own_rows(tmp_path)), "--backbone", tiny.name, *settings]
    assert cli.main([*command, "--out", "out", "--minutes", "1e-6"]) == 3
    said = capsys.readouterr()
    assert "stopped by the limit of 1e-06 minutes after 0 moves; called again" in said.out
    assert "move 0: start, dev 0." in said.err and " s left" in said.err


def test_money_without_a_price_is_wrong_input(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_KEY", "k")
    monkeypatch.delenv("NSLORA_EDITOR_PRICE", raising=False)
    command = ["adapt", str(own_rows(tmp_path)), "--out", str(tmp_path / "out")]
    remote = ["--editor-url", "http://127.0.0.1:9/v1"]
    for more, words in (
        (["--money", "2"], "a limit of 2 dollars needs the price of the editor at http://127"),
        (["--price", "2.5"], "--price must be two numbers like '2.5,10', not '2.5'."),
        (["--tokens", "0"], "a limit of tokens must be above 0, not 0."),
        # a price is known: what is wrong is the address
        (["--money", "2", "--price", "1,2"], "cannot be reached"),
    ):
        assert cli.main([*command, *remote, *more]) == 2
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["mine.jsonl"]


# ---- beforehand


@pytest.mark.parametrize("method", ["textgrad", "lora-remade", "fixed:NS", "neurosymbolic"])
def test_a_plan_bounds_what_the_run_asks_of_the_editor(opened, tmp_path, tiny, method: str) -> None:
    asked: list[Request] = []

    def answer(request: Request) -> str:
        asked.append(request)
        return lowercase(request)

    run = opened(answer, method=method, moves=2, gate=False)
    price = (1.0, 1.0)
    cfg = run.cfg.but(editor_url="http://127.0.0.1:9/v1")
    foreseen = plans.plan(cfg, run.task, price, None)
    from nslora.algorithm.loop import adapt_phases

    adapt_phases(run, lambda state, needs: None)
    assert 0 < len(asked) <= foreseen.calls
    # nothing of a request is longer than was foreseen
    spent = sum(most_tokens(request) + request.max_tokens for request in asked)
    assert spent <= foreseen.tokens
    assert foreseen.money == pytest.approx(foreseen.tokens / 1e6)
    assert foreseen.moves == 2 and foreseen.seconds is None


def test_answers_that_ask_for_no_form_cost_weights_no_tokens(tmp_path, tiny) -> None:
    options = {"out": tmp_path / "out", "backbone": tiny.name, **SETTINGS}
    path = own_rows(tmp_path)
    _, weights = foresee(path, **{**options, "method": "lora-remade"})
    assert (weights.calls, weights.tokens, weights.money) == (0, 0, 0.0)
    _, nothing = foresee(path, **{**options, "method": "frozen"})
    assert (nothing.moves, nothing.calls) == (0, 0)
    _, prompts = foresee(path, **{**options, "method": "textgrad"})
    # two texts x (feedback 2 + candidates 2), three times
    assert prompts.calls == 24
    assert weights.seconds is not None and prompts.seconds is not None
    assert "symbolic move" not in weights.seconds and "numerical move" not in prompts.seconds
    assert weights.whole_s is not None and weights.whole_s > 3 * weights.seconds["numerical move"]


def test_a_plan_spends_nothing_and_leaves_nothing(
    endpoint, tmp_path, tiny, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--set=moves=2", "--set=threads=1", "--backbone", tiny.name]
    command = ["adapt", str(own_rows(tmp_path)), "--out", "out", "--plan", *settings]
    remote = ["--editor-url", endpoint.url]
    assert cli.main([*command, *remote, "--price", "2,8"]) == 0
    first, time_line, editor = capsys.readouterr().out.splitlines()
    assert first == f"neurosymbolic on {tiny.name}: at most 2 moves."
    assert time_line.startswith("time here: at most ") and "measured on a few rows" in time_line
    assert editor.startswith("external LLM: at most 20 calls and ") and " dollars; " in editor
    assert cli.main([*command, *remote]) == 0
    assert "of unknown price: give --price IN,OUT" in capsys.readouterr().out
    assert cli.main([*command, "--method", "gepa"]) == 2
    assert "what gepa asks of the editor is not known beforehand." in capsys.readouterr().err
    assert endpoint.seen == []
    assert [p.name for p in tmp_path.iterdir()] == ["mine.jsonl"]
