"""What is installed, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import release

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "peft"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    return release.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        return archive.namelist()


def test_the_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"safegene_edge"}


def test_the_wheel_is_whole(wheel):
    """Every module and data file of the two source folders is in it."""
    sources = {
        f"safegene_edge/{path.relative_to(ROOT / 'safegene_edge')}"
        for path in (ROOT / "safegene_edge").rglob("*")
        if path.suffix in (".py", ".json", ".jsonl", ".css", ".js", ".gguf", ".npz")
        and "converters" not in path.parts
    } | {f"safegene_edge/converters/{path.name}" for path in (ROOT / "converters").glob("*.py")}
    assert sources <= set(wheel)
    assert "safegene_edge/py.typed" in wheel


def test_the_source_distribution_can_test_itself(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        pytest.skip("not a checkout")
    apart = (".ci/", ".gitignore", ".pre-commit-config.yaml")
    assert {name for name in kept.stdout.split() if not name.startswith(apart)} <= names


def test_an_installed_wheel_works_outside_of_the_checkout(built, tmp_path, tiny, tiny_adapter):
    """In an environment of its own, which borrows only the dependencies."""
    programs = release.borrowing(built[1], tmp_path / "venv")
    user = release.outside(programs, tmp_path / "user")
    code = "import safegene_edge.converters as c; print(c.__file__)"
    where = release.run([str(programs / "python"), "-c", code], tmp_path, **user)
    assert where.startswith(str(tmp_path / "venv"))
    made = f"convert {tiny_adapter('llama')} --base {tiny('llama').gguf_path} -o task.gguf"
    release.run(f"safegene-edge {made}", tmp_path, **user)
    shown = release.run("safegene-edge inspect task.gguf --json", tmp_path, **user)
    assert '"kind": "LoRA adapter"' in shown


def test_the_readme_has_its_five_lines():
    names = [line.split()[1] for line in release.lines_of_the_readme()]
    assert names == ["eval", "restore", "chat", "merge", "export"]


def modules_after(code):
    """The top-level modules that a fresh interpreter holds after running the code."""
    program = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split("\n")[-2].split())


HELP = """
import sys
sys.argv = ["safegene-edge", "--help"]
from safegene_edge.cli import main
main()
"""
CONVERT = """
import sys
sys.argv = ["safegene-edge", "convert", {peft!r}, "--base", {base!r}, "-o", {out!r}]
from safegene_edge.cli import main
main()
"""


def test_importing_and_help_load_nothing_heavy():
    assert not modules_after("import safegene_edge") & (HEAVY | {"llama_cpp", "gguf", "numpy"})
    assert not modules_after(HELP) & (HEAVY | {"llama_cpp", "gguf", "numpy"})


def test_a_module_of_a_functions_name_stays_out_of_its_way():
    code = """
import importlib, types
import safegene_edge
for name in ("export", "learn", "merge", "portfolio", "recalibrate", "restore"):
    module = importlib.import_module(f"safegene_edge.{name}")
    assert isinstance(module, types.ModuleType), name
    assert isinstance(getattr(safegene_edge, name), types.FunctionType), name
    assert getattr(module, name) is getattr(safegene_edge, name), name
from safegene_edge.merge import MergeSettings
from safegene_edge.portfolio import PortfolioSettings
"""
    modules_after(code)


def test_running_loads_no_torch(tiny, tiny_adapter, tmp_path):
    paths = {"peft": str(tiny_adapter("llama")), "base": str(tiny("llama").gguf_path)}
    loaded = modules_after(CONVERT.format(**paths, out=str(tmp_path / "a.gguf")))
    assert (tmp_path / "a.gguf").exists()
    assert not loaded & (HEAVY | {"llama_cpp"})
    every_name = "import safegene_edge\n[getattr(safegene_edge, n) for n in safegene_edge.__all__]"
    loaded = modules_after(every_name)
    assert "llama_cpp" in loaded
    assert not loaded & HEAVY


def test_only_training_imports_torch():
    for path in [*ROOT.glob("safegene_edge/**/*.py"), *ROOT.glob("converters/*.py")]:
        if "training" not in path.parts:
            words = path.read_text(encoding="utf-8")
            for name in HEAVY:
                assert f"import {name}" not in words and f"from {name}" not in words, path


def test_help_answers_at_once():
    """The aim is 0.3 s, which bench/cli measures; here only a heavy import must fail."""
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "safegene_edge", "--help"], check=True, capture_output=True
    )
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("words", [[], ["report"]])
def test_a_group_alone_prints_its_help(words):
    """On standard output, as with --help, and it is no error."""

    def run(*more):
        command = [sys.executable, "-m", "safegene_edge", *words, *more]
        return subprocess.run(command, capture_output=True, text=True)

    bare, asked = run(), run("--help")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == asked.stdout
    assert len(bare.stdout.splitlines()) > 8
    assert run("no-such").returncode == 2
