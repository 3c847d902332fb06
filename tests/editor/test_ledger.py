"""What is spent, and that no more is, also where parallel jobs share a budget."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from faulty import ASK, FAULT, OK, Faulty, completion

from nslora.editor.client import Editor
from nslora.editor.ledger import Budget, Ledger, Spending, Spent
from nslora.editor.replay import Reply
from nslora.types import UserError

COST = Reply("x", tokens_in=60, tokens_out=40, money=0.5)


def test_ledgers_subtract_and_keep_the_last_error_of_what_is_left() -> None:
    before = Ledger(2, 1, 0, 1, 40, 4, 1.0, 0.1, "old")
    after = Ledger(5, 1, 2, 1, 90, 9, 3.0, 0.3, "old")
    assert after - before == Ledger(3, 0, 2, 0, 50, 5, 2.0, 0.2)
    more = replace(after, lost=2, error="new") - before
    assert more.error == "new"
    # put together again, and with nothing more
    assert before + more == replace(after, lost=2, error="new")
    assert more + Ledger() == more


def test_a_difference_does_not_depend_on_what_was_spent_before() -> None:
    first, later = Ledger(), Ledger(money=0.7, seconds=123.456)
    start = replace(later)
    for ledger in (first, later):
        for _ in range(3):
            ledger.charge(replace(COST, money=0.1, seconds=0.1))
    assert first.money != later.money - start.money
    assert first - Ledger() == later - start


@pytest.mark.parametrize(
    ("budget", "made"),
    [(Budget(calls=2), 2), (Budget(tokens=150), 2), (Budget(money=1e-9), 1), (Budget(calls=0), 0)],
)
def test_nothing_is_sent_once_the_budget_is_spent(
    endpoint: Faulty, monkeypatch, budget, made
) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_PRICE", "1,1")
    outcomes = []
    with Editor("gpt", endpoint.url, budget=budget) as editor:
        for seed in range(4):
            outcomes += editor.complete_all([replace(ASK, seed=seed)])
    assert [isinstance(o, str) for o in outcomes] == [i < made for i in range(4)]
    assert len(endpoint.seen) == made
    assert (editor.ledger.calls, editor.ledger.lost) == (made, 4 - made)


def test_attempts_count_against_the_budget(endpoint: Faulty, quick) -> None:
    endpoint.script.extend([FAULT, OK])
    with Editor("gpt", endpoint.url, budget=Budget(calls=2)) as editor:
        assert editor.complete_all([ASK]) == ["fine"]
        [second] = editor.complete_all([replace(ASK, seed=8)])
    assert "budget of 2 calls is spent" in str(second)
    assert len(endpoint.seen) == 2


def test_what_is_replayed_is_free(endpoint: Faulty, tmp_path) -> None:
    for _ in range(3):
        with Editor("gpt", endpoint.url, recordings=tmp_path, budget=Budget(calls=1)) as editor:
            assert editor.complete(ASK) == "reply 7"
    assert len(endpoint.seen) == 1


def test_parallel_jobs_share_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "work" / "spent.json"

    def job(_: int) -> int:
        spending = Spending(Budget(calls=40), path)
        admitted = [spending.admit() for _ in range(10)]
        return admitted.count("")

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(job, range(6))) == 40
    assert Spending(Budget(calls=40), path).admit() == "40 calls"
    # and what they cost
    spending = Spending(Budget(tokens=150), path)
    spending.charge(COST)
    assert spending.admit() == ""
    spending.charge(replace(COST, retries=2))
    assert Spending(Budget(tokens=150), path).admit() == "150 tokens"
    assert Spending(Budget(calls=43), path).admit() == "43 calls"


def test_what_is_set_aside_for_calls_under_way_is_not_spent_twice() -> None:
    spending = Spending(Budget(tokens=250, money=2))
    assert spending.admit(120, 0.5) == spending.admit(120, 0.5) == ""
    assert spending.admit(120, 0.5) == "250 tokens"
    # a call that cost less leaves room for another
    spending.charge(COST, 120, 0.5)
    assert spending.left("tokens") == 150
    assert spending.admit(20, 0.5) == ""
    assert spending.admit(0, 0.7) == "2 dollars"


def test_a_budget_that_ends_a_run_is_not_exceeded_by_calls_that_go_together(
    endpoint: Faulty, tmp_path
) -> None:
    endpoint.reply = lambda body: (200, {}, completion("fine", prompt_tokens=40))
    asks = [replace(ASK, seed=seed, max_tokens=20) for seed in range(4)]
    budget = Budget(tokens=150)
    with (
        Editor("gpt", endpoint.url, recordings=tmp_path, budget=budget, ends=True) as editor,
        pytest.raises(Spent, match="^150 tokens$"),
    ):
        editor.complete_all(asks)
    # all four are asked for at once, and each may take some 70
    assert len(endpoint.seen) == editor.ledger.calls == 2
    # what was answered is there for whoever goes on
    with Editor("gpt", endpoint.url, recordings=tmp_path, ends=True) as editor:
        assert editor.complete_all(asks) == ["fine"] * 4
    assert len(endpoint.seen) == 4


def test_a_limit_of_money_needs_a_price(endpoint: Faulty, monkeypatch) -> None:
    monkeypatch.delenv("NSLORA_EDITOR_PRICE", raising=False)
    with pytest.raises(UserError, match="a limit of 2 dollars needs the price of the editor at"):
        Editor("gpt", endpoint.url, budget=Budget(money=2))
    Editor("gpt", endpoint.url, budget=Budget(money=2), price=(0.0, 0.0))
    # our own server is free
    Editor("smollm2-135m", budget=Budget(money=2))


def test_without_a_limit_no_file_is_made(tmp_path: Path) -> None:
    spending = Spending(Budget(), tmp_path / "spent.json")
    assert spending.admit() == ""
    spending.charge(COST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"calls": 1}', '{"calls": "many"}'])
def test_a_damaged_count_is_named_and_not_taken_for_nothing(tmp_path: Path, content) -> None:
    path = tmp_path / "spent.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"spent\.json does not say what the editor has spent"):
        Spending(Budget(calls=4), path).admit()


def test_the_budget_is_set_in_the_environment(monkeypatch) -> None:
    assert Budget.from_environment() == Budget()
    monkeypatch.setenv("NSLORA_EDITOR_BUDGET", "calls=500, money=2.5")
    assert Budget.from_environment() == Budget(calls=500, money=2.5)


@pytest.mark.parametrize("text", ["many", "calls=many", "calls=-1", "cals=5", "calls", "calls=nan"])
def test_a_wrong_budget_is_one_sentence(monkeypatch, text) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_BUDGET", text)
    with pytest.raises(UserError, match="NSLORA_EDITOR_BUDGET must be like"):
        Budget.from_environment()
