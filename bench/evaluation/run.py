"""Does an evaluation repeat itself, and how long does `eval --quick` take?

The same evaluation twice with the same number of threads (the reports must agree but for
`times`), once with a single thread (verdicts may differ, and are counted), and the command
with --quick as a user starts it, three times.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, safety_adapter, smollm2, table, write

from safegene_edge import SafeLlama, evaluate
from safegene_edge.evals.report.report import Report
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.evals.statistics import Count

PROMPTS_PER_SUITE = 100


def run(model: Path, gene: Path, n_threads: int) -> Report:
    with SafeLlama(model, n_ctx=512, n_threads=n_threads) as llama:
        return evaluate(llama, gene, settings=EvalSettings(limit=PROMPTS_PER_SUITE))


def without_times(report: Report) -> dict[str, Any]:
    return {key: value for key, value in report.to_json().items() if key != "times"}


def labels(report: Report) -> list[str | None]:
    return [
        None if answer.verdict is None else answer.verdict.label
        for result in report.suites
        for answers in result.columns.values()
        for answer in answers
    ]


def texts(report: Report) -> list[str]:
    return [
        answer.completion
        for result in report.suites
        for answers in result.columns.values()
        for answer in answers
    ]


def quick(model: Path, gene: Path) -> float:
    command = [sys.executable, "-m", "safegene_edge", "eval", str(model), "--gene", str(gene)]
    start = time.perf_counter()
    subprocess.run([*command, "--quick", "--no-resume"], check=True, capture_output=True)
    return round(time.perf_counter() - start, 1)


def main() -> None:
    model = smollm2()
    gene = safety_adapter(model)
    threads = machine()["physical_cores"]
    seconds = [quick(model, gene) for _ in range(3)]
    first, again, single = (run(model, gene, n) for n in (threads, threads, 1))
    pairs = list(zip(labels(first), labels(single), strict=True))
    worded = list(zip(texts(first), texts(single), strict=True))
    other = Count(sum(a != b for a, b in pairs), len(pairs))
    wording = Count(sum(a != b for a, b in worded), len(worded))
    results = {
        "model": model.name,
        "quick_seconds": seconds,
        "same_report_twice": without_times(first) == without_times(again),
        "threads": [threads, 1],
        "verdicts": other.total,
        "verdicts_that_differ": other.n,
        "answers_that_differ": wording.n,
    }
    rows = [
        ["`eval --quick`, median of three, s", statistics.median(seconds)],
        ["two runs give the same report but for times", results["same_report_twice"]],
        [f"verdicts that differ, {threads} threads against 1", other],
        [f"answers that differ, {threads} threads against 1", wording],
    ]
    text = f"# Repeating an evaluation, {model.name}\n\n" + table(["what", "found"], rows)
    write(Path(__file__).parent, results, text)


if __name__ == "__main__":
    main()
