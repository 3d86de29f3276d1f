"""How far does `scan` agree with `eval`, and how long does it take?

    python bench/scan/run.py MODELS.tsv [SECONDS]   # measure what is not in results.json yet
    python bench/scan/run.py                        # write results.md again from results.json

A line of MODELS.tsv: name, model, and an adapter if one is on, with tabs between. With SECONDS no
further model is begun after so many. `direction.py` makes the models without a refusal direction.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import table, write  # noqa: E402

from safegene_edge.evals.evaluate import evaluate  # noqa: E402
from safegene_edge.evals.report import findings  # noqa: E402
from safegene_edge.evals.scan import ORDERED, REFUSES, scan  # noqa: E402
from safegene_edge.evals.settings import EvalSettings  # noqa: E402
from safegene_edge.evals.statistics import Count  # noqa: E402

SETTINGS = EvalSettings(limit=24, max_tokens=16)
RESULTS = HERE / "results.json"


def measured(model: str, adapters: list[str]) -> dict[str, Any]:
    """One model's scan, and an evaluation of it on the built-in suites."""
    found = scan(model, adapters)
    start = time.perf_counter()
    report = evaluate(model, adapters=adapters, settings=SETTINGS).to_json()
    seconds = time.perf_counter() - start
    asked = {kind: findings.pooled(report, kind, kind, labels)
             for kind, (_, labels) in findings.MEASURE.items()}  # fmt: skip
    return {
        "scan": found.to_json(),
        "eval": {k: {"n": r.before.n, "total": r.before.total} for k, r in asked.items() if r},
        "eval_seconds": round(seconds, 1),
    }


def agreement(rows: dict[str, Any]) -> dict[str, Any]:
    """Correlations of shares, the mean distance, and findings against the evaluation's share."""
    pairs = {
        kind: [(share(r["scan"][name]), share(r["eval"][kind])) for r in rows.values()]
        for kind, name in (("harmful", "refused"), ("harmless", "over_refused"))
    }
    decided = [
        (r["scan"]["finding"] == "refuses", share(r["eval"]["harmful"]) >= REFUSES)
        for r in rows.values()
        if r["scan"]["finding"] != "undecided"
    ]
    return {
        "correlation": {k: round(float(np.corrcoef(*zip(*p, strict=True))[0, 1]), 3)
                        for k, p in pairs.items()},
        "mean_distance": {k: round(float(np.mean([abs(a - b) for a, b in p])), 3)
                          for k, p in pairs.items()},
        "same_side": {"n": sum(a == b for a, b in decided), "total": len(decided)},
    }  # fmt: skip


def share(count: dict[str, int]) -> float:
    return count["n"] / count["total"]


def report(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found["models"].items():
        scanned, asked = row["scan"], row["eval"]
        order = scanned["order"]
        rows.append([
            name, scanned["finding"],
            *(Count(c["n"], c["total"]) for c in (scanned["refused"], asked["harmful"])),
            *(Count(c["n"], c["total"]) for c in (scanned["over_refused"], asked["harmless"])),
            f"{order['share']:.2f} ({order['interval'][0]:.2f}–{order['interval'][1]:.2f})",
            f"{scanned['seconds']:.1f}", f"{row['eval_seconds']:.0f}",
        ])  # fmt: skip
    head = ["model", "finding", "harmful refused: scan", "eval", "harmless refused: scan", "eval",
            "in order", "scan, s", "eval, s"]  # fmt: skip
    all_of = found["agreement"]
    far = ", ".join(f"{kind} {value:.3f}" for kind, value in all_of["mean_distance"].items())
    close = ", ".join(f"{kind} {value:.3f}" for kind, value in all_of["correlation"].items())
    same = all_of["same_side"]
    return (
        "# What a scan says, and what is answered\n\n"
        f"`scan` reads margins on the {found['examples']} shipped examples and generates nothing. "
        f"`eval` asks at most {SETTINGS.limit} prompts of each built-in suite, and judges answers "
        f"of {SETTINGS.max_tokens} tokens. The two share no prompt. A model *refuses* where the "
        f"interval lies above {REFUSES:.0%}; it is *abliterated* where it lies below, and fewer "
        f"than {ORDERED:.0%} of the pairs of a harmful and a harmless prompt are in order. Both "
        "thresholds were set before.\n\n"
        + table(head, rows)
        + f"\nCorrelation of the shares: {close}. Mean distance: {far}. Where the scan decides, "
        f"{same['n']} of {same['total']} models are on the same side of {REFUSES:.0%} in the "
        "evaluation.\n"
    )


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found.pop("machine", None)
    rows = found.setdefault("models", {})
    start, limit = time.perf_counter(), float(sys.argv[2]) if len(sys.argv) > 2 else np.inf
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else []
    for name, model, *adapters in (line.split("\t") for line in lines if line.strip()):
        if name in rows or time.perf_counter() - start > limit or not Path(model).exists():
            continue
        rows[name] = measured(model, adapters)
        print(name, rows[name], flush=True)
        total = sum(rows[name]["scan"][key]["total"] for key in ("refused", "over_refused"))
        found |= {"examples": total, "agreement": agreement(rows) if len(rows) > 1 else {}}
        RESULTS.write_text(json.dumps(found), encoding="utf-8")
    if len(rows) < 2:
        print("give MODELS.tsv with two models or more; nothing is measured yet", file=sys.stderr)
        return
    write(HERE, found, report(found))


if __name__ == "__main__":
    main()
