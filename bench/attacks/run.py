"""Every attack on a gene: how many harmful prompts are answered without and with it.

    python bench/attacks/run.py [--gene GENE.gguf] [--model MODEL.gguf] [--limit 40]

Without arguments the example's adapter on SmolLM2-135M-Instruct Q4_K_M. Finished answers lie
in the cache folder, so that a stopped run goes on; the answers themselves are not reported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cache_folder, safety_adapter, smollm2, table, write

from safegene_edge.evals.asking.attacks import ATTACKS
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.report.json import label_counts
from safegene_edge.evals.report.report import Report
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.evals.statistics import Count, Paired, mcnemar

# The search of the adaptive attack reads some thirty prompts for each one that it asks.
ADAPTIVE_LIMIT = 16
JOURNAL = cache_folder() / "bench-attacks.jsonl"


def main() -> None:
    options = arguments()
    model = options.model or smollm2()
    gene = options.gene or safety_adapter(model)
    fixed = [name for name in ATTACKS if name not in ("direct", "adaptive")]
    with Journal(JOURNAL) as journal:
        reports = [
            measured(model, gene, fixed, options.limit, journal),
            measured(model, gene, ["adaptive"], min(options.limit, ADAPTIVE_LIMIT), journal),
        ]
    facts = [report.to_json() for report in reports]
    results: dict[str, Any] = {
        "model": facts[0]["model"],
        "gene": facts[0]["gene"],
        "suite": {key: facts[0]["suites"][0][key] for key in ("name", "version")},
        "max_tokens": reports[0].settings.max_tokens,
        "attacks": [attack for part in facts for attack in part["attacks"]],
    }
    rows = [row for report in reports for row in rows_of(report)]
    text = (
        f"# Attacks on {results['gene']['name']}, {results['model']['name']}\n\n"
        "Harmful prompts that were answered (lower is better): n/N (share, 95 % Wilson interval), "
        f"greedy answers of at most {results['max_tokens']} tokens, suite "
        f"{results['suite']['name']} version {results['suite']['version']}, evenly sampled. "
        "The last column is McNemar's mid-p over the same prompts.\n\n"
        + table(["attack", "without the gene", "with the gene", "mid-p"], rows)
        + "\nThe second row named direct is the base line of the adaptive attack's own prompts.\n"
    )
    write(Path(__file__).parent, results, text)
    into_docs(text)
    JOURNAL.unlink()  # it holds answers to harmful prompts


def into_docs(text: str) -> None:
    """Put the table between its marks in docs/attacks.md."""
    path = Path(__file__).parents[2] / "docs" / "attacks.md"
    begin, end = "<!-- begin bench/attacks -->\n", "<!-- end bench/attacks -->\n"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    table = text.partition("\n\n")[2]  # the document has a heading of its own
    path.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gene", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    return parser.parse_args()


def measured(model: Path, gene: Path, attacks: list[str], limit: int, journal: Journal) -> Report:
    settings = EvalSettings(max_tokens=32, limit=limit, attack_limit=limit)
    return evaluate(
        model,
        gene,
        suites=["harmful"],
        settings=settings,
        attacks=attacks,
        journal=journal,
        progress=show,
    )


def show(done: int, total: int) -> None:
    if done % 20 == 0 or done == total:
        print(f"{done}/{total}", file=sys.stderr, flush=True)


def rows_of(report: Report) -> list[list[str]]:
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
        rows.append([attack.name, *shown, f"{chance:.2g}"])
    return rows


if __name__ == "__main__":
    main()
