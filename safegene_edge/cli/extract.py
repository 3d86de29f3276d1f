"""`extract`: a safety gene from an aligned model and degraded ones."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import command
from ..training.settings import ExtractSettings
from .adapters import beside
from .options import (
    FINITE,
    check_outputs,
    comma_separated,
    examples,
    file_option,
    files_of,
    say_next,
    setting,
)
from .sharing import write_card


@click.command(
    epilog=examples(
        "extract --aligned model-folder --degrade auto -o gene.gguf",
        "extract --aligned model.gguf --degraded task-lora --degraded other.gguf -o gene.gguf",
    )
)
@file_option("--aligned", required=True, metavar="MODEL", help="The model that refuses harm.")
@file_option(
    "--degraded",
    multiple=True,
    metavar="MODEL",
    help="A model that lost it; may be given several times.",
)
@click.option("--degrade", type=click.Choice(["auto"]), help="Make degraded models of MODEL first.")
@file_option("--base", metavar="MODEL.gguf", help="A GGUF of the family; default: the first given.")
@file_option("-o", "--output", required=True, metavar="GENE.gguf", help="Where to write it.")
@file_option("--work", metavar="DIR", help="Checkpoints; default: GENE.work beside the output.")
@click.option("--method", type=click.Choice(["distil", "delta"]), default="distil",
              show_default=True, help="Learn, or take the weights' difference.")  # fmt: skip
@click.option("--family", default="", help="The family's name; default: the base's.")
@setting(ExtractSettings, "rank", type=click.IntRange(min=1))
@setting(ExtractSettings, "targets", type=comma_separated, metavar="A,B")
@setting(ExtractSettings, "epochs", type=click.IntRange(min=1))
@setting(ExtractSettings, "learning_rate", type=FINITE)
@setting(ExtractSettings, "batch", type=click.IntRange(min=1))
@setting(ExtractSettings, "budget", type=click.IntRange(min=1))
@setting(ExtractSettings, "select", "--select/--no-select")
@setting(ExtractSettings, "seed", type=int)
@file_option("--card", metavar="README.md", help="Also write the gene's card, as a hub shows it.")
def extract(
    aligned: str,
    degraded: tuple[str, ...],
    degrade: str | None,
    base: str | None,
    output: str,
    work: str | None,
    method: str,
    family: str,
    rank: int,
    targets: tuple[str, ...],
    epochs: int,
    learning_rate: float,
    batch: int,
    budget: int | None,
    select: bool,
    seed: int,
    card: str | None,
) -> None:
    """Extract a safety gene, once for a family of models.

    MODEL is a Hugging Face folder, a GGUF file, or either with PEFT folders: MODEL,ADAPTER.
    For --degraded a PEFT folder alone lies on top of the aligned model. A run that was
    stopped goes on where it was.
    """
    from ..training.extract import extract as run
    from ..training.processes import Processes

    if not degraded and not degrade:
        raise click.UsageError("give --degraded MODEL, or --degrade auto")
    settings = ExtractSettings(
        rank=rank, alpha=2 * rank, targets=targets, epochs=epochs,
        learning_rate=learning_rate, batch=batch, budget=budget, select=select, seed=seed,
    )  # fmt: skip
    inputs = [Path(part) for text in (aligned, *degraded) for part in files_of(text)]
    check_outputs((output, card), [path for path in inputs if path.is_file()])
    folder = Path(work) if work else Path(output).with_suffix(".work")
    worse = list(degraded)
    if degrade:
        worse += _degraded(aligned, folder, base)
    gene = run(
        aligned, worse, folder=folder / "gene", method=method, settings=settings, base=base,
        family=family, report=_report,
    )  # fmt: skip
    if Processes.current().is_first:
        gene.save(output)
        if card:
            write_card(card, gene, output, base)
        _report(
            f"{output}: {gene.family}, {len(gene.layers)} layers, {gene.n_parameters:,} parameters"
        )
        say_next(command("recalibrate", "MODEL.gguf", output, "-o", beside(output, "fitted")))


def _degraded(aligned: str, folder: Path, base: str | None) -> list[str]:
    """Degraded models made here, as the command's own way to name them."""
    from ..training.degrade import degrade

    made = degrade(aligned, folder / "degraded", base=base, report=_report)
    return [",".join(map(str, (source.base, *source.adapters))) for source in made]


def _report(line: str) -> None:
    click.echo(line, err=True)
