"""`recalibrate`: a gene's strengths for one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import command
from ..recalibrate.settings import RecalibrationSettings
from .adapters import beside
from .options import (
    FILE,
    FINITE,
    Number,
    check_outputs,
    examples,
    file_option,
    say_next,
    setting,
    with_adapters,
)
from .terminal import progress

if TYPE_CHECKING:
    from ..recalibrate import Recalibration


@click.command(
    epilog=examples(
        "recalibrate model.gguf gene.gguf -o fitted.gguf",
        "recalibrate model.gguf gene.gguf --adapter task.gguf --plot curve.svg -o fitted.gguf",
    )
)
@click.argument("model", type=FILE)
@click.argument("gene", type=FILE)
@file_option(
    "--adapter",
    multiple=True,
    metavar="TASK.gguf",
    help="A LoRA that the model is run with; may be repeated.",
)
@file_option(
    "--examples",
    metavar="FILE.jsonl",
    help='Lines of {"prompt": "…", "kind": "harmful"}, "harmless" or "task", and "part": '
    '"validation" for those that the result is counted on; task prompts alone are added '
    "to the shipped examples.",
)
@file_option(
    "-o",
    "--output",
    metavar="FITTED.gguf",
    help="The fitted adapter: the gene with this model's strengths folded in.",
)
@file_option("--expression", metavar="FILE.json", help="The strengths alone.")
@file_option("--plot", metavar="FILE.svg", help="The trade-off of refusal against KL as a picture.")
@setting(RecalibrationSettings, "kl_budget", type=FINITE)
@setting(RecalibrationSettings, "over_refusal", type=Number(0, 1))
@setting(RecalibrationSettings, "passes", type=click.IntRange(1, 99))
@setting(RecalibrationSettings, "n_ctx", "--ctx", "n_ctx", type=click.IntRange(min=64))
@setting(RecalibrationSettings, "anyway", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Print strengths and curve as JSON.")
def recalibrate(
    model: str,
    gene: str,
    adapter: tuple[str, ...],
    examples: str | None,
    output: str | None,
    expression: str | None,
    plot: str | None,
    kl_budget: float | None,
    over_refusal: float,
    passes: int,
    n_ctx: int | None,
    anyway: bool,
    as_json: bool,
) -> None:
    """Find a gene's strengths for MODEL.gguf from a few examples, without training."""
    from ..compat import open_model, require_fit
    from ..files import write_text
    from ..gene import SafetyGene
    from ..recalibrate import PARTS, Examples
    from ..recalibrate import recalibrate as run

    outputs = [name for name in (output, expression, plot) if name]
    if not (outputs or as_json):
        raise click.UsageError(
            "give -o FITTED.gguf, --expression FILE.json, --plot FILE.svg or --json"
        )
    inputs = [Path(name) for name in (model, gene, *adapter, examples) if name]
    check_outputs(outputs, inputs)
    settings = RecalibrationSettings(
        kl_budget=kl_budget, over_refusal=over_refusal, passes=passes, n_ctx=n_ctx, anyway=anyway
    )
    loaded = SafetyGene.load(gene)
    require_fit(loaded, open_model(model), gene)
    given, kept = (Examples.load(examples, part) if examples else None for part in PARTS)
    with progress("recalibrating") as advance:
        found = run(
            model, loaded, given, validation=kept, adapters=adapter, settings=settings,
            progress=advance,
        )  # fmt: skip
    if output and not found.nothing_lost:
        loaded.express(found.expression).save(output, inputs)
    if expression:
        found.expression.save(expression)
    if plot and found.bounds:
        from ..evals.report.pictures import of_curve

        write_text(plot, of_curve(found.curve, found.point, found.bounds.kl), inputs)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    for line in _said(model, found, [name for name in (output, plot) if name]):
        click.echo(line, err=True)
    say_next(*_after(model, gene, adapter, found, output, expression))


def _after(
    model: str,
    gene: str,
    adapters: tuple[str, ...],
    found: Recalibration,
    output: str | None,
    expression: str | None,
) -> list[str]:
    """What goes on from the files that were written."""
    own = [model, *with_adapters(adapters)]
    if found.nothing_lost:
        return [command("eval", *own, "--quick")]
    safe = beside(model, "safe")
    if output:
        return [
            command("eval", *own, "--gene", output, "--quick"),
            command("chat", *own, "--gene", output),
            command("merge", model, *adapters, output, "-o", safe),
        ]
    if expression:
        return [command("merge", model, *adapters, f"{gene}={expression}", "-o", safe)]
    return [command("recalibrate", model, gene, *own[1:], "-o", beside(model, "fitted"))]


def _said(model: str, found: Recalibration, outputs: list[str]) -> list[str]:
    """What was found, in words."""
    if found.nothing_lost:
        lines = [
            f"{model}: nothing was lost: of harmful examples it refuses as many as the aligned "
            "model, but for chance; every strength is 0 (--anyway looks for one)"
        ]
        return lines + [f"{name}: not written, for there is nothing in it" for name in outputs]
    point, bounds, counted = found.point, found.bounds, found.validation
    assert bounds is not None and counted is not None
    task = "" if point.task_kl is None else f", {point.task_kl:.4f} on the task prompts"
    lines = [
        f"{model}: strength {max(point.coefficients):.2f} in {len(point.coefficients)} layers; KL "
        f"{point.kl:.3f} nats a token{task} (how far its answers move; at most {bounds.kl:.3f})",
        "on examples that the fit never saw, refused without → with the gene:",
        f"  harmful                  {counted.refused}",
        f"  harmless                 {counted.over_refused}",
    ]
    width = max(map(len, counted.by_form), default=0)
    lines.append(f"    {'by form':<{width}}  harmful;  harmless")
    for form, (harmful, harmless) in counted.by_form.items():
        lines.append(f"    {form:<{width}}  {harmful};  {harmless}")
    if found.guard:
        lines.append(
            f"guard: it ends an answer when its refusal margin, looked at midway, is above "
            f"{found.guard.threshold:.1f} nats; {found.guard.ended} of {found.guard.answers} "
            "harmless answers were above 0"
        )
    return lines
