"""The command line: what it refuses, with what words and status, before anything is downloaded or spent."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nslora import cli
from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.types import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_is_fetched_or_trapped(tmp_path, monkeypatch):
    """An empty cache, a project folder of its own, and the signal handlers as they were."""
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NSLORA_EDITOR_KEY", raising=False)
    monkeypatch.chdir(ROOT)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    left = list((tmp_path / "cache").rglob("*")) if (tmp_path / "cache").exists() else []
    assert left == [], "wrong input must not download anything"


def refused(capsys, *argv: str) -> str:
    """The one sentence on standard error of a command that must exit with status 2."""
    status = cli.main(argv)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("run", "--backbone", "gpt-5"), "unknown backbone 'gpt-5'"),
        (("run", "--backbone", "hub:a/b@main"), "40 hex digits"),
        (("run", "--task", "poetry"), "unknown task 'poetry'"),
        (("run", "--method", "magic"), "unknown method 'magic'"),
        (("run", "--set", "rank"), "KEY=VALUE"),
        (("run", "--set", "colour=red"), "KEY=VALUE with KEY one of"),
        (("run", "--set", "rank=many"), "setting rank must be of type int"),
        (("run", "--set", "gate=perhaps"), "setting gate must be of type bool"),
        (("run", "--set", "rank=0"), "greater than 0"),
        (("run", "--set", "editor_model=gpt-5"), "unknown editor model"),
        (("run", "--set", "editor_url=https://api.example.com/v1"), "NSLORA_EDITOR_KEY"),
        (("run", "--task", "own:missing.jsonl"), "missing.jsonl"),
        (("plan", "--profile", "slow"), "unknown profile 'slow'; choose from quick, full, smoke"),
        (("reproduce", "--profile", "slow"), "unknown profile"),
        (("reproduce", "--shard", "3/2"), "--shard must be I/N"),
        (("reproduce", "--shard", "x"), "--shard must be I/N"),
        (("reproduce", "--jobs", "0"), "--jobs must be at least 1"),
        (("bench", "--only", "speed"), "unknown part 'speed'"),
        (("bench", "--threads", "0"), "--threads must be at least 1"),
        (("adapt", "missing.jsonl", "--out", "somewhere"), "there is no file missing.jsonl"),
    ],
)
def test_wrong_input_gets_one_sentence_and_status_2(capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_a_malformed_row_is_named_by_its_line(capsys, tmp_path):
    rows = [json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([*rows[:6], '{"question": 1', *rows[6:]]))
    assert "line 7" in refused(capsys, "adapt", str(data), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_adapt_does_not_write_into_a_folder_in_use(capsys, tmp_path):
    (tmp_path / "mine.txt").touch()
    assert "is not empty" in refused(capsys, "adapt", "data.jsonl", "--out", str(tmp_path))


def test_a_full_disk_is_told_before_the_download(capsys, monkeypatch):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "GB free" in refused(capsys, "run")


def test_downloads_count_the_editor_only_where_it_can_be_called():
    size = {key: w.bytes for key, w in checkpoints.BACKBONES.items()}
    frozen, both = RunConfig(method="frozen"), RunConfig()
    assert cli.downloads([frozen]) == size["smollm2-135m"]
    assert cli.downloads([frozen, both]) == size["smollm2-135m"] + size["qwen2.5-coder-1.5b"]
    assert cli.downloads([RunConfig(editor_url="https://x")]) == size["smollm2-135m"]


def test_settings_take_the_types_of_the_config():
    parsed = cli.settings(["rank=4", "lr=1e-3", "gate=False", "rule=json"])
    assert parsed == {"rank": 4, "lr": 1e-3, "gate": False, "rule": "json"}
    assert RunConfig.of(parsed).lr == 1e-3
    with pytest.raises(UserError):
        cli.settings(["lr=fast"])


def test_models_shows_licences_and_sources(capsys):
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    for w in checkpoints.BACKBONES.values():
        assert w.key in out
        assert w.licence in out
        assert w.source in out


@pytest.mark.parametrize("profile", ["quick", "full", "smoke"])
def test_plan_lists_every_job_and_what_is_left(capsys, profile):
    assert cli.main(["plan", "--profile", profile]) == 0
    out = capsys.readouterr().out
    assert "01_why-smollm2-135m" in out
    assert "09_paper" in out
    assert "MB of models to fetch" in out


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from nslora import cli; cli.parser(); print('torch' in sys.modules, 'openai' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["False", "False"]


def test_reports_of_a_project_without_records_load_no_torch(tmp_path):
    (tmp_path / "experiments.toml").write_text('[profiles.t]\nresults = "results"\n')
    code = (
        "import sys; from nslora import cli\n"
        "print([cli.main([name, '--profile', 't']) for name in ('figures', 'verify', 'table')], 'torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.endswith("[0, 0, 0] False\n"), done.stderr
    assert (tmp_path / "results" / "claims.json").exists()
