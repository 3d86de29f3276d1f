"""Every command that writes, with a fault in its midst: killed, a full or broken disk, Ctrl-C.

    python bench/faults/run.py [--seconds N] [--fresh] [--command NAME...] [--kind KIND...]

Tiny random models, one processor a run. After each fault: no file under a final name that is not
whole, one line and the right exit code, no temporary file left after an error or Ctrl-C, and the
same command once more writes the same bytes. Trials that were run are kept and the next call goes
on, so `--seconds` cuts the work in pieces. Where this user may not mount, two kinds are left out.
What a trial is, tests/faults.py says; a sample of them runs among the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
import fault_inputs
import faults
from common import cache_folder, rows_of, table, write

HERE = Path(__file__).parent
HOME = Path(os.environ.get("SAFEGENE_FAULTS", cache_folder() / "bench-faults"))
GOALS = {
    "kill": 100, "kill at a time": 100, "EIO": 60, "ENOSPC": 20, "file limit": 20, "small disk": 20,
    "read-only folder": 2, "vanishing input": 30, "Ctrl-C": 40, "Ctrl-C at a time": 40,
    "two processes": 20,
}  # fmt: skip
WIDE = {"num_hidden_layers": 5, "max_position_embeddings": 2048}


def build() -> None:
    """The inputs, in a process of its own: whoever forks must not have run torch or llama.cpp."""
    import tiny

    from safegene_edge.runtime.requantise import requantise

    made = HOME / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    model = tiny.build("llama", made / "model", **WIDE)
    wide = tiny.build("llama", made / "wide", **tiny.WIDE)
    requantise(wide.gguf_path, made / "wide.gguf", "Q4_K_M")
    peft = tiny.build_adapter(model, made / "peft")
    fault_inputs.build(made / "inputs", model.gguf_path, made / "wide.gguf", peft)
    (made / "inputs").rename(HOME / "inputs")


def work(number: int, of: int, end: float, commands: list[str], kinds: list[str]) -> None:
    """Trials of one processor, written down one by one."""
    faults.load()
    kept, places = HOME / f"trials-{number}.jsonl", sorted(os.sched_getaffinity(0))
    done = {(t["command"], t["kind"], t["index"]) for t in rows_of(HOME / "trials-*.jsonl")}
    mounts = faults.can_mount(HOME / f"mount-{number}")
    plan = [
        (name, kind, index)
        for name in commands
        for kind in kinds
        for index in range(GOALS[kind])
        if mounts or kind not in faults.NEED_MOUNT
    ]
    random.Random(0).shuffle(plan)  # so that a piece of it says something of everything
    ready: dict[str, faults.Trials] = {}
    with open(kept, "a") as journal:
        for name, kind, index in plan[number::of]:
            if (name, kind, index) in done:
                continue
            if time.monotonic() > end:
                break
            folder = HOME / f"work-{number}" / name.replace(" ", "-")
            if name not in ready:
                ready[name] = faults.Trials(name, HOME / "inputs", folder, places[number])
            calls = len(ready[name].reference.calls)
            at = 1 + index * calls // GOALS[kind] if kind in ("kill", "EIO", "Ctrl-C") else None
            found = ready[name].trial(kind, random.Random(f"{name} {kind} {index}"), at)
            facts = {**vars(found), "index": index, "calls": calls,
                     "seconds": round(ready[name].reference.seconds, 3)}  # fmt: skip
            journal.write(json.dumps(facts) + "\n")
            journal.flush()


def summary() -> None:
    """results.json and the table; kinds that were not tried this time keep their figures."""
    found = rows_of(HOME / "trials-*.jsonl")
    new = {(t["command"], t["kind"]) for t in found}
    before = json.loads((HERE / "results.json").read_text())
    commands = {name: dict(facts) for name, facts in before["commands"].items()}
    failed = [t for t in before["failed"] if (t["command"], t["kind"]) not in new]
    failed += [{k: t[k] for k in ("command", "kind", "what", "problems")}
               for t in found if t["problems"]]  # fmt: skip
    for name, kind in new:
        tried = [t for t in found if (t["command"], t["kind"]) == (name, kind)]
        facts = commands.setdefault(name, {"kinds": {}})
        facts |= {what: max(t[what] for t in tried) for what in ("seconds", "calls")}
        facts["kinds"][kind] = {
            "tried": len(tried),
            "changed the end": sum(t["hit"] for t in tried),
            "held": sum(not t["problems"] for t in tried),
        }
    write(HERE, {"commands": commands, "failed": failed}, text_of(commands, len(failed)))


def text_of(commands: dict[str, Any], n_failed: int) -> str:
    """The table."""
    names = [name for name in fault_inputs.COMMANDS if name in commands]
    cells = {name: commands[name]["kinds"] for name in names}
    kinds = [kind for kind in GOALS if any(kind in cells[name] for name in names)]

    def of(kind: str, what: str) -> int:
        return sum(cells[name].get(kind, {}).get(what, 0) for name in names)

    def shown(name: str, kind: str) -> str:
        cell = cells[name].get(kind)
        return f"{cell['held']}/{cell['tried']}" if cell else ""

    rows = [[name, *(shown(name, kind) for kind in kinds)] for name in names]
    rows.append(["all", *(f"{of(kind, 'held')}/{of(kind, 'tried')}" for kind in kinds)])
    tried, hit = (sum(of(kind, what) for kind in kinds) for what in ("tried", "changed the end"))
    return (
        "# Faults in every command that writes\n\n" + table(["held, of", *kinds], rows)
        + "\nA trial holds where no half file lies under a final name, the command says one line "
        "with the right exit code, leaves no temporary file after an error or Ctrl-C, and writes "
        "the same bytes when it is run again.\n\"kill\", \"EIO\" and \"Ctrl-C\" come at a call of "
        "the system on a file of the run, evenly over all its calls; \"at a time\" is a random "
        "moment. \"file limit\" is RLIMIT_FSIZE, \"small disk\" a tmpfs of a random size. `learn` "
        "and `restore` take a random model's words for refusals, and `restore` takes half of the "
        f"gene's strength for the right one.\n\nTrials: {tried}; the fault changed the end of "
        f"{hit}; {n_failed} did not hold.\n"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument(
        "--command", action="append", choices=fault_inputs.COMMANDS, help="default: all"
    )
    parser.add_argument("--kind", action="append", choices=GOALS, help="default: all")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--work", type=int)
    given = parser.parse_args()
    workers = min(2, len(os.sched_getaffinity(0)))
    if given.build:
        return build()
    if given.work is not None:
        end = time.monotonic() + given.seconds
        commands, kinds = given.command or list(fault_inputs.COMMANDS), given.kind or list(GOALS)
        return work(given.work, workers, end, commands, kinds)
    if given.fresh:
        shutil.rmtree(HOME, ignore_errors=True)
    again = [sys.executable, __file__]
    if not (HOME / "inputs").exists():
        subprocess.run([*again, "--build"], check=True, stdout=2)
    again += [word for name in given.command or () for word in ("--command", name)]
    again += [word for kind in given.kind or () for word in ("--kind", kind)]
    running = [
        subprocess.Popen([*again, "--seconds", str(given.seconds), "--work", str(number)],
                         env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        for number in range(workers)
    ]  # fmt: skip
    for one in running:
        one.wait()
    return summary()


if __name__ == "__main__":
    main()
