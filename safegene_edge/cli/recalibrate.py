"""`recalibrate`: a gene's strengths for one model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..recalibrate.settings import RecalibrationSettings
from .options import setting

if TYPE_CHECKING:
    from ..recalibrate import Recalibration


@click.command()
@click.argument("model", type=click.Path())
@click.argument("gene", type=click.Path())
@click.option("--adapter", multiple=True, metavar="TASK.gguf",
              help="A LoRA that the model is run with; may be repeated.")  # fmt: skip
@click.option("--examples", metavar="FILE.jsonl",
              help='Lines of {"prompt": "…", "kind": "harmful"}, "harmless" or "task"; task '
              "prompts alone are added to the shipped examples.")  # fmt: skip
@click.option(
    "-o", "--output", metavar="FITTED.gguf",
    help="The fitted adapter: the gene with this model's strengths folded in.",
)  # fmt: skip
@click.option("--expression", metavar="FILE.json", help="The strengths alone.")
@click.option("--plot", metavar="FILE.svg",
              help="The trade-off of refusal against KL as a picture.")  # fmt: skip
@setting(RecalibrationSettings, "kl_budget", type=float)
@setting(RecalibrationSettings, "passes", type=click.IntRange(6, 99))
@setting(RecalibrationSettings, "n_ctx", "--ctx", "n_ctx", type=click.IntRange(min=64))
@click.option("--json", "as_json", is_flag=True, help="Print strengths and curve as JSON.")
def recalibrate(
    model: str,
    gene: str,
    adapter: tuple[str, ...],
    examples: str | None,
    output: str | None,
    expression: str | None,
    plot: str | None,
    kl_budget: float,
    passes: int,
    n_ctx: int | None,
    as_json: bool,
) -> None:
    """Find a gene's strengths for MODEL.gguf from a few examples, without training."""
    from ..charts import curve_chart
    from ..files import check_output, write_text
    from ..gene import SafetyGene
    from ..recalibrate import Examples
    from ..recalibrate import recalibrate as run

    outputs = [name for name in (output, expression, plot) if name]
    if not (outputs or as_json):
        raise click.UsageError(
            "give -o FITTED.gguf, --expression FILE.json, --plot FILE.svg or --json"
        )
    if len({Path(name).resolve() for name in outputs}) < len(outputs):
        raise click.UsageError("two outputs are the same file")
    inputs = [Path(name) for name in (model, gene, *adapter, examples) if name]
    for name in outputs:
        check_output(name, inputs)
    settings = RecalibrationSettings(kl_budget=kl_budget, passes=passes, n_ctx=n_ctx)
    loaded = SafetyGene.load(gene)
    given = Examples.load(examples) if examples else None
    with click.progressbar(
        length=100, label="recalibrating", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        found = run(
            model, loaded, given, adapters=adapter, settings=settings,
            progress=lambda done, limit: bar.update(100 * done // limit - bar.pos),
        )  # fmt: skip
    if output:
        loaded.express(found.expression).save(output, inputs)
    if expression:
        found.expression.save(expression)
    if plot:
        write_text(plot, curve_chart(found.curve, found.point, kl_budget), inputs)
    if as_json:
        facts = {**found.to_json(), "kl_budget": kl_budget,
                 "aligned_over_refusal": loaded.aligned_over_refusal}  # fmt: skip
        click.echo(json.dumps(facts, indent=2))
    for line in _said(model, found):
        click.echo(line, err=True)


def _said(model: str, found: Recalibration) -> list[str]:
    """What was found, in words."""
    point, own = found.point, found.curve[0]
    of = "" if found.same_examples else " on the shipped examples, not on these"
    goal = f" (aligned model {found.goal:.3f}{of})" if found.goal else ""
    task = "" if point.task_kl is None else f" and {point.task_kl:.4f} on the task prompts"
    lines = [
        f"{model}: refusal loss {own.refusal_loss:.3f} → {point.refusal_loss:.3f}{goal}, "
        f"KL {point.kl:.4f} nats a token{task}, {len(found.curve)} points looked at"
    ]
    if found.nothing_lost:
        lines.append(
            f"{model}: without the gene its refusal loss is no larger than the aligned model's on "
            "the shipped examples, so that nothing is to be brought back (largest strength "
            f"{max(point.coefficients):.2f}); if other prompts show a loss, give --examples"
        )
    return lines
