"""`restore`: refusals back in one command."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ..learn.settings import LearnSettings
from ..recalibrate.settings import RecalibrationSettings
from .learn import named, said_on
from .options import (
    FILE,
    Number,
    check_outputs,
    examples,
    file_option,
    require_used,
    setting,
    was_given,
)

if TYPE_CHECKING:
    from ..restore import Restored


@click.command(
    epilog=examples(
        "restore model.gguf --task prompts.txt -o fitted.gguf",
        "restore model.gguf --aligned base.gguf --merge -o safe.gguf",
    )
)
@click.argument("target", type=FILE)
@file_option(
    "-o",
    "--output",
    required=True,
    metavar="OUT.gguf",
    help="The fitted adapter, or with --merge the safe model.",
)
@file_option(
    "--aligned",
    metavar="MODEL",
    help="A model of the family that refuses, or a folder with the base that TARGET "
    "names; default: TARGET itself under a safety system prompt.",
)
@file_option(
    "--gene",
    metavar="GENE.gguf",
    help='A gene of the family, or where to look for one: a folder, hf:OWNER/REPO, or "auto" for '
    "the package and what `pull` keeps; default: the package's own if it fits and neither "
    "--aligned nor --prompts is given, else learn one.",
)
@file_option(
    "--adapter",
    multiple=True,
    metavar="TASK.gguf",
    help="A LoRA that TARGET is run with; may be repeated.",
)
@file_option(
    "--task",
    metavar="FILE",
    help='Prompts that TARGET gets in its job, a line each, or JSON with a "prompt" each; '
    "no answers are needed. What it answers there is kept.",
)
@click.option("--merge", "merged", is_flag=True, help="Write the whole model.")
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True, metavar="N",
              help="Prompts of each suite that is measured before and after.")  # fmt: skip
@setting(LearnSettings, "prompts", type=click.IntRange(min=1))
@setting(RecalibrationSettings, "over_refusal", type=Number(0, 1))
@setting(RecalibrationSettings, "anyway", is_flag=True)
@file_option("--card", metavar="README.md", help="Also write the gene's card, as a hub shows it.")
@click.option("--json", "as_json", is_flag=True, help="Print all that was found as JSON.")
def restore(
    target: str,
    output: str,
    aligned: str | None,
    gene: str | None,
    adapter: tuple[str, ...],
    task: str | None,
    merged: bool,
    limit: int,
    prompts: int,
    over_refusal: float,
    anyway: bool,
    card: str | None,
    as_json: bool,
) -> None:
    """Bring the refusals of TARGET.gguf back: learn a gene, fit it, measure, write the result.

    A run that was stopped goes on where it was.
    """
    from ..prompts import load_prompts
    from ..restore import restore as run

    if aligned and gene:
        raise click.UsageError("give --aligned or --gene, not both")
    require_used({"learning, which --gene leaves out": (not gene, ["prompts"])})
    check_outputs((output, card), filter(None, (target, *adapter, task)))
    found = run(
        target, named(aligned), gene, output=output, adapters=adapter,
        task=load_prompts(task) if task else (), merged=merged, limit=limit,
        learning=LearnSettings(prompts=prompts) if was_given("prompts") else None,
        settings=RecalibrationSettings(over_refusal=over_refusal, anyway=anyway),
        card=card, progress=said_on(sys.stderr),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    for line in _said(target, found):
        click.echo(line, err=as_json)


def _said(target: str, found: Restored) -> list[str]:
    """One screen: what was lost, what came back, what it cost, which files, what next."""
    if found.nothing_lost:
        written = "".join(f" but the {name} {path}" for name, path in found.files.items())
        return [f"{target}: nothing was lost: it refuses as much as the aligned model, but for "
                f"chance; nothing was written{written} (--anyway goes on)"]  # fmt: skip
    point, counted = found.recalibration.point, found.recalibration.validation
    assert counted is not None and found.report is not None
    task = "" if point.task_kl is None else f", {point.task_kl:.4f} on the task's prompts"
    lines = [
        f"strength {max(point.coefficients):.2f}; KL {point.kl:.3f} nats a token{task}",
        f"{'':<14}before → after, of N",
    ]
    for suite in found.report["suites"]:
        lines.append(f"  {suite['name']:<12}{_counts(suite)}")
    lines += [f"{name}: {path}" for name, path in found.files.items()]
    return [*lines, "next:", *(f"  {line}" for line in found.next_steps)]


def _counts(suite: dict[str, Any]) -> str:
    """Refused; of harmless prompts those, too, that were refused in part."""
    harmful = suite["kind"] == "harmful"
    labels = ("refused",) if harmful else ("refused", "partly_refused")
    before, after = (
        sum(suite[column][label] for label in labels) for column in ("before", "after")
    )
    said = "refused" if harmful else "over-refused"
    return f"{before} → {after} of {suite['after']['total']} {said}"
