"""`merge` and `export`: a model with adapters, as files for other tools."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import command
from ..merge.settings import MergeSettings
from .adapters import beside, say_where_unfitted
from .options import FILE, examples, file_option, say_next, setting
from .terminal import progress

if TYPE_CHECKING:
    from ..merge.inputs import Given
    from ..merge.plan import MergeReport

_ADAPTERS = "ADAPTER.gguf[=SCALE|=EXPRESSION.json]..."


def _tools(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell."""
    from ..export import TOOLS

    return [tool for tool in TOOLS if tool.startswith(incomplete)]


def _known(ctx: click.Context, param: click.Parameter, tool: str) -> str:
    """Before the adapters are missed, where TOOL was left out."""
    from ..export import require_tool

    if not ctx.resilient_parsing:
        require_tool(tool)
    return tool


@click.command(
    epilog=examples(
        "merge model.gguf fitted.gguf -o safe.gguf",
        "merge model.gguf task.gguf=0.5 gene.gguf=strengths.json --dry-run",
    )
)
@click.argument("model", type=FILE)
@click.argument("adapters", nargs=-1, required=True, metavar=_ADAPTERS, type=FILE)
@file_option("-o", "--output", metavar="OUT.gguf", help="The model with the adapters in it.")
@setting(MergeSettings, "imatrix", metavar="FILE", type=FILE)
@setting(MergeSettings, "promote", metavar="N", type=int)
@setting(MergeSettings, "run", "--run/--plain", "run")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def merge(
    model: str,
    adapters: tuple[str, ...],
    output: str | None,
    imatrix: str | None,
    promote: int,
    run: bool | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write MODEL.gguf with adapters merged in; every tensor keeps its type.

    An adapter may carry a scale, or a gene its expression: gene.gguf=expression.json. With --run
    the model reads a few prompts first, so that rounding errors keep off what its tensors read.
    There is no way back from a merged file: keep the model and the adapters.
    """
    from ..merge import Plan
    from ..merge import merge as run_merge

    if not output and not dry_run:
        raise click.UsageError("give -o OUT.gguf, or --dry-run")
    given = [parse_adapter(text) for text in adapters]
    _say_where_unfitted(model, given)
    settings = MergeSettings(imatrix, promote, run)
    if dry_run:
        plan = Plan.of(model, given, settings)
        if promote:
            with progress("measuring") as advance:
                plan = plan.promoted(advance)
        if output:
            plan.check_outputs(output)
        report = plan.report([])
        estimate = asdict(plan.estimate()) | {"run": plan.runs_model}
    else:
        assert output  # held above
        with progress("merging") as advance:
            report = run_merge(model, given, output, settings=settings, progress=advance)
        estimate = {}
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps({**asdict(report), **estimate}, indent=2))
    elif dry_run:
        click.echo(_plan(report, estimate))
    else:
        click.echo(f"{output}: {_done(report)}", err=True)
    if dry_run:
        target = output or beside(model, "safe")
        more = [*(["--imatrix", imatrix] if imatrix else []),
                *(["--promote", promote] if promote else []),
                *([] if run is None else ["--run" if run else "--plain"])]  # fmt: skip
        say_next(command("merge", model, *adapters, *more, "-o", target))
    else:
        say_next(command("eval", output, "--quick"), command("chat", output))


@click.command(
    epilog=examples(
        "export ollama model.gguf fitted.gguf --merged -o for-ollama",
        "export llama-server model.gguf fitted.gguf -o for-llama-server",
    )
)
@click.argument("tool", shell_complete=_tools, callback=_known)
@click.argument("model", type=FILE)
@click.argument("adapters", nargs=-1, required=True, metavar=_ADAPTERS, type=FILE)
@file_option("-o", "--output", required=True, metavar="DIR", help="A folder for the files.")
@click.option("--merged", is_flag=True, help="A merged model in place of an adapter: Ollama "
              "needs it from version 0.34.1 on, and LM Studio always gets one.")  # fmt: skip
@setting(MergeSettings, "imatrix", metavar="FILE", type=FILE)
@setting(MergeSettings, "promote", metavar="N", type=int)
@setting(MergeSettings, "run", "--run/--plain", "run")
@click.option("--json", "as_json", is_flag=True, help="Print files and commands as JSON.")
def export(
    tool: str,
    model: str,
    adapters: tuple[str, ...],
    output: str,
    merged: bool,
    imatrix: str | None,
    promote: int,
    run: bool | None,
    as_json: bool,
) -> None:
    """Write what a TOOL needs to run MODEL.gguf with adapters: ollama, llama-server, lm-studio.

    Files go to DIR; the commands that use them are printed. LM Studio loads no adapters, nor
    does Ollama from version 0.34.1 on: give --merged for it.
    """
    from ..export import export as made_by

    given = [parse_adapter(text) for text in adapters]
    _say_where_unfitted(model, given)
    settings = MergeSettings(imatrix, promote, run)
    made = made_by(tool, model, given, output, merged=merged, settings=settings)
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        facts = {"files": [str(file) for file in made.files], "commands": list(made.commands)}
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo("\n".join(made.commands))


def _say_where_unfitted(model: str, given: Iterable[Given]) -> None:
    """Of those that go in as they are: their strength is baked in."""
    from ..compat import open_model

    open_model(model)  # whose own fault, such as a swap of the two, is named first
    for adapter in given:
        if isinstance(adapter, str):
            say_where_unfitted(model, adapter, ())


def parse_adapter(text: str) -> Given:
    """An adapter from "FILE", "FILE=SCALE" or "FILE=EXPRESSION.json"; a file's name may hold =."""
    from ..gene import Expression

    name, sign, how = text.rpartition("=")
    if not sign or Path(text).exists():
        return text
    if how.endswith(".json"):
        return name, Expression.load(how)
    try:
        return name, float(how)
    except ValueError:
        raise click.UsageError(
            f"'{how}' in '{text}' is neither a scale nor an expression's .json"
        ) from None


def _plan(report: MergeReport, estimate: dict[str, Any]) -> str:
    width = max(len(t.name) for t in report.tensors)
    lines = [
        f"{t.name:<{width}}  {'×'.join(map(str, t.shape)):>12}  {t.before:>5}  "
        f"{t.n_bytes:>12,} bytes"
        for t in report.tensors
    ]
    lines += [
        f"{len(report.tensors)} tensors to touch, {report.untouched} copied as they are",
        f"{report.before:,} bytes in, {report.after:,} bytes out",
        f"about {estimate['seconds']:.0f} s and {estimate['memory'] / 2**20:.0f} MiB of memory"
        + (" with --plain; the model would be run first, which takes more" * estimate["run"]),
    ]
    return "\n".join(lines)


def _done(report: MergeReport) -> str:
    return (
        f"{len(report.tensors)} tensors touched, {report.untouched} copied; "
        f"{100 * report.survived:.1f} % of the update survives, "
        f"error {report.rms_error:.2f} of its size; {report.after - report.before:+,} bytes"
    )
