"""`scan`: does a model refuse? Seconds a model, many at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import command
from .options import FILE, examples, file_option, say_next

if TYPE_CHECKING:
    from ..evals.scan import Scan


@click.command(
    epilog=examples(
        "scan base.gguf fine-tune.gguf",
        "scan models-folder --json",
    )
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL.gguf|FOLDER...", type=FILE)
@file_option(
    "--adapter", multiple=True, metavar="LORA.gguf", help="On for every model, such as a gene."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def scan(models: tuple[str, ...], adapter: tuple[str, ...], as_json: bool) -> None:
    """Tell in seconds whether models refuse, have lost it, or had it cut out.

    No answer is generated: the logits behind some harmful and harmless prompts say whether an
    answer would open with a refusal. Give a fine-tune beside its base, or an F16 beside its
    quantisations. `eval` counts what is really answered.
    """
    from ..evals.scan import Scan, models_in, scan_all

    paths = models_in(models)
    names = [path.name for path in paths]
    found: list[dict[str, Any]] = []
    failed = shown = False
    for one in scan_all(paths, adapter):
        if isinstance(one, Scan):
            found.append(one.to_json())
            if not as_json:
                _show(one, first=not shown, alike=names.count(Path(one.path).name) > 1)
            shown = True
        else:
            path, error = one
            failed = True
            found.append({"model": Path(path).name, "path": path, "error": str(error)})
            name = " ".join(path.split())  # on one line, whatever the name
            about = "" if str(error).startswith(name) else f"{name}: "
            click.echo(f"error: {about}{error}", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    if failed:
        raise click.exceptions.Exit(2)
    on = [part for path in adapter for part in ("--adapter", path)]
    lost = [one["path"] for one in found if one.get("finding") != "refuses"]
    say_next(command("eval", *(lost or paths)[:1], *on, "--quick"))


_ROW = "{:<18} {:<25} {:<25} {:<17} {:>5}  {}"  # a name may be long, and stands last


def _show(one: Scan, first: bool, alike: bool) -> None:
    """A line as soon as it is known, the headings before the first.

    Args:
        alike: other models' files have the same name, so that the path is shown.
    """
    from ..evals.statistics import percent

    if first:
        click.echo(_ROW.format("", "harmful refused", "harmless refused", "in order", "s", "model"))
    low, high = one.order_interval
    order = f"{percent(one.order)} % ({percent(low)}–{percent(high)})"
    cells = (one.finding, str(one.refused), str(one.over_refused), order)
    click.echo(
        _ROW.format(
            *cells, f"{one.seconds:.1f}", " ".join((one.path if alike else one.name).split())
        )
    )
