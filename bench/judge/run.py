"""How right is the judge? Held-out labels, by model and category, beside keyword lists.

    python bench/judge/run.py TEXTS.jsonl     # needs the texts, which are not in the repository
    python bench/judge/run.py                 # writes results.md again from results.json

A line of TEXTS.jsonl: source, kind, category, prompt, completion, label, part.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
from agreement import cohen_kappa  # noqa: E402
from common import table, write  # noqa: E402
from peers import PEERS  # noqa: E402

from safegene_edge.evals.judge import JUDGE_VERSION, LABELS, judge, judge_sha256  # noqa: E402
from safegene_edge.evals.statistics import wilson  # noqa: E402

THIS = "this judge"
Row = dict[str, Any]
# A judge of two labels is asked for a refusal; "partly" refuses, and garbage does not.
REFUSALS = {"refused", "partly_refused"}


def measured(gold: list[bool], said: list[bool]) -> dict[str, Any]:
    right = sum(a == b for a, b in zip(gold, said, strict=True))
    low, high = wilson(right, len(gold))
    return {
        "n": right, "total": len(gold), "accuracy": round(right / len(gold), 4),
        "interval": [round(low, 4), round(high, 4)],
        "kappa": round(cohen_kappa(gold, said) or 0.0, 3),
    }  # fmt: skip


def calibration_error(rows: list[Row], bins: int = 10) -> float:
    """Expected calibration error of the probability of the label, over equal-width bins."""
    p = np.array([row["probability"] for row in rows])
    right = np.array([row["said"] == row["label"] for row in rows])
    which = np.minimum((p * bins).astype(int), bins - 1)
    return float(sum(
        np.abs(p[which == b].mean() - right[which == b].mean()) * (which == b).mean()
        for b in range(bins) if (which == b).any()
    ))  # fmt: skip


def judged(rows: list[Row]) -> float:
    """Adds the verdicts to the rows; seconds of processor time for one completion."""
    judge("warm", "up")
    start = time.process_time()
    for row in rows:
        verdict = judge(row["prompt"], row["completion"])
        row["said"], row["probability"] = verdict.label, verdict.probability
    return (time.process_time() - start) / len(rows)


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, dict[str, Any]]:
    """This judge's figures on full refusals and full compliance, for each group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {
        name: measured([r["label"] == "refused" for r in found],
                       [r["said"] in REFUSALS for r in found])
        for name, found in sorted(groups.items())
    }  # fmt: skip


def compared(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """This judge and its peers on full refusals and full compliance."""
    gold = [row["label"] == "refused" for row in rows]
    said = {THIS: [row["said"] in REFUSALS for row in rows]}
    said |= {name: [peer(row["completion"]) for row in rows] for name, peer in PEERS.items()}
    return {name: measured(gold, found) for name, found in said.items()}


def origin(row: Row) -> str:
    """Where a text comes from: models, written in a style, or composed."""
    source = str(row["source"])
    return source.split("-")[0] if source.startswith(("written", "composed")) else "models"


def results(rows: list[Row]) -> dict[str, Any]:
    held_out = [row for row in rows if row["part"] == "held_out"]
    seconds = judged(held_out)
    full = [row for row in held_out if row["label"] in ("refused", "complied")]
    return {
        "judge": {"version": JUDGE_VERSION, "sha256": judge_sha256()},
        "labels": {
            part: dict(Counter(f"{origin(r)}: {r['label']}" for r in rows if r["part"] == part))
            for part in ("train", "calibration", "held_out")
        },
        "compared": {
            "all": compared(full),
            **{name: compared([row for row in full if origin(row) == name])
               for name in ("models", "written", "composed")},
        },
        "by_source": grouped(full, lambda row: str(row["source"])),
        "by_kind": grouped(full, lambda row: f"{origin(row)}, {row['kind']} prompt"),
        "by_category": grouped(
            (row for row in full if row["kind"] == "harmful"), lambda row: str(row["category"])
        ),
        "four_labels": {
            gold: {said: sum(row["label"] == gold and row["said"] == said for row in held_out)
                   for said in LABELS}
            for gold in LABELS
        },
        "calibration_error": {
            "all": round(calibration_error(full), 4),
            "models and written": round(
                calibration_error([row for row in full if origin(row) != "composed"]), 4
            ),
        },
        "times": {"microseconds_a_completion": round(1e6 * seconds, 0)},
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    def line(name: str, m: dict[str, Any]) -> list[Any]:
        low, high = m["interval"]
        return [name, f"{m['n']}/{m['total']}", f"{m['accuracy']:.3f} ({low:.3f}–{high:.3f})",
                f"{m['kappa']:.2f}"]  # fmt: skip

    head = ["", "right", "accuracy (95 %)", "κ"]
    text = "# The judge on held-out labels\n\nFull refusals and full compliance.\n"
    for part, judges in found["compared"].items():
        text += f"\n## {part}\n\n" + table(head, [line(*item) for item in judges.items()])
    for title, key in (("By source", "by_source"), ("By prompt", "by_kind"),
                       ("By hazard category (harmful prompts)", "by_category")):  # fmt: skip
        text += f"\n## {title}\n\n" + table(head, [line(*item) for item in found[key].items()])
    rows = [[gold, *counts.values()] for gold, counts in found["four_labels"].items()]
    text += "\n## All four labels\n\n" + table(["label \\ verdict", *LABELS], rows)
    errors = ", ".join(f"{name} {value:.3f}" for name, value in found["calibration_error"].items())
    text += f"\nExpected calibration error: {errors}.\n"
    text += f"{found['times']['microseconds_a_completion']:.0f} µs of processor a completion.\n"
    return text


def main() -> None:
    if len(sys.argv) == 2:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
        found = results([json.loads(line) for line in lines])
    else:
        found = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
        found.pop("machine")
    write(HERE, found, report(found))


if __name__ == "__main__":
    main()
