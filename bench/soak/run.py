"""An hour of chat, evaluation and adapter switching in one process: nothing may grow.

    python bench/soak/run.py [--seconds N]

Each round attaches a gene, chats at several strengths (half of the answers stream, some are left in
the midst), saves a state and goes back to it, evaluates a few prompts, opens an engine and closes
it, and takes the gene off again; a model is opened and closed as well. Memory, file descriptors and
threads are read after each round. The first quarter warms up.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import smollm2, table, write

from safegene_edge import Engine, SafeLlama, SafetyGene, evaluate
from safegene_edge.evals.settings import EvalSettings

HERE, MIB = Path(__file__).parent, 2**20
GROWTH = 0.02  # of the second quarter's memory, that the last may have more
ASKED = ("Name three fruits.", "What is the capital of France?", "Write a line about rain.")


def footprint() -> dict[str, float]:
    """Resident memory (MiB), open file descriptors and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / MIB,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
    }


def round_of(llama: SafeLlama, gene: SafetyGene, number: int) -> None:
    """One of everything."""
    handle = llama.attach(gene)
    for place, scale in enumerate((1.0, 0.0, 0.5)):
        llama.set_scale(handle, scale)
        chat(llama, ASKED[(number + place) % len(ASKED)], stream=place != 1, leave=place == 2)
    llama.set_scale(handle, 1.0)
    state = llama.save_state()
    chat(llama, ASKED[0])
    llama.load_state(state)
    llama.detach(handle)
    settings = EvalSettings(max_tokens=8, limit=4, n_ctx=2048)
    report = evaluate(llama, gene, suites=("harmful", "harmless"), settings=settings)
    assert len(report.suites) == 2 and not llama.adapters
    with Engine(llama, n_parallel=4, n_ctx=1024) as engine:
        engine.generate([llama.render([{"role": "user", "content": ASKED[1]}])], max_tokens=8)


def chat(llama: SafeLlama, text: str, *, stream: bool = False, leave: bool = False) -> None:
    """One answer; `leave` closes the stream after its first pieces."""
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0, "stream": stream}
    answer: Any = llama.create_chat_completion([{"role": "user", "content": text}], **options)
    if not stream:
        assert answer["choices"][0]["message"]["content"]
        return
    for count, _ in enumerate(answer):
        if leave and count > 2:
            answer.close()
            return


def summary(kept: list[dict[str, float]], seconds: float) -> None:
    """results.json and the table, by quarters of the time."""
    parts = [[k for k in kept if int(4 * k["at"] / (seconds * 1.0001)) == q] for q in range(4)]
    names = ("memory", "descriptors", "threads")
    quarters = [{name: [min(k[name] for k in part), max(k[name] for k in part)] for name in names}
                for part in parts if part]  # fmt: skip
    second, last = quarters[1], quarters[-1]
    flat = (
        last["memory"][1] <= (1 + GROWTH) * second["memory"][1]
        and last["descriptors"][1] <= second["descriptors"][1]
        and last["threads"][1] <= second["threads"][1]
    )
    rows = [
        [n, len(part), *("{:.1f} to {:.1f}".format(*quarter[name]) for name in names)]
        for n, (part, quarter) in enumerate(zip([p for p in parts if p], quarters, strict=True), 1)
    ]
    text = (
        f"# {seconds / 60:.0f} minutes of chat, evaluation and adapter switching\n\n"
        + table(["quarter", "rounds", "memory, MiB", "file descriptors", "threads"], rows)
        + "\nA round: a gene attached, three chats at three strengths (one left in the midst), a "
        "state saved and loaded, the gene detached, 16 answers evaluated, an engine opened and "
        "closed; every tenth round a model opened and closed.\nFlat is: the last quarter's most "
        f"is not above the second's, by {GROWTH:.0%} in memory. It {'is' if flat else 'is NOT'}.\n"
    )
    write(HERE, {"seconds": seconds, "rounds": len(kept), "flat": flat, "quarters": quarters}, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    given = parser.parse_args()
    model, gene = smollm2(), SafetyGene.shipped()
    started, kept = time.monotonic(), []
    with SafeLlama(model, n_ctx=512) as llama:
        while (at := time.monotonic() - started) < given.seconds:
            round_of(llama, gene, len(kept))
            if len(kept) % 10 == 0:
                with SafeLlama(model, n_ctx=256) as other:
                    chat(other, ASKED[0])
            gc.collect()
            kept.append({"at": at, **footprint()})
    summary(kept, given.seconds)


if __name__ == "__main__":
    main()
