"""A bundle in other forms, each loaded by its own tool in a process that cannot import this library."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundled import ADAPTED, FORMATS, READER, SURE, made
from safetensors.torch import load_file
from tinymodel import save_tiny_model

from nslora import cli
from nslora.runs import evaluate
from nslora.runs.bundles import forms
from nslora.runs.bundles.bundle import bundle
from nslora.types import Prompt, UserError

# peft's
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

QUESTION = "your question"
# answers from GGUF files by llama.cpp: (file, chat messages or a whole input, texts that end a reply)
LLAMA = """
import json, sys
sys.modules["nslora"] = None
import httpx, xllamacpp
for file, asked, stop in json.load(sys.stdin):
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_gpu_layers, params.n_parallel, params.n_ctx, params.verbosity = 0, 1, 512, 0
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    chat = isinstance(asked, list)
    body = {"messages" if chat else "prompt": asked, "temperature": 0, "max_tokens": 24, "stop": stop}
    address = f"{server.listening_address}/v1/{'chat/' * chat}completions"
    reply = httpx.post(address, json=body, trust_env=False, timeout=60).json()["choices"][0]
    print(json.dumps(reply["message"]["content"] if chat else reply["text"]), flush=True)
    del server
"""


def alone(code: str, *arguments: str, data: object = None) -> str:
    """Run code that cannot import this library; return what it prints."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=json.dumps(data).encode(),
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def llama(*asked: tuple[Path, object, list[str]]) -> list[str]:
    """Return what llama.cpp replies, without blanks around it."""
    rows = [(str(file), prompt, stop) for file, prompt, stop in asked]
    return [json.loads(line).strip() for line in alone(LLAMA, data=rows).splitlines()]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """By chat format, a bundle of the tiny model and its reply; its tokenizer has a merge, as GGUF wants."""
    root = tmp_path_factory.mktemp("bundles")
    base = save_tiny_model(root / "tiny", merges=[("t", "h")])
    done = {}
    for name, chat in FORMATS.items():
        (root / name).mkdir()
        store, cfg, (_, tuned) = made(str(base), root / name, chat, sure=name == "chat")
        bundle(cfg, store, root / name / "bundle")
        done[name] = root / name / "bundle", tuned
    return done


def messages(folder: Path) -> list[dict[str, str]]:
    return Prompt(**json.loads((folder / "prompt.json").read_text())).messages(QUESTION)


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile, read as Ollama does: a quotation ends where a line does."""
    found, held = [], ""
    for line in text.split("\n"):
        held = f"{held}\n{line}" if held else line
        name, _, value = held.strip().partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        if value.startswith('"""'):
            if len(value) < 6 or not value.endswith('"""'):
                continue
            value = value[3:-3]
        if held:
            found.append((name, "".join(c for c in value if c.isprintable() or c in "\n\t")))
        held = ""
    assert not held, "a quotation is open"
    return found


def rendered(template: str, system: str, question: str) -> str:
    """What a Go template of ours writes up to the reply."""
    template = template.partition("{{ .Response }}")[0]
    if_system = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", re.DOTALL)
    template = if_system.sub(lambda match: match[1] if system else match[2], template)
    strings = re.compile(r'\{\{ (?:\.(\w+)|("(?:[^"\\]|\\.)*")) \}\}')

    def value(match: re.Match) -> str:
        # Go writes any character by eight digits, as Python does
        return {"System": system, "Prompt": question}.get(match[1]) or eval(match[2])

    return strings.sub(value, template)


def test_merged_weights_answer_the_same_by_plain_transformers(bundles, tmp_path: Path) -> None:
    """In float32: the same texts, and logits within 1e-4; bfloat16 rounds each weight once."""
    folders = []
    for name, (folder, _) in bundles.items():
        folders.append(forms.export(folder, tmp_path / name, "merged", "f32"))
        names = {path.name for path in folders[-1].iterdir()}
        assert {"prompt.json", "system.txt", "tokenizer.json", "model.safetensors"} <= names
        assert not [name for name in names if "adapter" in name or ".part" in name]
        assert (folders[-1] / "model.safetensors").stat().st_mode & 0o777 == 0o644
        assert (folders[-1] / "system.txt").read_bytes().decode() == ADAPTED["system"]
    # a model is nothing but its folder
    printed = alone(f"{READER}\nassert 'peft' not in sys.modules", *map(str, folders))
    replies = [text.removesuffix("\n") for text in printed.split("BUNDLE\n")[1:]]
    assert replies == [reply for _, reply in bundles.values()]

    from transformers import AutoModelForCausalLM

    folder, _ = bundles["chat"]
    with_adapter = evaluate.open_bundle(folder, dtype="float32").backbone.model
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    ids = torch.arange(2, 60)[None]
    assert merged.dtype == torch.float32
    assert torch.allclose(merged(ids).logits, with_adapter(ids).logits, atol=1e-4)

    forms.export(folder, tmp_path / "rounded", "merged")
    exact = load_file(tmp_path / "chat" / "model.safetensors")
    for key, weight in load_file(tmp_path / "rounded" / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, exact[key].bfloat16())


def test_gguf_files_answer_the_same_by_llama_cpp(bundles, tmp_path: Path) -> None:
    folder, reply = bundles["chat"]
    asked: list[tuple[Path, object, list[str]]] = []
    for quantisation in ("f32", "f16", "q8_0"):
        out = forms.export(folder, tmp_path / quantisation, "gguf", quantisation)
        file = f"model-{quantisation}.gguf"
        others = {"README.md", "prompt.json", "system.txt", "generation_config.json"}
        assert {path.name for path in out.iterdir()} == {file, *others}
        # what the README sends
        readme = (out / "README.md").read_text()
        (body,) = re.findall(r"<<'JSON'\n(.*?)\nJSON", readme, re.DOTALL)
        assert json.loads(body)["messages"] == messages(out)
        asked.append((out / file, messages(out), []))
    assert llama(*asked) == [reply] * 3 == [SURE] * 3


def test_a_modelfile_asks_as_the_model_was_adapted_to_be_asked(bundles, tmp_path: Path) -> None:
    asked, wanted = [], []
    for name in ("base", "no system role"):
        folder, reply = bundles[name]
        out = forms.export(folder, tmp_path / name, "ollama", "f32")
        lines = instructions((out / "Modelfile").read_text())
        given = dict(lines)
        assert given["FROM"] == "./model-f32.gguf" and (out / given["FROM"]).is_file()
        assert (given["temperature"], given["num_predict"]) == ("0", "24")
        stops = [value for key, value in lines if key == "stop"]
        assert "<|im_end|>" in stops
        assert ("\nQuestion:" in stops) == (name == "base")
        text = rendered(given["TEMPLATE"], given.get("SYSTEM", ""), QUESTION)
        opened = evaluate.open_bundle(folder, dtype="float32")
        assert text == opened.backbone.text(opened.prompt, QUESTION)
        asked.append((out / "model-f32.gguf", text, stops))
        wanted.append(reply)
    assert llama(*asked) == wanted


@pytest.mark.parametrize(
    "system",
    [
        "Be brief.",
        "Two lines.\n\n  Indented {{ .System }} and {{ if }}.",
        'Say """no""" and "yes"',
        'Ends in a quotation mark "',
        'A line ends in """\nand goes on.',
        "A separator\u2028, a blank\u00a0, an emoji \U0001f600, a back\\slash.",
        "# no comment\nFROM ./other\nSYSTEM none",
        "",
    ],
)
@pytest.mark.parametrize("question", ["{question}", 'Q: "{question}" {{now}}\n"""'])
def test_every_prompt_comes_through_a_modelfile(bundles, system: str, question: str) -> None:
    from transformers import AutoTokenizer

    from nslora.runs.bundles import ollama

    folder, _ = bundles["chat"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prompt = Prompt(system, question)
    text = ollama.modelfile("m.gguf", tokenizer, prompt, ["<|im_end|>", "\n\n"], 9, plain=False)
    lines = instructions(text)
    names = [name for name, _ in lines]
    assert names.count("FROM") == 1 and names.count("TEMPLATE") == 1 and names.count("stop") == 2
    given = dict(lines)
    asked = rendered(given["TEMPLATE"], given.get("SYSTEM", ""), "Who?")
    options = {"tokenize": False, "add_generation_prompt": True}
    assert asked == tokenizer.apply_chat_template(prompt.messages("Who?"), **options)


def test_what_was_good_about_a_bundle_stays_told(bundles, tmp_path: Path) -> None:
    folder = shutil.copytree(bundles["chat"][0], tmp_path / "bundle")
    with (folder / "README.md").open("a") as readme:
        readme.write("\n## Is it better?\n\nBetter: by far.\n")
    (folder / "metrics.json").write_text("{}")
    out = forms.export(folder, tmp_path / "out", "merged")
    assert (out / "README.md").read_text().endswith("\n## Is it better?\n\nBetter: by far.\n")
    assert (out / "metrics.json").read_text() == "{}"


def test_a_prompt_alone_is_exported_with_the_weights_as_they_were(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "tiny")
    store, cfg, (frozen, _) = made(str(base), tmp_path, FORMATS["chat"], adapter=False)
    bundle(cfg, store, tmp_path / "bundle")
    out = forms.export(tmp_path / "bundle", tmp_path / "out", "merged", "f32")
    printed = alone(READER, str(out))
    assert printed == f"BUNDLE\n{frozen}\n"


# ---- what is refused


def refused(capsys, *argv: str) -> str:
    assert cli.main(["export", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(".\n")
    return err.splitlines()[-1]


def test_wrong_input_is_one_sentence(bundles, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(bundles["chat"][0])
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    merged = ("--to", "merged")
    cases = {
        (str(tmp_path), *merged, "--out", "o"): "is no folder that nslora adapt has written",
        ("none", *merged, "--out", "o"): "is no folder that nslora adapt has written",
        (folder, "--to", "onnx", "--out", "o"): "unknown form 'onnx'; choose from merged, gguf",
        (folder, *merged, "--out", "o", "--quantisation", "q8_0"): "choose from bf16, f16, f32",
        (folder, "--to", "gguf", "--out", "o", "--quantisation", "q2"): "choose from q8_0, q6_k",
        (folder, *merged, "--out", "file"): "file is a file",
        (folder, *merged, "--out", "full"): "full is not empty",
        (folder, *merged, "--out", "file/below"): "cannot be written (Not a directory)",
    }
    for argv, words in cases.items():
        assert words in refused(capsys, *argv)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full"}


def test_a_damaged_bundle_is_named_and_leaves_nothing(bundles, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")

    def export(*damage: str) -> str:
        folder = shutil.copytree(bundles["chat"][0], tmp_path / "bundle")
        path = folder.joinpath(*damage)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.write_bytes(path.read_bytes()[:-20])
        said = refused(capsys, str(folder), "--to", "merged", "--out", out)
        shutil.rmtree(folder)
        return said

    assert "adapter_model.safetensors is damaged" in export("adapter", "adapter_model.safetensors")
    assert "holds no prompt" in export("prompt.json")
    assert "is damaged or missing" in export("record", "run.json")
    assert "has no tokenizer" in export("tokenizer")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_adaptation_to_the_same_folder_is_left_alone(
    bundles, tmp_path: Path
) -> None:
    moves = tmp_path / ".out.part" / "runs"
    moves.mkdir(parents=True)
    forms.export(bundles["chat"][0], tmp_path / "out", "merged")
    assert moves.is_dir()
    with pytest.raises(UserError, match="is not empty"):
        forms.export(bundles["chat"][0], tmp_path / "out", "merged")
    assert moves.is_dir()


def test_a_full_disk_is_told_before_anything_is_written(
    bundles, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"merged needs .* which has 0.0 GB free"):
        forms.export(bundles["chat"][0], tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_leave_to_write_is_named(bundles, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            forms.export(bundles["chat"][0], tmp_path / "out", "merged")
    finally:
        tmp_path.chmod(0o755)
