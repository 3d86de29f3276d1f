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
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
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
    faults.build(made / "inputs", model.gguf_path, made / "wide.gguf", peft)
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
    """results.json and the table."""
    found = rows_of(HOME / "trials-*.jsonl")
    tried, held, hit = (
        Counter((t["command"], t["kind"]) for t in found if of(t))
        for of in (lambda _: True, lambda t: not t["problems"], lambda t: t["hit"])
    )
    names = [name for name in faults.COMMANDS if any(t["command"] == name for t in found)]
    kinds = [kind for kind in GOALS if any(t["kind"] == kind for t in found)]
    rows = [[name, *(f"{held[name, k]}/{tried[name, k]}" for k in kinds)] for name in names]
    rows.append(["all", *(f"{sum(held[n, k] for n in names)}/{sum(tried[n, k] for n in names)}"
                          for k in kinds)])  # fmt: skip
    failed = [t for t in found if t["problems"]]
    text = (
        "# Faults in every command that writes\n\n" + table(["held, of", *kinds], rows)
        + "\nA trial holds where no half file lies under a final name, the command says one line "
        "with the right exit code, leaves no temporary file after an error or Ctrl-C, and writes "
        "the same bytes when it is run again.\n\"kill\", \"EIO\" and \"Ctrl-C\" come at a call of "
        "the system on a file of the run, evenly over all its calls; \"at a time\" is a random "
        "moment. \"file limit\" is RLIMIT_FSIZE, \"small disk\" a tmpfs of a random size. `learn` "
        "and `restore` take a random model's words for refusals, and `restore` takes half of the "
        f"gene's strength for the right one.\n\nTrials: {len(found)}; the fault changed the end of "
        f"{sum(hit.values())}; {len(failed)} did not hold.\n"
    )  # fmt: skip
    write(
        HERE,
        {
            "commands": {
                n: {
                    "seconds": max(t["seconds"] for t in found if t["command"] == n),
                    "calls": max(t["calls"] for t in found if t["command"] == n),
                    "kinds": {k: {"tried": tried[n, k], "changed the end": hit[n, k],
                                  "held": held[n, k]} for k in kinds},
                }
                for n in names
            },
            "failed": [{k: t[k] for k in ("command", "kind", "what", "problems")} for t in failed],
        },
        text,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--command", action="append", choices=faults.COMMANDS, help="default: all")
    parser.add_argument("--kind", action="append", choices=GOALS, help="default: all")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--work", type=int)
    given = parser.parse_args()
    workers = min(2, len(os.sched_getaffinity(0)))
    if given.build:
        return build()
    if given.work is not None:
        end = time.monotonic() + given.seconds
        commands, kinds = given.command or list(faults.COMMANDS), given.kind or list(GOALS)
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
