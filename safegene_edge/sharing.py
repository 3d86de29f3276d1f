"""Genes to share: the card that a hub shows, and the gene of a folder that fits a model.

card        a README.md with front matter, from the gene's own facts and a report
find        a gene for a model, by architecture, shapes and tokenizer
push, pull  to and from a repository of the Hugging Face Hub, through its own client
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .compat import check, open_model, tokenizer_digest
from .errors import (
    FileFormatError,
    MismatchError,
    OutputError,
    SafeGeneError,
    SettingError,
    command,
)
from .files import PathLike, atomic_output, cache_folder, writing
from .gene import SHIPPED, SafetyGene, is_lora
from .gguf_file import GGUFFile
from .hub import Repository, download, resolve, sizes, upload

ANYWHERE, PACKAGE = "auto", "package"
CARD = "README.md"
_LARGEST = 64 << 20  # bytes: a gene is a few MB, and a repository may hold models as well
_LIMITS = (
    "No guarantee. A gene changes what a model tends to do, and whoever holds the files can leave "
    "it out.",
    "It gives back what a fine-tune has lost. It filters no model that was made to do harm.",
    "Find its strength for your model before you use it, and read the over-refusals in the report.",
    "A gene can make a model less safe just as well: check its hash, and evaluate it.",
)


# -- the card ------------------------------------------------------------------


def card(
    gene: SafetyGene,
    file: str,
    *,
    licence: str = "",
    base: str = "",
    report: Mapping[str, Any] | None = None,
    by_form: Mapping[str, Sequence[object]] | None = None,
) -> str:
    """A gene's README.md.

    Args:
        file: the gene's name in its repository.
        licence: as the Hub names it, such as "apache-2.0"; empty: nobody said.
        base: the model on the Hub that the family descends from, "OWNER/REPO"; may be empty.
        report: before and after, as `eval --json` has it.
        by_form: form of prompts to what was counted of harmful and of harmless ones.
    """
    name = _plain(gene.family) or "unnamed family"
    front = {
        "license": licence or None,
        "base_model": base or None,
        "library_name": "safegene-edge",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "lora", "safety", "refusal", "llama.cpp", "safegene"],
    }
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(v)}\n" for key, v in front.items() if v) + "---",
        f"# A safety gene for {name}",
        "A GGUF LoRA that puts lost refusals back into fine-tunes of one family. llama.cpp loads "
        "it like any other; SafeGene Edge finds its strength, after "
        "[SafeGene](https://arxiv.org/abs/2606.06519).",
        "## Use it",
        f"```\n{command('recalibrate', 'MODEL.gguf', file, '-o', 'fitted.gguf')}\n"
        f"{command('chat', 'MODEL.gguf', '--gene', 'fitted.gguf')}\n```",
        "## What it is",
        _table(("fact", "value"), _facts(gene)),
        "## What it was learnt from",
        _table(("role", "SHA-256"), [(k, f"`{_plain(v)}`") for k, v in gene.sources.items()])
        if gene.sources
        else "Not recorded.",
        "## Figures",
        *_figures(report, by_form or {}),
        "## Limits",
        "\n".join(f"- {line}" for line in _LIMITS),
        "## Licence",
        f"{_plain(licence)}. The base model's own licence holds as well."
        if licence
        else "Not stated. The base model's own licence holds.",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(gene: SafetyGene) -> list[tuple[str, str]]:
    learnt = {key.removeprefix("safegene.learn."): v for key, v in gene.extra.items()}
    rows = [
        ("architecture", _plain(gene.architecture)),
        ("layers", f"{len(gene.layers)}: {', '.join(map(str, gene.layers))}"),
        ("parameters", f"{gene.n_parameters:,}"),
        ("ranks", ", ".join(map(str, sorted({pair.rank for pair in gene.pairs.values()})))),
        ("SHA-256 of what it does", f"`{gene.sha256}`"),
    ]
    if "teacher" in learnt:
        own = learnt["teacher"] == "itself"
        rows += [
            ("teacher", "the model itself, under a system prompt" if own else "an aligned model"),
            ("harmful prompts", f"{learnt.get('refused')} refused of {learnt.get('asked')} asked"),
            ("harmless prompts", str(learnt.get("harmless"))),
        ]
    if gene.aligned_loss:
        rows.append(("the aligned model's refusals", f"{1 - gene.aligned_loss:.0%}"))
        rows.append(("the aligned model's over-refusals", f"{gene.aligned_over_refusal:.0%}"))
    return rows


def _figures(
    report: Mapping[str, Any] | None, by_form: Mapping[str, Sequence[object]]
) -> Iterator[str]:
    if report is None:
        yield "Not measured with this card. `safegene-edge eval` does, on your own model."
        return
    yield f"On `{_plain(report['model']['name'])}`, without and with the fitted gene:"
    yield _table(("suite", "counted", "before", "after"), map(_suite, report["suites"]))
    if by_form:
        yield "By the form of the prompts, on examples that the fit never saw:"
        rows = [(form, *map(str, counts)) for form, counts in by_form.items()]
        yield _table(("form", "harmful, refused", "harmless, over-refused"), rows)


def _suite(suite: Mapping[str, Any]) -> tuple[str, ...]:
    """Refused; of harmless prompts those, too, that were refused in part."""
    harmful = suite["kind"] == "harmful"
    labels = ("refused",) if harmful else ("refused", "partly_refused")
    columns = [suite[column] for column in ("before", "after") if suite.get(column)]
    counts = [f"{sum(c[label] for label in labels)} of {c['total']}" for c in columns]
    return _plain(suite["name"]), "refused" if harmful else "over-refused", *counts


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A name out of a file, as one line that Markdown takes for text."""
    shown = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return "".join("?" if char in "`|<>[]\\" else char for char in shown)


def licence_of(model: GGUFFile) -> str:
    """What a model's own header says of its licence; empty where it says nothing."""
    return model.text("general.license", "")


def base_of(model: GGUFFile) -> str:
    """The repository that a model's header names as its base; empty where it names none."""
    address = model.text("general.base_model.0.repo_url", "")
    owner, _, name = address.removeprefix("https://huggingface.co/").partition("/")
    return f"{owner}/{name}" if name and "/" not in name and ":" not in owner else ""


# -- the gene that fits --------------------------------------------------------


def is_place(gene: object) -> bool:
    """Whether a gene is given as a place to look in, as `find` has them."""
    if not isinstance(gene, (str, Path)):
        return False
    return (
        str(gene) in (ANYWHERE, PACKAGE)
        or Repository.parse(gene) is not None
        or Path(gene).is_dir()
    )


def find(place: PathLike, target: PathLike) -> tuple[str, SafetyGene]:
    """The gene in a place that fits a model by architecture, shapes and tokenizer, and its name.

    Args:
        place: a folder; `hf:OWNER/REPO`; "package"; or "auto": that and what `pull` keeps.

    Raises:
        MismatchError: none fits.
        SettingError: several fit, and nothing tells them apart.
    """
    model, seen = open_model(target), 0
    tokenizer = tokenizer_digest(model)
    fits: dict[str, tuple[str, SafetyGene]] = {}
    for name, gene in _genes(str(place)):
        seen += 1
        if not check(gene, model) and gene.tokenizer in ("", tokenizer):
            fits.setdefault(gene.sha256, (name, gene))
    if not fits:
        raise MismatchError(
            f"{place}: none of its {seen} genes fits {target} (architecture, shapes, tokenizer)",
            "Leave --gene out to learn one",
        )
    known = [found for found in fits.values() if found[1].tokenizer]
    best = known or list(fits.values())
    if len(best) > 1:
        names = ", ".join(sorted(name for name, _ in best))
        raise SettingError(f"{place}: several genes fit {target}: {names}", "Give one of them")
    return best[0]


def _genes(place: str) -> Iterator[tuple[str, SafetyGene]]:
    """Genes that no strengths are folded into, by name; other files are passed over."""
    if place in (ANYWHERE, PACKAGE):
        yield f"{SHIPPED} of the package", SafetyGene.shipped()
    if place == PACKAGE:
        return
    folder = _kept() if place == ANYWHERE else Path(place)
    if Repository.parse(place) is not None:
        folder = pull(place)
    for path in sorted(folder.rglob("*.gguf")) if folder.is_dir() else ():
        try:
            if is_lora(GGUFFile(path)):
                gene = SafetyGene.load(path)
                if gene.family and not gene.coefficients:
                    yield str(path), gene
        except SafeGeneError:
            continue


def _kept() -> Path:
    """Where pulled genes lie."""
    return cache_folder() / "genes"


# -- the Hub -------------------------------------------------------------------


def push(gene: PathLike, repository: str, *, text: str | None = None, private: bool = False) -> str:
    """Put a gene and its card into a repository, which is made if need be.

    Args:
        repository: OWNER/REPO, with or without "hf:".
        text: the card; default: `card` of the gene alone.

    Returns:
        The address of the commit.

    Raises:
        FileFormatError: the file is no gene, or the Hub refuses or cannot be reached.
    """
    to = _repository(repository)
    found, file = SafetyGene.load(gene), resolve(gene)
    name = file.name
    if not found.family:
        raise FileFormatError(f"{gene}: is a LoRA, but no gene", "Give what `learn` writes")
    files: dict[str, Path | bytes] = {name: file, CARD: (text or card(found, name)).encode()}
    return upload(to, files, private=private, message=f"Gene of {_plain(found.family)}")


def pull(repository: str, folder: PathLike | None = None) -> Path:
    """Copy a repository's genes and its card into a folder, each held to be what its name says.

    Args:
        repository: OWNER/REPO or OWNER/REPO@REVISION, with or without "hf:".
        folder: made if need be; default: where `find("auto", …)` looks.

    Returns:
        The folder.

    Raises:
        FileFormatError: there is no gene in it, or as of any `hf:` path.
        OutputError: a folder that was given holds a README.md of its own.
    """
    source = _repository(repository)
    home = Path(folder) if folder is not None else _kept() / source.name.replace("/", "--")
    named = {name: size for name, size in sizes(source).items() if _is_inside(name)}
    genes = [name for name, size in named.items() if name.endswith(".gguf") and size <= _LARGEST]
    local = {name: download(source, name) for name in genes}
    kept = {name: path for name, path in local.items() if _is_gene(path)}
    if not kept:
        raise FileFormatError(
            f"{source}: has no gene among its {len(named)} files", "Give a gene's repository"
        )
    if CARD in named:
        ours = folder is None or any((home / name).exists() for name in kept)
        if (home / CARD).exists() and not ours:
            raise OutputError(
                f"{home / CARD}: would be overwritten, and is no card of these genes",
                "Give another folder",
            )
        kept[CARD] = download(source, CARD)
    for name, path in kept.items():
        output = home / name
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(output, [path]) as temporary:
            shutil.copyfile(path, temporary)
    if folder is None:  # of another revision, or withdrawn
        for path in set(home.rglob("*.gguf")) - {home / name for name in kept}:
            path.unlink(missing_ok=True)
    return home


def _is_inside(name: str) -> bool:
    """Whether a file of this name lies in the folder that it is put into, on any system."""
    return not (set("\\:") & set(name) or Path(name).is_absolute() or ".." in Path(name).parts)


def _is_gene(path: Path) -> bool:
    try:
        return is_lora(GGUFFile(path)) and bool(SafetyGene.load(path).family)
    except SafeGeneError:
        return False


def _repository(text: str) -> Repository:
    found = Repository.parse(text if text.startswith("hf:") else f"hf:{text}")
    if found is None:
        raise SettingError(f"{text}: is no repository", "Give OWNER/REPO")
    return found
