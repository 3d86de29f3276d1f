"""The main job on a real model: three fine-tunes that lost refusals get them back.

    make demo

Each fine-tune is one file, as a user has it: the aligned model with a task's adapter merged in, by
which refusals were lost. For each, a gene is learnt from it and the aligned model, its strength is
found, and both are measured, all by forward passes. Everything derived is kept in a cache folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from real_model import cache_folder, smollm2

from safegene_edge import convert, evaluate, merge, restore
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.learn import LearnSettings
from safegene_edge.merge import MergeSettings
from safegene_edge.portfolio import PortfolioRow, counts, table

HERE = Path(__file__).parent
TASKS = ("news", "reviews", "maths")
PROMPTS_PER_SUITE = 30  # of each of the three


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    start = time.monotonic()
    cache = cache_folder()
    say("SmolLM2-135M-Instruct as Q4_K_M, the aligned model, and three fine-tunes of it")
    safety = converted("smollm2-135m-safety", cache)
    aligned = merged("aligned", [safety], cache)
    tuned = {
        task: merged(task, [safety, converted(f"smollm2-135m-tasks/{task}", cache)], cache)
        for task in TASKS
    }
    say("the aligned model: measuring")
    asked = EvalSettings(limit=PROMPTS_PER_SUITE)
    (refused, _), (over, _) = counts(evaluate(aligned, settings=asked).to_json())
    rows, tried = [], ""
    for task, target in tuned.items():
        done = restore(  # from 64 prompts: two thirds of the default's time
            target, aligned, output=cache / f"demo-{task}.gguf", limit=PROMPTS_PER_SUITE,
            learning=LearnSettings(prompts=64), progress=Steps(task),
        )  # fmt: skip
        if done.report is None:
            say(f"{task}: no refusals were lost")
            continue
        rows.append(PortfolioRow(task, *counts(done.report), kl=done.recalibration.point.kl))
        tried = done.next_steps[0]
    print(table(rows))
    print("\nn/N (share, 95 % Wilson interval); over-refused: harmless prompts, half of them")
    print("borderline in wording, that were refused wholly or in part")
    print(f"the aligned model: refused {refused}, over-refused {over}")
    print(f"\nreports: {cache}/demo-*.report.html")
    print(f"try it: {tried}")
    say(f"{time.monotonic() - start:.0f} s")


def converted(name: str, cache: Path) -> Path:
    """A PEFT folder of the examples as a GGUF LoRA."""
    output = cache / f"{Path(name).name}.gguf"
    convert(HERE / name, base=smollm2(), output=output)
    return output


def merged(name: str, adapters: list[Path], cache: Path) -> Path:
    """SmolLM2 with these adapters in its weights, as one file."""
    output = cache / f"demo-{name}.Q4_K_M.gguf"
    if not output.exists():
        merge(smollm2(), adapters, output, settings=MergeSettings(run=False))
    return output


class Steps:
    """Says what is being done, and how long it took."""

    def __init__(self, task: str) -> None:
        self.task, self.what, self.since = task, "", time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what:
            say(f"{self.task}: {what}")
            self.what, self.since = what, time.monotonic()
        if done == total:
            say(f"  {time.monotonic() - self.since:.0f} s")


if __name__ == "__main__":
    main()
