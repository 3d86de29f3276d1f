"""The main job on a real model: one gene, three fine-tunes that it never saw.

    make demo

Each fine-tune is the aligned model with a task's adapter, which wore its refusals off. The
shipped gene is recalibrated for each, side-loaded, and measured. Everything derived is kept in a
cache folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from real_model import cache_folder, smollm2

from safegene_edge import SafetyGene, convert, evaluate, recalibrate
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.files import write_text
from safegene_edge.portfolio import PortfolioRow, counts, table

HERE = Path(__file__).parent
TASKS = ("news", "reviews", "maths")
PROMPTS_PER_SUITE = 40  # of each of the three


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    start = time.monotonic()
    cache = cache_folder()
    say("SmolLM2-135M-Instruct as Q4_K_M (requantised once)")
    model = smollm2()
    gene = SafetyGene.shipped()
    say(f"the shipped gene: {len(gene.layers)} layers, {gene.n_parameters:,} parameters")
    aligned = converted("smollm2-135m-safety", model, cache)
    say("the aligned model: evaluating")
    asked = EvalSettings(limit=PROMPTS_PER_SUITE)
    (refused, _), (over, _) = counts(evaluate(model, adapters=[aligned], settings=asked).to_json())
    rows, tried = [], ""
    for task in TASKS:
        adapters = [aligned, converted(f"smollm2-135m-tasks/{task}", model, cache)]
        say(f"{task}: recalibrating")
        found = recalibrate(model, gene, adapters=adapters)
        fitted = None
        if not found.nothing_lost:
            fitted = cache / f"demo-{task}.gguf"
            gene.express(found.expression).save(fitted)
        say(f"{task}: evaluating before and after")
        report = evaluate(
            model,
            fitted,
            adapters=adapters,
            settings=asked,
            progress=progress if sys.stderr.isatty() else None,
        )
        facts = report.to_json()
        rows.append(PortfolioRow(task, *counts(facts), kl=found.point.kl))
        if fitted is not None:
            flags = " ".join(f"--adapter {path}" for path in adapters)
            tried = f"{flags} --gene {fitted}"
        page = cache / f"demo-{task}.html"
        write_text(page, report.to_html())
        write_text(page.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    print(table(rows))
    print("\nn/N (share, 95 % Wilson interval); over-refused: harmless prompts, half of them")
    print("borderline in wording, that were refused wholly or in part")
    print(f"the aligned model: refused {refused}, over-refused {over}")
    print(f"\nreports: {cache}/demo-*.html")
    print(f"try it: safegene-edge chat {model} {tried}")
    say(f"{time.monotonic() - start:.0f} s")


def converted(name: str, model: Path, cache: Path) -> Path:
    """A PEFT folder of the examples as a GGUF LoRA."""
    output = cache / f"{Path(name).name}.gguf"
    convert(HERE / name, base=model, output=output)
    return output


def progress(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
