"""`report`: check, show and compare the reports that `eval --json` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from ..errors import command
from ..evals.settings import By, GateSettings
from .options import FILE, HelpGroup, Number, examples, file_option, require_used, say_next, setting

if TYPE_CHECKING:
    from ..evals.report.compare import Comparison

_REPORT = click.argument("report", metavar="REPORT.json", type=FILE)


@click.group(
    "report",
    cls=HelpGroup,
    epilog=examples(
        "report render report.json -o report.html",
        "report compare before.json after.json",
    ),
)
def report_group() -> None:
    """Check, show and compare reports that `eval --json` wrote."""


@report_group.command(
    epilog=examples(
        "report verify report.json",
        "report verify report.json --model model.gguf --gene fitted.gguf",
    )
)
@_REPORT
@file_option("--model", metavar="MODEL.gguf", help="Hold this file against the report's model.")
@file_option("--gene", metavar="GENE.gguf", help="Hold this file against the report's gene.")
@file_option("--adapter", multiple=True, metavar="TASK.gguf", help="May be repeated.")
@file_option("--suite", multiple=True, metavar="FILE", help="A suite of your own; repeatable.")
def verify(
    report: str,
    model: str | None,
    gene: str | None,
    adapter: tuple[str, ...],
    suite: tuple[str, ...],
) -> None:
    """Recompute the hashes; exit with 2 where one differs.

    The report's own content and the built-in suites are always checked, files where they are
    given. This finds mistakes and later changes; it is no proof against whoever can write a
    new hash into the report, too.
    """
    from ..evals.report import record
    from ..evals.report.schema import read_report

    checks = record.verify(
        read_report(report), model=model, gene=gene, adapters=adapter, suites=suite
    )
    for check in checks:
        click.echo(str(check))
    if fault := record.failed(checks):
        raise fault
    say_next(command("report", "render", report, "-o", Path(report).with_suffix(".html")))


@report_group.command(
    epilog=examples(
        "report render report.json -o report.html",
        "report render report.json -o report.md",
    )
)
@_REPORT
@file_option("-o", "--output", required=True, metavar="FILE", help="Ends in .html or .md.")
def render(report: str, output: str) -> None:
    """Show a report as one HTML file, or as Markdown."""
    from ..evals.report.html import render_html
    from ..evals.report.markdown import render_markdown
    from ..evals.report.schema import read_report
    from ..files import check_output, write_text

    makers = {".html": render_html, ".htm": render_html, ".md": render_markdown}
    make = makers.get(Path(output).suffix.lower())
    if make is None:
        raise click.UsageError(f"{output} ends in none of {', '.join(makers)}")
    check_output(output, [report])
    write_text(output, make(read_report(report)), [report])
    click.echo(f"{output}: written", err=True)
    say_next(command("report", "verify", report))


@report_group.command(
    epilog=examples(
        "report record report.json",
        "report record report.json -o record.md",
    )
)
@_REPORT
@file_option("-o", "--output", metavar="FILE", help="Ends in .json or .md; else JSON on stdout.")
def record(report: str, output: str | None) -> None:
    """Extract the safety record: what was tested, with what, how, and what that leaves out."""
    from ..evals.report.markdown import render_record
    from ..evals.report.record import safety_record
    from ..evals.report.schema import read_report
    from ..files import write_text

    suffix = Path(output).suffix.lower() if output else ".json"
    if suffix not in (".json", ".md"):
        raise click.UsageError(f"{output} ends neither in .json nor in .md")
    facts = read_report(report)
    text = render_record(facts) if suffix == ".md" else _json(safety_record(facts))
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text, [report])
        click.echo(f"{output}: written", err=True)
    say_next(command("report", "verify", report))


@report_group.command(
    epilog=examples(
        "report compare before.json after.json",
        "report compare before.json after.json --json",
    )
)
@click.argument("first", metavar="A.json", type=FILE)
@click.argument("second", metavar="B.json", type=FILE)
@click.option("--no-worse", is_flag=True, help="Exit with 1 unless B is shown to be no worse.")
@click.option(
    "--margin",
    default=0.05,
    show_default=True,
    type=Number(0, 1),
    help="How much worse, as a share of the prompts, still counts as no worse.",
)
@setting(GateSettings, "by", type=click.Choice(get_args(By)))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(first: str, second: str, no_worse: bool, margin: float, by: By, as_json: bool) -> None:
    """Compare two runs suite by suite, and say where they cannot be compared."""
    from ..evals.report import compare as comparing
    from ..evals.report.schema import read_report
    from .evaluation import end_by

    require_used({"--no-worse": (no_worse, ("margin", "by"))})
    a, b = read_report(first), read_report(second)
    found = comparing.compare(a, b)
    gate = comparing.no_worse(a, b, margin, by) if no_worse else None
    if as_json:
        facts = found.to_json() | ({} if gate is None else {"no_worse": gate.to_json()})
        click.echo(_json(facts), nl=False)
    else:
        click.echo(_lines(found))
    if gate is not None:
        end_by(gate, quiet=as_json)
    else:
        say_next(command("report", "render", second, "-o", Path(second).with_suffix(".html")))


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _lines(found: Comparison) -> str:
    from ..evals.report.findings import p_value, signed

    lines = [f"not comparable: {text}" for text in found.obstacles]
    lines += [f"note: {text}" for text in found.notes]
    for row in found.rows:
        lines.append(f"{row.suite}, {row.column}, {row.outcome}: {row.a} → {row.b}")
        if row.paired is not None and row.p is not None and row.paired.difference is not None:
            low, high = row.paired.interval()
            lines.append(
                f"  {signed(row.paired.difference)} points "
                f"(95 % interval {signed(low)} to {signed(high)}), "
                f"McNemar {p_value(row.p)}, n = {row.paired.n}"
            )
        elif row.reason not in found.obstacles:
            lines.append(f"  not paired: {row.reason}")
    return "\n".join(lines)
