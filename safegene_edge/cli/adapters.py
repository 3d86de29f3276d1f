"""`convert`, `to-peft` and `inspect`: adapters as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import command
from .options import FILE, examples, file_option, say_next, with_adapters

if TYPE_CHECKING:
    from ..gene import Adapter
    from ..gguf_file import GGUFFile

_MODEL = "MODEL.gguf"
_TEMPLATE = "tokenizer.chat_template"


@click.command(
    epilog=examples(
        "convert peft-folder --base model.gguf -o task.gguf",
        "convert mlx-folder --base model.gguf -o task.gguf --text-only",
    )
)
@click.argument("peft_dir", type=FILE)
@file_option("--base", required=True, metavar=_MODEL, help="The GGUF that the adapter is for.")
@file_option("-o", "--output", required=True, metavar="ADAPTER.gguf", help="Where to write it.")
@click.option("--text-only", is_flag=True, help="Leave out the tensors of a vision or audio part.")
def convert(peft_dir: str, base: str, output: str, text_only: bool) -> None:
    """Turn a PEFT or MLX LoRA folder into a GGUF LoRA that llama.cpp loads."""
    from ..converters import convert as run

    adapter = run(peft_dir, base=base, output=output, text_only=text_only)
    click.echo(f"{output}: {_summary(adapter)}", err=True)
    if left := adapter.extra.get("safegene.peft.left_out"):
        click.echo(f"left out: {left} tensors of a vision or audio part", err=True)
    say_next(
        command("chat", base, "--adapter", output),
        command("restore", base, "--adapter", output, "-o", beside(output, "fitted")),
    )


@click.command(
    "to-peft",
    epilog=examples(
        "to-peft task.gguf --base model.gguf -o peft-folder",
        "to-peft fitted.gguf --base hf:OWNER/REPO/model.gguf -o peft-folder",
    ),
)
@click.argument("adapter", type=FILE)
@file_option("--base", required=True, metavar=_MODEL, help="The GGUF that the adapter is for.")
@file_option("-o", "--output", required=True, metavar="DIR", help="A new folder.")
def to_peft(adapter: str, base: str, output: str) -> None:
    """Turn a GGUF LoRA back into a PEFT folder."""
    from ..converters import to_peft as run

    run(adapter, base=base, output_dir=output)
    click.echo(f"{output}: written", err=True)
    say_next(f"PeftModel.from_pretrained(model, {output!r})  # Python, in peft")


@click.command(
    "inspect",
    epilog=examples(
        "inspect model.gguf",
        "inspect gene.gguf --base model.gguf --plot scores.svg",
    ),
)
@click.argument("file", type=FILE)
@file_option("--base", metavar=_MODEL, help="Also say whether the adapter fits this model.")
@file_option("--plot", metavar="SCORES.svg", help="A gene's selection scores as a picture.")
@file_option(
    "--signed-by",
    metavar="KEY",
    help="A minisign public key, or its file, that must have signed FILE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_file(
    file: str, base: str | None, plot: str | None, signed_by: str | None, as_json: bool
) -> None:
    """Show what a GGUF model or adapter holds."""
    from ..compat import check, open_model, require_fit
    from ..files import write_text
    from ..gene import SafetyGene, is_lora
    from ..gguf_file import GGUFFile
    from ..signing import verify

    signed = None if signed_by is None else verify(file, signed_by)
    header = GGUFFile(file)
    if not is_lora(header):
        if base or plot:
            raise click.UsageError(f"{file} is no adapter: --base and --plot are for adapters")
        split = header.whole("split.count", 1) > 1 and not header.whole("split.no", 0)
        facts = _model_facts(open_model(file) if split else header)
    else:
        gene = SafetyGene.load(file)
        facts = _adapter_facts(gene, header)
        if plot:
            from ..evals.report.pictures import of_scores

            write_text(plot, of_scores(gene.scores, gene.layers), [file])
        if base:
            facts["misfits"] = [str(problem) for problem in check(gene, open_model(base))]
    if signed:
        facts["signed"] = signed.comment
    click.echo(json.dumps(facts, indent=2) if as_json else _as_lines(facts))
    if base and facts["misfits"]:
        require_fit(gene, open_model(base), file)
    say_next(_after(facts, base or "MODEL.gguf"))


def _after(facts: dict[str, Any], base: str) -> str:
    """What is done with a model, a gene, and an adapter that is none."""
    file = facts["file"]
    if facts["kind"] == "model":
        return command("eval", file, "--quick")
    if facts["kind"] != "safety gene":
        return command("chat", base, "--adapter", file)
    if facts["coefficients"]:
        return command("chat", base, "--gene", file)
    return command("recalibrate", base, file, "-o", beside(base, "fitted"))


def beside(file: str, what: str) -> str:
    """A name for an output beside a file: dir/task.gguf gives dir/task.fitted.gguf."""
    local = Path(file.rpartition("/")[2] if file.startswith("hf:") else file)
    return str(local.with_name(f"{local.stem}.{what}.gguf"))


def say_where_unfitted(model: str, gene: str | None, adapters: Iterable[str]) -> None:
    """Warn of a gene whose strength was not found for this model, with the command that does."""
    from ..compat import unfitted

    if gene and (cause := unfitted(gene, model)):
        fit = command("recalibrate", model, gene, *with_adapters(adapters),
                      "-o", beside(model, "fitted"))  # fmt: skip
        click.echo(f"warning: {cause}; fit it: {fit}", err=True)


def _summary(adapter: Adapter) -> str:
    return (
        f"{adapter.architecture}, {len(adapter.pairs)} tensors in {len(adapter.layers)} layers, "
        f"{adapter.n_parameters:,} parameters"
    )


def _model_facts(file: GGUFFile) -> dict[str, Any]:
    from collections import Counter

    architecture = file.architecture
    name = file.metadata.get("general.name")
    types = Counter(info.type_name for info in file.tensors.values())
    files = {file.path, *(info.path for info in file.tensors.values())}  # the parts of a split one
    return {
        "file": str(file.path),
        "kind": "model",
        "name": name if isinstance(name, str) else "",
        "architecture": architecture,
        "layers": file.whole(f"{architecture}.block_count", 0),
        "parameters": sum(info.n_elements for info in file.tensors.values()),
        "bytes": sum(path.stat().st_size for path in files),
        "tensor_types": dict(types.most_common()),
        "context_length": file.whole(f"{architecture}.context_length", 0),
        "chat_template": _TEMPLATE in file.metadata,
        "template_warnings": _template_warnings(file),
        "tied_output": "output.weight" not in file.tensors,
        **_merged(file),
    }


def _merged(file: GGUFFile) -> dict[str, Any]:
    """What `merge` has written of where the file came from."""
    from ..gguf_file import ArrayValue

    return {
        key.removeprefix("safegene."): value.values() if isinstance(value, ArrayValue) else value
        for key, value in file.metadata.items()
        if key.startswith("safegene.merge.")
    }


def _template_warnings(file: GGUFFile) -> list[str]:
    """Suspicious parts of all chat templates; a model may have several, by name."""
    from ..template_scan import suspicious

    found = []
    for key, text in file.metadata.items():
        name = key.removeprefix(_TEMPLATE)
        if name != key and isinstance(text, str):
            found += [f"{name[1:]}: {line}" if name else line for line in suspicious(text)]
    return found


def _adapter_facts(gene: Any, file: GGUFFile) -> dict[str, Any]:
    from ..gene import INVOCATION

    facts: dict[str, Any] = {
        "file": str(file.path),
        "kind": "aLoRA adapter"
        if gene.is_alora
        else "safety gene"
        if gene.family
        else "LoRA adapter",
        "architecture": gene.architecture,
        "alpha": gene.alpha,
        "ranks": sorted({pair.rank for pair in gene.pairs.values()}),
        "parameters": gene.n_parameters,
        "zero_pairs": gene.zero_pairs,
        "bytes": file.n_bytes,
        "layers": list(gene.layers),
        "tensors": list(gene.pairs),
    }
    if gene.is_alora:
        facts["invocation_tokens"] = gene.extra.get(INVOCATION, [])
    if gene.family:
        facts |= {
            "family": gene.family,
            "sources": dict(gene.sources),
            "scores": dict(gene.scores),
            "coefficients": dict(gene.coefficients),
            "refusal_openers": list(gene.refusal_openers),
            "aligned_loss": gene.aligned_loss,
            "aligned_over_refusal": gene.aligned_over_refusal,
            "aligned_kl": gene.aligned_kl,
        }
    return facts


def _as_lines(facts: dict[str, Any]) -> str:
    from .terminal import printable

    width = max(map(len, facts))
    lines = (f"{key:<{width}}  {_shown(value)}" for key, value in facts.items())
    return "\n".join(printable(" ".join(line.splitlines())) for line in lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if value == []:
        return "none"
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:8]))
        return f"{shown}, … ({len(value)})" if len(value) > 8 else shown
    return str(value)
