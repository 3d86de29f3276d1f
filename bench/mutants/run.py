"""Small faults put into the code, one at a time: do the tests see them?

    python bench/mutants/run.py [--each N] [--seconds N] [--fresh]

Of every part so many mutants are drawn from a seed: a comparison turned, a number one more, a
statement left out, a text changed. Each is tried on a copy, with the part's own tests, in a fork
that stops at the first failure. What was tried is kept, and the next call goes on. Whoever survives
is named in results.json: by hand, to see whether the change can be seen at all.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import ROOT, cache_folder, rows_of, table, write

HERE = Path(__file__).parent
HOME = Path(os.environ.get("SAFEGENE_MUTANTS", cache_folder() / "bench-mutants"))
SEED, MEMORY = 35, 12 << 30
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # files, tests
    "gguf reader": (("gguf_file/reader.py",), ("test_gguf_file", "test_gene", "test_inspect")),
    "gene": (("gene.py",), ("test_gene", "test_inspect", "test_compat")),
    "compat": (("compat.py",), ("test_compat", "test_bad_inputs", "test_gene")),
    "judge": (
        ("evals/judge/model.py", "evals/judge/normalise.py", "evals/judge/phrases.py",
         "evals/judge/plain.py", "evals/judge/verdict.py"),
        ("test_judge", "test_judge_traps"),
    ),
    "merge": (
        ("merge/codes.py", "merge/imatrix.py", "merge/inputs.py", "merge/plan.py",
         "merge/rounding.py", "merge/workers.py"),
        ("test_imatrix", "test_rounding", "test_merge", "test_files"),
    ),
}  # fmt: skip
_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip


# -- mutants --------------------------------------------------------------


def mutants(source: str) -> list[tuple[int, str, int, int]]:
    """Line, what is done, and the place and the change that `mutated` takes, of every mutant."""
    found = []
    for place, (node, field, index) in enumerate(_places(ast.parse(source))):
        old = _get(node, field, index)
        line = getattr(old, "lineno", getattr(node, "lineno", 0))
        found += [(line, what, place, n) for n, (what, _) in enumerate(_changes(old))]
    return found


def mutated(source: str, place: int, change: int) -> str:
    """The source with one mutation."""
    tree = ast.parse(source)
    node, field, index = list(_places(tree))[place]
    _set(node, field, index, list(_changes(_get(node, field, index)))[change][1])
    return ast.unparse(ast.fix_missing_locations(tree))


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every part of the code that runs; no annotations, no docstrings, no words of errors."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(tree, ast.Raise) or _is_alias(tree):
            continue
        for index, one in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(one, ast.AST) and not _is_text(one):
                yield tree, field, index
                yield from _places(one)


def _is_text(node: ast.AST) -> bool:
    """A docstring, or a text with values in it, which is a message."""
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def _is_alias(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation)


def _changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    if other := _OTHER.get(type(node)):
        yield f"{type(node).__name__} to {other.__name__}", other()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"no {type(node.op).__name__}", node.operand
    elif isinstance(node, ast.Constant):
        yield from _constant(node.value)
    elif isinstance(node, ast.If):
        turned = ast.UnaryOp(ast.Not(), node.test)
        yield "condition turned", ast.If(turned, node.body, node.orelse)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.Raise, ast.AugAssign, ast.Expr)):
        yield f"no {type(node).__name__}", ast.Pass()


def _constant(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield f"{value} to {not value}", ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield f"{value} to {value + 1}", ast.Constant(value + 1)
    elif isinstance(value, str) and value:
        yield f"{value[:30]!r} changed", ast.Constant(value + "\x01")


def _get(node: ast.AST, field: str, index: int | None) -> Any:
    value = getattr(node, field)
    return value if index is None else value[index]


def _set(node: ast.AST, field: str, index: int | None, new: Any) -> None:
    if index is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[index] = new


def drawn(part: str, each: int) -> tuple[list[tuple[str, int, str, int, int]], int]:
    """The part's sample (file, line, what, place, change), and how many there are in all."""
    every = [
        (file, *one)
        for file in PARTS[part][0]
        for one in mutants((ROOT / "safegene_edge" / file).read_text())
    ]
    random.Random(f"{SEED} {part}").shuffle(every)
    return every[:each], len(every)


# -- trials ---------------------------------------------------------------


def load() -> None:
    """What tests import but for this package, so that a fork need not."""
    for name in ("click.testing", "gguf", "llama_cpp", "numpy", "peft", "pytest",
                 "safetensors.numpy", "torch", "transformers"):  # fmt: skip
        importlib.import_module(name)


def copy_of(folder: Path) -> None:
    """The package and its tests, to be changed."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("safegene_edge", "tests", "examples", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "converters" if name[0] == "s" else "-")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(ROOT / "converters", folder / "safegene_edge" / "converters")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, folder / name)


def passes(folder: Path, tests: tuple[str, ...], limit: float) -> tuple[bool, float]:
    """Whether the tests pass on the copy as it is, and in how many seconds."""
    began, pid = time.monotonic(), os.fork()
    if not pid:
        _tests(folder, tests)
    descriptor = os.pidfd_open(pid)
    ended = bool(select.select([descriptor], [], [], limit)[0])
    os.close(descriptor)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return ended and status == 0, time.monotonic() - began


def _tests(folder: Path, tests: tuple[str, ...]) -> None:
    code = 99
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(folder)
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p) != ROOT)]
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__
                            and "editable" not in getattr(f, "__module__", "")]  # fmt: skip
        for name in [name for name in sys.modules if name.split(".")[0] == "safegene_edge"]:
            del sys.modules[name]  # common.py has imported it from elsewhere
        import pytest

        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}.py" for name in tests)]
        )
    finally:
        os._exit(int(code))


def work(number: int, of: int, each: int, parts: list[str], end: float) -> None:
    """Mutants of one processor, written down one by one."""
    if hasattr(os, "sched_setaffinity"):
        places = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {places[number % len(places)]})
    load()
    kept, folder = HOME / f"mutants-{number}.jsonl", HOME / f"copy-{number}"
    copy_of(folder)
    done = {(t["part"], t["index"]) for t in rows_of(HOME / "mutants-*.jsonl")}
    limits: dict[str, float] = {}
    plan = [(part, index, *one) for part in parts for index, one in enumerate(drawn(part, each)[0])]
    random.Random(0).shuffle(plan)
    with open(kept, "a") as journal:
        for part, index, file, line, what, *which in plan[number::of]:
            if (part, index) in done:
                continue
            if time.monotonic() > end:
                return
            tests = PARTS[part][1]
            if part not in limits:
                fine, seconds = passes(folder, tests, 300)
                if not fine:
                    raise SystemExit(f"{part}: its tests fail as they are")
                limits[part] = 3 * seconds + 10
            path = folder / "safegene_edge" / file
            before = path.read_text()
            path.write_text(mutated(before, *which))
            survived, seconds = passes(folder, tests, limits[part])
            path.write_text(before)
            facts = {"part": part, "seed": SEED, "index": index, "file": file, "line": line,
                     "what": what, "survived": survived, "seconds": round(seconds, 1)}  # fmt: skip
            journal.write(json.dumps(facts) + "\n")
            journal.flush()


def summary() -> None:
    """results.json and the table."""
    found, rows, totals = rows_of(HOME / "mutants-*.jsonl"), [], {}
    for part in PARTS:
        mine = [t for t in found if t["part"] == part]
        killed = sum(not t["survived"] for t in mine)
        totals[part] = drawn(part, 0)[1]
        share = f"{100 * killed / len(mine):.0f} %" if mine else ""
        rows.append([part, totals[part], len(mine), killed, share])
    killed = sum(not t["survived"] for t in found)
    share = f"{100 * killed / len(found):.0f} %" if found else ""
    rows.append(["all", sum(totals.values()), len(found), killed, share])
    text = "# Mutants: small faults that the tests must see\n\n" + table(
        ["part", "mutants", "tried (drawn at random)", "killed", "of those tried"], rows
    )
    text += (
        "\nKilled: a test of the part's own files failed, or took three times as long. Survivors "
        "are in results.json, with file and line.\n"
    )
    survivors = [{k: t[k] for k in ("part", "file", "line", "what")} for t in found
                 if t["survived"]]  # fmt: skip
    survivors.sort(key=lambda t: (t["file"], t["line"]))
    seeds = {t["part"]: t["seed"] for t in found}
    write(HERE, {"seeds": seeds, "survivors": survivors}, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=100, help="mutants of each part")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--work", type=int)
    given = parser.parse_args()
    workers = min(2, len(os.sched_getaffinity(0)))
    if given.work is not None:
        end = time.monotonic() + given.seconds
        return work(given.work, workers, given.each, given.part or list(PARTS), end)
    if given.fresh:
        shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True, exist_ok=True)
    running = [
        subprocess.Popen([sys.executable, __file__, "--seconds", str(given.seconds),
                          "--each", str(given.each), "--work", str(number),
             *(word for part in given.part or () for word in ("--part", part))],
                         env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        for number in range(workers)
    ]  # fmt: skip
    for one in running:
        one.wait()
    return summary()


if __name__ == "__main__":
    main()
