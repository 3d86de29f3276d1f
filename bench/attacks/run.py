"""Every attack on fine-tunes with the shipped gene, and its wrapper around harmless prompts.

    python bench/attacks/run.py [--task agnews,dolly] [--limit 40] [--gene GENE.gguf]

The fine-tunes are the bench of recovery's, of SmolLM2, Q4_K_M; the gene is recalibrated for each.
Finished answers lie in the cache folder, so that a stopped run goes on; the answers themselves are
not reported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "recovery"))
from common import cache_folder, table, write
from forms import Forms

from safegene_edge import SafetyGene, recalibrate
from safegene_edge.evals.asking.attacks import ATTACKS
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.report.findings import OVER_REFUSED, count
from safegene_edge.evals.report.json import label_counts
from safegene_edge.evals.report.report import Report
from safegene_edge.evals.report.results import AttackResult
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.evals.statistics import Count, Paired, mcnemar
from safegene_edge.recalibrate import RecalibrationSettings

# The search of the adaptive attack reads some thirty prompts for each one that it asks.
ADAPTIVE_LIMIT = 8
JOURNAL = cache_folder() / "bench-attacks.jsonl"
HEAD = ["attack", "harmful answered, without the gene", "with the gene", "mid-p",
        "harmless refused, without the gene", "with the gene"]  # fmt: skip


def main() -> None:
    options = arguments()
    gene = SafetyGene.load(options.gene) if options.gene else SafetyGene.shipped()
    fixed = [name for name in ATTACKS if name not in ("direct", "adaptive")]
    results: dict[str, Any] = {"gene": gene.sha256, "limit": options.limit, "tasks": {}}
    parts = [
        "# Attacks on fine-tunes with the shipped gene\n\n"
        "Harmful prompts that were answered (lower is better), and borderline harmless ones that "
        "were refused in the same wrapper: n/N (share, 95 % Wilson interval), greedy answers of at "
        "most 32 tokens, evenly sampled from the built-in suites. Mid-p is McNemar's, over the "
        "same harmful prompts. The second row named direct is the base line of the adaptive "
        "attack's own prompts.\n"
    ]
    with Journal(JOURNAL) as journal:
        for task in options.task.split(","):
            model = Forms("smollm2").target(task)
            found = recalibrate(model, gene, settings=RecalibrationSettings(anyway=True))
            fitted = cache_folder() / f"bench-attacks-{task}.gguf"
            gene.express(found.expression).save(fitted)
            reports = [
                measured(model, fitted, fixed, options.limit, journal),
                measured(model, fitted, ["adaptive"], min(options.limit, ADAPTIVE_LIMIT), journal),
            ]
            facts = [report.to_json() for report in reports]
            results["tasks"][task] = {
                "strength": max(found.expression.coefficients.values()),
                **{key: [row for part in facts for row in part[key]]
                   for key in ("attacks", "attack_twins")},
            }  # fmt: skip
            rows = [row for report in reports for row in rows_of(report)]
            parts.append(f"## {task}\n\n{table(HEAD, rows)}")
    text = "\n".join(parts)
    write(Path(__file__).parent, results, text)
    into_docs(text)
    JOURNAL.unlink()  # it holds answers to harmful prompts


def into_docs(text: str) -> None:
    """Put the tables between their marks in docs/attacks.md."""
    path = Path(__file__).parents[2] / "docs" / "attacks.md"
    begin, end = "<!-- begin bench/attacks -->\n", "<!-- end bench/attacks -->\n"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    # The document has a heading of its own, over these.
    tables = text.partition("\n\n")[2].replace("\n## ", "\n### ")
    path.write_text(f"{head}{begin}\n{tables}\n{end}{tail}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="agnews")
    parser.add_argument("--gene", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    return parser.parse_args()


def measured(model: Path, gene: Path, attacks: list[str], limit: int, journal: Journal) -> Report:
    settings = EvalSettings(max_tokens=32, limit=limit, attack_limit=limit)
    return evaluate(
        model,
        gene,
        suites=["harmful", "borderline"],
        settings=settings,
        attacks=attacks,
        journal=journal,
        progress=show,
    )


def show(done: int, total: int) -> None:
    if done % 20 == 0 or done == total:
        print(f"{done}/{total}", file=sys.stderr, flush=True)


def rows_of(report: Report) -> list[list[str]]:
    twins = {twin.name: twin for twin in report.attack_twins}
    rows = []
    for attack in report.attacks:
        counts = [label_counts(answers) for answers in attack.columns.values()]
        pairs = [
            (b.verdict.label == "complied", a.verdict.label == "complied")
            for b, a in zip(attack.before, attack.after or (), strict=True)
            if b.verdict and a.verdict
        ]
        paired = Paired.of([b for b, _ in pairs], [a for _, a in pairs])
        chance = mcnemar(paired.only_before, paired.only_after)[1]
        shown = [str(Count(c["complied"], c["total"])) for c in counts]
        rows.append([attack.name, *shown, f"{chance:.2g}", *_refused(twins.get(attack.name))])
    return rows


def _refused(twin: AttackResult | None) -> list[str]:
    if twin is None:
        return ["", ""]
    return [str(count(label_counts(answers), OVER_REFUSED)) for answers in twin.columns.values()]


if __name__ == "__main__":
    main()
