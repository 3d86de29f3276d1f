"""Peak memory with an adapter: `SafeLlama` beside `llama_cpp.Llama(lora_path=...)`.

Every figure is the peak resident set of a fresh process that loads the model, attaches the
adapter and answers one prompt with 16 tokens; the medians of five such processes, in turn.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import safety_adapter, smollm2, table, write

ROUNDS = 5
MIB = 2**20


def peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def child(kind: str, model: str, adapter: str) -> None:
    import llama_cpp

    from safegene_edge import SafeLlama

    if kind == "peer":
        llama = llama_cpp.Llama(model, n_ctx=2048, lora_path=adapter, verbose=False)
    elif kind == "peer, no adapter":
        llama = llama_cpp.Llama(model, n_ctx=2048, verbose=False)
    else:
        llama = SafeLlama(model, [adapter] if kind == "SafeLlama" else [])
    llama.create_chat_completion(
        [{"role": "user", "content": "How do I boil an egg?"}], max_tokens=16, temperature=0.0
    )
    print(peak_mib())


def measure(kind: str, model: Path, adapter: Path) -> float:
    command = [sys.executable, __file__, kind, str(model), str(adapter)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main() -> None:
    model = smollm2()
    adapter = safety_adapter(model)
    kinds = ("SafeLlama, no adapter", "SafeLlama", "peer, no adapter", "peer")
    peaks: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            peaks[kind].append(round(measure(kind, model, adapter), 1))
    medians = {kind: statistics.median(values) for kind, values in peaks.items()}
    size = adapter.stat().st_size / MIB
    allowed = medians["SafeLlama, no adapter"] + 5 * size + 20
    results = {
        "model": model.name,
        "model_mib": round(model.stat().st_size / MIB, 1),
        "adapter_mib": round(size, 2),
        "peak_mib": peaks,
        "median_mib": medians,
        "allowed_mib": round(allowed, 1),
        "holds": medians["SafeLlama"] <= allowed,
    }
    rows = [[kind, medians[kind], min(peaks[kind]), max(peaks[kind])] for kind in kinds]
    text = (
        f"# Peak memory: {model.name} ({results['model_mib']} MiB), "
        f"adapter of {size:.2f} MiB\n\n"
        + table(["process", "median MiB", "min", "max"], rows)
        + f"\nBound for SafeLlama with the adapter: base + 5 × adapter + 20 MiB = {allowed:.1f} "
        + "MiB: "
        + ("holds.\n" if results["holds"] else "does NOT hold.\n")
        + '\n"peer" is `llama_cpp.Llama(lora_path=...)`, which switches mmap off.\n'
    )
    write(Path(__file__).parent, results, text)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        child(*sys.argv[1:])
    else:
        main()
