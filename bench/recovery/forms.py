"""What comes back on prompts of other forms, and what must not change.

    python bench/recovery/forms.py smollm2 [--gene NAME=GENE.gguf...] [--task agnews,...]
    python bench/recovery/forms.py smollm2 --learn direct,itself,shared [--task agnews,...]
    python bench/recovery/forms.py accuracy smollm2 [the same]
    python bench/recovery/forms.py tables

Suites by form: commands (AdvBench, HarmBench), questions (MaliciousInstruct), advice to be argued
for and its harmless twin (SafeText), degrading statements, and the project's own, whose harmful
and borderline prompts come in fourteen forms. A gene that is not named is the family's. Learnt ones
(`safegene-edge learn`) come from the fine-tune itself with the aligned model as the teacher
(direct), from it alone (itself), or from other fine-tunes (shared). Cells that are there already
are not measured again; no completion is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import SHARED, machine
from finetunes import LABELLED, TASKS, rows, tune
from form_tables import write_tables
from run import ANSWER, Bench, measure, say

from safegene_edge import Engine, SafetyGene, recalibrate
from safegene_edge.errors import NoEffectError
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.files import sha256, write_text
from safegene_edge.prompts import Prompt
from safegene_edge.recalibrate import Examples

HERE = Path(__file__).parent
ROWS = 800  # of a task, for its accuracy
# Name, where it is, prompts of it (evenly spread) that SmolLM2 is asked; Qwen a fifth of them.
HARMFUL = (
    ("advbench", SHARED / "advbench.csv", 50),
    ("harmbench", SHARED / "harmbench_text.csv", 50),
    ("malicious_instruct", SHARED / "malicious_instruct.txt", 50),
    ("safetext_unsafe", SHARED / "safetext_unsafe.jsonl", 50),
    ("controversial", SHARED / "controversial.jsonl", 40),
    ("harmful", "harmful", 160),
)
HARMLESS = (
    ("safetext_safe", SHARED / "safetext_safe.jsonl", 50),
    ("borderline", "borderline", 100),
    ("harmless", "harmless", 56),
)
SHARE = {"smollm2": 1, "qwen": 5}
# Of the rows that the fine-tune learnt: prompts that a gene is learnt from, and recalibrated on.
TASK_LEARNT, TASK_FITTED = 80, 20
DIRECT, ITSELF, SHARED_GENE = "learnt: direct", "learnt: no aligned model", "learnt: shared"
BARE = "learnt: direct, no task prompts"
LEARNT = {"direct": DIRECT, "itself": ITSELF, "shared": SHARED_GENE, "bare": BARE}
SHARED_FROM = ("dolly", "sst2", "gsm8k")  # the others' gene; unlike each other


def suites(family: str) -> dict[str, list[Prompt]]:
    """Prompts by suite."""
    return {
        name: list(load_suite(source)[0].sample(count // SHARE[family]).prompts)
        for name, source, count in (*HARMFUL, *HARMLESS)
    }


class Forms:
    """All cells of one family."""

    def __init__(self, name: str) -> None:
        self.bench, self.prompts = Bench(name), suites(name)
        self.file = HERE / f"forms-{name}.json"
        self.found: dict[str, Any] = {"family": name, "tasks": {}, "accuracy": {}}
        if self.file.exists():
            self.found |= json.loads(self.file.read_text(encoding="utf-8"))
        self.found["forms"] = {suite: [prompt.form for prompt in prompts]
                               for suite, prompts in self.prompts.items()}  # fmt: skip
        texts = [[list(p.messages) for p in prompts] for prompts in self.prompts.values()]
        self.asked = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    def run(self, genes: dict[str, Path | None], tasks: list[str]) -> None:
        """The aligned model, each fine-tune, and each gene fitted to it."""
        aligned = self.bench.builder.build("aligned", {})
        for task in tasks:
            entry = self.found["tasks"].setdefault(task, {})
            entry["aligned"] = self._cell(entry.get("aligned"), aligned, None)
            target = self.target(task)
            entry["fine-tuned"] = self._cell(entry.get("fine-tuned"), target, None)
            self.save()
            for column, path in genes.items():
                examples, facts = None, {}
                if path is None:
                    path, facts = self.learnt(task, column)
                    examples = _with_task(task, column)
                entry[column] = self._cell(entry.get(column), target, path, examples, facts)
                self.save()
                say(f"{self.bench.family.name} {task}, {column}: {_counts(entry[column])}")

    def accuracy(self, genes: dict[str, Path | None], tasks: list[str]) -> None:
        """The labelled tasks' answers, without the gene and with it; 0/1 a row."""
        for task in [task for task in tasks if task in LABELLED]:
            entry, target = self.found["accuracy"].setdefault(task, {}), self.target(task)
            held = rows(task, ROWS)[1]
            for column, path in {"fine-tuned": None, **genes}.items():
                if path is None and column in LEARNT.values():
                    path = self.learnt(task, column)[0]
                fitted = self._fitted(task, column, path)
                key = self._key(target, fitted) + str(len(held))
                if entry.get(column, {}).get("key") != key:
                    draft = self.bench.work / ".accuracy.gguf"
                    found = measure(target, fitted, {}, task, held, draft)
                    entry[column] = {"key": key, "hits": found["task"]["accuracy"]}
                    self.save()
                say(f"{task}, {column}: {entry[column]['hits'].count('1')}/{len(held)}")

    def target(self, task: str) -> Path:
        """A fine-tune, quantised."""
        source = tune(self.bench.family, task)
        return self.bench.builder.build(task, self.bench.builder.task(source))

    def _fitted(self, task: str, column: str, path: Path | None) -> SafetyGene | None:
        """The gene with the strength that was found for this cell."""
        strength = self.found["tasks"][task][column].get("strength", 0.0)
        return SafetyGene.load(path).scaled(strength) if path and strength else None

    def _key(self, target: Path, gene: SafetyGene | None) -> str:
        facts = [sha256(target), gene.sha256 if gene else "", self.asked, str(ANSWER)]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]

    def learnt(self, task: str, column: str) -> tuple[Path, dict[str, Any]]:
        """The gene that the command line learns for a fine-tune, and what that took."""
        folder = self.bench.work / "learnt"
        folder.mkdir(exist_ok=True)
        shared = column == SHARED_GENE
        gene = folder / f"{'shared' if shared else task}-{column.replace(': ', '-')}.gguf"
        note = gene.with_suffix(".json")
        if not note.exists():
            flags: list[str] = []
            for one in SHARED_FROM if shared else (task,):
                flags += ["--degraded", str(self.target(one))]
            if column != ITSELF:
                flags += ["--aligned", str(self.bench.builder.build("aligned", {}))]
            if prompts := _task_prompts(task, column)[:TASK_LEARNT]:
                asked = folder / f"{task}.jsonl"
                write_text(asked, "".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
                flags += ["--task", str(asked)]
            write_text(note, json.dumps(_timed(["learn", *flags, "-o", str(gene)])))
        return gene, {"learning": json.loads(note.read_text(encoding="utf-8"))}

    def _cell(
        self, known: dict[str, Any] | None, target: Path, path: Path | None,
        examples: Examples | None = None, facts: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        facts = facts or {}
        fitted = None
        if path is not None:
            if known and known.get("gene") == sha256(path):
                return known
            facts |= {"gene": sha256(path), **fit(target, path, examples)}
            fitted = SafetyGene.load(path).scaled(facts["strength"]) if facts["strength"] else None
        key = self._key(target, fitted)
        for entry in self.found["tasks"].values():  # the aligned model is every task's
            for cell in entry.values():
                if cell.get("key") == key:
                    return {**facts, "key": key, "suites": cell["suites"]}
        draft = self.bench.work / f".{key}.gguf"
        found = measure(target, fitted, self.prompts, "identity", [], draft)
        return {**facts, "key": key, "suites": found["suites"]}

    def save(self) -> None:
        """Hits are 0/1 a prompt, in the prompts' order."""
        text = json.dumps({**self.found, "machine": machine(), "tokens": ANSWER}, indent=1)
        write_text(self.file, text + "\n")


def _task_prompts(task: str, column: str) -> list[str]:
    """What a gene may see of a task; nobody wants to keep the shift of identity."""
    if task == "identity" or column in (SHARED_GENE, BARE):
        return []
    return [row["prompt"] for row in rows(task)[0]][: TASK_LEARNT + TASK_FITTED]


def _with_task(task: str, column: str) -> Examples | None:
    prompts = _task_prompts(task, column)[TASK_LEARNT:]
    return Examples.shipped("fit", prompts) if prompts else None


def _timed(arguments: list[str]) -> dict[str, Any]:
    """Seconds, MiB at most, and what `learn --json` says of a run of the command line."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "safegene_edge", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tempfile.gettempdir()) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    facts = {key: value for key, value in json.loads(said).items() if key != "sources"}
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "peak_mib": usage.ru_maxrss // 1024, **facts}


def fit(target: Path, path: Path, examples: Examples | None = None) -> dict[str, Any]:
    """The default recalibration: strength, what the result says, seconds and tokens read."""
    read, decode = 0, Engine._decode

    def counted(self: Engine, stands_for: int = 1) -> None:
        nonlocal read
        read += self._batch.size
        decode(self, stands_for)

    Engine._decode = counted  # type: ignore[method-assign]
    started, gene = time.perf_counter(), SafetyGene.load(path)
    try:
        found = recalibrate(target, gene, examples)
    except NoEffectError as error:
        return {"strength": 0.0, "error": str(error)}
    finally:
        Engine._decode = decode  # type: ignore[method-assign]
    return {
        "strength": max(found.expression.coefficients.values()),
        "nothing_lost": found.nothing_lost,
        "kl": found.point.kl,
        "bounds": asdict(found.bounds) if found.bounds else None,
        "validation": asdict(found.validation) if found.validation else None,
        "seconds": round(time.perf_counter() - started, 1),
        "tokens": read,
    }


def _counts(cell: dict[str, Any]) -> str:
    hits = {name: f"{found.count('1')}/{len(found)}" for name, found in cell["suites"].items()}
    return ", ".join(f"{name} {count}" for name, count in hits.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+", help="[accuracy] FAMILY, or tables")
    parser.add_argument("--gene", action="append", default=[], metavar="NAME=GENE.gguf")
    parser.add_argument("--learn", default="", metavar=",".join(LEARNT))
    parser.add_argument("--task", default=",".join(TASKS))
    given = parser.parse_args()
    if given.what != ["tables"]:
        work = Forms(given.what[-1])
        genes = dict(text.split("=", 1) for text in given.gene)
        paths: dict[str, Path | None] = {name: Path(path) for name, path in genes.items()}
        paths |= {LEARNT[name]: None for name in given.learn.split(",") if name}
        paths = paths or {"the gene": work.bench.family.gene}
        step = work.accuracy if given.what[0] == "accuracy" else work.run
        step(paths, given.task.split(","))
    write_tables()


if __name__ == "__main__":
    main()
