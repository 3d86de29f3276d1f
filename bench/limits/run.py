"""How near the engine comes to what the machine can do, beside llama.cpp's own `llama-bench`.

    LLAMA_BENCH=.../llama-bench SAFEGENE_QWEN=QWEN.gguf python bench/limits/run.py

The limits are measured, not looked up: bytes a second by a dot product of two threads over arrays
far larger than the caches, operations a second by BLAS's product of float32 matrices. Decoding one
sequence reads every weight once a token; reading a prompt multiplies each with every token. Weights
are multiplied as 8-bit integers, so the second share may pass 100 %. In each round all are run in
turn. A program or model that is not named is left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cache_folder, machine, smollm2, table, write

from safegene_edge import Engine, SafeLlama
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.runtime.requantise import requantise

ROUNDS, PROMPT, ANSWER, MANY = 3, 256, 32, 16
KINDS = ("Q4_K_M", "Q4_0")
GIB = 2**30


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read."""
    part = np.ones((threads, 1 << 26), np.float32)  # 256 MiB a thread

    def read(row: Any) -> float:
        return float(np.dot(row, row))

    with ThreadPoolExecutor(threads) as pool:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(read, part))
            taken.append(time.perf_counter() - start)
    return float(part.nbytes / min(taken))


def operations() -> float:
    """Float32 operations a second, of a product of matrices."""
    size, taken = 2048, []
    a = np.ones((size, size), np.float32)
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        taken.append(time.perf_counter() - start)
    return float(2 * size**3 / min(taken))


def models() -> dict[str, Path]:
    """Each model in each type, by name."""
    found = {}
    sources = {"SmolLM2-135M": smollm2()}
    if path := os.environ.get("SAFEGENE_QWEN"):
        sources["Qwen2.5-Coder-0.5B"] = Path(path)
    for name, source in sources.items():
        for kind in KINDS:
            target = source if kind == "Q4_K_M" else cache_folder() / f"bench-{name}.{kind}.gguf"
            if not target.exists():
                requantise(source, target, kind)
            found[f"{name} {kind}"] = target
    return found


def weights(path: Path) -> tuple[int, int]:
    """Bytes that a decoded token reads, and the numbers that a prompt's token meets.

    The latter are those of the layers: only a prompt's last token meets the output.
    """
    file = GGUFFile(path)
    tied = "output.weight" not in file.tensors
    read = [info.n_bytes for name, info in file.tensors.items()
            if tied or not name.startswith("token_embd")]  # fmt: skip
    met = [info.n_elements for name, info in file.tensors.items() if name.startswith("blk.")]
    return sum(read), sum(met)


def ours(llama: SafeLlama, engine: Engine) -> dict[str, float]:
    """Tokens a second of the engine."""
    prompt = [(7 * n) % 9000 + 100 for n in range(PROMPT)]
    start = time.perf_counter()
    engine.visit_logits([prompt], [[PROMPT - 1]], lambda *_: None)
    found = {"prefill": PROMPT / (time.perf_counter() - start)}
    for name, count in (("decode", 1), (f"decode, {MANY} at once", MANY)):
        start = time.perf_counter()
        begun = [[100 + n, 200, 300] for n in range(count)]
        engine.generate(begun, max_tokens=ANSWER, stop_at_end=False)
        found[name] = count * ANSWER / (time.perf_counter() - start)
    return found


def theirs(path: Path) -> dict[str, float]:
    """Tokens a second of llama-bench."""
    program = os.environ.get("LLAMA_BENCH")
    if not program:
        return {}
    command = [program, "-m", str(path), "-p", str(PROMPT), "-n", str(ANSWER), "-r", "1",
               "-t", str(machine()["physical_cores"]), "-fa", "1", "-o", "json"]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in json.loads(said)}


def measured(path: Path) -> dict[str, dict[str, float]]:
    """Medians of the rounds, ours and llama-bench's."""
    rounds: dict[str, list[dict[str, float]]] = {"engine": [], "llama-bench": []}
    with SafeLlama(path, n_ctx=512) as llama, Engine(llama, n_ctx=4096, flash_attn=True) as engine:
        for number in range(ROUNDS + 1):
            found = {"engine": ours(llama, engine), "llama-bench": theirs(path)}
            if number:  # the first round warms up
                for name, speeds in found.items():
                    rounds[name].append(speeds)
    return {
        name: {key: statistics.median(one[key] for one in every) for key in every[0]}
        for name, every in rounds.items()
    }


def main() -> None:
    read, done = bandwidth(machine()["physical_cores"]), operations()
    found = {}
    for name, path in models().items():
        n_bytes, numbers = weights(path)
        found[name] = {"bytes": n_bytes, "weights": numbers, "speeds": measured(path)}
    summary(read, done, found)


def summary(read: float, done: float, found: dict[str, Any]) -> None:
    """results.json and the table."""
    rows = []
    for name, facts in found.items():
        n_bytes, numbers = facts["bytes"], facts["weights"]
        for who, each in facts["speeds"].items():
            if not each:
                continue
            many = each.get(f"decode, {MANY} at once")
            rows.append([
                name, who, f"{each['prefill']:.0f}", f"{each['decode']:.1f}",
                f"{many:.0f}" if many else "",
                f"{200 * numbers * each['prefill'] / done:.0f} %",
                f"{100 * n_bytes * each['decode'] / read:.0f} %",
            ])  # fmt: skip
    head = ["model", "by", "prefill, tokens/s", "decode", f"decode, {MANY} at once",
            "prefill: of the operations", "decode: of the bytes"]  # fmt: skip
    text = (
        "# How near the machine's limits\n\n" + table(head, rows)
        + f"\nThe machine reads {read / GIB:.1f} GiB a second and makes {done / 1e9:.0f} "
        f"GFLOP of float32. A prompt of {PROMPT} tokens, answers of {ANSWER}; medians of "
        f"{ROUNDS} rounds in turn.\n"
    )  # fmt: skip
    write(
        Path(__file__).parent,
        {"bytes_per_second": read, "operations_per_second": done, "models": found}, text,
    )  # fmt: skip


if __name__ == "__main__":
    main()
