"""Schedule trees: a path is what a run of that schedule makes, and an interrupted tree goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from scripted import Scripted, lowercase
from tinymodel import config

from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.disk import sealed, unsealed
from nslora.experiments import grid, schedules
from nslora.runs.run import make_run
from nslora.runs.store import Store, read_jsonl
from nslora.types import UserError

DEPTH = 3


class Grown(NamedTuple):
    """A tree, and what was said and kept while it grew."""

    nodes: list[dict]
    instance: dict
    said: list[str]
    states: list[int]


def grow(tiny, folder: Path, reply=lowercase, stop: int = 0, **settings) -> Grown:
    """Grow the tree of a folder; with `stop` the process is interrupted after so many nodes."""
    said: list[str] = []
    states: list[int] = []

    def say(line: str) -> None:
        said.append(line)
        states.append(len(list((folder / "work").glob("node-*"))))
        if len(said) == stop:
            raise KeyboardInterrupt

    place = Store(folder / "results", folder / "runs")
    with suppress(KeyboardInterrupt):
        schedules.grow(
            settings_of(tiny, **settings),
            folder / "tree",
            place,
            folder / "work",
            say,
            Scripted(reply),
            tiny,
        )
    instance = json.loads((folder / "tree" / "instance.json").read_text())
    return Grown(read_jsonl(folder / "tree" / "nodes.jsonl"), instance, said, states)


@pytest.fixture(scope="module")
def whole(tiny_loaded, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """A tree that grew undisturbed."""
    return grow(tiny_loaded, tmp_path_factory.mktemp("whole"))


def settings_of(tiny, **settings) -> RunConfig:
    basic = {"method": "neurosymbolic", "rule": "lower_case", "seed": 1, "moves": DEPTH}
    # so many that the gate lets some edits pass
    basic |= {"dev_items": 4}
    return config(**{**basic, "backbone": tiny.name, **settings})


def untimed(nodes: list[dict]) -> list[dict]:
    left_out = ("seconds", "sha256")
    return [{key: value for key, value in node.items() if key not in left_out} for node in nodes]


def test_every_schedule_is_a_node(whole: Grown) -> None:
    names = [node["schedule"] for node in whole.nodes]
    assert names == schedules.by_length(schedules.below("", DEPTH))
    assert len(names) == len(set(names)) == 2 ** (DEPTH + 1) - 1
    # lest the tests below see edits of one kind only
    assert {node["accepted"] for node in whole.nodes} == {None, True, False}


@pytest.mark.parametrize("schedule", ["NNS", "SNS"])
def test_a_path_is_what_a_run_of_its_schedule_makes(whole, tiny, tmp_path, schedule: str) -> None:
    """The run has the tree's targets and needs, and a schedule in the place of a decision."""
    nodes = {node["schedule"]: node for node in whole.nodes}
    same_as_a_run(nodes, settings_of(tiny), schedule, lowercase, tiny, tmp_path)


def same_as_a_run(
    nodes: dict[str, dict], cfg: RunConfig, schedule: str, reply, tiny, folder: Path
) -> None:
    cfg = cfg.but(method=f"fixed:{schedule}", needs="asked")
    place = Store(folder / "results", folder / "runs")
    record = make_run(cfg, place, Scripted(reply), tiny, watch=lambda step: None)
    for step in read_jsonl(record / "steps.jsonl"):
        node = nodes[schedule[: step["step"]]]
        for key in ("dev", "train", "signal", "evidence", "bill", "prompt"):
            assert json.dumps(node[key]) == json.dumps(step[key]), (schedule, step["step"], key)
    final = json.loads((record / "run.json").read_text())
    chosen = nodes[schedule[: final["best"]["step"]]]
    for key in ("success", "value", "n"):
        assert chosen["test"][key] == final["final"]["test"][key]


@contextmanager
def noting() -> Iterator[list[str]]:
    """Note the schedules whose last move is made, not shared."""
    made: list[str] = []
    compute = schedules.Tree._compute

    def noted(tree: schedules.Tree, schedule: str) -> None:
        made.append(schedule)
        compute(tree, schedule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules.Tree, "_compute", noted)
        yield made


def no_edit(request: object) -> str:
    """An editor none of whose edits is accepted."""
    return "no edit"


@pytest.fixture(scope="module")
def in_vain(tiny_loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grown, list[str]]:
    """A tree of which no edit is accepted, and the schedules whose moves were made."""
    with noting() as made:
        return grow(tiny_loaded, tmp_path_factory.mktemp("in_vain"), no_edit), made


def test_a_numerical_move_after_rejected_edits_is_made_once(in_vain) -> None:
    grown, made = in_vain
    assert [name for name in made if name.endswith("N")] == ["N", "NN", "NNN"]
    assert any(line.endswith(" as NN") for line in grown.said)
    assert len(grown.nodes) == 2 ** (DEPTH + 1) - 1


@pytest.mark.parametrize("schedule", ["NSN", "SNN", "SNS", "SSN"])
def test_a_shared_move_is_what_a_run_of_its_schedule_makes(
    in_vain, tiny, tmp_path, schedule: str
) -> None:
    nodes = {node["schedule"]: node for node in in_vain[0].nodes}
    same_as_a_run(nodes, settings_of(tiny), schedule, no_edit, tiny, tmp_path)


@pytest.mark.parametrize(
    ("accepted", "twins"),
    [
        ("", {"SN": "N", "NSN": "NN", "SSN": "N", "SNSN": "NN"}),
        ("S", {"SN": "", "SSN": "SN", "SNSN": "SNN", "NSN": "NN"}),
        # the second edit is another one where there was none before it
        ("SS", {"SSN": "", "SN": "N", "SSSN": "SSN", "SSNSN": "SSNN"}),
        ("SNS", {"SNSN": "", "SNSSN": "SNSN", "NSN": "NN"}),
    ],
)
def test_what_parts_twins_are_rejected_edits_since_the_last_accepted_one(
    tmp_path: Path, accepted: str, twins: dict[str, str]
) -> None:
    names = schedules.below("", 5)
    nodes = {name: {"accepted": name == accepted if name.endswith("S") else None} for name in names}
    session = SimpleNamespace(cfg=RunConfig(moves=5))
    tree = schedules.Tree(cast(Session, session), tmp_path, tmp_path, nodes)
    for name in names:
        (tree._place(name)).mkdir()
        tree._state(name).touch()
    assert {name: tree._twin(name) for name in twins} == twins


def test_weights_that_learn_some_inputs_share_nothing(tiny, tmp_path: Path) -> None:
    """Edits that fail leave what needs form to the weights: other inputs."""
    with noting() as made:
        grow(tiny, tmp_path, reply=no_edit, moves=2, inputs="needed")
    assert made == sorted(schedules.below("", 2))


@pytest.mark.parametrize("stop", [1, 6, 13])
def test_an_interrupted_tree_goes_on_from_its_finished_nodes(whole, tiny, tmp_path, stop) -> None:
    cut = grow(tiny, tmp_path, stop=stop)
    assert len(cut.nodes) == stop
    resumed = grow(tiny, tmp_path)
    assert untimed(resumed.nodes) == untimed(whole.nodes)
    # nothing that was finished is made again
    assert len(resumed.said) == len(whole.nodes) - stop


def test_lost_states_are_made_again(whole: Grown, tiny, tmp_path: Path) -> None:
    """Records may travel to another machine without the working folder."""
    path = tmp_path / "tree" / "nodes.jsonl"
    path.parent.mkdir()
    # all but the last schedules of three moves
    kept = [node for node in whole.nodes if node["schedule"] not in ("SSN", "SSS")]
    path.write_text("".join(json.dumps(node) + "\n" for node in kept))
    path.with_name("instance.json").write_text(json.dumps(whole.instance))
    again = grow(tiny, tmp_path)
    assert untimed(again.nodes) == untimed(whole.nodes)
    # the two, and the states on the way to them
    assert len(again.said) == 5


def test_other_code_does_not_finish_a_tree(whole: Grown, tiny, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "nodes.jsonl").write_text(json.dumps(whole.nodes[0]) + "\n")
    environment = whole.instance["environment"] | {"code": "another"}
    instance = unsealed(whole.instance) | {"environment": environment}
    (tmp_path / "tree" / "instance.json").write_text(json.dumps(sealed(instance)))
    with pytest.raises(UserError, match="of other code"):
        grow(tiny, tmp_path)


def test_a_tree_that_cannot_be_grown_stops_no_other(tmp_path: Path) -> None:
    """Two instances of which none can be built: both are said, and named to whoever asked."""
    wrong = [config(task="facts", items=2, test_items=99, seed=seed) for seed in (1, 2)]
    profile = grid.Profile("t", tmp_path, tmp_path / "results", 60, {}, (), tuple(wrong))
    names = [cfg.run_id for cfg in wrong]
    assert schedules.left(profile) == wrong
    said: list[str] = []
    assert schedules.grow_all(profile, said.append) == names
    assert [line.split(":")[0] for line in said] == names
    assert all("are too many for items = 2" in line for line in said)


def test_states_go_when_nothing_starts_from_them(whole: Grown) -> None:
    # never more than a path and one node beside it
    assert max(whole.states) <= DEPTH + 2


def test_a_rejected_edit_shares_its_parents_scores(tiny, tmp_path: Path) -> None:
    grown = grow(tiny, tmp_path, reply=lambda request: "no edit", moves=2)
    nodes = {node["schedule"]: node for node in grown.nodes}
    for schedule in ("S", "SS", "NS"):
        node, parent = nodes[schedule], nodes[schedule[:-1]]
        assert node["accepted"] is False
        for key in ("test", "test_items", "locality", "promptability", "prompt", "dev"):
            assert node[key] == parent[key]


def test_frozen_weights_have_forgotten_nothing(whole: Grown) -> None:
    start = whole.nodes[0]
    assert start["promptability"] == 1.0
    # a random model knows nothing that it could forget
    assert start["locality"] in (None, 1.0)


def test_frozen_weights_say_once_what_they_know(tiny, tmp_path: Path, monkeypatch) -> None:
    """In another batch the same weights may give other bits, and seem to have forgotten something."""
    decode = Session._decode
    asked: list[str] = []

    def noted(run: Session, texts: list[str], temperature: float = 0.0, seed: int = 0) -> Any:
        asked.extend(text for text in texts if not run.adapter and not temperature)
        return decode(run, texts, temperature, seed)

    monkeypatch.setattr(Session, "_decode", noted)
    grow(tiny, tmp_path, reply=lambda request: "no edit", moves=1)
    assert asked and len(set(asked)) == len(asked)


def test_an_instance_says_what_it_is(whole: Grown) -> None:
    instance, nodes = whole.instance, whole.nodes
    assert instance["shares"] == pytest.approx({"content": 1 / 3, "style": 1 / 3, "both": 1 / 3})
    assert instance["depth"] == DEPTH and instance["split"] == "test"
    assert 0 <= instance["follows"] <= 1
    assert set(instance["abilities"]) == {"locality", "promptability"}
    assert instance["abilities"]["promptability"] > 0
    assert len(instance["facts"]) == len(nodes[0]["test_items"]) == nodes[0]["test"]["n"]
