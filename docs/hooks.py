"""What the site needs beyond docs/: the reference, design/, the benches' results, the schema.

The pages link to files where they lie in the repository (`../bench/judge/results.md`), so that
the links work there, too. Here the files enter the site, and the links follow. The reference is
generated: the commands from click, the settings from their classes, the report from its schema.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("design/*.md", "bench/*/*.md", "bench/*/*.svg")
SCHEMA = "safegene_edge/evals/report/data/report.schema.json"
SETTINGS = {  # class and the commands that take it
    "safegene_edge.learn.settings.LearnSettings": "learn, restore",
    "safegene_edge.recalibrate.settings.RecalibrationSettings": "recalibrate, restore, portfolio",
    "safegene_edge.merge.settings.MergeSettings": "merge, export",
    "safegene_edge.evals.settings.EvalSettings": "eval",
    "safegene_edge.evals.settings.CostSettings": "eval",
    "safegene_edge.evals.settings.GateSettings": "eval, report compare",
    "safegene_edge.evals.settings.EndpointModel": "eval --endpoint",
    "safegene_edge.portfolio_settings.PortfolioSettings": "portfolio",
    "safegene_edge.serve.settings.ServeSettings": "serve",
    "safegene_edge.cli.settings.ChatSettings": "chat",
    "safegene_edge.training.settings.ExtractSettings": "extract",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie elsewhere in the repository."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        _add(files, config, path.relative_to(ROOT).as_posix())
    _add(files, config, SCHEMA)
    return files


def _add(files: Files, config: Any, name: str) -> None:
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Add what is generated. Links out of docs/, and from design/ into it, become the site's."""
    made = {"cli.md": command_pages, "settings.md": settings_pages, "schema.md": schema_page}
    if page.file.src_uri in made:
        markdown += "\n" + "\n".join(made[page.file.src_uri]())
    if page.file.src_uri.startswith("design/"):
        return markdown.replace("](../docs/", "](../")
    for outside in ("design/", "bench/", SCHEMA):
        markdown = markdown.replace(f"](../{outside}", f"]({outside}")
    return markdown


# -- the commands --------------------------------------------------------------


def command_pages() -> Iterator[str]:
    """Every command: what it does, how it is typed, its options."""
    sys.path.insert(0, str(ROOT))
    try:
        from safegene_edge.cli import cli
    finally:
        sys.path.remove(str(ROOT))
    yield from _commands(cli, "safegene-edge", "##")


def _commands(group: click.Group, above: str, marks: str) -> Iterator[str]:
    for name, command in group.commands.items():
        path = f"{above} {name}"
        context = click.Context(command, info_name=path)
        yield f"{marks} {path}\n"
        yield f"{_paragraphs(command.help or '')}\n"
        yield f"```\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
        if command.epilog:
            lines = command.epilog.splitlines()[2:]
            yield "```sh\n" + "\n".join(line.strip() for line in lines) + "\n```\n"
        rows = [option.get_help_record(context) for option in command.get_params(context)]
        if shown := [row for row in rows if row and row[1]]:
            yield "| option | what it does |\n| --- | --- |"
            yield from (f"| `{_cell(option)}` | {_cell(text)} |" for option, text in shown)
            yield ""
        if isinstance(command, click.Group):
            yield from _commands(command, path, marks + "#")


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


# -- the settings --------------------------------------------------------------


def settings_pages() -> Iterator[str]:
    """Every settings class, each field once: default and meaning."""
    from safegene_edge.cli.options import described

    for path, commands in SETTINGS.items():
        module, _, name = path.rpartition(".")
        kind = getattr(import_module(module), name)
        yield f"## {name}\n\n`from {module} import {name}`; on the command line: `{commands}`.\n"
        yield "| setting | default | meaning |\n| --- | --- | --- |"
        for field in fields(kind):
            default = "" if field.default is MISSING else f"`{field.default!r}`"
            yield f"| `{field.name}` | {_cell(default)} | {_cell(described(kind)[field.name])} |"
        yield ""


# -- the report ----------------------------------------------------------------


def schema_page() -> Iterator[str]:
    """Every value of a report, by its path."""
    schema = json.loads((ROOT / SCHEMA).read_text(encoding="utf-8"))
    yield from _values("The report", schema)
    for name, part in schema["$defs"].items():
        yield from _values(name, part)


def _values(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}\n\n{part.get('description', '')}\n"
    if "properties" not in part:
        yield f"`{_type(part)}`\n"
        return
    yield "| key | type | meaning |\n| --- | --- | --- |"
    for key, value in part["properties"].items():
        if isinstance(value, dict):
            needed = "" if key in part.get("required", ()) else " (may be missing)"
            meaning = _cell(value.get("description", "") + needed).strip()
            yield f"| `{key}` | `{_cell(_type(value))}` | {meaning} |"
    yield ""


def _type(value: Mapping[str, Any]) -> str:
    if "$ref" in value:
        return str(value["$ref"]).rpartition("/")[2]
    for choice in ("anyOf", "oneOf"):
        if choice in value:
            return " or ".join(map(_type, value[choice]))
    if "enum" in value:
        return " or ".join(map(json.dumps, value["enum"]))
    if "const" in value:
        return json.dumps(value["const"])
    kind = value.get("type", "any value")
    kind = " or ".join(kind) if isinstance(kind, list) else kind
    if kind == "array" and isinstance(value.get("items"), dict):
        return f"list of {_type(value['items'])}"
    inner = value.get("additionalProperties")
    return f"{kind} of {_type(inner)}" if kind == "object" and isinstance(inner, dict) else kind


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
