"""Claims, tables and numbers of a synthetic results folder, and that tampering with any of them is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from synthetic import write_grid, write_record

from nslora.study import claims, records, report, stats


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a small main comparison with everything built from them."""
    results = tmp_path_factory.mktemp("results")
    write_grid(results)
    report.build(results)
    return results


def verdicts(results: Path) -> dict[str, str]:
    return {
        claim["key"]: claim["verdict"] for claim in claims.judged(records.load(results))["claims"]
    }


def test_build_writes_every_kind_of_file(grid: Path) -> None:
    names = {
        path.name for path in grid.rglob("*") if path.is_file() and "records" not in path.parts
    }
    kinds = (
        "gain_matrix",
        "success",
        "interaction",
        "cost_curves",
        "signal_traces",
        "prompt_diffs",
    )
    assert {f"{kind}.{end}" for kind in kinds for end in ("pdf", "png", "csv", "json")} <= names
    assert {
        f"{kind}.{end}" for kind in ("main", "rules", "cost") for end in ("md", "tex", "csv")
    } <= names
    assert {"claims.json", "numbers.tex"} <= names


def test_sidecars_name_the_interval_and_the_runs_behind_it(grid: Path) -> None:
    shown = json.loads((grid / "figures" / "interaction.json").read_text())
    assert shown["interval"] == "95% t-interval on seed means" and shown["n_seeds"] == "3"
    assert len(shown["sources"]) == 10 * 2 * 3 and all(
        name.startswith("mixed-") for name in shown["sources"]
    )
    traces = json.loads((grid / "figures" / "signal_traces.json").read_text())
    assert len(traces["sources"]) == 2 and "no interval" in traces["interval"]


def test_main_table_cells_are_the_records_numbers(grid: Path) -> None:
    table = report.main_table(grid)
    runs = records.load(grid).main.runs.query(
        "task == 'mixed' and backbone == 'smollm2-135m' and method == 'lora'"
    )
    interval = stats.t_interval(100 * runs["final.test.success"])
    assert (
        table.loc["lora", ("mixed", "smollm2-135m")] == f"{interval.mean:.1f} ± {interval.half:.1f}"
    )
    assert table.loc["oracle", ("facts", "smollm2-135m")] == "-"
    assert table.loc["oracle", ("all", "IQM")] == "-" and "±" in str(
        table.loc["lora", ("all", "IQM")]
    )


def test_tables_agree_in_every_form(grid: Path) -> None:
    markdown = report.readme_table(grid)
    assert markdown == (grid / "tables" / "main.md").read_text()
    cells = [
        line.split(" | ")[1:] for line in markdown.splitlines() if line.startswith("| lora |")
    ][0]
    shown = report.show_table(grid)
    assert all(cell.strip(" |") in shown for cell in cells)
    tex = (grid / "tables" / "main.tex").read_text()
    assert (
        tex.count(r"\\") == 2 + 10 and tex.count(r"$\pm$") == markdown.count("± ") - 2
    )  # caption: ± twice


def test_seeds_short_of_the_table_are_marked(tmp_path: Path) -> None:
    for seed in range(2):
        write_record(tmp_path, task="facts", method="lora", seed=seed)
    write_record(tmp_path, task="facts", method="frozen")
    table = report.main_table(tmp_path)
    assert re.fullmatch(r"\d+\.\d \(n=1\)", str(table.loc["frozen"].iloc[0]))
    assert "seeds: 1-2." in report.readme_table(tmp_path)


def test_a_mean_over_fewer_rules_is_marked(tmp_path: Path) -> None:
    for rule in ("json", "bullet"):
        write_record(tmp_path, task="style", method="textgrad", rule=rule)
    write_record(tmp_path, task="style", method="lora", rule="json")
    cells = report.main_table(tmp_path).iloc[:, 0]
    assert str(cells["lora"]).endswith(" (1 of 2 rules)") and "rule" not in str(cells["textgrad"])


def test_numbers_are_distinct_latex_commands(grid: Path) -> None:
    text = (grid / "numbers.tex").read_text()
    commands = re.findall(r"^\\newcommand\{\\([A-Za-z]+)\}\{[^{}]+\}$", text, re.M)
    assert len(commands) == len(set(commands)) == len(text.splitlines())
    value = dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", text))[
        "successMixedSmollmTwoOneThreeFiveMLora"
    ]
    assert str(report.main_table(grid).loc["lora", ("mixed", "smollm2-135m")]).startswith(value)


@given(st.lists(st.text("aZ9._-: ", max_size=8), min_size=1, max_size=4))
def test_macro_names_are_letters(words: list[str]) -> None:
    assert re.fullmatch("[A-Za-z]*", report.macro("success", *words))


def test_claims_follow_the_records(grid: Path) -> None:
    found = json.loads((grid / "claims.json").read_text())
    assert found == claims.judged(records.load(grid))
    assert {c["key"]: c["verdict"] for c in found["claims"]}["beats-both"] == "holds"
    rows = found["claims"][0]["comparisons"]
    assert [row["backbone"] for row in rows] == ["all", "qwen2.5-coder-0.5b", "smollm2-135m"]
    assert rows[0]["n"] == 3 and rows[0]["low"] <= rows[0]["difference"] <= rows[0]["high"]
    assert rows[0]["difference"] == pytest.approx(
        (rows[1]["difference"] + rows[2]["difference"]) / 2, abs=1e-5
    )


def test_share_of_editor_requests_avoided(grid: Path) -> None:
    values = claims.calls_avoided(records.load(grid))
    assert values.groupby("seed").first().tolist() == [1 - (10 + s) / (30 + s) for s in range(3)]


def test_without_records_every_claim_is_undecided(tmp_path: Path) -> None:
    report.build(tmp_path)
    found = json.loads((tmp_path / "claims.json").read_text(), parse_constant=pytest.fail)
    assert len(found["claims"]) == 12
    assert all(row["n"] == 0 for claim in found["claims"] for row in claim["comparisons"])
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}
    assert report.show_table(tmp_path) == "no finished runs yet" and report.verify(tmp_path) == []


def test_a_verdict_is_told_with_what_it_rests_on(grid: Path, tmp_path: Path) -> None:
    first, second, *rest = claims.told(records.load(grid), "facts-numerical").splitlines()
    judged = claims.judge(claims.CLAIMS[0], records.load(grid))
    assert first.split(maxsplit=1) == [judged["verdict"], judged["claim"]]
    assert f"= {judged['comparisons'][0]['difference']:.3f} [" in second and second.endswith(
        "3 seeds"
    )
    assert len(rest) == 2
    (tmp_path / "records").mkdir()
    assert claims.told(records.load(tmp_path), "facts-numerical").endswith("= not run")
    write_record(tmp_path, (0.9, 0.9), task="facts", method="lora")
    write_record(tmp_path, (0.1, 0.1), task="facts", method="textgrad")
    assert claims.told(records.load(tmp_path), "facts-numerical").endswith("[?, ?], 1 seeds")


def test_a_claim_can_fail(tmp_path: Path) -> None:
    for seed in range(3):
        write_record(tmp_path, (0.1, 0.1), task="facts", method="lora", seed=seed)
        write_record(tmp_path, (0.9, 0.9), task="facts", method="textgrad", seed=seed)
        assert verdicts(tmp_path)["facts-numerical"] == ("undecided" if seed < 2 else "fails")


def test_a_claim_can_have_a_bound_below_or_above_zero(tmp_path: Path) -> None:
    for seed in range(3):
        write_record(tmp_path, (1.0, 1.0), task="mixed", method="neurosymbolic", seed=seed)
        write_record(tmp_path, (1.0, 1.0), task="mixed", method="lora-demonstrated", seed=seed)
    loaded = records.load(tmp_path)
    assert (
        verdicts(tmp_path)["near-demonstrated"] == "holds"
    )  # equal is within 5 points, and not above 0
    above = claims.methods("neurosymbolic", "lora-demonstrated", "mixed")
    assert claims.result(above, "all", above.values(loaded))["verdict"] == "fails"
    kept = claims.known_kept(loaded)
    bound = claims.Comparison("kept", claims.known_kept, least=0.9)
    row = claims.result(bound, "all", kept)
    assert row["difference"] == pytest.approx(kept.groupby("seed").mean().mean(), abs=1e-6)
    assert row["least"] == 0.9 and row["verdict"] == stats.verdict(records.estimate(kept), 0.9)


def test_beating_one_of_two_is_not_beating_both(tmp_path: Path) -> None:
    for seed in range(3):
        for method, skill in {"neurosymbolic": 0.6, "lora": 0.1, "textgrad": 1.0}.items():
            write_record(
                tmp_path, (skill, skill), task="mixed", method=method, seed=seed, test_items=40
            )
    claim = next(
        c for c in claims.judged(records.load(tmp_path))["claims"] if c["key"] == "beats-both"
    )
    pooled = [row["verdict"] for row in claim["comparisons"] if row["backbone"] == "all"]
    assert pooled == ["holds", "fails"] and claim["verdict"] == "fails"


def test_pooling_uses_the_seeds_that_backbones_share() -> None:
    seeds = {"a": (0, 1, 2, 3), "b": (1, 2, 3), "c": (0,)}
    index = pd.MultiIndex.from_tuples(
        [(b, s) for b, own in seeds.items() for s in own], names=["backbone", "seed"]
    )
    kept = claims.pooled(pd.Series(1.0, index)).index.tolist()
    assert kept == [(b, s) for b in "ab" for s in (1, 2, 3)]


def test_saturation_claim_scores_c1_against_what_came_later(grid: Path) -> None:
    loaded = records.load(grid)
    assert (
        claims.saturation("c1", 1.0)(loaded) > 0.4
    ).all()  # the synthetic loss flattens with the reward
    assert (claims.saturation("c1", -1.0)(loaded) < -0.4).all()


def test_the_claims_table_says_what_claims_json_says(grid: Path) -> None:
    judged = json.loads((grid / "claims.json").read_text())["claims"]
    table = (grid / "tables" / "claims.md").read_text()
    for claim in judged:
        for row in claim["comparisons"]:
            difference = (
                f"{report.percent(row['difference'])} [{report.percent(row['low'])}, "
                if row["n"]
                else "-"
            )
            line = f"| {claim['key']} | {row['comparison']} | {row['backbone']} | {difference}"
            assert line in table
            assert f"| {row['n']} | {row['verdict']} |" in table.split(line)[1].splitlines()[0]


def test_remade_data_are_paired_across_targets_only(tmp_path: Path) -> None:
    for seed in range(3):
        for targets, skill in (("verified", 1.0), ("gold", 0.0)):
            write_record(
                tmp_path,
                (skill, 1.0),
                task="math",
                method="neurosymbolic",
                targets=targets,
                seed=seed,
            )
        write_record(
            tmp_path,
            (0.0, 1.0),
            task="math",
            method="neurosymbolic",
            targets="verified",
            seed=seed,
            rank=4,
        )
    values = claims.remade(records.load(tmp_path))
    assert len(values) == 3 * 12 and (values == 1.0).all()  # the runs at rank 4 have no partner


def test_a_second_round_of_remaking_is_compared_with_as_many_epochs_in_one(tmp_path: Path) -> None:
    for seed in range(3):
        for skill, schedule in ((1.0, {"moves": 4, "epochs": 4}), (0.0, {"moves": 2, "epochs": 8})):
            shared = {"task": "math", "method": "alternate", "targets": "verified", "seed": seed}
            write_record(tmp_path, (skill, 1.0), **shared, **schedule)
            write_record(tmp_path, (skill, 1.0), **shared | schedule | {"targets": "gold"})
    values = claims.remade_again(records.load(tmp_path))
    assert len(values) == 3 * 12 and (values == 1.0).all()
    assert len(set(values.index.get_level_values("settings"))) == 1


def test_build_removes_what_earlier_versions_left_behind(grid: Path, tmp_path: Path) -> None:
    results = Path(shutil.copytree(grid, tmp_path / "results"))
    old = results / "figures" / "kept.csv"
    old.write_text("a figure that has another name now")
    assert report.verify(results) == [
        "figures/kept.csv is stored but does not follow from the records."
    ]
    report.build(results)
    assert not old.exists() and report.verify(results) == []


def test_verify_finds_whatever_was_changed(grid: Path, tmp_path: Path) -> None:
    results = Path(shutil.copytree(grid, tmp_path / "results"))
    assert report.verify(results) == []
    (results / "claims.json").write_text(
        (results / "claims.json").read_text().replace("undecided", "holds")
    )
    (results / "tables" / "extra.md").write_text("typed by hand")
    (results / "figures" / "interaction.csv").unlink()
    record = sorted(results.glob("records/facts-*"))[0]
    run = json.loads((record / "run.json").read_text())
    run["final"]["test"]["content"] += 0.01
    (record / "run.json").write_text(json.dumps(run))
    assert report.verify(results) == [
        f"{record.name}: run.json and scores.csv disagree on test content.",
        "claims.json differs from what the records give.",
        "figures/interaction.csv is missing.",
        "tables/extra.md is stored but does not follow from the records.",
    ]


def test_picture_of_a_finished_run(grid: Path) -> None:
    record = next(grid.glob("records/mixed-*-neurosymbolic-s0-*"))
    fig = report.run_picture(record)
    assert isinstance(fig, Figure) and {"dev reward", "training loss, nats per token"} <= {
        ax.get_title("left") for ax in fig.axes
    }


def test_interquartile_mean_needs_every_column(grid: Path) -> None:
    frame = report.middle(records.load(grid))
    assert (
        set(frame.method) == {"frozen", "lora", "textgrad", "neurosymbolic"}
        and np.isfinite(frame["mean"]).all()
    )


def test_interquartile_mean_needs_three_seeds(grid: Path, tmp_path: Path) -> None:
    results = Path(shutil.copytree(grid, tmp_path / "results"))
    for record in results.glob("records/facts-*-lora-s2-*"):
        shutil.rmtree(record)
    frame = report.middle(records.load(results))
    assert "lora" not in set(frame.method) and "textgrad" in set(frame.method)
