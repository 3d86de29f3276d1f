"""`recalibrate`: express a gene in one fine-tuned model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("model", type=click.Path())
@click.argument("gene", type=click.Path())
@click.option("--examples", metavar="FILE.jsonl", help="Prompts to calibrate on; default: ours. "
              "With prompts of the model's own task, their answers are kept as well.")  # fmt: skip
@click.option("-o", "--output", metavar="EXPRESSED.gguf", help="The gene, ready for this model.")
@click.option("--expression", metavar="FILE.json", help="The coefficients alone.")
@click.option(
    "--plot", metavar="FILE.svg", help="The trade-off of refusal against KL as a picture."
)
@click.option("--kl-budget", type=float, default=0.1, show_default=True,
              help="Nats a token that it may cost on harmless prompts.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print coefficients and curve as JSON.")
def recalibrate(
    model: str,
    gene: str,
    examples: str | None,
    output: str | None,
    expression: str | None,
    plot: str | None,
    kl_budget: float,
    as_json: bool,
) -> None:
    """Find a gene's coefficients for MODEL.gguf from a few examples, without training."""
    from ..charts import curve_chart
    from ..files import check_output, write_text
    from ..gene import SafetyGene
    from ..recalibrate.examples import Examples
    from ..recalibrate.fit import Point, taken
    from ..recalibrate.fit import recalibrate as run

    outputs = [name for name in (output, expression, plot) if name]
    if not (outputs or as_json):
        raise click.UsageError("give -o EXPRESSED.gguf, --expression FILE.json or --json")
    if len(set(outputs)) < len(outputs):
        raise click.UsageError("two outputs have the same name")
    inputs = [Path(name) for name in (model, gene, examples) if name]
    for name in outputs:
        check_output(name, inputs)
    loaded = SafetyGene.load(gene)
    given = Examples.load(examples) if examples else None
    curve: list[Point] = []
    with click.progressbar(
        length=100, label="recalibrating", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        found = run(
            model, loaded, given, kl_budget=kl_budget, gene_file=gene, curve=curve,
            progress=lambda done, limit: bar.update(100 * done // limit - bar.pos),
        )  # fmt: skip
    if output:
        loaded.express(found).save(output, inputs)
    if expression:
        found.save(expression)
    point = taken(found, curve)
    if plot:
        write_text(plot, curve_chart(curve, point, kl_budget), inputs)
    if as_json:
        facts = {"coefficients": dict(found.coefficients), "gene": found.gene,
                 "target": found.target, "kl_budget": kl_budget,
                 "aligned_loss": loaded.aligned_loss,
                 "aligned_over_refusal": loaded.aligned_over_refusal,
                 "curve": [asdict(point) for point in curve]}  # fmt: skip
        click.echo(json.dumps(facts, indent=2))
    goal = f" (aligned model {loaded.aligned_loss:.3f})" if loaded.aligned_loss else ""
    told = "" if point.task_kl is None else f" and {point.task_kl:.4f} on the task"
    click.echo(
        f"{model}: refusal loss {curve[0].refusal_loss:.3f} → {point.refusal_loss:.3f}{goal}, "
        f"KL {point.kl:.4f} nats a token{told}, {len(curve)} points looked at",
        err=True,
    )
    if curve[0].refusal_loss <= loaded.aligned_loss:
        click.echo(
            f"{model}: without the gene its refusal loss is no larger than the aligned model's on "
            "the shipped examples, so that nothing is to be brought back (largest coefficient "
            f"{max(point.coefficients):.2f}); if other prompts show a loss, give --examples",
            err=True,
        )
