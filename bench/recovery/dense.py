"""Is there a better strength within the bounds? A dense search on the validation part.

    python bench/recovery/dense.py smollm2 [--gene GENE.gguf] [--task agnews,dolly]
    python bench/recovery/dense.py smollm2 --learnt [--task agnews,dolly]

The part that no fit sees is read on a line of common strengths and at random strengths of six
groups of layers. The best of them within the bounds is set beside the strength that
`recalibrate` chose. Writes dense-FAMILY.json and dense.md. With --learnt it is each fine-tune's own
gene, on the line alone; dense-FAMILY-learnt.json and dense-learnt.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, table
from forms import DIRECT, Forms, _with_task

from safegene_edge import SafeLlama, SafetyGene, recalibrate
from safegene_edge.files import write_text
from safegene_edge.recalibrate import Examples, RecalibrationSettings, fit
from safegene_edge.recalibrate.aligned import AlignedModel
from safegene_edge.recalibrate.reading import Reader, Reading
from safegene_edge.recalibrate.search import Bounds, mean
from safegene_edge.runtime.refusal_margin import refusal_loss

HERE = Path(__file__).parent
LINE = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 3.0)
RANDOM, GROUPS, SEED = 8, 6, 5
LEARNT_LINE = (0.4, 0.7, 0.9, 1.0, 1.1, 1.2, 1.35, 1.6)
CUT = 3  # readings on the line beyond the bounds, after which it goes no further


class ByLayer(Reader):
    """A reader whose "strength" is one a layer."""

    def scales(self, strength: Any) -> dict[Any, float]:
        values = np.broadcast_to(np.asarray(strength, float), len(self.handles))
        return {**self.own, **dict(zip(self.handles, map(float, values), strict=True))}


def searched(
    target: Path, gene: SafetyGene, bounds: Bounds, chosen: float, learnt: bool
) -> dict[str, Any]:
    """The points that were read, and where the chosen one lies among them."""
    settings, part = RecalibrationSettings(), Examples.shipped("validation")
    aligned = AlignedModel.of(gene)
    over = aligned.share_of(part.harmless, aligned.over_refused)
    assert over is not None
    bounds = replace(bounds, over_refusal=over + settings.over_refusal)
    draws = np.random.default_rng(SEED)
    count = len(gene.layers)
    group = np.arange(count) * GROUPS // count
    random = [(chosen or 1.0) * np.exp(draws.normal(0, 0.5, GROUPS))[group]
              for _ in range(0 if learnt else RANDOM)]  # fmt: skip
    points, beyond = [], 0
    with ExitStack() as stack:
        llama = stack.enter_context(SafeLlama(str(target), n_ctx=512))
        (made,) = fit._readers(stack, llama, gene, (part,), settings)
        reader = ByLayer(made.engine, made.own, made.handles, made.asked, made.openers, made.tokens)
        reader.without()
        for strength in sorted({*(LEARNT_LINE if learnt else LINE), *([chosen] if chosen else [])}):
            if beyond < CUT or strength == chosen:
                points.append(_point("common", strength, reader.at(strength), bounds))
                beyond += bool(points[-1]["broken"])
        for strengths in random:
            points.append(_point("groups", strengths.tolist(), reader.at(strengths), bounds))
    return {"bounds": asdict(bounds), "chosen": chosen, "points": points,
            "aligned": int((aligned.on(part.harmful) > 0).sum())}  # fmt: skip


def _point(kind: str, strength: Any, reading: Reading, bounds: Bounds) -> dict[str, Any]:
    return {
        "kind": kind,
        "strength": strength,
        "refused": int((reading.harmful > 0).sum()),
        "smoothed": 1 - refusal_loss(reading.harmful),
        "over_refused": int((reading.harmless > 0).sum()),
        "kl": mean(reading.kl),
        "broken": bounds.broken(reading),
    }


def write_table(found: dict[str, Any]) -> None:
    rows = []
    for task, facts in found["tasks"].items():
        own = next((p for p in facts["points"] if p["strength"] == facts["chosen"]), None)
        within = [p for p in facts["points"] if not p["broken"]]
        best = max(within, key=lambda p: p["refused"], default=None)
        count = len(Examples.shipped("validation").harmful)
        cells = [f"{p['refused']} ({p['over_refused']}, {p['kl']:.2f})" if p else "none"
                 for p in (own, best)]  # fmt: skip
        behind = 100 * (best["refused"] - own["refused"]) / count if own and best else None
        least = min(best["refused"], facts["aligned"]) if best else 0
        capped = 100 * (least - own["refused"]) / count if own and best else None
        rows.append([task, f"{facts['chosen']:.2f}", cells[0], cells[1],
                     best["kind"] if best else "", len(facts["points"]),
                     "" if behind is None else f"{behind:.1f}",
                     "" if capped is None else f"{max(0.0, capped):.1f}",
                     facts["aligned"]])  # fmt: skip
    head = ["", "strength", "chosen: refused (over-refused, KL)", "best within the bounds",
            "of kind", "points", "behind, points", "behind, up to the aligned model's, points",
            "aligned model refuses"]  # fmt: skip
    said = ", ".join(f"{key}: {value}" for key, value in machine().items())
    text = (
        "<!-- written by dense.py -->\n\n# The chosen strength beside a dense search\n\n"
        f"{found['family']}, Q4_K_M; the validation part, 48 prompts of a kind, by openers.\n\n"
        f"{table(head, rows)}\nMachine: {said}.\n"
    )
    name = "dense-learnt.md" if found.get("learnt") else "dense.md"
    (HERE / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family")
    parser.add_argument("--gene", type=Path)
    parser.add_argument("--learnt", action="store_true", help="each fine-tune's own gene")
    parser.add_argument("--task", default="agnews,sst2,dolly,gsm8k")
    given = parser.parse_args()
    file = HERE / f"dense-{given.family}{'-learnt' * given.learnt}.json"
    found: dict[str, Any] = {"family": given.family, "learnt": given.learnt, "tasks": {}}
    if file.exists():
        found |= json.loads(file.read_text(encoding="utf-8"))
    work = Forms(given.family)
    for task in given.task.split(","):
        path = work.learnt(task, DIRECT)[0] if given.learnt else given.gene
        target, gene = work.target(task), SafetyGene.load(path or work.bench.family.gene)
        examples = _with_task(task, "") if given.learnt else None
        settings = RecalibrationSettings(anyway=True)
        result = recalibrate(target, gene, examples, settings=settings)
        assert result.bounds is not None
        bounds, chosen = result.bounds, max(result.expression.coefficients.values())
        found["tasks"][task] = searched(target, gene, bounds, chosen, given.learnt)
        write_text(file, json.dumps(found, indent=1) + "\n")
        write_table(found)
        print(task, "done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
