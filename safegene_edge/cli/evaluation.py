"""`eval`: refusals and harmless answers, before and after."""

from __future__ import annotations

import json
import sys
from typing import Any

import click


@click.command("eval")
@click.argument("model", type=click.Path())
@click.option("--gene", metavar="GENE.gguf", help="The safety adapter; measures before and after.")
@click.option("--adapter", multiple=True, metavar="TASK.gguf", help="Other adapters, always on.")
@click.option("--suite", "suites", multiple=True, metavar="NAME|FILE", help="May be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="At most N a suite, evenly spread.")
@click.option("--max-tokens", default=48, show_default=True, type=click.IntRange(min=1))
@click.option("--parallel", default=16, show_default=True, type=click.IntRange(1, 255))
@click.option("--json", "json_out", metavar="FILE", help="Write the report as JSON.")
def evaluate_model(
    model: str,
    gene: str | None,
    adapter: tuple[str, ...],
    suites: tuple[str, ...],
    limit: int | None,
    max_tokens: int,
    parallel: int,
    json_out: str | None,
) -> None:
    """Count refusals on harmful prompts and answers on harmless ones.

    Without --suite the project's own suites "harmful", "borderline" and "harmless" are used;
    "languages" asks in eight languages. A FILE may be JSONL, CSV (AdvBench, HarmBench and their
    like) or plain text, one prompt a line.
    """
    from ..evals.evaluate import EvalSettings, evaluate
    from ..evals.suites import DEFAULT_SUITES
    from ..gguf_file import check_output, write_text

    inputs = [model, *adapter, *([gene] if gene else [])]
    if json_out:
        check_output(json_out, inputs)  # before the work, not after it
    settings = EvalSettings(max_tokens=max_tokens, limit=limit, n_parallel=parallel)
    with _progress() as advance:
        report = evaluate(
            model,
            gene,
            adapters=adapter,
            suites=suites or DEFAULT_SUITES,
            settings=settings,
            progress=advance,
        )
    click.echo(report.table())
    if json_out:
        write_text(json_out, json.dumps(report.to_json(), indent=2) + "\n", inputs)
        click.echo(f"report: {json_out}", err=True)


class _progress:  # noqa: N801 - reads as the function it is used as
    """A bar on stderr, only on a terminal; its `advance(done, total)` may be called often."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Any:
        return self._advance if sys.stderr.isatty() else None

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = click.progressbar(length=total, label="evaluating", file=sys.stderr)
            self._bar.__enter__()
        self._bar.update(done - self._bar.pos)

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)
