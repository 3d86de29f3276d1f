"""`portfolio`: one gene, many fine-tunes."""

from __future__ import annotations

import json
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import MissingExtraError, SafeGeneError, command
from ..evals.settings import BUILT_IN
from ..portfolio_settings import PortfolioSettings
from ..recalibrate.settings import RecalibrationSettings
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

if TYPE_CHECKING:
    from ..portfolio import PortfolioRow


@click.command(
    epilog=examples(
        "portfolio models/*.gguf --gene gene.gguf -o out",
        "portfolio a.gguf b.gguf --gene gene.gguf --adapter task.gguf --limit 20 -o out",
    )
)
@click.argument("models", nargs=-1, required=True, type=FILE)
@file_option("--gene", required=True, metavar="GENE.gguf", help="A gene of their family.")
@file_option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="Folder for the results, one subfolder a model.",
)
@setting(PortfolioSettings, "adapters", "--adapter", "adapters", multiple=True,
         metavar="TASK.gguf", type=FILE)  # fmt: skip
@setting(PortfolioSettings, "suites", "--suite", "suites", multiple=True,
         metavar="NAME|FILE", type=FILE)  # fmt: skip
@setting(PortfolioSettings, "limit", metavar="N", type=click.IntRange(min=1))
@setting(PortfolioSettings, "examples", metavar="FILE.jsonl", type=FILE)
@setting(RecalibrationSettings, "kl_budget", type=FINITE)
@setting(RecalibrationSettings, "over_refusal", type=Number(0, 1))
@setting(RecalibrationSettings, "passes", type=click.IntRange(1, 99))
@setting(RecalibrationSettings, "n_ctx", "--ctx", "n_ctx", type=click.IntRange(min=64))
@setting(RecalibrationSettings, "anyway", is_flag=True)
@click.option("--dask", metavar="ADDRESS", help="A dask.distributed scheduler to run on.")
@file_option("--plot", metavar="FILE.svg", help="Every model before and after as a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def portfolio(
    models: tuple[str, ...],
    gene: str,
    output: str,
    adapters: tuple[str, ...],
    suites: tuple[str, ...],
    limit: int,
    examples: str | None,
    kl_budget: float | None,
    over_refusal: float,
    passes: int,
    n_ctx: int | None,
    anyway: bool,
    dask: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Recalibrate and evaluate many MODELS with one gene; one table at the end.

    A model that is done is not done again. One that fails stops no other; the exit code is
    then 2. With --dask, the workers must see the same files under the same paths.
    """
    from ..files import write_text
    from ..portfolio import picture, table
    from ..portfolio import portfolio as run

    files = (*adapters, *(name for name in suites if name not in BUILT_IN), examples)
    check_outputs((plot,), filter(None, (*models, gene, *files)))
    recalibration = RecalibrationSettings(
        kl_budget=kl_budget, over_refusal=over_refusal, passes=passes, n_ctx=n_ctx, anyway=anyway
    )
    settings = PortfolioSettings(suites, limit, examples, recalibration, adapters)

    def say(row: PortfolioRow) -> None:
        words = f"failed: {row.error}" if row.error else f"done in {row.seconds:.0f} s"
        click.echo(f"{row.model}: {words}", err=True)

    with ExitStack() as stack:
        executor = _dask(dask, stack) if dask else None
        rows = run(models, gene, output, settings=settings, executor=executor, on_row=say)
    if plot and any(row.refused for row in rows):
        write_text(plot, picture(rows))
        click.echo(f"plot: {plot}", err=True)
    click.echo(json.dumps([row.to_json() for row in rows], indent=2) if as_json else table(rows))
    if failed := sum(bool(row.error) for row in rows):
        raise SafeGeneError(f"{failed} of {len(rows)} models failed", "Their lines above say why")
    for row in rows:
        fitted = Path(output) / Path(row.model).stem / "fitted.gguf"
        if fitted.exists():
            own = [row.model, *with_adapters(adapters)]
            say_next(command("chat", *own, "--gene", fitted))
            break


def _dask(address: str, stack: ExitStack) -> Executor:
    """dask.distributed's executor on a scheduler."""
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            "--dask needs dask.distributed", "pip install 'safegene-edge[cluster]'"
        ) from error
    try:
        client = stack.enter_context(Client(address, timeout=10))
    except (OSError, ValueError) as error:
        raise SafeGeneError(f"{address}: no scheduler answers ({error})", "Check it") from error
    executor: Executor = stack.enter_context(client.get_executor())
    return executor
