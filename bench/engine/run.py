"""The batched engine beside a loop of `Llama.create_chat_completion`, in turn, same settings.

Both stop at the model's end token and nowhere else. The peer runs as llama-cpp-python sets it
up, and with flash attention, which the engine uses. Answers of a quantised model depend on the
order of sums, so a control shows how far the peer agrees with itself when it only reads the
prompt in smaller pieces.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, safety_adapter, smollm2, table, write

from safegene_edge import Engine, SafeLlama, judge
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.statistics import Count

N_PROMPTS, N_TOKENS, ROUNDS = 200, 32, 3
Ask = Callable[[list[str]], list[str]]
CONTROL = "loop, prompts read 16 tokens at a time"


def prompts() -> list[str]:
    suites = [suite for name in ("harmful", "harmless") for suite in load_suite(name)]
    return [p.text for suite in suites for p in suite.sample(N_PROMPTS // 2).prompts]


def loop(model: str, **options: Any) -> Ask:
    threads = machine()["physical_cores"]
    options = {"n_ctx": 2048, "n_threads": threads, "n_threads_batch": threads, **options}
    peer = llama_cpp.Llama(model, verbose=False, **options)

    def ask(texts: list[str]) -> list[str]:
        return [
            peer.create_chat_completion(
                [{"role": "user", "content": text}], max_tokens=N_TOKENS, temperature=0.0
            )["choices"][0]["message"]["content"]
            for text in texts
        ]

    return ask


def batched(model: str, *adapters: str) -> Ask:
    ours = SafeLlama(model, adapters)
    engine = Engine(ours, flash_attn=True)

    def ask(texts: list[str]) -> list[str]:
        rendered = [ours.render([{"role": "user", "content": text}]) for text in texts]
        return [ours.text(g.tokens) for g in engine.generate(rendered, max_tokens=N_TOKENS)]

    return ask


def agreement(texts: list[str], ours: list[str], theirs: list[str]) -> dict[str, int]:
    triples = list(zip(texts, ours, theirs, strict=True))
    return {
        "total": len(triples),
        "same_verdict": sum(judge(t, a).label == judge(t, b).label for t, a, b in triples),
        "identical": sum(a.strip() == b.strip() for _, a, b in triples),
    }


def rounds_of(texts: list[str], ways: dict[str, Ask]) -> tuple[list[Any], dict[str, list[str]]]:
    rounds, answers = [], {}
    for number in range(ROUNDS):
        seconds = {}
        for name, ask in ways.items():
            start = time.perf_counter()
            answers[name] = ask(texts)
            seconds[name] = round(time.perf_counter() - start, 2)
        rounds.append(seconds)
        print(f"round {number + 1}: {seconds}", file=sys.stderr)
    return rounds, answers


def shown(model: Path, results: dict[str, Any]) -> str:
    names = list(results["rounds"][0])
    rows = [[i + 1, *(r[name] for name in names)] for i, r in enumerate(results["rounds"])]
    ratios = [
        f"{results['median_ratio'][name]:.2f} times as fast as the {name}"
        for name in names
        if name != "engine"
    ]
    agreed = [
        [name, Count(a["same_verdict"], a["total"]), Count(a["identical"], a["total"])]
        for name, a in results["agreement"].items()
    ]
    return (
        f"# Engine: {N_PROMPTS} prompts × {N_TOKENS} tokens, {model.name}\n\n"
        + table(["round", *(f"{name}, s" for name in names)], rows)
        + f"\nMedians of the ratios within a round: {', '.join(ratios)}.\n\n"
        + table(["against the loop", "same verdict", "identical answer"], agreed)
        + "\nBatching changes the order of floating-point sums, which a quantised model amplifies. "
        f"The control is the peer against itself: {CONTROL}.\n"
    )


def main() -> None:
    path = smollm2()
    model, gene, texts = str(path), str(safety_adapter(path)), prompts()
    ways = {
        "loop": loop(model),
        "loop, flash attention": loop(model, flash_attn=True),
        "engine": batched(model),
    }
    rounds, answers = rounds_of(texts, ways)
    control = loop(model, n_batch=16)(texts)
    with_gene = loop(model, lora_path=gene)(texts), batched(model, gene)(texts)
    results = {
        "model": path.name,
        "prompts": len(texts),
        "max_tokens": N_TOKENS,
        "rounds": rounds,
        "median_ratio": {
            name: round(statistics.median(r[name] / r["engine"] for r in rounds), 2)
            for name in ways
            if name != "engine"
        },
        "agreement": {
            "engine, bare model": agreement(texts, answers["engine"], answers["loop"]),
            "engine, with the safety adapter": agreement(texts, with_gene[1], with_gene[0]),
            "control, bare model": agreement(texts, control, answers["loop"]),
        },
    }
    write(Path(__file__).parent, results, shown(path, results))


if __name__ == "__main__":
    main()
