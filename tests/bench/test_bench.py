"""The benchmark: what it computes from rows, what it keeps, and both sides measured for real, but never their speed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from nslora.bench import measure, report
from nslora.types import UserError

COMMON = {"threads": 1, "backbone": "smollm2-135m"}
ROW = {"device": "cpu", "dtype": "float32", "peak_mb": 100.0, "backbone": "b"}


def rows(part: str, ours: list[float], theirs: list[float], **more: Any) -> list[dict[str, Any]]:
    """Rows of two sides that took turns at 12 units of work, in these seconds."""
    pairs = [[("nslora", a), ("other", b)] for a, b in zip(ours, theirs, strict=True)]
    return [
        {
            **ROW,
            "part": part,
            "case": "c",
            "side": side,
            "repetition": i,
            "work": 12,
            "seconds": seconds,
            **more,
        }
        for i, pair in enumerate(pairs)
        for side, seconds in pair
    ]


def test_comparison_is_the_ratio_of_medians_with_the_range_of_single_turns() -> None:
    (line,) = report.compared(rows("train", [1, 2, 6], [4, 6, 6])).to_dict("records")
    assert (line["ours"], line["theirs"], line["unit"], line["n"]) == (6.0, 2.0, "tokens/s", 3)
    assert (line["ratio"], line["low"], line["high"]) == (3.0, 1.0, 4.0)
    assert (line["against"], line["our_mb"]) == ("other", 100.0)


def test_only_measured_turns_are_compared() -> None:
    assert report.compared(rows("tried", [1], [2]) + rows("growth", [1], [2])).empty
    both = rows("train", [1], [2]) + [
        row | {"side": "third"} for row in rows("train", [1], [3])[1:]
    ]
    assert report.compared(both).ratio.tolist() == [2.0, 3.0]


def test_table_says_the_numbers() -> None:
    frame = report.compared(rows("train", [2, 2], [4, 8], setting="packing"))
    shown = report.table(frame)
    assert shown.index.tolist() == ["train, c"]
    assert shown.iloc[0].tolist() == [
        "b",
        "6 tokens/s",
        "2.25",
        "other, packing",
        "2.67 (2.00 to 4.00)",
        "100 / 100",
    ]


def growing() -> list[dict[str, Any]]:
    sizes = [(axis, n) for axis in ("items", "tokens") for n in (16, 64)]
    return [
        {
            **ROW,
            "part": "growth",
            "case": axis,
            "size": n,
            "repetition": i,
            "seconds": n / 10 + i,
            "peak_mb": 500.0 + i,
        }
        for axis, n in sizes
        for i in range(3)
    ]


def test_growth_takes_median_seconds_and_highest_memory() -> None:
    frame = report.grown(growing()).set_index(["axis", "size"])
    assert frame.loc[("items", 64), ["seconds", "peak_mb", "n"]].tolist() == [7.4, 502.0, 3]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Parts that need no model; changing the dictionary changes what they measure."""
    made = {"train": rows("train", [1, 1], [2, 4]), "growth": growing()}
    monkeypatch.setattr(
        measure, "MEASURED", {name: lambda *_, name=name: made[name] for name in made}
    )
    return made


def run(out: Path, only: str | None = None) -> list[Path]:
    return measure.run(out, measure.SMALL, 1, only, lambda _: None)


def test_every_part_is_kept_as_soon_as_it_is_measured(
    tmp_path: Path, faked: dict[str, Any]
) -> None:
    names = {path.name for path in run(tmp_path)}
    pictures = {
        f"{name}.{end}" for name in ("ratios", "growth") for end in ("pdf", "png", "csv", "json")
    }
    assert names == {"bench.json", "bench.md", "bench.tex", "bench.csv"} | pictures
    assert all((tmp_path / name).exists() for name in names)
    faked["growth"] = []  # breaks
    faked["train"] = rows("train", [1, 1], [5, 5])
    with pytest.raises(StopIteration):
        run(tmp_path)
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["train"]["rows"] == faked["train"]
    assert kept["growth"]["rows"] == growing()
    assert kept["train"]["environment"]["threads"] == "1"
    heads = (tmp_path / "bench.md").read_text().split("|")
    assert [head.strip() for head in heads[1:3]] == ["what", "backbone"]
    assert pd.read_csv(tmp_path / "bench.csv").ratio.tolist() == [5.0]


def test_a_part_says_the_dtype_of_what_counts(tmp_path: Path, faked: dict[str, Any]) -> None:
    """Evaluation, which begins with a check in float32, was once said to be measured in it."""
    check = [row | {"part": "float32", "dtype": "float32"} for row in faked["train"]]
    faked["train"] = check + [row | {"dtype": "bfloat16"} for row in faked["train"]]
    run(tmp_path, only="train")
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["train"]["environment"]["dtype"] == "bfloat16"


def test_a_part_says_all_its_counts_of_threads(tmp_path: Path, faked: dict[str, Any]) -> None:
    faked["train"] = [row | {"threads": n} for n in (2, 1) for row in faked["train"]]
    run(tmp_path, only="train")
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["train"]["environment"]["threads"] == "1 and 2"


def test_memory_is_that_of_the_server_where_there_is_one() -> None:
    made = [row | {"peak_server_mb": 7.0} for row in rows("editor", [1], [2])]
    (line,) = report.compared(made).to_dict("records")
    assert (line["our_mb"], line["their_mb"]) == (7.0, 7.0)


@pytest.mark.parametrize(("who", "most"), [("nslora", None), ("TRL", "1024")])
def test_other_sides_keep_as_many_compiled_products_as_torch_does(
    monkeypatch, who: str, most: str | None
) -> None:
    seen: list[dict[str, str]] = []

    def refuse(*_: Any, env: dict[str, str], **__: Any) -> None:
        seen.append(env)
        raise OSError("refused here")

    for name in measure.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(measure.subprocess, "Popen", refuse)
    with (
        pytest.raises(OSError, match="refused here"),
        measure.side({**COMMON, "run": "sides.product", "side": who}),
    ):
        pass
    assert [seen[0].get(name) for name in measure.CACHES] == [most] * 2


def test_one_part_can_be_measured_again(tmp_path: Path, faked: dict[str, Any]) -> None:
    run(tmp_path)
    before = json.loads((tmp_path / "bench.json").read_text())
    faked["train"] = rows("train", [1], [3])
    run(tmp_path, only="train")
    after = json.loads((tmp_path / "bench.json").read_text())
    assert after.pop("train")["rows"] == faked["train"]
    assert after == {key: value for key, value in before.items() if key != "train"}


@pytest.mark.parametrize("native", [True, False])
def test_products_are_in_float32_and_in_what_the_hardware_computes(
    monkeypatch, native: bool
) -> None:
    monkeypatch.setattr(measure, "fast_bfloat16", lambda _device: native)
    asked: list[list[dict[str, Any]]] = []

    def fake(specs: list[dict[str, Any]], _repetitions: int) -> list[dict[str, Any]]:
        asked.append(specs)
        return [{"flop": 3e9}]

    monkeypatch.setattr(measure, "measure", fake)
    assert all(
        row["work"] == 3.0 for row in measure.arithmetic(measure.SMALL, {"threads": 1, "batch": 4})
    )
    wanted = ["bfloat16", "float32"] if native else ["float32"]
    assert [[spec["dtype"] for spec in specs[1:]] for specs in asked] == [wanted, wanted]
    assert [specs[0]["run"] for specs in asked] == ["sides.epochs", "sides.prefill"]


def test_unknown_parts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown part 'speed' .* choose from train, evaluate, load, editor, arith"
    ):
        run(tmp_path, only="speed")
    assert list(tmp_path.iterdir()) == []


def test_operations_are_counted_once_per_weight_and_token() -> None:
    from nslora.bench.sides import flop

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(num_attention_heads=2, hidden_size=4, num_hidden_layers=1)
            self.body, self.lora, self.head = (
                torch.nn.Linear(4, 3),
                torch.nn.Linear(3, 1),
                torch.nn.Linear(4, 5),
            )
            self.body.requires_grad_(False)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    weights, head, pairs = 12, 20, 10 * 10 / 2
    whole = [(10, 10, 2)]
    assert (
        flop(Tiny(), whole, training=False) == 10 * 2 * (weights + 3) + 4 * 4 * pairs + 2 * 2 * head
    )
    assert (
        flop(Tiny(), whole, training=True)
        == 10 * (4 * weights + 6 * 3) + 3 * 4 * 4 * pairs + 2 * 4 * head
    )
    parted = [(6, 6, 0), (10, 4, 2)]  # the same tokens, six of them from a cache
    assert flop(Tiny(), parted, training=False) == flop(Tiny(), whole, training=False)


def test_sums_are_right_and_of_the_asked_length(backbone) -> None:
    from nslora.bench.sides import PLAIN, addition, additions, encoded

    pair = addition([1, 2, 3], steps=True)
    assert (pair.question, pair.target) == (
        "What is 1 + 2 + 3?",
        "1 + 2 = 3. 3 + 3 = 6. The sum is 6.",
    )
    assert addition([1, 2, 3], steps=False).target == "The sum is 6."
    assert pair.prompt == PLAIN
    spec = {"items": 4, "tokens": 100, "steps": True, "spread": 0.1}
    lengths = [
        len(prompt) + len(answer) for prompt, answer in encoded(backbone, additions(backbone, spec))
    ]
    assert all(90 <= n <= 140 for n in lengths)  # one more step than wanted at most


def test_a_refused_side_says_its_sentence() -> None:
    with (
        pytest.raises(UserError, match="unknown backbone 'gpt-5'"),
        measure.side({**COMMON, "run": "sides.replies", "backbone": "gpt-5"}),
    ):
        pass


def test_both_sides_learn_the_same_from_the_same_tokens() -> None:
    spec = {
        **COMMON,
        "batch": 4,
        "items": 4,
        "tokens": 50,
        "steps": False,
        "spread": 0.1,
        "dtype": "float32",
    }
    theirs = spec | {"run": "sides.trl_epochs", "side": "TRL", "settings": measure.FAST}
    with (
        measure.side(spec | {"run": "sides.epochs", "side": "nslora"}) as mine,
        measure.side(theirs) as other,
    ):
        a, b = (
            {"part": "train", "case": "c", "repetition": 0, **repeat()} for repeat in (mine, other)
        )
    assert a["work"] == b["work"] > 150
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # of one batch, before the first step
    assert min(row["peak_mb"] for row in (a, b)) > 300
    (line,) = report.compared([a, b]).to_dict("records")
    assert (line["against"], line["n"]) == ("TRL", 1)


def test_a_setting_that_breaks_is_told_and_never_the_best() -> None:
    spec = {**COMMON, "batch": 4, "items": 4, "tokens": 50, "steps": False, "spread": 0.1}
    spec |= {"part": "train", "case": "c"}
    wrong = spec | {
        "run": "sides.trl_epochs",
        "side": "TRL",
        "setting": "odd",
        "settings": {"optim": "no such optimizer"},
    }
    row = measure.tried_once(wrong)
    assert row["work"] == 0 and "adamw" in row["broke"]
    fine = row | {"setting": "plain", "work": 100, "seconds": 2.0}
    del fine["broke"]
    assert report.tried([row, fine]) == [
        "Tried for train, c, smollm2-135m, tokens/s: odd: did not run; plain: 50."
    ]


def test_both_sides_answer_the_same_in_float32() -> None:
    spec = {**COMMON, "items": 3, "new_tokens": 6, "chains": False, "dtype": "float32"}
    theirs = spec | {"run": "sides.padded_replies", "side": "transformers", "ask": {"batch": 2}}
    made = measure.measure([spec | {"run": "sides.replies", "side": "nslora"}, theirs], 1)
    assert [row["side"] for row in made] == ["nslora", "transformers"]
    ours, other = measure.with_share(made, least=1.0)
    assert ours["identical"] == other["identical"] == 1.0
    assert ours["tokens"] == other["tokens"]
    assert "texts" not in ours
    broken = [made[0], made[1] | {"texts": ["x"] * 3}]
    with pytest.raises(RuntimeError, match="the texts differ in float32"):
        list(measure.with_share(broken, least=1.0))


def test_every_part_says_where_it_was_measured() -> None:
    """Parts can be measured anew one by one, and then on another machine."""
    old = {"device": "cpu", "dtype": "bfloat16", "threads": 2, "processor": "A"}
    new = old | {"processor": "B"}
    said = report.places({"train": new, "evaluate": old, "load": old})
    assert (
        said == "train: cpu, bfloat16, threads: 2, B; evaluate, load: cpu, bfloat16, threads: 2, A"
    )
