"""Refusals on public benchmarks before and after the example's adapter, Q4_K_M.

AdvBench and the standard rows of HarmBench are read from ../shared/data and never committed.
The project's own suites stand beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import SHARED, safety_adapter, smollm2, write

from safegene_edge import evaluate
from safegene_edge.evals.settings import DEFAULT_SUITES

SUITES = (SHARED / "advbench.csv", SHARED / "harmbench_text.csv")


def main() -> None:
    if not all(path.exists() for path in SUITES):
        sys.exit("skipped: the benchmark files are not beside this checkout")
    model = smollm2()
    report = evaluate(model, safety_adapter(model), suites=(*SUITES, *DEFAULT_SUITES))
    text = "# Refusals, SmolLM2-135M-Instruct Q4_K_M\n\n```\n" + report.table() + "\n```\n"
    write(Path(__file__).parent, report.to_json(), text)


if __name__ == "__main__":
    main()
