"""What recalibration costs and finds, beside another commit's, in alternation.

    git worktree add --detach OLD 4ad6d2d
    python bench/recovery/speed.py OLD [smollm2/agnews ...]
    python bench/recovery/speed.py tables

A pair is a family and a fine-tune. Each is recalibrated by both commits, each with its own gene of
the family and its own examples, one after the other, in a process of its own. What is in speed.json
is not measured again. No completion is made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import ROOT, cache_folder, machine, table

HERE = Path(__file__).parent
FILE = HERE / "speed.json"
PAIRS = ("smollm2/agnews", "smollm2/dolly", "smollm2/gsm8k", "smollm2/sst2", "qwen/agnews")
GENES = {"qwen": "bench/recovery/qwen2.5-coder-0.5b.gene.gguf"}  # the package's, but for these


def once(pair: str, tree: Path) -> dict[str, Any]:
    """One recalibration by the package that PYTHONPATH names."""
    import llama_cpp

    from safegene_edge import SafetyGene, recalibrate

    family, task = pair.split("/")
    target = cache_folder() / "recovery" / family / "targets" / f"{task}.Q4_K_M.gguf"
    gene = SafetyGene.load(tree / GENES[family]) if family in GENES else SafetyGene.shipped()
    read, decode = [0, 0], llama_cpp.llama_decode

    def counted(context: Any, batch: Any) -> int:
        read[0], read[1] = read[0] + batch.n_tokens, read[1] + 1
        return int(decode(context, batch))

    llama_cpp.llama_decode = counted
    started, cpu = time.perf_counter(), time.process_time()
    found = recalibrate(target, gene)
    seconds, spent = time.perf_counter() - started, time.process_time() - cpu
    return {
        "strengths": list(found.expression.coefficients.values()),
        "readings": len(found.curve), "tokens": read[0], "decodes": read[1],
        "cpu_seconds": round(spent, 1), "seconds": round(seconds, 1),
    }  # fmt: skip


def measured(tree: Path, pair: str) -> dict[str, Any]:
    """`once` in a process of its own, with another checkout's package."""
    command = [sys.executable, str(HERE / "speed.py"), "once", pair, str(tree)]
    # Threads that wait for each other sleep, so that CPU seconds count work.
    whole = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    said = subprocess.run(command, env=whole, stdout=subprocess.PIPE, check=True).stdout
    return dict(json.loads(said.splitlines()[-1]))


def write_table(found: dict[str, Any]) -> None:
    """speed.md; each cell is before → now."""
    rows = []
    for pair, sides in found["pairs"].items():
        if len(sides) < 2:
            continue
        old, new = sides["before"], sides["now"]

        def both(name: str, form: str, old: Any = old, new: Any = new) -> str:
            return f"{old[name]:{form}} → {new[name]:{form}}"

        rows.append([pair, *(both(name, form) for name, form in (
            ("readings", "d"), ("tokens", ","), ("decodes", ","), ("seconds", ".0f"),
            ("cpu_seconds", ".0f"),
        )), f"{new['seconds'] / old['seconds']:.2f}"])  # fmt: skip
    head = ["", "readings", "tokens read", "decodes", "s", "CPU s", "s, now / before"]
    said = ", ".join(f"{key}: {value}" for key, value in found["machine"].items())
    text = (
        "<!-- written by speed.py -->\n\n# What recalibration costs\n\n"
        "Commit 4ad6d2d (16 and 16 examples, 16 and 16 to validate) → now (48 and 48, 48 and 48, "
        "and the guard's threshold), each with the family's gene of its time, one after the "
        "other.\n\n"
        f"{table(head, rows)}\nMachine: {said}.\n"
    )
    (HERE / "speed.md").write_text(text, encoding="utf-8")


def main() -> None:
    what, *pairs = sys.argv[1:] or ["tables"]
    if what == "once":
        print(json.dumps(once(pairs[0], Path(pairs[1]))))
        return
    found: dict[str, Any] = {"pairs": {}}
    if FILE.exists():
        found = json.loads(FILE.read_text(encoding="utf-8"))
    if what != "tables":
        for pair in pairs or PAIRS:
            sides = found["pairs"].setdefault(pair, {})
            for side, tree in (("before", Path(what)), ("now", ROOT)):
                if side not in sides:
                    sides[side] = measured(tree, pair)
                    found["machine"] = machine()
                    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    print(pair, side, sides[side]["seconds"], file=sys.stderr, flush=True)
    write_table(found)


if __name__ == "__main__":
    main()
