"""What comes back on prompts of other forms, and what must not change.

    python bench/recovery/forms.py smollm2 [--gene NAME=GENE.gguf...] [--task agnews,...]
    python bench/recovery/forms.py accuracy smollm2 [the same]
    python bench/recovery/forms.py tables

Suites by form: commands (AdvBench, HarmBench), questions (MaliciousInstruct), advice to be argued
for and its harmless twin (SafeText), degrading statements, and the project's own, whose harmful
and borderline prompts come in fourteen forms. A gene that is not named is the family's. Cells that
are there already are not measured again; no completion is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
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

    def run(self, genes: dict[str, Path], tasks: list[str]) -> None:
        """The aligned model, each fine-tune, and each gene fitted to it."""
        aligned = self.bench.builder.build("aligned", {})
        for task in tasks:
            entry = self.found["tasks"].setdefault(task, {})
            entry["aligned"] = self._cell(entry.get("aligned"), aligned, None)
            target = self.target(task)
            entry["fine-tuned"] = self._cell(entry.get("fine-tuned"), target, None)
            self.save()
            for column, path in genes.items():
                entry[column] = self._cell(entry.get(column), target, path)
                self.save()
                say(f"{self.bench.family.name} {task}, {column}: {_counts(entry[column])}")

    def accuracy(self, genes: dict[str, Path], tasks: list[str]) -> None:
        """The labelled tasks' answers, without the gene and with it; 0/1 a row."""
        for task in [task for task in tasks if task in LABELLED]:
            entry, target = self.found["accuracy"].setdefault(task, {}), self.target(task)
            held = rows(task, ROWS)[1]
            for column, path in {"fine-tuned": None, **genes}.items():
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

    def _cell(
        self, known: dict[str, Any] | None, target: Path, path: Path | None
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        fitted = None
        if path is not None:
            if known and known.get("gene") == sha256(path):
                return known
            facts = {"gene": sha256(path), **fit(target, path)}
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


def fit(target: Path, path: Path) -> dict[str, Any]:
    """The default recalibration: strength, what the result says, seconds and tokens read."""
    read, decode = 0, Engine._decode

    def counted(self: Engine, stands_for: int = 1) -> None:
        nonlocal read
        read += self._batch.size
        decode(self, stands_for)

    Engine._decode = counted  # type: ignore[method-assign]
    started, gene = time.perf_counter(), SafetyGene.load(path)
    try:
        found = recalibrate(target, gene)
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
    parser.add_argument("--task", default=",".join(TASKS))
    given = parser.parse_args()
    if given.what != ["tables"]:
        work = Forms(given.what[-1])
        genes = dict(text.split("=", 1) for text in given.gene)
        paths = {name: Path(path) for name, path in genes.items()} or {
            "the gene": work.bench.family.gene
        }
        step = work.accuracy if given.what[0] == "accuracy" else work.run
        step(paths, given.task.split(","))
    write_tables()


if __name__ == "__main__":
    main()
