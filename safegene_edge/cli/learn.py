"""`learn`: a safety gene by forward passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import command
from ..learn.settings import LearnSettings
from .adapters import beside
from .options import (
    check_outputs,
    examples,
    file_option,
    files_of,
    say_next,
    setting,
    with_adapters,
)
from .sharing import write_card
from .terminal import printable


@click.command(
    epilog=examples(
        "learn --degraded model.gguf --task prompts.txt -o gene.gguf",
        "learn --degraded a.gguf --degraded b.gguf,task.gguf --aligned base.gguf -o gene.gguf",
    )
)
@file_option(
    "--degraded",
    multiple=True,
    required=True,
    metavar="MODEL",
    help="A model that has lost refusals; several give a gene for others like them.",
)
@file_option(
    "--aligned",
    metavar="MODEL",
    help="A model of the family that refuses, or a folder with the base that the first "
    "degraded one names; default: each under a safety system prompt.",
)
@file_option(
    "--task",
    metavar="FILE",
    help="Prompts of the degraded model's own job, a line each, or JSON with a "
    '"prompt" each; no answers are needed.',
)
@file_option("-o", "--output", required=True, metavar="GENE.gguf", help="Where to write it.")
@click.option("--family", default="", help="The family's name; default: the model's.")
@setting(LearnSettings, "rank", type=click.IntRange(min=1))
@setting(LearnSettings, "prompts", type=click.IntRange(min=1))
@setting(LearnSettings, "budget", type=click.IntRange(min=1))
@setting(LearnSettings, "threads", type=click.IntRange(min=1))
@file_option("--card", metavar="README.md", help="Also write the gene's card, as a hub shows it.")
@click.option("--json", "as_json", is_flag=True, help="Print what was learnt as JSON.")
def learn(
    degraded: tuple[str, ...],
    aligned: str | None,
    task: str | None,
    output: str,
    family: str,
    rank: int | None,
    prompts: int,
    budget: int,
    threads: int | None,
    card: str | None,
    as_json: bool,
) -> None:
    """Learn a safety gene from GGUF models in minutes, by forward passes alone.

    MODEL is a GGUF file, or one with the GGUF LoRAs that it is run with: MODEL,LORA.
    """
    from ..learn import learn as run
    from ..prompts import load_prompts

    models = [files_of(text) for text in degraded]
    teacher = named(aligned)
    teachers = teacher if isinstance(teacher, list) else [teacher]
    files = [*(part for model in models for part in model), *teachers, task]
    inputs = [Path(part) for part in files if part and not Path(part).is_dir()]
    check_outputs((output, card), inputs)
    settings = LearnSettings(rank=rank, prompts=prompts, budget=budget, threads=threads)
    gene = run(
        models, teacher, task=load_prompts(task) if task else (), family=family,
        settings=settings, progress=said_on(sys.stderr),
    )  # fmt: skip
    gene.save(output, inputs)
    if card:
        write_card(card, gene, output, models[0][0])
    if as_json:
        facts = {key.removeprefix("safegene.learn."): value for key, value in gene.extra.items()}
        click.echo(json.dumps({"family": gene.family, "layers": list(gene.layers),
                               "parameters": gene.n_parameters, "scores": dict(gene.scores),
                               "sources": dict(gene.sources), **facts}, indent=2))  # fmt: skip
    click.echo(
        f"{output}: {printable(gene.family)}, {len(gene.layers)} layers, "
        f"{gene.n_parameters:,} parameters",
        err=True,
    )
    model, *adapters = models[0]
    fitted = beside(model, "fitted")
    say_next(command("recalibrate", model, output, *with_adapters(adapters), "-o", fitted))


def named(model: str | None) -> Any:
    """A model as an option gives it: a folder, or MODEL,LORA."""
    if model is None or Path(model).is_dir():
        return model
    return files_of(model)


def said_on(stream: Any) -> Any:
    """Progress as lines: each step once, and its layers where the stream is a terminal."""
    last, is_open = "", False

    def say(what: str, done: int, total: int) -> None:
        nonlocal last, is_open
        if stream.isatty():
            start = "\n" if is_open and what != last else "\r"  # a step may end early
            is_open = done != total
            end = "" if is_open else "\n"
            click.echo(f"{start}{what}: {done}/{total}{end}", file=stream, nl=False)
        elif what != last:
            click.echo(what, file=stream)
        last = what

    return say
