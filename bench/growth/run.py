"""How time grows: with prompts, with sequences at once, with the layers of an adapter; and a start.

    SAFEGENE_QWEN=QWEN.gguf python bench/growth/run.py

Answers of 16 tokens to the built-in prompts. The start is a new process up to its first token: this
package with a gene beside `llama_cpp.Llama` without one. Medians of rounds in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import safety_adapter, smollm2, table, write

from safegene_edge import Engine, SafeLlama, SafetyGene
from safegene_edge.evals.asking.suites import load_suite

ROUNDS, TOKENS = 3, 16
PROMPTS, SEQUENCES, LAYERS = (50, 100, 200, 400, 800), (1, 2, 4, 8, 16, 32), (0, 1, 5, 10, 20, 30)
FEWER = 4  # times as many prompts are left out where the model is larger
GENE = Path(__file__).parents[2] / "safegene_edge" / "data" / "smollm2-135m.gene.gguf"
START = {
    "SafeLlama with a gene": "from safegene_edge import SafeLlama\n"
    "llama = SafeLlama({model!r}, [{gene!r}], n_ctx=512)\n",
    "llama_cpp.Llama without": "from llama_cpp import Llama\n"
    "llama = Llama({model!r}, n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)\n",
}
FIRST = (
    "next(iter(llama.create_chat_completion([{{'role': 'user', 'content': 'Hello'}}], "
    "max_tokens=1, temperature=0.0)['choices']))\n"
)


def medians(ways: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of each way, all in turn in each round; one round more warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seconds = way()
            if number:
                taken[name].append(seconds)
    return {name: round(statistics.median(found), 3) for name, found in taken.items()}


def rendered(llama: SafeLlama, count: int) -> list[list[int]]:
    """So many of the built-in prompts, again from the first where there are not enough."""
    texts = [
        p.text for name in ("harmful", "harmless") for s in load_suite(name) for p in s.prompts
    ]
    ready = [llama.render([{"role": "user", "content": text}]) for text in texts]
    return list(islice(cycle(ready), count))


def timed(engine: Engine, prompts: list[list[int]], scales: Any = None) -> float:
    start = time.perf_counter()
    engine.generate(prompts, max_tokens=TOKENS, adapters=scales)
    return time.perf_counter() - start


def by_prompts(model: Path, counts: tuple[int, ...], rounds: int) -> dict[str, float]:
    with SafeLlama(model, n_ctx=512) as llama, Engine(llama, flash_attn=True) as engine:
        return medians(
            {str(n): lambda n=n: timed(engine, rendered(llama, n)) for n in counts}, rounds
        )  # fmt: skip


def by_sequences(model: Path) -> dict[str, float]:
    found = {}
    with SafeLlama(model, n_ctx=512) as llama:
        prompts = rendered(llama, 64)
        for count in SEQUENCES:
            with Engine(llama, n_parallel=count, n_ctx=8192, flash_attn=True) as engine:
                found |= medians({str(count): lambda e=engine: timed(e, prompts)})
    return found


def by_layers(model: Path) -> dict[str, float]:
    whole = SafetyGene.load(safety_adapter(model))
    with SafeLlama(model, n_ctx=512) as llama, Engine(llama, flash_attn=True) as engine:
        prompts = rendered(llama, 64)
        parts = {n: llama.attach(whole.only(whole.layers[:n]), 0.0) for n in LAYERS if n}
        return medians(
            {str(n): lambda n=n: timed(engine, prompts, {parts[n]: 1.0} if n else {})
             for n in LAYERS}
        )  # fmt: skip


def starts(model: Path) -> dict[str, float]:
    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    facts = {"model": str(model), "gene": str(GENE)}
    return medians(
        {name: lambda c=code: run((c + FIRST).format(**facts)) for name, code in START.items()}, 5
    )  # fmt: skip


def main() -> None:
    model = smollm2()
    found: dict[str, dict[str, float]] = {
        "start to the first token": starts(model),
        "prompts": by_prompts(model, PROMPTS, 1),
        "sequences at once, 64 prompts": by_sequences(model),
        "layers of an adapter (4 tensors each), 64 prompts": by_layers(model),
    }
    if path := os.environ.get("SAFEGENE_QWEN"):
        counts = tuple(n // FEWER for n in PROMPTS)
        found["prompts, Qwen2.5-Coder-0.5B"] = by_prompts(Path(path), counts, 1)
    text = f"# How time grows, {model.name}\n"
    for name, seconds in found.items():
        least = min(seconds.values())
        rows = [[key, f"{value:.2f}", f"{value / least:.2f}"] for key, value in seconds.items()]
        text += f"\n## {name[0].upper()}{name[1:]}\n\n" + table(["", "s", "of the least"], rows)
    write(Path(__file__).parent, found, text)


if __name__ == "__main__":
    main()
