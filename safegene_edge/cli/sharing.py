"""`push` and `pull`: genes to and from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import FileFormatError, command
from .options import FILE, examples, file_option, say_next

if TYPE_CHECKING:
    from ..gene import SafetyGene


@click.command(
    epilog=examples(
        "push gene.gguf OWNER/REPO --card README.md",
        "push gene.gguf OWNER/REPO --private",
    )
)
@click.argument("gene", type=FILE)
@click.argument("repository", metavar="OWNER/REPO")
@file_option("--card", metavar="README.md", help="Its card; default: one made from the gene alone.")
@click.option("--private", is_flag=True, help="Where the repository is made: for you alone.")
def push(gene: str, repository: str, card: str | None, private: bool) -> None:
    """Put a gene and its card into a repository of the Hugging Face Hub.

    The repository is made if need be. `hf auth login` says who you are.
    """
    from ..files import read_text
    from ..sharing import push as run

    try:
        text = read_text(card) if card else None
    except ValueError as error:
        raise FileFormatError(f"{card}: is not UTF-8 text", "Give a README.md") from error
    address = run(gene, repository, text=text, private=private)
    click.echo(address)
    spec = f"hf:{repository.removeprefix('hf:')}"
    say_next(command("restore", "MODEL.gguf", "--gene", spec, "-o", "fitted.gguf"))


@click.command(
    epilog=examples(
        "pull OWNER/REPO",
        "pull OWNER/REPO@v1.0 -o genes",
    )
)
@click.argument("repository", metavar="OWNER/REPO[@REVISION]")
@file_option(
    "-o", "--output", metavar="DIR", help="A folder; default: where `restore --gene auto` looks."
)
def pull(repository: str, output: str | None) -> None:
    """Copy the genes of a repository of the Hugging Face Hub, with their card.

    Each file is held to be a gene before it is kept. Models in the repository are left there.
    """
    from ..sharing import pull as run

    folder = run(repository, output)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        click.echo(str(path))
    place = output or "auto"
    say_next(command("restore", "MODEL.gguf", "--gene", place, "-o", "fitted.gguf"))


def write_card(path: str, gene: SafetyGene, output: str, model: str | None) -> None:
    """The card of a gene that was just made, beside it or where the user says."""
    from ..compat import open_model
    from ..files import write_text
    from ..sharing import base_of, card, licence_of

    header = open_model(model) if model else None
    licence, base = (licence_of(header), base_of(header)) if header else ("", "")
    text = card(gene, Path(output).name, licence=licence, base=base)
    write_text(path, text, [output])
    click.echo(f"{path}: written", err=True)
