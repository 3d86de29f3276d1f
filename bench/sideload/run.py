"""What a side-loaded gene costs in speed, beside an adapter on all layers and a baked gene.

    python bench/sideload/run.py

Prefill and decode by the engine, one sequence and sixteen, all columns in turn in each round. The
distilled gene is the package's; the learnt one is the bench of recovery's (`forms.py --learn
direct`), left out where it was not made; the adapter on all linear layers is the example's safety
adapter. A gene's cost goes with the number of its tensors, not with their rank.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cache_folder, safety_adapter, smollm2, table, write

from safegene_edge import Engine, SafeLlama, SafetyGene, bake
from safegene_edge.merge import MergeSettings

ROUNDS, PROMPT, ANSWER = 5, 256, 48
LEARNT = cache_folder() / "recovery" / "smollm2" / "learnt" / "agnews-learnt-direct.gguf"
BATCHES = (1, 16)
BARE = "no adapter"


def speeds(engine: Engine, scales: Any, batch: int) -> tuple[float, float]:
    """Tokens a second of reading `batch` prompts, and of answering them."""
    prompts = [[(7 * n + 13 * i) % 9000 + 100 for i in range(PROMPT)] for n in range(batch)]
    start = time.perf_counter()
    engine.visit_logits(prompts, [[PROMPT - 1]] * batch, lambda *_: None, adapters=scales)
    read = time.perf_counter() - start
    short = [prompt[:4] for prompt in prompts]
    start = time.perf_counter()
    engine.generate(short, max_tokens=ANSWER, adapters=scales, stop_at_end=False)
    answered = time.perf_counter() - start
    return batch * PROMPT / read, batch * ANSWER / answered


def main() -> None:
    model, gene = smollm2(), SafetyGene.shipped()
    whole = safety_adapter(model)
    found: dict[str, Any] = {}
    with (
        SafeLlama(model, n_ctx=512) as llama, Engine(llama, n_ctx=8192, flash_attn=True) as engine,
        bake(model, [gene], settings=MergeSettings(run=False), n_ctx=512) as other,
        Engine(other, n_ctx=8192, flash_attn=True) as baked,
    ):  # fmt: skip
        adapters = {"distilled gene": gene, "all layers": SafetyGene.load(whole)}
        if LEARNT.exists():
            adapters = {"learnt gene": SafetyGene.load(LEARNT), **adapters}
        columns: dict[str, Any] = {BARE: (engine, {}, 0)}
        for name, adapter in adapters.items():
            columns[name] = engine, {llama.attach(adapter): 1.0}, len(adapter.pairs)
        columns["distilled gene, baked"] = baked, {}, 0
        for batch in BATCHES:
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
            for number in range(ROUNDS + 1):
                for name, (of, scales, _) in columns.items():
                    speed = speeds(of, scales, batch)
                    if number:  # the first round warms up
                        taken[name].append(speed)
            found[str(batch)] = {name: summary(taken[name], taken[BARE]) for name in columns}
        found = {"tensors": {name: count for name, (*_, count) in columns.items()},
                 "batches": found}  # fmt: skip
    write(Path(__file__).parent, found, text_of(found, model.name))


def summary(own: list[tuple[float, float]], bare: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, and the medians of the ratios within a round."""
    facts = {}
    for place, what in enumerate(("prefill", "decode")):
        facts[what] = round(statistics.median(speed[place] for speed in own), 1)
        ratios = [a[place] / b[place] for a, b in zip(own, bare, strict=True)]
        facts[f"{what}_kept"] = round(statistics.median(ratios), 3)
    return facts


def text_of(found: dict[str, Any], name: str) -> str:
    rows = [
        [batch, column, found["tensors"][column], f"{facts['prefill']:.0f}",
         f"{facts['prefill_kept']:.1%}", f"{facts['decode']:.0f}", f"{facts['decode_kept']:.1%}"]
        for batch, columns in found["batches"].items()
        for column, facts in columns.items()
    ]  # fmt: skip
    head = ["sequences", "", "adapter tensors", "prefill, tokens/s", "kept", "decode, tokens/s",
            "kept"]  # fmt: skip
    return (
        f"# Side-loading: {name}\n\n{table(head, rows)}\n"
        f"Prompts of {PROMPT} tokens, answers of {ANSWER}; medians of {ROUNDS} rounds in turn. "
        "Kept is the median of the ratios to no adapter within a round.\n"
    )


if __name__ == "__main__":
    main()
