"""The command line: what it refuses, with what words and status, before anything is downloaded or spent."""

import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from faulty import FAULTS, refusal, serving

import nslora
from nslora import cli
from nslora.config import RunConfig
from nslora.experiments import grid
from nslora.model import checkpoints
from nslora.runs import preflight
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
        (("run", "--task", "poetry"), "setting task = 'poetry': unknown; choose from facts"),
        (("run", "--method", "magic"), "unknown method 'magic'"),
        (("run", "--method", "fixed:SNX"), "as in fixed:SNNN"),
        (("run", "--method", "fixed:SNNN", "--set", "moves=3"), "more moves than its budget, 3"),
        (("run", "--set", "rank"), "KEY=VALUE"),
        (("schedules", "--profile", "smoke"), "profile 'smoke' has no schedules"),
        (("schedules", "--profile", "tuning", "--jobs", "0"), "--jobs must be at least 1"),
        (("run", "--set", "colour=red"), "KEY=VALUE with KEY one of"),
        (("run", "--set", "rank=many"), "setting rank = 'many': input should be a valid integer"),
        (
            ("run", "--set", "gate=perhaps"),
            "setting gate = 'perhaps': input should be a valid bool",
        ),
        (("run", "--set", "tier=odd"), "setting tier = 'odd': input should be 'easy' or 'hard'"),
        (("run", "--set", "rank=0"), "greater than 0"),
        (("run", "--set", "editor_model=gpt-5"), "unknown editor model"),
        (("run", "--set", "editor_url=https://api.example.com/v1"), "NSLORA_EDITOR_KEY"),
        (("run", "--task", "own:missing.jsonl"), "missing.jsonl"),
        (
            ("plan", "--profile", "slow"),
            "unknown profile 'slow'; choose from quick, tuning, full, smoke",
        ),
        (("reproduce", "--profile", "slow"), "unknown profile"),
        (("reproduce", "--jobs", "0"), "--jobs must be at least 1"),
        (("bench", "--only", "speed"), "unknown part 'speed'"),
        (("bench", "--threads", "0"), "--threads must be at least 1"),
        (("adapt", "missing.jsonl", "--out", "somewhere"), "there is no file missing.jsonl"),
        (("adapt", "x.jsonl", "--out", "."), "a folder of its own, not the working directory"),
        (("adapt", "x.jsonl", "--out", "/"), "/ cannot be a folder of its own"),
        (("adapt", "x.jsonl", "--out", "README.md"), "README.md is a file"),
        (("adapt", "x.jsonl", "--out", "tests"), "is not empty"),
        (("adapt", "x.jsonl", "--out", "a", "--set", "task=math"), "the task is your data"),
        (("adapt", "x.jsonl", "--out", "a", "--set", "template=Q"), "must hold {question} once"),
        (
            ("adapt", "x.jsonl", "--out", "a", "--prompt", "none.txt"),
            "--prompt none.txt holds no prompt",
        ),
        (
            ("adapt", "x.jsonl", "--out", "a", "--prompt", "README.md", "--system", "s"),
            "give --system or --prompt, not both",
        ),
        (
            ("adapt", "x.jsonl", "--out", "a", "--reward", "a.py:f", "--set", "reward=parts"),
            "give --reward file.py:function or --set reward",
        ),
        (("check", "README.md", "--reward", "a.py:f"), "must be file.py:function"),
        (("check", "README.md", "--reward", "tests/conftest.py:f"), "has no function 'f'"),
        (
            ("check", "README.md", "--reward", "a.py:f", "--grader", "exact"),
            "give one of a reward, a judge and a grader",
        ),
        (("evaluate", "tests", "x.jsonl"), "tests is no folder that nslora adapt has written"),
        (("chat", "tests", "--ask", "Who?"), "tests is no folder that nslora adapt has written"),
        (("adapt", "x.jsonl", "--out", "a", "--minutes", "-1"), "minutes must be above 0, not -1"),
        (("adapt", "x.jsonl", "--out", "a", "--price", "2"), "--price must be two numbers like"),
        (("compare", "tests", "smollm2-135m", "x.jsonl"), "folder tests "),
        (("compare", "smollm2-135m", "gpt-5", "x.jsonl"), "unknown backbone 'gpt-5'"),
        (("advise", "missing.jsonl"), "there is no file missing.jsonl"),
        (("check", "missing.jsonl"), "there is no file missing.jsonl"),
        (("check", "README.md", "--backbone", "gpt-5"), "unknown backbone 'gpt-5'"),
        (("check", "README.md", "--grader", "fuzzy"), "unknown grader 'fuzzy'; choose from auto"),
        (("check", "README.md", "--map", "ask=question"), "must be FIELD=COLUMN"),
        (("check", "hub:data"), "must read hub:<owner>/<name>"),
    ],
)
def test_wrong_input_gets_one_sentence_and_status_2(capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_a_deprecation_between_libraries_is_not_shown_to_users(capsys):
    said = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        cli.main(["schedules", "--profile", "nobody"])
        warnings.warn(said, FutureWarning, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]


@pytest.mark.parametrize("command", ["run", "adapt"])
def test_a_useless_editor_is_refused_before_anything_is_loaded(
    capsys, monkeypatch, tmp_path, command
):
    monkeypatch.setenv("NSLORA_EDITOR_KEY", "k")
    out = tmp_path / "out"
    data = [str(own_data(tmp_path))] * (command == "adapt")
    with serving() as endpoint:
        argv = [command, *data, "--out", str(out), "--set", f"editor_url={endpoint.url}"]
        endpoint.script.extend([refusal(401, "no such key"), refusal(404, "no model gpt")])
        assert "refuses the key (status 401): no such key" in refused(capsys, *argv)
        assert "no such model or address (status 404)" in refused(capsys, *argv)
        endpoint.script.extend([FAULTS["page"]] * 2)
        assert "is not a chat completion" in refused(capsys, *argv)
    assert "cannot be reached" in refused(capsys, *argv)
    assert not out.exists()


def test_an_editor_that_is_not_asked_is_not_checked(monkeypatch):
    monkeypatch.setenv("NSLORA_EDITOR_KEY", "k")
    url = "http://127.0.0.1:9/v1"
    preflight.check([RunConfig(editor_url=url, method="frozen")])
    monkeypatch.setenv("NSLORA_EDITOR_MODE", "replay")
    preflight.check([RunConfig(editor_url=url)])


def test_a_malformed_row_is_named_by_its_line(capsys, tmp_path):
    rows = [json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([*rows[:6], '{"question": 1', *rows[6:]]))
    assert "line 7" in refused(capsys, "adapt", str(data), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def own_data(folder: Path) -> Path:
    rows = [json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) for i in range(12)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(rows))
    return data


def test_check_prints_all_problems_and_adapt_refuses_the_first(capsys, tmp_path):
    rows = [json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([*rows[:3], '{"question": 1', *rows[3:], '{"question": "q1?"}']))
    assert cli.main(["check", str(data)]) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("12 rows: 7 to train on")]
    assert [line for line in out.splitlines() if line.startswith("grader contains (12 rows)")]
    problems = [line for line in out.splitlines() if ", line " in line]
    assert [line.partition(", line ")[2].partition(":")[0] for line in problems] == ["4", "14"]
    said = refused(capsys, "adapt", str(data), "--out", str(tmp_path / "out"))
    assert said == problems[0].rstrip(".") + " (1 more: see nslora check).\n"


def test_a_sound_file_passes_the_check_and_the_run_says_how_it_grades(
    capsys, monkeypatch, tmp_path
):
    data = tmp_path / "data.csv"
    rows = [f"q{i}?,{('yes', 'no')[i % 2]}" for i in range(12)]
    data.write_text("\n".join(["ask,reply", *rows]))
    options = ["--map", "question=ask,answer=reply", "--grader", "labels:yes|no|unsure"]
    assert cli.main(["check", str(data), *options]) == 0
    graded = "grader labels (12 rows): in line 2 the reply 'yes' is right, 'no or unsure' is wrong."
    assert graded in capsys.readouterr().out.splitlines()

    def stand_in(cfg, store, watch, limits):
        assert (cfg.columns, cfg.grader) == ("question=ask,answer=reply", "labels:yes|no|unsure")
        raise UserError("enough.")

    monkeypatch.setitem(sys.modules, "nslora.runs.run", SimpleNamespace(make_run=stand_in))
    assert cli.main(["adapt", str(data), "--out", str(tmp_path / "out"), *options]) == 2
    assert graded in capsys.readouterr().err.splitlines()


def test_checking_loads_no_torch(tmp_path):
    code = f"from nslora import cli\ncli.main(['check', {str(own_data(tmp_path))!r}])"
    assert light(code).splitlines()[-1] == "[]"


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(capsys, tmp_path):
    data = own_data(tmp_path)
    out = data / "out"  # below a file
    assert f"cannot write {out} (" in refused(capsys, "adapt", str(data), "--out", str(out))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_shows_an_example_that_it_takes(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    example = f"nslora {name} {cli.COMMANDS[name][2]}".rstrip()
    assert f"example: {example}" in said
    cli.parser().parse_args(shlex.split(example)[1:])


def test_a_start_prompt_is_a_text_or_a_prompt_as_bundles_have_it(tmp_path):
    def start(text: str) -> dict:
        path = tmp_path / "prompt"
        path.write_text(text)
        argv = ["adapt", "x.jsonl", "--out", "a", "--prompt", str(path)]
        return cli.start(cli.parser().parse_args(argv))

    assert start(" Be {brief}.\n") == {"system": "Be {brief}.", "template": "{question}"}
    prompt = {"system": "", "question": "Q: {question}"}
    assert start(json.dumps(prompt)) == {"system": "", "template": "Q: {question}"}
    with pytest.raises(UserError, match="--prompt .*holds no prompt"):
        start('{"system": 1}')


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nslora {nslora.__version__}\n"


def test_the_public_face_is_there_and_light():
    assert nslora.RunConfig is RunConfig
    assert (
        nslora.Prompt("Be brief.").system
        == nslora.Candidate(nslora.Prompt("Be brief.")).prompt.system
    )
    with pytest.raises(UserError, match="there is no file none.jsonl"):
        nslora.adapt("none.jsonl", backbone="smollm2-135m", out="adapted")
    with pytest.raises(UserError, match="unknown setting 'colour'"):
        nslora.adapt(Path("README.md"), out="adapted", colour="red")
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        nslora.magic  # noqa: B018


def test_a_full_disk_is_told_before_the_download(capsys, monkeypatch):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "GB free" in refused(capsys, "run")


def test_downloads_count_the_editor_only_where_it_can_be_called():
    size = {key: w.bytes for key, w in checkpoints.BACKBONES.items()}
    frozen, both = RunConfig(method="frozen"), RunConfig()
    assert preflight.downloads([frozen]) == size["smollm2-135m"]
    assert preflight.downloads([frozen, both]) == size["smollm2-135m"] + size["qwen2.5-coder-1.5b"]
    assert preflight.downloads([RunConfig(editor_url="https://x")]) == size["smollm2-135m"]


def test_settings_take_the_types_of_the_config():
    pairs = ["rank=4", "lr=1e-3", "gate=False", "rule=json", "tier=hard", "method=fixed:SN"]
    parsed = dict(map(cli.parse, pairs))
    assert parsed == {
        "rank": 4,
        "lr": 1e-3,
        "gate": False,
        "rule": "json",
        "tier": "hard",
        "method": "fixed:SN",
    }
    assert RunConfig.of(parsed).lr == 1e-3


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


def test_records_of_earlier_settings_are_named(capsys, monkeypatch, tmp_path):
    """Tables would show them beside the new ones, as if both were of one study."""
    toy.make(tmp_path, good=(toy.RUNS,))
    monkeypatch.chdir(tmp_path)
    profile = grid.load("t", tmp_path)
    toy.finish(profile.store, profile.runs[0])
    assert cli.main(["plan", "--profile", "t"]) == 0
    assert "note:" not in capsys.readouterr().err
    text = (tmp_path / "experiments.toml").read_text()
    (tmp_path / "experiments.toml").write_text(text.replace("seeds = [0]", "seeds = [1]"))
    assert cli.main(["plan", "--profile", "t"]) == 0
    said = capsys.readouterr().err
    assert (
        said.startswith("note: ")
        and "has 1 of runs that" in said
        and profile.runs[0].run_id in said
    )


def light(code: str, folder: Path = ROOT) -> str:
    """What a Python process prints last: the heavy libraries that `code` has loaded."""
    heavy = ("torch", "transformers", "openai", "datasets")
    code = f"import sys\n{code}\nprint([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_the_public_face_load_no_torch():
    code = "import nslora\nfrom nslora import cli\ncli.parser(), nslora.adapt, nslora.RunConfig"
    assert light(code) == "[]\n"


def test_reports_of_a_project_without_records_load_no_torch(tmp_path):
    (tmp_path / "experiments.toml").write_text('[profiles.t]\nresults = "results"\n')
    code = (
        "from nslora import cli\n"
        "print([cli.main([name, '--profile', 't']) for name in ('figures', 'verify', 'table')])"
    )
    assert light(code, tmp_path).endswith("[0, 0, 0]\n[]\n")
    assert (tmp_path / "results" / "claims.json").exists()
