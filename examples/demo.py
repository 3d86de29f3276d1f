"""The main job on a real model: convert, side-load, evaluate, print the table.

    make demo

Everything derived is kept in a cache folder, so that a second run starts from there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from real_model import cache_folder, smollm2

from safegene_edge import convert, evaluate
from safegene_edge.evals.evaluate import EvalSettings
from safegene_edge.gguf_file import write_text

PEFT_FOLDER = Path(__file__).parent / "smollm2-135m-safety"
PROMPTS_PER_SUITE = 74  # of each of the three; all of them take more than a minute


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    start = time.monotonic()
    cache = cache_folder()
    say("SmolLM2-135M-Instruct as Q4_K_M (requantised once)")
    model = smollm2()

    gene = cache / "smollm2-135m-safety.gguf"
    adapter = convert(PEFT_FOLDER, base=model, output=gene)
    say(f"converted {PEFT_FOLDER.name}: {adapter.n_parameters:,} parameters")

    say("evaluating before and after (under a minute on two cores)")
    report = evaluate(
        model,
        gene,
        settings=EvalSettings(limit=PROMPTS_PER_SUITE),
        progress=progress if sys.stderr.isatty() else None,
    )
    print(report.table())
    page = cache / "demo-report.html"
    write_text(page, report.to_html())
    write_text(page.with_suffix(".json"), json.dumps(report.to_json(), indent=2) + "\n")
    print(f"\nreport: {page}")
    print(f"try it: safegene-edge chat {model} --gene {gene}")
    say(f"{time.monotonic() - start:.0f} s")


def progress(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
