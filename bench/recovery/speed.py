"""What recalibration costs and finds, beside another commit's, in alternation.

    git worktree add --detach OLD 469e741
    python bench/recovery/speed.py OLD [smollm2/agnews ...]
    python bench/recovery/speed.py now [smollm2/agnews ...]
    python bench/recovery/speed.py tables

A pair is a fine-tune and the gene that was learnt from it (`forms.py --learn`). Each is
recalibrated by both commits, one after the other, in a process of its own. What is in speed.json
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
PAIRS = (
    "smollm2/agnews", "smollm2/dolly", "smollm2/gsm8k", "smollm2/sst2", "smollm2/identity",
    "qwen/agnews", "qwen/gsm8k",
)  # fmt: skip


def files(pair: str) -> tuple[Path, Path]:
    """A pair's fine-tune and gene."""
    family, task = pair.split("/")
    folder = cache_folder() / "recovery" / family
    (gene,) = (folder / "learnt").glob(f"{task}-learnt-*.gguf")
    return folder / "targets" / f"{task}.Q4_K_M.gguf", gene


def once(pair: str) -> dict[str, Any]:
    """One recalibration by the package that PYTHONPATH names."""
    from dataclasses import asdict

    from forms import _with_task

    from safegene_edge import SafetyGene, recalibrate
    from safegene_edge.runtime.schedule import Scheduler

    target, path = files(pair)
    examples = _with_task(pair.split("/")[1], "")
    gene, read, decode = SafetyGene.load(path), [0, 0], Scheduler._decode

    def counted(self: Scheduler, stands_for: int = 1) -> None:
        read[0], read[1] = read[0] + self._batch.size, read[1] + 1
        decode(self, stands_for)

    Scheduler._decode = counted  # type: ignore[method-assign]
    started, cpu = time.perf_counter(), time.process_time()
    found = recalibrate(target, gene, examples)
    assert found.validation is not None and found.bounds is not None
    counts = found.validation.refused, found.validation.over_refused
    return {
        "strength": max(found.expression.coefficients.values()),
        "bounds": asdict(found.bounds),
        "refused": vars(counts[0]), "over_refused": vars(counts[1]),
        "kl": found.point.kl, "task_kl": found.point.task_kl,
        "curve": [max(point.coefficients) for point in found.curve],
        "tokens": read[0], "decodes": read[1],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def measured(tree: Path, pair: str) -> dict[str, Any]:
    """`once` in a process of its own, with another checkout's package."""
    command = [sys.executable, str(HERE / "speed.py"), "once", pair]
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

        def counts(name: str, old: Any = old, new: Any = new) -> str:
            aligned = old[name]["aligned"]
            known = "" if aligned is None else f" ({aligned})"
            return f"{old[name]['before']}; {old[name]['after']} → {new[name]['after']}{known}"

        rows.append([
            pair, both("strength", ".2f"), counts("refused"), counts("over_refused"),
            both("kl", ".3f"), both("tokens", ","), f"{old['tokens'] / new['tokens']:.1f}",
            both("cpu_seconds", ".0f"), f"{old['cpu_seconds'] / new['cpu_seconds']:.1f}",
            both("seconds", ".0f"),
        ])  # fmt: skip
    head = ["", "strength", "validation: refused without; with the gene (aligned) of 48",
            "over-refused, the same", "KL", "tokens read", "times fewer", "CPU s", "times less",
            "s"]  # fmt: skip
    said = ", ".join(f"{key}: {value}" for key, value in found["machine"].items())
    text = (
        "<!-- written by speed.py -->\n\n# What recalibration costs\n\n"
        "Before (commit 469e741) → now; each fine-tune (Q4_K_M) with the gene that was learnt from "
        "it. Other work ran beside both: seconds are upper bounds, tokens are exact.\n\n"
        f"{table(head, rows)}\nMachine: {said}.\n"
    )
    (HERE / "speed.md").write_text(text, encoding="utf-8")


def main() -> None:
    what, *pairs = sys.argv[1:] or ["tables"]
    if what == "once":
        print(json.dumps(once(pairs[0])))
        return
    found: dict[str, Any] = {"pairs": {}}
    if FILE.exists():
        found = json.loads(FILE.read_text(encoding="utf-8"))
    if what != "tables":
        trees = {"before": Path(what), "now": ROOT} if what != "now" else {"now": ROOT}
        for pair in pairs or PAIRS:
            sides = found["pairs"].setdefault(pair, {})
            for side, tree in trees.items():
                if side not in sides:
                    sides[side] = measured(tree, pair)
                    found["machine"] = machine()
                    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    print(pair, side, sides[side]["seconds"], file=sys.stderr, flush=True)
    write_table(found)


if __name__ == "__main__":
    main()
