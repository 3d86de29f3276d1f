"""A plugin for simonw's `llm`: local models with a gene, under names of your own.

    llm safegene add guarded MODEL.gguf --gene FITTED.gguf
    llm -m guarded "Hello!"

The names lie in `safegene.json` in llm's own folder. `llm` finds this module by its entry point.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from pydantic import Field

from ..errors import SafeGeneError, SettingError
from ..hub import PREFIX
from .options import FILE, described, setting
from .settings import ChatSettings

if TYPE_CHECKING:
    from ..runtime.llama import SafeLlama


@dataclass(frozen=True)
class Entry:
    """What a name stands for; paths are absolute or begin with `hf:`."""

    model: str
    gene: str | None = None
    adapters: tuple[str, ...] = ()
    scale: float = 1.0
    ctx: int = ChatSettings.ctx
    no_guard: bool = False

    def check(self) -> None:
        """SafeGeneError where a file is missing, or an adapter does not fit the model."""
        from ..compat import open_model, require_fit
        from ..gene import SafetyGene

        model = open_model(self.model)
        for path in (*self.adapters, *([self.gene] if self.gene else [])):
            require_fit(SafetyGene.load(path), model, path)

    def load(self) -> SafeLlama:
        """The model with its adapters."""
        from ..runtime.llama import SafeLlama

        guard = bool(self.gene) and not self.no_guard
        llama = SafeLlama(self.model, self.adapters, n_ctx=self.ctx, guard=guard)
        if self.gene:
            llama.attach_each([(self.gene, self.scale)])
        return llama


class SafeGeneModel(llm.Model):  # type: ignore[misc]
    """One entry, loaded when it is first asked."""

    can_stream = True

    class Options(llm.Options):  # type: ignore[misc]
        """What `-o` sets."""

        max_tokens: int = Field(
            ChatSettings.max_tokens, ge=1, description=described(ChatSettings)["max_tokens"]
        )
        temperature: float = Field(
            ChatSettings.temperature, ge=0, description=described(ChatSettings)["temperature"]
        )

    def __init__(self, model_id: str, entry: Entry) -> None:
        self.model_id, self.entry = model_id, entry
        self._llama: SafeLlama | None = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer, in pieces if `stream`."""
        try:
            self._llama = self._llama or self.entry.load()
            answer = self._llama.create_chat_completion(
                messages=_messages(prompt),
                stream=stream,
                max_tokens=prompt.options.max_tokens,
                temperature=prompt.options.temperature,
            )
            if stream:
                for chunk in answer:
                    yield chunk["choices"][0]["delta"].get("content") or ""
            else:
                yield answer["choices"][0]["message"]["content"] or ""
        except (SafeGeneError, ValueError) as error:  # ValueError: the context is full
            raise llm.ModelError(str(error)) from error


def _messages(prompt: Any) -> list[dict[str, str]]:
    """The whole conversation with the new prompt, as llm keeps it."""
    if not hasattr(prompt, "messages"):
        raise SettingError("the plugin needs llm 0.32 or later", "pip install -U llm")
    return [
        {"role": message.role, "content": "".join(getattr(p, "text", "") for p in message.parts)}
        for message in prompt.messages
    ]


# -- the names ----------------------------------------------------------------


def _file() -> Path:
    return Path(llm.user_dir()) / "safegene.json"


def _entries() -> dict[str, Entry]:
    """Every name and what it stands for; SettingError where the file was damaged."""
    path = _file()
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): Entry(**{**entry, "adapters": tuple(entry.get("adapters", ()))})
            for name, entry in facts.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SettingError(f"{path}: cannot be read ({error})", "Mend it or delete it") from error


def _write(entries: dict[str, Entry]) -> None:
    from ..files import write_text

    facts = {name: asdict(entry) for name, entry in entries.items()}
    write_text(_file(), json.dumps(facts, indent=2) + "\n")


def _absolute(path: str) -> str:
    return path if path.startswith(PREFIX) else os.path.abspath(path)  # noqa: PTH100 - keeps links


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Tell llm of every name."""
    try:
        entries = _entries()
    except SettingError as error:  # it must not take llm's other models away
        click.echo(f"safegene: {error}", err=True)
        return
    for name, entry in entries.items():
        register(SafeGeneModel(name, entry))


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_commands(cli: click.Group) -> None:
    """Add `llm safegene`."""
    cli.add_command(safegene)


@click.group()
def safegene() -> None:
    """Local models with a SafeGene Edge gene."""


@safegene.command()
@click.argument("name")
@click.argument("model", metavar="MODEL.gguf", type=FILE)
@click.option("--gene", metavar="GENE.gguf", type=FILE, help="The safety adapter.")
@click.option("--adapter", multiple=True, metavar="TASK.gguf", type=FILE, help="Other adapters.")
@click.option("--scale", default=1.0, show_default=True, help="The gene's scale.")
@setting(ChatSettings, "ctx", type=click.IntRange(min=64))
@click.option("--no-guard", is_flag=True, help="Do not look again at answers and last messages, "
              "which a gene's guard does.")  # fmt: skip
def add(
    name: str,
    model: str,
    gene: str | None,
    adapter: tuple[str, ...],
    scale: float,
    ctx: int,
    no_guard: bool,
) -> None:
    """Call MODEL.gguf, with its adapters, NAME."""
    paths = tuple(_absolute(path) for path in adapter)
    entry = Entry(_absolute(model), gene and _absolute(gene), paths, scale, ctx, no_guard)
    try:
        entry.check()
        _write({**_entries(), name: entry})
    except SafeGeneError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{name}: added; try llm -m {name} 'Hello!'", err=True)


@safegene.command("list")
def list_names() -> None:
    """Show the names."""
    try:
        entries = _entries()
    except SafeGeneError as error:
        raise click.ClickException(str(error)) from error
    for name, entry in entries.items():
        click.echo(f"{name}: {entry.model}{' with ' + entry.gene if entry.gene else ''}")


@safegene.command()
@click.argument("name")
def remove(name: str) -> None:
    """Forget NAME; no file is touched."""
    try:
        entries = _entries()
        if name not in entries:
            raise click.ClickException(f"there is no model {name}")
        del entries[name]
        _write(entries)
    except SafeGeneError as error:
        raise click.ClickException(str(error)) from error
