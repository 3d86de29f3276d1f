"""The batched engine beside a loop of `Llama.create_chat_completion`, in turn, same settings.

Both stop at the model's end token and nowhere else. Three rounds, medians of the ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, smollm2, table, write

from safegene_edge import Engine, SafeLlama, judge
from safegene_edge.evals.suites import load_suite

N_PROMPTS, N_TOKENS, ROUNDS = 200, 32, 3


def prompts() -> list[str]:
    suites = [suite for name in ("harmful", "harmless") for suite in load_suite(name)]
    return [p.text for suite in suites for p in suite.sample(N_PROMPTS // 2).prompts]


def timed(work: Callable[[], list[str]]) -> tuple[float, list[str]]:
    start = time.perf_counter()
    answers = work()
    return time.perf_counter() - start, answers


def main() -> None:
    model, threads = str(smollm2()), machine()["physical_cores"]
    texts = prompts()
    peer = llama_cpp.Llama(
        model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ours = SafeLlama(model)
    engine = Engine(ours)

    def loop() -> list[str]:
        return [
            peer.create_chat_completion(
                [{"role": "user", "content": text}], max_tokens=N_TOKENS, temperature=0.0
            )["choices"][0]["message"]["content"]
            for text in texts
        ]

    def batched() -> list[str]:
        rendered = [ours.render([{"role": "user", "content": text}]) for text in texts]
        return [ours.text(g.tokens) for g in engine.generate(rendered, max_tokens=N_TOKENS)]

    rounds = []
    for number in range(ROUNDS):
        loop_seconds, theirs = timed(loop)
        seconds, answers = timed(batched)
        rounds.append({"loop_seconds": round(loop_seconds, 2), "engine_seconds": round(seconds, 2)})
        print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    same_verdicts = sum(
        judge(text, a).label == judge(text, b).label
        for text, a, b in zip(texts, answers, theirs, strict=True)
    )
    identical = sum(a.strip() == b.strip() for a, b in zip(answers, theirs, strict=True))
    ratio = statistics.median(r["loop_seconds"] / r["engine_seconds"] for r in rounds)
    results = {
        "model": Path(model).name,
        "prompts": len(texts),
        "max_tokens": N_TOKENS,
        "rounds": rounds,
        "median_ratio": round(ratio, 2),
        "same_verdicts": same_verdicts,
        "identical_answers": identical,
        "tokens": {
            "loop": sum(len(ours.tokenize(a.encode(), add_bos=False)) for a in theirs),
            "engine": sum(len(ours.tokenize(a.encode(), add_bos=False)) for a in answers),
        },
    }
    rows = [
        [i + 1, r["loop_seconds"], r["engine_seconds"],
         f"{r['loop_seconds'] / r['engine_seconds']:.2f}"]
        for i, r in enumerate(rounds)
    ]  # fmt: skip
    text = (
        f"# Engine: {len(texts)} prompts × {N_TOKENS} tokens, {results['model']}\n\n"
        + table(["round", "create_chat_completion loop, s", "engine, s", "ratio"], rows)
        + f"\nMedian ratio {ratio:.2f}. The judge gives the same verdict on {same_verdicts}/"
        f"{len(texts)} prompts; {identical}/{len(texts)} answers are identical "
        "(batching changes the order of floating-point sums).\n"
    )
    write(Path(__file__).parent, results, text)


if __name__ == "__main__":
    main()
