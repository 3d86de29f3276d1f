"""Refusals recovered by one gene in fine-tunes that it never saw, beside the field's baselines.

    python bench/recovery/finetunes.py smollm2 && python bench/recovery/run.py smollm2
    python bench/recovery/run.py tables

Each cell carries a hash of its files and prompts, and the family's JSON is the cache: a re-run,
on this machine or another, measures only what changed. No completion is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import SHARED, machine
from finetunes import LABELLED, MEASURED, TASKS, Family, Row, family, rows, tune
from targets import Builder

from safegene_edge import Engine, SafeLlama, SafetyGene, recalibrate
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.judge import judge
from safegene_edge.files import sha256, write_text
from safegene_edge.gene import Expression
from safegene_edge.prompts import Prompt, harmful_prompts, harmless_prompts
from safegene_edge.recalibrate import Examples, fit
from safegene_edge.runtime import refusal_margin
from safegene_edge.training.degrade import degrade
from safegene_edge.training.extract import REFUSALS, extract
from safegene_edge.training.models import Source
from safegene_edge.training.settings import ExtractSettings

HERE = Path(__file__).parent
PROMPTS, ANSWER = 100, 32
# The default, and with the prompts of a few rows that the fine-tune has learnt, without answers.
TASK_PROMPTS, TASK_ROWS = "default, task prompts", 16
COLUMNS = (
    "fine-tuned", "default", TASK_PROMPTS, "default, all layers", "coefficients 1",
    "all layers, coefficients 1", "RESTA", "SafeLoRA", "SafeMERGE", "trained for this model",
)  # fmt: skip
# Asked for like columns: the table of quantisations, and the tasks' accuracy on many more rows,
# for a point of a hundred rows is one row.
KINDS, ACCURACY, MORE = "kinds", "accuracy", 2000
# Another search, or another loss, finds other coefficients.
CODE = sha256(fit.__file__) + sha256(refusal_margin.__file__)
Cell = dict[str, Any]


def suites() -> dict[str, list[Prompt]]:
    """Prompts by suite; a hundred of each, evenly spread."""
    files = {
        "advbench": SHARED / "advbench.csv",
        "harmbench": SHARED / "harmbench_text.csv",
        "borderline": "borderline",
        "harmless": "harmless",
    }
    return {
        name: list(load_suite(source)[0].sample(PROMPTS).prompts) for name, source in files.items()
    }


class Bench:
    """All cells of one family."""

    def __init__(self, name: str) -> None:
        self.family: Family = family(name)
        self.work = self.family.work
        self.builder = Builder(self.family, lambda: self._bare() or self._degraded())
        self.prompts = suites()
        self.texts = {name: [list(p.messages) if p.history else p.text for p in prompts]
                      for name, prompts in self.prompts.items()}  # fmt: skip
        self.results: dict[str, Any] = {
            "family": name, "tasks": {}, KINDS: {}, ACCURACY: {},
        }  # fmt: skip
        if self.file.exists():
            self.results |= json.loads(self.file.read_text(encoding="utf-8"))
        groups = [entry for part in ("tasks", KINDS, ACCURACY)
                  for entry in self.results[part].values()]  # fmt: skip
        self.known = {part["key"]: part for group in groups for cell in group.values()
                      for part in cell.values() if isinstance(part, dict)}  # fmt: skip

    @property
    def file(self) -> Path:
        return HERE / f"{self.family.name}.json"

    # -- genes ------------------------------------------------------------

    def _bare(self) -> list[Source]:
        """The model as it was before its alignment, where that is known."""
        aligned = self.family.aligned
        return [Source(aligned.base)] if aligned.adapters else []

    def _degraded(self) -> list[Source]:
        return degrade(self.family.aligned, self.work / "degraded", report=say)

    def gene(self) -> Path:
        """The family's gene: the shipped one, or extracted here."""
        path = self.family.gene
        if not path.exists():
            settings = ExtractSettings(rank=5, alpha=10)  # 11 of 24 layers fit the budget
            self._extract(self.work / "gene", settings).save(path)
        return path

    def whole_gene(self) -> Path:
        """The gene before layers were selected, from the same training examples and steps.

        Kept beside the bench, for it takes an hour to learn.
        """
        path = HERE / f"{self.family.name}-whole.gene.gguf"
        if not path.exists():
            before, folder = self.work / "gene", self.work / "whole"
            if (before / "train.pt").exists() and not folder.exists():
                shutil.copytree(before, folder)
                (folder / "run.json").unlink()
            self._extract(folder, self._unselected()).save(path)
        return path

    def trained(self, task: str, source: Source) -> Path:
        """Safety training of this one fine-tune: all layers, the gene's examples and steps."""
        path = self.work / f"trained-{task}.gene.gguf"
        if not path.exists():
            folder = self.work / f"trained-{task}"
            folder.mkdir(exist_ok=True)
            for name in ("aligned.npz", REFUSALS):
                shutil.copy(self.work / "gene" / name, folder / name)
            self._extract(folder, self._unselected(), [source]).save(path)
        return path

    def _unselected(self) -> ExtractSettings:
        """The gene's own settings, but for the selection."""
        run = json.loads((self.work / "gene" / "run.json").read_text(encoding="utf-8"))
        first = run["settings"]
        return ExtractSettings(**{**first, "targets": tuple(first["targets"]), "select": False})

    def _extract(
        self, folder: Path, settings: ExtractSettings, degraded: Sequence[Source] = ()
    ) -> SafetyGene:
        # The half-billion model learns at 120 tokens a second here: every second prompt.
        step = 2 if self.family.name == "qwen" else 1
        return extract(
            self.family.aligned, degraded or [*self._degraded(), *self._bare()],
            folder=folder, settings=settings, report=say,
            harmful=harmful_prompts()[::step], harmless=harmless_prompts()[::step],
        )  # fmt: skip

    # -- cells ------------------------------------------------------------

    def run(self, columns: tuple[str, ...]) -> None:
        """Measure what is missing; write the results after every cell."""
        aligned = self.builder.build("aligned", {})
        for task in TASKS:
            entry = self.results["tasks"].setdefault(task, {})
            entry["aligned"] = self.cell(aligned, None, task)
        others = {KINDS: self.kinds, ACCURACY: self.accuracy}
        for column in columns:
            if column in others:
                others[column]()
                continue
            for task in TASKS:
                if (
                    column == TASK_PROMPTS and task == "identity"
                ):  # a task that nobody wants to keep
                    continue
                source = tune(self.family, task)
                started = time.process_time()
                found = self._column(column, task, source)
                target, gene, parameters, seconds = found
                say(f"{self.family.name} {task}, {column}: ready in "
                    f"{time.process_time() - started:.0f} CPU s")  # fmt: skip
                cell = self.cell(target, gene, task)
                self.results["tasks"][task][column] = {
                    **cell, "parameters": parameters, "seconds": seconds,
                }  # fmt: skip
                self.save()

    def _column(
        self, column: str, task: str, source: Source
    ) -> tuple[Path, SafetyGene | None, int, float]:
        """A column's target, gene, parameters and seconds to apply."""
        build = self.builder
        change = build.task(source)
        plain = build.build(task, change)
        if column == "fine-tuned":
            return plain, None, 0, 0.0
        baselines: Mapping[str, Callable[[Any], Any]] = {
            "RESTA": build.resta, "SafeLoRA": build.safe_lora, "SafeMERGE": build.safe_merge,
        }  # fmt: skip
        if column in baselines:
            started = time.process_time()
            target = build.build(f"{task}-{column}", baselines[column](change))
            count = sum(d.size for d in build.safety.values())
            return target, None, count, self._once(target, time.process_time() - started)
        if column == "trained for this model":
            started = time.process_time()
            path = self.trained(task, source)
            gene = SafetyGene.load(path)
            seconds = self._once(path, time.process_time() - started)
            return plain, gene, gene.n_parameters, seconds
        path = self.whole_gene() if "all layers" in column else self.gene()
        gene = SafetyGene.load(path)
        if "coefficients 1" in column:
            return plain, gene, gene.n_parameters, 0.0
        learnt = rows(task)[0][:TASK_ROWS] if column == TASK_PROMPTS else []
        examples = Examples.shipped(task=[row["prompt"] for row in learnt])
        expression, seconds = self.expressed(plain, path, gene, examples)
        return plain, gene.express(expression), gene.n_parameters, seconds

    def expressed(
        self, target: Path, path: Path, gene: SafetyGene, examples: Examples
    ) -> tuple[Expression, float]:
        """The expression for a target, found once."""
        facts = f"{sha256(target)}{sha256(path)}{CODE}{gene.aligned_loss}{examples}"
        file = self.work / f"expression-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"
        started = time.process_time()
        if not file.exists():
            recalibrate(target, gene, examples).expression.save(file)
        return Expression.load(file), self._once(file, time.process_time() - started)

    def _once(self, path: Path, seconds: float) -> float:
        """The seconds that making a file took, the first time."""
        note = path.with_name(path.name + ".seconds")
        if not note.exists():
            note.write_text(f"{seconds:.1f}")
        return float(note.read_text())

    def cell(
        self, target: Path, gene: SafetyGene | None, task: str, measured: int = MEASURED
    ) -> Cell:
        """Counts of one target with one gene: {"suites": ..., "task": ...}."""
        facts: list[Any] = [sha256(target), ANSWER]
        if gene is not None:
            facts.append([[n, hashlib.sha256(p.a.tobytes() + p.b.tobytes()).hexdigest()]
                          for n, p in sorted(gene.pairs.items())])  # fmt: skip
        held = rows(task, measured)[1]
        wanted = {"suites": [*facts, self.texts], "task": [*facts, held]}
        keys = {name: hashlib.sha256(json.dumps(fact).encode()).hexdigest()[:16]
                for name, fact in wanted.items()}  # fmt: skip
        missing = [name for name, key in keys.items() if key not in self.known]
        if missing:
            draft = self.work / f".{keys['suites']}.gguf"
            prompts = self.prompts if "suites" in missing else {}
            found = measure(target, gene, prompts, task, held, draft)
            for name in missing:
                self.known[keys[name]] = {"key": keys[name], **found[name]}
        return {name: self.known[key] for name, key in keys.items()}

    def kinds(self) -> None:
        """One fine-tune in four quantisations, with the same gene recalibrated for each."""
        task = "gsm8k"
        change = self.builder.task(tune(self.family, task))
        for kind in ("Q4_K_M", "Q5_K_M", "Q8_0", "F16"):
            target = self.builder.build(task, change, kind)
            gene = SafetyGene.load(self.gene())
            expression, _ = self.expressed(target, self.gene(), gene, Examples.shipped())
            self.results[KINDS][kind] = {
                "fine-tuned": self.cell(target, None, task),
                "default": self.cell(target, gene.express(expression), task),
            }
            self.save()

    def accuracy(self) -> None:
        """The labelled tasks on many more rows, with the gene and without."""
        for task in LABELLED:
            entry = self.results[ACCURACY].setdefault(task, {})
            for column in ("fine-tuned", "default", TASK_PROMPTS):
                target, gene, *_ = self._column(column, task, tune(self.family, task))
                entry[column] = {"task": self.cell(target, gene, task, MORE)["task"]}
                self.save()

    def save(self) -> None:
        """One family's results; hits are 0/1 a prompt, in the prompts' order."""
        known = {**self.results, "machine": machine(), "prompts": PROMPTS, "tokens": ANSWER}
        text = json.dumps(known, separators=(",", ":"))
        write_text(self.file, text.replace("},", "},\n") + "\n")


def measure(
    target: Path, gene: SafetyGene | None, prompts: Mapping[str, list[Prompt]],
    task: str, held: Sequence[Row], draft: Path,
) -> Cell:  # fmt: skip
    """Refused (as "0"/"1" a prompt) by suite, and the task's accuracy or perplexity."""
    suites: Cell = {}
    with SafeLlama(str(target), n_ctx=512) as llama:
        scales = {}
        if gene is not None:
            try:
                gene.save(draft)
                scales = {llama.attach(draft, 1.0): 1.0}
            finally:
                draft.unlink(missing_ok=True)
        with Engine(llama, n_parallel=16, flash_attn=True) as engine:
            for name, asked_of in prompts.items():
                asked = [llama.render(prompt.as_dicts()) for prompt in asked_of]
                said = engine.generate(asked, max_tokens=ANSWER, adapters=scales)
                verdicts = [
                    judge(prompt.text, llama.text(answer.tokens)).label == "refused"
                    for prompt, answer in zip(asked_of, said, strict=True)
                ]
                suites[name] = "".join(str(int(hit)) for hit in verdicts)
        with Engine(llama, n_parallel=16) as engine:
            return {"suites": suites, "task": _task(llama, engine, scales, task, held)}


def _task(llama: SafeLlama, engine: Engine, scales: Any, task: str, held: Sequence[Row]) -> Cell:
    if not held:
        return {}
    asked = [llama.render([{"role": "user", "content": row["prompt"]}]) for row in held]
    if task in LABELLED:
        said = engine.generate(asked, max_tokens=4, adapters=scales)
        right = [
            llama.text(answer.tokens).strip().lower().startswith(row["response"].lower())
            for row, answer in zip(held, said, strict=True)
        ]
        return {"accuracy": "".join(str(int(hit)) for hit in right)}
    words = [
        llama.tokenize(row["response"].encode(), add_bos=False, special=False)[:96] for row in held
    ]
    logs = engine.score(asked, words, adapters=scales)
    tokens = sum(len(row) for row in logs)
    return {"perplexity": math.exp(-sum(float(row.sum()) for row in logs) / tokens)}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    if not SHARED.exists():
        sys.exit("skipped: the benchmark files are not beside this checkout")
    name, *columns = sys.argv[1:] or ["tables"]
    if name != "tables":
        Bench(name).run(tuple(columns) or (*COLUMNS, KINDS, ACCURACY))
    from tables import write_tables

    write_tables()


if __name__ == "__main__":
    main()
