"""Merging beside the two-step way: llama.cpp's llama-export-lora, then llama-quantize.

    LLAMA_BIN=path/to/build/bin python bench/merge/run.py [PART...]

LLAMA_BIN holds both programs, built from the sources that llama-cpp-python ships:

    cmake -B build -DGGML_NATIVE=ON && cmake --build build --target llama-export-lora llama-quantize

Parts: smollm2, qwen (its GGUF's path in SAFEGENE_QWEN), large (a synthetic model of 4 GB), kill.
Every part's results are kept; without a name all parts that can run are run.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import SHARED, cache_folder, machine, smollm2, table

from safegene_edge import Engine, SafeLlama, convert
from safegene_edge.compat import open_model
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.judge import judge
from safegene_edge.evals.statistics import Count
from safegene_edge.files import sha256, write_text
from safegene_edge.merge import Plan
from safegene_edge.merge.settings import RUN_UP_TO
from safegene_edge.runtime.logits import kl_from_logits, log_softmax
from safegene_edge.runtime.requantise import requantise

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
KINDS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
JUDGED = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
GENE = HERE.parent.parent / "safegene_edge" / "data" / "smollm2-135m.gene.gguf"
PROMPTS, ASKED, ANSWER, KILLS = 200, 200, 8, 50
REPEATED = "side-loaded again"  # one sequence at a time
WAYS = ("run", "plain", "two-step")
Rows = dict[tuple[int, int], np.ndarray]


# -- the two ways ---------------------------------------------------------


def timed(*commands: Sequence[str | Path]) -> dict[str, float]:
    """Wall seconds of commands one after the other, and the peak RSS (MiB) with all children."""
    started, peak = time.perf_counter(), 0.0
    for command in commands:
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=said
            ) as process,
        ):
            while process.poll() is None:
                peak = max(peak, _tree_mib(process.pid))
                time.sleep(0.02)
            said.seek(0)
            if process.returncode:
                sys.exit(f"{command[0]} failed: {said.read().decode()[-2000:]}")
    return {"seconds": time.perf_counter() - started, "mib": peak}


def _tree_mib(pid: int) -> float:
    """Resident MiB of a process and its children, now; pages they share count for each."""
    total = 0.0
    for number in [pid, *_children(pid)]:
        try:
            pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it has just ended
        total += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return total


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in task.read_text().split()]
    return found


def one_step(model: Path, adapter: Path, output: Path, *more: str) -> dict[str, float]:
    return timed(
        [sys.executable, "-m", "safegene_edge", "merge", model, adapter, "-o", output, *more]
    )


def two_steps(model: Path, adapter: Path, output: Path, kind: str) -> dict[str, float]:
    programs, draft = Path(os.environ["LLAMA_BIN"]), output.with_suffix(".f16")
    threads = str(len(os.sched_getaffinity(0)))
    found = timed(
        [
            programs / "llama-export-lora",
            "-m",
            model,
            "--lora",
            adapter,
            "-o",
            draft,
            "-t",
            threads,
        ],
        [programs / "llama-quantize", "--allow-requantize", draft, output, kind, threads],
    )
    draft.unlink()
    return found


# -- truth ----------------------------------------------------------------


def compared(source: Path, output: Path, adapter: Path) -> dict[str, Any]:
    """Types, sizes and untouched bytes of a merged file against its source."""
    before, after = open_model(source), open_model(output)
    touched = {name.removesuffix(".lora_a") for name in open_adapter(adapter)}
    same = [
        before.raw(name).tobytes() == after.raw(name).tobytes()
        for name in before.tensors
        if name not in touched
    ]
    return {
        "types": all(after.tensors[n].ggml_type == i.ggml_type for n, i in before.tensors.items()),
        "header_bytes": after.n_bytes - before.n_bytes,
        "data_bytes": sum(i.n_bytes for i in after.tensors.values())
        - sum(i.n_bytes for i in before.tensors.values()),
        "untouched": len(same),
        "identical": sum(same),
    }


def open_adapter(path: Path) -> list[str]:
    from safegene_edge.gguf_file import GGUFFile

    return list(GGUFFile(path).tensors)


class Sequences:
    """Harmless prompts with the side-loaded model's own first tokens, and its distributions."""

    def __init__(self, model: Path, adapter: Path) -> None:
        half = PROMPTS // 2
        texts = [
            p.text
            for name in ("harmless", "borderline")
            for p in load_suite(name)[0].sample(half).prompts
        ]
        with (
            SafeLlama(str(model), [str(adapter)], n_ctx=512) as llama,
            Engine(llama, flash_attn=True) as engine,
        ):
            asked = [llama.render([{"role": "user", "content": text}]) for text in texts]
            said = engine.generate(asked, max_tokens=ANSWER)
            self.tokens = [[*p, *a.tokens] for p, a in zip(asked, said, strict=True)]
            self.places = [
                range(len(p) - 1, len(p) + len(a.tokens)) for p, a in zip(asked, said, strict=True)
            ]
            self.side = self._rows(engine)

    def _rows(self, engine: Engine) -> Rows:
        rows: Rows = {}

        def keep(index: int, position: int, row: np.ndarray) -> None:
            rows[index, position] = log_softmax(row)

        engine.visit_logits(self.tokens, self.places, keep)
        return rows

    def against(
        self, model: Path, adapters: Sequence[Path] = (), n_parallel: int = 16
    ) -> dict[str, float]:
        """Mean KL(side-loaded || model) in nats a token, and the largest difference of a logit."""
        with (
            SafeLlama(str(model), [str(a) for a in adapters], n_ctx=512) as llama,
            Engine(llama, n_parallel=n_parallel, flash_attn=True) as engine,
        ):
            rows = self._rows(engine)
        values = [kl_from_logits(self.side[key], rows[key]) for key in rows]
        apart = max(float(np.abs(self.side[key] - rows[key]).max()) for key in rows)
        return {"kl": float(np.mean(values)), "tokens": len(values), "largest": apart}


def refusals(model: Path, adapters: Sequence[Path]) -> dict[str, str]:
    """Refused or not ("1" or "0" a prompt), greedy, 32 tokens."""
    found = {}
    with (
        SafeLlama(str(model), [str(a) for a in adapters], n_ctx=512) as llama,
        Engine(llama, flash_attn=True) as engine,
    ):
        for name, file in (("advbench", "advbench.csv"), ("harmbench", "harmbench_text.csv")):
            texts = [p.text for p in load_suite(SHARED / file)[0].sample(ASKED).prompts]
            asked = [llama.render([{"role": "user", "content": text}]) for text in texts]
            said = engine.generate(asked, max_tokens=32)
            found[name] = "".join(
                str(int(judge(text, llama.text(answer.tokens)).label == "refused"))
                for text, answer in zip(texts, said, strict=True)
            )
    return found


# -- parts ----------------------------------------------------------------


def family(name: str, results: dict[str, Any]) -> None:
    """Every type of a real model: size, types, truth, speed, memory."""
    work = cache_folder() / "merge"
    work.mkdir(exist_ok=True)
    for kind in KINDS:
        model, adapter = real_model(name, kind, work)
        inputs = f"{sha256(model)}{sha256(adapter)}{llama_cpp.__version__}"
        before = results.setdefault(name, {}).get(kind, {})
        if before.get("key") == inputs + code():
            continue
        print(f"{name} {kind}", file=sys.stderr, flush=True)
        files = {way: work / f"{way}.gguf" for way in WAYS}
        runs = []
        for _ in range(3 if name == "smollm2" else 1):
            runs.append({
                "run": one_step(model, adapter, files["run"], "--run"),
                "plain": one_step(model, adapter, files["plain"], "--plain"),
                "two-step": two_steps(model, adapter, files["two-step"], kind),
            })  # fmt: skip
        known = before.get("measured", {}) if before.get("inputs") == inputs else {}
        made = {way: sha256(path) for way, path in files.items()}
        judged = name == "smollm2" and kind in JUDGED
        results[name][kind] = {
            "key": inputs + code(), "inputs": inputs, "runs": runs, "made": made,
            "default": "run" if Plan.of(model, [adapter]).runs_model else "plain",
            "compared": {way: compared(model, files[way], adapter) for way in ("run", "plain")},
            "measured": measured(model, adapter, {made[way]: files[way] for way in WAYS}, known,
                                 judged),
        }  # fmt: skip
        save(results)
        for path in files.values():
            path.unlink()


def measured(
    model: Path, adapter: Path, files: dict[str, Path], known: dict[str, Any], judged: bool
) -> dict[str, Any]:
    """Divergence and refusals by a file's hash; `known` ones are not measured again."""
    found = {digest: known[digest] for digest in ("side-loaded", "without", REPEATED, *files)
             if digest in known}  # fmt: skip
    missing = {digest: path for digest, path in files.items() if digest not in found}
    repeat = model.name.endswith("F16.gguf") and REPEATED not in found
    if missing or repeat:
        truth = Sequences(model, adapter)
        if repeat:  # no merged file can be nearer than the side-loaded model is to itself
            found[REPEATED] = truth.against(model, [adapter], n_parallel=1)
        for digest, path in missing.items():
            found[digest] = truth.against(path)
        if "without" not in found:
            found["without"] = truth.against(model)
    if judged:
        for digest, path in files.items():
            if "refused" not in found[digest]:
                found[digest]["refused"] = refusals(path, [])
        if "side-loaded" not in found:
            found["side-loaded"] = {"refused": refusals(model, [adapter])}
    return found


def real_model(name: str, kind: str, work: Path) -> tuple[Path, Path]:
    if name == "smollm2":
        return smollm2(kind), GENE
    from safegene_edge.training.degrade import degrade

    source = Path(os.environ["SAFEGENE_QWEN"])
    model = source if kind == "Q4_K_M" else work / f"qwen.{kind}.gguf"
    if not model.exists():
        requantise(source, model, kind)
    # A task's fine-tune on the project's own rows: trained once, some minutes.
    folder = cache_folder() / "recovery" / "qwen" / "degraded"
    (tuned,) = degrade(source, folder, kinds=("task",))
    adapter = work / "qwen-task.gguf"
    convert(tuned.adapters[-1], base=source, output=adapter)
    return model, adapter


def code() -> str:
    """A hash of what decides a merged file's bytes; comments do not."""
    root = HERE.parent.parent
    package = root / "safegene_edge"
    files = sorted(path for path in (package / "merge").glob("*.py"))
    files += [package / name for name in ("gguf_file/kernels.py", "gguf_file/rewrite.py",
                                          "runtime/activations.py")]  # fmt: skip
    parts = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    parts.append(sha256(root / "safegene_edge" / "data" / "calibration.jsonl"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def large(results: dict[str, Any]) -> None:
    """A model of Llama 7B's shapes in Q4_K_M's types, 4 GB, made and deleted here."""
    from synthetic import adapter_of, model_of

    work = cache_folder() / "merge"
    work.mkdir(exist_ok=True)
    model, adapter = work / "large.gguf", work / "large-gene.gguf"
    mine, theirs = work / "large-one-step.gguf", work / "large-two-step.gguf"
    try:
        model_of(model, smollm2())
        adapter_of(adapter, model)
        runs = []
        for _ in range(3):
            # The default runs no model of this size.
            runs.append({"plain": one_step(model, adapter, mine),
                         "two-step": two_steps(model, adapter, theirs, "Q4_K_M")})  # fmt: skip
            print(runs[-1], file=sys.stderr, flush=True)
        results["large"] = {
            "bytes": model.stat().st_size,
            "touched": len(open_adapter(adapter)) // 2,
            "default": "run" if Plan.of(model, [adapter]).runs_model else "plain",
            "runs": runs,
            "compared": {"plain": compared(model, mine, adapter)},
        }
        save(results)
    finally:
        for path in (model, adapter, mine, theirs, theirs.with_suffix(".f16")):
            path.unlink(missing_ok=True)


def kill(results: dict[str, Any]) -> None:
    """SIGKILL at random moments: an output that is not whole, or a changed input, is counted."""
    work = cache_folder() / "merge" / "kill"
    work.mkdir(parents=True, exist_ok=True)
    model = smollm2()
    before = sha256(model)
    whole = work / "whole.gguf"
    needed = one_step(model, GENE, whole)["seconds"]
    expected, choice = sha256(whole), random.Random(5)
    kills = broken = finished = 0
    while kills < KILLS:
        output = work / "out.gguf"
        command = [sys.executable, "-m", "safegene_edge", "merge", model, GENE, "-o", output]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(choice.uniform(0, 1.05 * needed))
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
        kills, finished = kills + (not ended), finished + ended
        broken += output.exists() and sha256(output) != expected
        for path in work.glob("*out.gguf*"):
            path.unlink()
    results["kill"] = {
        "killed at work": kills, "finished before": finished, "broken": broken,
        "input changed": sha256(model) != before,
    }  # fmt: skip
    whole.unlink()
    save(results)


# -- results --------------------------------------------------------------


def save(results: dict[str, Any]) -> None:
    results["machine"] = machine()
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(HERE / "results.md", text(results))


def median(runs: list[dict[str, Any]], way: str, what: str) -> float:
    return float(np.median([run[way][what] for run in runs]))


def text(results: dict[str, Any]) -> str:
    parts = [
        "<!-- written by run.py from results.json -->\n\n# Merging into quantised files\n",
        "Two-step: llama-export-lora, then llama-quantize, of the llama.cpp that "
        "llama-cpp-python ships. KL: mean KL(side-loaded ‖ merged) in nats a token, over "
        f"{PROMPTS} harmless prompts (half of them borderline) and the first {ANSWER} tokens of "
        "the side-loaded model's answers; without: the model with no adapter at all. Seconds and "
        "peak RSS are of whole commands, medians of runs that took turns. Bold: the default, which "
        f"is --run for models up to {RUN_UP_TO / 1e6:.0f} MB; ratios are of the two-step way to "
        "it.\n",
    ]
    for name in ("smollm2", "qwen"):
        cells = {k: cell for k, cell in results.get(name, {}).items() if "default" in cell}
        if cells:
            parts.append(f"## {name}\n\n{_truth(cells)}\n{_speed(cells)}")
            judged = {k: c for k, c in cells.items() if "side-loaded" in c["measured"]}
            if judged:
                parts.append(_refused(judged))
    if "default" in results.get("large", {}):
        cell = results["large"]
        size = f"{cell['bytes'] / 1e9:.1f} GB, {cell['touched']} tensors touched"
        parts.append(f"## A synthetic 7B, {size}\n\n{_speed({'Q4_K_M': cell})}")
    if "kill" in results:
        facts = ", ".join(f"{key}: {value}" for key, value in results["kill"].items())
        parts.append(f"## SIGKILL at random moments\n\n{facts}\n")
    lines = ", ".join(f"{key}: {value}" for key, value in results["machine"].items())
    return "\n".join(parts) + f"\nMachine: {lines}.\n"


def _bold(figure: str, way: str, cell: dict[str, Any]) -> str:
    return f"**{figure}**" if way == cell["default"] else figure


def _truth(cells: dict[str, Any]) -> str:
    rows = []
    for kind, cell in cells.items():
        kept = cell["compared"].values()
        found = [cell["measured"][cell["made"][way]] for way in WAYS]
        rows.append([
            kind, "yes" if all(c["types"] and not c["data_bytes"] for c in kept) else "NO",
            ", ".join(f"{c['identical']}/{c['untouched']}" for c in kept),
            ", ".join(f"{c['header_bytes']:+}" for c in kept),
            *(_bold(f"{x['kl']:.5f}", way, cell) for x, way in zip(found, WAYS, strict=True)),
            f"{cell['measured']['without']['kl']:.4f}" if "without" in cell["measured"] else "",
            *(f"{way['largest']:.4f}" for way in found),
            f"{cell['measured'][REPEATED]['largest']:.4f}" if REPEATED in cell["measured"] else "",
        ])  # fmt: skip
    ways = [{k: c["made"][way] for k, c in cells.items()} for way in WAYS]
    default = {kind: cell["made"][cell["default"]] for kind, cell in cells.items()}
    means = [
        f"{np.mean([cells[k]['measured'][d]['kl'] for k, d in made.items()]):.5f}"
        for made in (*ways, default)
    ]
    rows.append(["mean", "", "", "", *means[:3], *[""] * 5])
    rows.append(["mean of the default", "", "", "", f"**{means[3]}**", *[""] * 7])
    header = [
        "type", "types and size kept", "untouched identical (--run, --plain)", "header, bytes",
        "KL, --run", "KL, --plain", "KL, two-step", "KL, without",
        "largest difference of a log-probability, --run", "--plain", "two-step",
        "the side-loaded model, one prompt at a time",
    ]  # fmt: skip
    return table(header, rows)


def _speed(cells: dict[str, Any]) -> str:
    rows = []
    for kind, cell in cells.items():
        runs = cell["runs"]
        ways = [way for way in WAYS if way in runs[0]]
        medians = {what: {w: median(runs, w, what) for w in ways} for what in ("seconds", "mib")}
        faster = np.median([r["two-step"]["seconds"] / r[cell["default"]]["seconds"] for r in runs])
        smaller = medians["mib"]["two-step"] / medians["mib"][cell["default"]]
        row = [kind]
        for what, form, ratio in (("seconds", ".1f", faster), ("mib", ".0f", smaller)):
            row += [
                _bold(format(medians[what][w], form), w, cell) if w in ways else "" for w in WAYS
            ]
            row.append(f"{ratio:.2f}")
        rows.append(row)
    header = ["type", "s, --run", "s, --plain", "s, two-step", "ratio", "MiB, --run",
              "MiB, --plain", "MiB, two-step", "ratio"]  # fmt: skip
    return table(header, rows)


def _refused(cells: dict[str, Any]) -> str:
    rows = []
    for kind, cell in cells.items():
        row = [kind]
        for suite in ("advbench", "harmbench"):
            side = cell["measured"]["side-loaded"]["refused"][suite]
            row.append(str(Count(side.count("1"), len(side))))
            for way in WAYS:
                hits = cell["measured"][cell["made"][way]]["refused"][suite]
                points = 100 * (hits.count("1") - side.count("1")) / len(side)
                row.append(_bold(f"{hits.count('1')} ({points:+.1f})", way, cell))
        rows.append(row)
    ways = ["--run (points)", "--plain (points)", "two-step (points)"]
    header = ["refused", "AdvBench, side-loaded", *ways, "HarmBench, side-loaded", *ways]
    return table(header, rows)


def main() -> None:
    if "LLAMA_BIN" not in os.environ:
        sys.exit("skipped: LLAMA_BIN names no folder with llama-export-lora and llama-quantize")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    every = ["smollm2", "large", "kill"] + ["qwen"] * ("SAFEGENE_QWEN" in os.environ)
    for part in sys.argv[1:] or every:
        if part in ("smollm2", "qwen"):
            family(part, results)
        else:
            {"large": large, "kill": kill}[part](results)


if __name__ == "__main__":
    main()
