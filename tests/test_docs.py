"""README and docs: every snippet is run, as it stands, in a folder with files of the names it uses.

- A block of ```python is run; the blocks of a page share one namespace.
- A block of ```sh or ```console is a list of commands, and so is a block without a language, or
  an indented one, whose first word is a program. `safegene-edge` is run; of `make`, `pip` and
  `python` it is checked that the target, the extra and the script exist.
- `<!-- not run: reason -->` before a block keeps it from being run. Its commands must still parse,
  and its imports still work. How many there are is counted at the end.
- Any other block is output, or prose.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from safegene_edge import SafetyGene
from safegene_edge.cli import cli
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.merge.settings import RUN_UP_TO, MergeSettings
from safegene_edge.serve.settings import ServeSettings

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = ["What is a bee?", "How do I sing?"]  # README's `texts`
NOT_RUN = {
    "README.md": 1, "cookbook.md": 3, "extract.md": 3, "guard.md": 2, "index.md": 3, "learn.md": 3,
    "plugins.md": 2, "serve.md": 3, "share.md": 3,
}  # fmt: skip
NEEDS = {"plugins.md": "langchain_community"}
PROGRAMS = ("safegene-edge", "make", "pip", "python", "llm", "ollama", "printf")
# Stands where Ollama would: notes how it was started, and reads what Ollama reads first.
OLLAMA = """#!{python} -I
import json, os, sys
from pathlib import Path
words, model = sys.argv[1:], ""
if words[0] == "create":
    (line,) = Path(words[words.index("-f") + 1]).read_text().splitlines()
    name = line.removeprefix("FROM ").strip('"')
    assert Path(name).read_bytes()[:4] == b"GGUF", line
    model = os.path.abspath(name)
with open({log!r}, "a") as log:
    print(json.dumps([os.getcwd(), words, model]), file=log)
"""
MARK = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A piece of code; `kind` is "python", "commands" or "" for anything else."""

    line: int
    kind: str
    text: str
    not_run: str = ""

    @property
    def commands(self):
        """The command lines, comments off and continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip().removeprefix("$ ") for line in lines if line.strip()]


def blocks_of(page):
    """The fenced and the indented blocks of a page, in order."""
    found, lines, number, mark = [], page.read_text(encoding="utf-8").splitlines(), 0, ""
    while number < len(lines):
        line, start = lines[number], number + 1
        number += 1
        if fence := re.fullmatch(r"```(\w*)", line):
            end = lines.index("```", number)
            text, number = "\n".join(lines[number:end]), end + 1
            found.append(Block(start, _kind(fence[1], text), text, mark))
        elif line.startswith("    ") and line.split()[0] in PROGRAMS:
            text = []
            while number <= len(lines) and lines[number - 1].startswith("    "):
                text.append(lines[number - 1][4:])
                number += 1
            found.append(Block(start, "commands", "\n".join(text), mark))
        elif marked := MARK.fullmatch(line):
            mark = marked[1]
            continue
        elif not line.strip():
            continue
        mark = ""
    return found


def _kind(language, text):
    if language in ("sh", "console", "bash"):
        return "commands"
    if not language:
        words = text.split()
        return "commands" if words and words[0] in PROGRAMS else ""
    return "python" if language == "python" else ""


def has_snippets(page):
    return any(block.kind for block in blocks_of(page))


# -- running -------------------------------------------------------------------


@pytest.mark.parametrize("page", list(filter(has_snippets, PAGES)), ids=lambda page: page.name)
def test_the_snippets_of(page, place, monkeypatch):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    run_page(page, monkeypatch)


def test_from_lost_refusals_to_where_ollama_starts(place, monkeypatch):
    """The longest way in the guides, by the cookbook's own lines."""
    log = put_ollama(place, monkeypatch)
    for heading in ("My fine-tune lost its refusals", "Ollama"):
        page = place / "way.md"
        page.write_text(section("cookbook.md", heading), encoding="utf-8")
        for block in blocks_of(page):
            if block.not_run:
                subprocess.run(["bash", "-euc", block.text], check=True)
                continue
            for line in block.commands if block.kind == "commands" else ():
                run_command(line, "", f"{heading}:{block.line}", monkeypatch)
    started = [json.loads(line) for line in log.read_text().splitlines()]
    folder, safe = str(place / "ollama"), str(place / "ollama" / "MODEL-safe.gguf")
    assert started == [
        [folder, ["create", "guarded", "-f", "Modelfile"], safe],
        [folder, ["run", "guarded"], ""],
    ]
    # The gene is in the model, at the strength that was found for it.
    fitted = SafetyGene.load(place / "FITTED.gguf")
    before, after = GGUFFile(place / "MODEL.gguf"), GGUFFile(safe)
    assert fitted.coefficients
    assert set(fitted.pairs) == {
        name for name in before.tensors if before.raw(name).tobytes() != after.raw(name).tobytes()
    }


def section(page, heading):
    """A page's text below a heading of the second level."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def put_ollama(folder, monkeypatch):
    """Put the program that stands for Ollama on the path; where it notes how it was started."""
    log, programs = folder / "ollama.log", folder / "programs"
    programs.mkdir()
    program = programs / "ollama"
    program.write_text(OLLAMA.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return log


def run_page(page, monkeypatch):
    blocks = [block for block in blocks_of(page) if block.kind]
    names = {"texts": TEXTS}
    for block in blocks:
        where = f"{page.name}:{block.line}"
        if block.kind == "python":
            run_python(block, names, where)
        for line in block.commands if block.kind == "commands" else ():
            run_command(line, block.not_run, where, monkeypatch)


def run_python(block, names, where):
    code = ast.parse(block.text, filename=where)
    if block.not_run:
        kept = [node for node in code.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        code = ast.Module(body=kept, type_ignores=[])
    exec(compile(code, where, "exec"), names)


def run_command(line, not_run, where, monkeypatch):
    words = shlex.split(line, comments=True)
    program, arguments = words[0], [word.removesuffix("...") for word in words[1:]]
    if program == "safegene-edge":
        run_ours(arguments, not_run, monkeypatch)
    elif "|" in words:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True)
        assert done.returncode == 0, f"{where}: {done.stderr}"
    elif program == "make":
        subprocess.run(["make", "-C", ROOT, "-n", *arguments], check=True, capture_output=True)
    elif program == "pip":
        assert set(re.findall(r"safegene-edge\[(\w+)\]", line)) <= extras(), where
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), where
    else:
        assert not_run, f"{where}: {program} can only stand in a block that is not run"


def run_ours(arguments, not_run, monkeypatch):
    """A command of ours in this process; an error of the user is an error here."""
    name, *rest = arguments
    if not_run:  # raises where click does not know an option, or the number of arguments
        context = cli.make_context("safegene-edge", list(arguments))
        _, command, rest = cli.resolve_command(context, list(arguments))
        command.make_context(name, rest, parent=context)
        return
    if name == "serve":
        serve(arguments)
        return
    if name == "to-peft":  # the README's PEFT_DIR is an input of `convert` above it
        shutil.rmtree(rest[rest.index("-o") + 1], ignore_errors=True)
    expanded = [found for word in rest for found in matching(word)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/gene\n/quit\n"))  # for `chat`
    cli.main([name, *expanded], prog_name="safegene-edge", standalone_mode=False)


def matching(word):
    """What the shell makes of a pattern."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def serve(arguments):
    """Start the server, wait until it listens, and end it."""
    command = [sys.executable, "-m", "safegene_edge", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "http://" in line:
                return
        pytest.fail(f"the server ended: {''.join(said)}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if sys.version_info < (3, 11):
        return set(re.findall(r"^(\w+) = \[", text, re.M))
    return set(tomllib.loads(text)["project"]["optional-dependencies"])


# -- the convention itself -----------------------------------------------------


def test_what_is_not_run_is_counted():
    """A marker is an exception: whoever adds one also changes this number."""
    counts = {page.name: sum(bool(b.not_run) for b in blocks_of(page)) for page in PAGES}
    assert {name: n for name, n in counts.items() if n or name in NOT_RUN} == NOT_RUN
    assert sum(bool(b.kind and not b.not_run) for page in PAGES for b in blocks_of(page)) >= 20


ROTTEN = {
    "```python\nfrom safegene_edge import nothing\n```": "cannot import name 'nothing'",
    "```python\nfrom safegene_edge import SafeLlama\n\nSafeLlama('none.gguf')\n```": "no such file",
    "```sh\nsafegene-edge inspect none.gguf\n```": "no such file",
    "```\nsafegene-edge eval MODEL.gguf --no-such-option\n```": "--no-such-option",
    "    safegene-edge inspct MODEL.gguf": "inspct",
    "```sh\nprintf x | safegene-edge chat none.gguf\n```": "no such file",
    "```sh\nunknown-program\n```": "unknown-program",
    "    make nothing": "'nothing'",
    "    pip install 'safegene-edge[nothing]'": "'nothing'",
    "    python bench/nothing.py": "page.md:3",
    "<!-- not run: why -->\n```sh\nsafegene-edge chat MODEL.gguf --gone\n```": "--gone",
    "<!-- not run: why -->\n```python\nfrom safegene_edge import gone\n```": "'gone'",
}


@pytest.mark.parametrize("text", ROTTEN)
def test_a_rotten_snippet_is_found(text, tmp_path, place, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    with pytest.raises((Exception, SystemExit)) as caught:
        run_page(page, monkeypatch)
    assert ROTTEN[text] in repr(caught.value)


# -- the site ------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it: a broken link or anchor is an error."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="pip install 'safegene-edge[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_command_and_name(site):
    import safegene_edge

    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    commands = (site / "cli.html").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f">safegene-edge {name}<" in commands
    settings = (site / "settings.html").read_text(encoding="utf-8")
    written = [path.read_text(encoding="utf-8") for path in (ROOT / "safegene_edge").rglob("*.py")]
    for name in re.findall(
        r"\nclass (\w+Settings|EndpointModel)(?:\(Recipe\))?:", "".join(written)
    ):
        assert f'id="{name.lower()}"' in settings, name
    names = (site / "api.html").read_text(encoding="utf-8")
    for name in set(safegene_edge.__all__) - {"__version__"}:
        assert re.search(rf'id="[\w.]*\.{name}"', names), name


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(https?:[^" >]+)', text)
        assert loaded == [], page


def test_the_servers_limits_are_those_of_its_settings():
    """docs/serve.md says what happens beyond each; the numbers are the fields'."""
    settings = ServeSettings()
    fields = {
        "waiting requests": (settings.queue,),
        "prompt and answer": (settings.ctx,),
        "answer": (settings.max_tokens,),
        "time with waiting": (settings.seconds,),
        "body": (settings.max_body >> 20, settings.max_messages),
        "sending a request, reading an answer": (settings.read_seconds,),
        "connections": (settings.connections,),
    }
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    table = text.split("| limit | default |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    said = {
        name.split(" (")[0]: tuple(map(float, re.findall(r"[0-9]+", default)))
        for name, default in rows
    }
    assert said == fields


def test_the_size_up_to_which_merge_runs_a_model_is_the_constants():
    said = f"model of up to {RUN_UP_TO / 1e6:.0f} MB"
    for text in (MergeSettings.__doc__, (ROOT / "docs" / "merge.md").read_text(encoding="utf-8")):
        assert said in " ".join(text.split())


def test_the_shipped_gene_is_what_the_docs_say():
    gene = SafetyGene.shipped()
    assert f"{gene.n_parameters:,} parameters" in (ROOT / "README.md").read_text(encoding="utf-8")
