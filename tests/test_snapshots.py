"""Every command's help, output and error lines, held against tests/data/cli/.

`SAFEGENE_UPDATE_SNAPSHOTS=1 pytest tests/test_snapshots.py` writes the files anew: read the
difference before you commit it. Figures of a run are written `#`, because they are the machine's.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from adapters import random_adapter
from safetensors.numpy import save_file

from safegene_edge.cli import cli, main
from safegene_edge.learn import teachers
from safegene_edge.learn.run import _Learning

SNAPSHOTS = Path(__file__).parent / "data" / "cli"
# Command lines, as typed after "safegene-edge"; --help is shown of each command first.
RUNS = {
    "": ["--version", "", "restor MODEL.gguf"],
    "restore": [
        "restore MODEL.gguf --gene GENE.gguf --limit 1 -o 'out safe.gguf'",
        "restore MODEL.gguf",
        "restore none.gguf -o safe.gguf",
        "restore MODEL.gguf --aligned A.gguf --gene GENE.gguf -o safe.gguf",
        "restore MODEL.gguf --prompts 9 --gene GENE.gguf -o safe.gguf",
    ],
    "convert": [
        "convert PEFT_DIR --base MODEL.gguf -o out.gguf",
        "convert PEFT_DIR -o out.gguf",
        "convert MODEL.gguf --base MODEL.gguf -o out.gguf",
    ],
    "to-peft": ["to-peft TASK.gguf --base MODEL.gguf -o folder", "to-peft TASK.gguf -o folder"],
    "inspect": [
        "inspect MODEL.gguf",
        "inspect GENE.gguf --base MODEL.gguf",
        "inspect TASK.gguf",
        "inspect before.json",
    ],
    "eval": [
        "eval MODEL.gguf --gene GENE.gguf --limit 1 --kl 0 --max-tokens 2 --json out.json",
        "eval MODEL.gguf --adapter TASK.gguf --limit 1 --kl 0 --max-tokens 2",
        "eval",
        "eval MODEL.gguf --gene none.gguf",
        "eval MODEL.gguf --quick --full",
        "eval MODEL.gguf --qick",
    ],
    "learn": [
        "learn --degraded MODEL.gguf,TASK.gguf --aligned MODEL.gguf --card c.md -o o.gguf",
        "learn --degraded MODEL.gguf",
        "learn --degraded none.gguf -o out.gguf",
    ],
    "extract": ["extract --aligned MODEL.gguf -o out.gguf", "extract --degrade auto -o out.gguf"],
    "recalibrate": [
        "recalibrate MODEL.gguf GENE.gguf --adapter TASK.gguf -o out.gguf",
        "recalibrate MODEL.gguf GENE.gguf --expression out.json",
        "recalibrate MODEL.gguf GENE.gguf",
        "recalibrate MODEL.gguf",
        "recalibrate MODEL.gguf MODEL.gguf -o out.gguf",
    ],
    "portfolio": [
        "portfolio models/one.gguf --gene GENE.gguf --limit 1 -o out",
        "portfolio --gene GENE.gguf -o out",
    ],
    "merge": [
        "merge MODEL.gguf TASK.gguf=0.5 -o out.gguf",
        "merge MODEL.gguf TASK.gguf --dry-run",
        "merge MODEL.gguf TASK.gguf",
        "merge MODEL.gguf TASK.gguf=half -o out.gguf",
    ],
    "export": [
        "export llama-server MODEL.gguf TASK.gguf -o out",
        "export olama MODEL.gguf TASK.gguf -o out",
    ],
    "report": ["report", "report verfy before.json"],
    "report verify": [
        "report verify before.json",
        "report verify before.json --model GENE.gguf",
        "report verify none.json",
    ],
    "report render": [
        "report render before.json -o out.html",
        "report render before.json -o x.txt",
    ],
    "report record": ["report record before.json -o out.md", "report record before.json -o x.txt"],
    "report compare": ["report compare before.json after.json", "report compare before.json"],
    "chat": [
        "chat MODEL.gguf --gene GENE.gguf --max-tokens 2",
        "chat MODEL.gguf --gene MODEL.gguf",
        "chat",
    ],
    "push": ["push GENE.gguf acme", "push TASK.gguf acme/tiny", "push none.gguf acme/tiny"],
    "pull": ["pull acme", "pull"],
    "serve": ["serve none.gguf", "serve MODEL.gguf --port 99999"],
    "doctor": ["doctor", "doctor now"],
    "scan": ["scan MODEL.gguf", "scan none.gguf", "scan"],
}  # fmt: skip
# What somebody new types in the README's five steps: mistakes first, then what the lines lead to.
MISTAKES = (
    (
        "evla model.gguf --quick",
        "eval modle.gguf --quick",
        "eval download.gguf --quick",
        "eval pytorch_model.bin --quick",
        "eval folder --quick",
        "eval folder/model.safetensors --quick",
        "eval PEFT_DIR/adapter_model.safetensors --quick",
        "eval half.gguf --quick",
        "eval GENE.gguf --quick",
        "eval --quick",
        "eval model.gguf --qiuck",
        "eval model.gguf --limit 1 --kl 0 --max-tokens 2",
    ),
    (
        "restore model.gguf --task prompts.txt",
        "restore model.gguf --taks prompts.txt -o fitted.gguf",
        "restore model.gguf --task prompt.txt -o fitted.gguf",
        "restore prompts.txt --task model.gguf -o fitted.gguf",
        "restore model.gguf --task prompts.txt -o results/fitted.gguf",
        "restore model.gguf --task prompts.txt -o folder",
        "restore model.gguf --task prompts.txt -o model.gguf",
        "restore model.gguf --gene other-family.gguf -o fitted.gguf",
        "restore GENE.gguf --gene model.gguf -o fitted.gguf",
        "restore model.gguf --gene GENE.gguf --task prompts.txt --limit 1 -o fitted.gguf",
    ),
    (
        "chat fitted.gguf --gene model.gguf",
        "chat model.gguf fitted.gguf",
        "chat model.gguf --gene PEFT_DIR",
        "chat model.gguf --gene other-family.gguf",
        "chat model.gguf --gene fitted.gguf --max-tokens 2",
    ),
    (
        "merge fitted.gguf model.gguf -o safe.gguf",
        "merge model.gguf -o safe.gguf",
        "merge model.gguf fitted.gguf safe.gguf",
        "merge model.gguf fitted.gguf -o model.gguf",
        "merge model.gguf fited.gguf -o safe.gguf",
        "merge model.gguf fitted.gguf -o safe.gguf",
    ),
    (
        "export model.gguf fitted.gguf --merged -o ollama",
        "export olama model.gguf fitted.gguf --merged -o ollama",
        "export ollama model.gguf fitted.gguf --merged",
        "export ollama model.gguf fitted.gguf --merged -o prompts.txt",
        "export ollama model.gguf fitted.gguf --merged -o ollama",
    ),
)
MEASURED = ("restore", "eval", "recalibrate", "learn", "portfolio", "doctor", "merge", "report",
            "scan")  # fmt: skip


@pytest.fixture
def typed(place, monkeypatch, capsys):
    """A function that runs a command line and gives what a user sees, streams marked."""
    monkeypatch.setenv("COLUMNS", "80")
    for _, one in commands():  # click keeps it from whoever called the command alone
        monkeypatch.setattr(one, "_help_option", None, raising=False)
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)

    def run(line):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/scale\n/quit\n"))
        monkeypatch.setattr(sys, "argv", ["safegene-edge", *shlex.split(line)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        out, err = (plain(line, text, str(place)) for text in (out, err))
        parts = [f"$ safegene-edge {line}".rstrip(), out, err and f"-- stderr --\n{err}"]
        return "\n".join([*filter(None, parts), f"-- exit {code} --\n"])

    return run


def plain(line, text, folder):
    """Text without what differs from machine to machine."""
    text = "\n".join(row.rstrip() for row in text.replace(folder, "/work").splitlines())
    name = line.split(" ")[0]
    if name == "doctor" and "error" not in text:
        return re.sub(r"^(\S+(?: \S+)?) {2,}.*", r"\1  #", text, flags=re.M)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "#", text)
    text = re.sub(r"^(refusal_openers|aligned_loss) +.*", r"\1  #", text, flags=re.M)
    if name in MEASURED and "--help" not in line and "error:" not in text:
        text = re.sub(r"[+\u2212-]?\d+(?:[.,]\d+)*", "#", text)
        text = re.sub(r"(?<=\S) {2,}", "  ", text)
    return text


@pytest.mark.parametrize("name", RUNS, ids=lambda name: name or "safegene-edge")
def test_what_a_user_sees_of(name, typed):
    seen = "\n".join(typed(line) for line in (f"{name} --help".strip(), *RUNS[name]))
    hold(name.replace(" ", "-") or "safegene-edge", seen)


def test_somebody_new_makes_mistakes_and_finds_the_way_out(typed, place, tiny, capsys):
    """Each mistake is one line that ends in what to do. What is there already is replaced."""
    with_foreign_files(place, tiny)
    capsys.readouterr()  # what making the files printed
    seen = {line: typed(line) for step in MISTAKES for line in step}
    hold("mistakes", "\n".join(seen.values()))
    for *wrong, right in MISTAKES:
        assert seen[right].endswith("-- exit 0 --\n")
        for line in wrong:
            said, end = seen[line].split("-- stderr --\n")[1].splitlines()
            assert end == "-- exit 2 --"
            assert re.search(r"\. [A-Z]|\(see safegene-edge ", said), said


def with_foreign_files(place, tiny):
    """What people have lying beside their model."""
    (place / "folder").mkdir()
    (place / "folder" / "config.json").write_text("{}")
    save_file({"a": np.zeros(1)}, place / "folder" / "model.safetensors")
    with zipfile.ZipFile(place / "pytorch_model.bin", "w") as archive:  # as torch.save does
        archive.writestr("archive/data.pkl", b"")
    (place / "download.gguf").write_text("<!DOCTYPE html><title>Sign in</title>")
    (place / "half.gguf").write_bytes((place / "model.gguf").read_bytes()[:9000])
    (place / "safe.gguf").write_text("an earlier run's")
    (place / "prompts.txt").write_text("Is this review positive? A joy.\n")
    gene = random_adapter(tiny("qwen2").gguf_path, family="tiny qwen2")
    gene.save(place / "other-family.gguf")


def hold(name, seen):
    """Hold what was seen against the kept file, or write it anew."""
    file = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("SAFEGENE_UPDATE_SNAPSHOTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(seen, encoding="utf-8")
    assert seen == file.read_text(encoding="utf-8")


def commands(group=cli, above=""):
    for name, one in group.commands.items():
        yield f"{above}{name}", one
        if isinstance(one, click.Group):
            yield from commands(one, f"{name} ")


def test_every_command_has_a_snapshot_and_two_examples_that_parse():
    found = dict(commands())
    assert set(found) == set(RUNS) - {""}
    for name, one in found.items():
        shown = re.findall(r"^  safegene-edge (.+)$", one.epilog or "", re.M)
        assert len(shown) == 2 and all(line.startswith(name) for line in shown), name
        for line in shown:
            assert len(line) <= 90, line
            words = shlex.split(line)[len(name.split()) :]
            if not isinstance(one, click.Group):
                one.make_context(name, words)  # raises where click does not know an option


def test_each_option_that_takes_a_file_completes_one():
    """The shell completes paths where click knows that it is one."""
    for name, one in commands():
        for option in one.params:
            named = option.metavar or ""
            if re.search(r"\.gguf|\.json|\.svg|FILE|DIR", named):
                assert isinstance(option.type, click.Path), f"{name} {option.opts}"


@pytest.mark.parametrize(
    ("shell", "words", "expected"),
    [
        ("bash", "safegene-edge rec", ["plain,recalibrate"]),
        ("bash", "safegene-edge export o", ["plain,ollama"]),
        ("bash", "safegene-edge chat m.gguf --gene ", ["file,"]),
        ("bash", "safegene-edge eval m.gguf --qu", ["plain,--quick"]),
        ("zsh", "safegene-edge report ver", ["plain", "verify"]),
        ("fish", "safegene-edge merge m.gguf ", ["file,"]),
    ],
)
def test_the_shell_completes(shell, words, expected):
    asked = {
        "_SAFEGENE_EDGE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": words.split(" ")[-1] if shell == "fish" else str(words.count(" ")),
    }
    program = str(Path(sys.executable).with_name("safegene-edge"))
    command = [program] if Path(program).exists() else [sys.executable, "-m", "safegene_edge"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()][: len(expected)] == expected
