"""`chat`: talk to a model, and feel what the gene changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SafeGeneError, SettingError, command
from .adapters import say_where_unfitted
from .options import FILE, Number, examples, file_option, say_next, setting, with_adapters
from .settings import ChatSettings
from .terminal import Lines, paint, printable

if TYPE_CHECKING:
    from ..runtime.llama import AttachedAdapter, SafeLlama

_HELP = '''\
/safe on|off   switch the gene
/scale X       set the gene's scale; alone: show it
/gene          show what the gene is
/again         ask the last question again
/new           forget the conversation
/save FILE     write the conversation as .json or .md
/help  /quit   (or Ctrl-D; Ctrl-C stops an answer)

A line that ends in \\ goes on in the next; """ opens and closes a message of many lines.
A message that begins with a slash: put a space before it.'''


@click.command(
    epilog=examples(
        "chat model.gguf --gene fitted.gguf",
        "chat model.gguf --gene fitted.gguf --system 'You sort mail.' --temperature 0.7",
    )
)
@click.argument("model", type=FILE)
@file_option("--gene", metavar="GENE.gguf", help="The safety adapter; switched with /safe.")
@file_option("--adapter", multiple=True, metavar="TASK.gguf", help="Other adapters, always on.")
@click.option("--system", metavar="TEXT", help="A system message.")
@setting(ChatSettings, "max_tokens", type=click.IntRange(min=1))
@setting(ChatSettings, "temperature", type=Number(min=0))
@setting(ChatSettings, "ctx", type=click.IntRange(min=64))
@click.option(
    "--no-guard",
    is_flag=True,
    help="Do not look again at answers and last messages, which a gene's guard does.",
)
@click.option("--no-history", is_flag=True, help="Keep no history of lines between chats.")
def chat(
    model: str,
    gene: str | None,
    adapter: tuple[str, ...],
    system: str | None,
    max_tokens: int,
    temperature: float,
    ctx: int,
    no_guard: bool,
    no_history: bool,
) -> None:
    """Chat with a model in the terminal; /help lists the commands.

    Answers go to standard output, everything else to standard error, so that a pipe works:
    each line, or each block between two lines of three double quotes, is a message. The
    exit code is 2 where a pipe's messages got no answer at all.
    """
    from ..files import cache_folder
    from ..runtime.chat import require_chat
    from ..runtime.llama import SafeLlama

    say_where_unfitted(model, gene, adapter)
    llama = SafeLlama(model, adapter, n_ctx=ctx, guard=bool(gene) and not no_guard)
    try:
        require_chat(llama, system=bool(system))
        handle = llama.attach_each([gene])[0] if gene else None
        lines = Lines(None if no_history else cache_folder() / "chat_history")
        names = _Names(model, gene, adapter)
        options = {"max_tokens": max_tokens, "temperature": temperature}
        session = _Session(llama, handle, lines, names, system, options)
        _say(f"{model}{' with ' + gene if gene else ''}. /help lists the commands.")
        while session.turn():
            pass
    finally:
        llama.close()
    if session.answered is False and not lines.at_keyboard:  # who is there has seen why
        raise SafeGeneError("none of the messages got an answer", "The lines above say why")
    given = ["--gene", gene] if gene else []
    say_next(command("serve", model, *with_adapters(adapter), *given))


def _say(text: str) -> None:
    """A line that is no answer."""
    click.echo(text, err=True)


@dataclass(frozen=True)
class _Names:
    """The files as the user named them."""

    model: str
    gene: str | None
    adapters: tuple[str, ...]

    @property
    def inputs(self) -> list[str]:
        return [name for name in (self.model, self.gene, *self.adapters) if name]


@dataclass(frozen=True)
class _Message:
    """A message of the conversation; `scale` is the gene's, behind an answer."""

    role: str
    content: str
    scale: float | None = None


class _Session:
    """A conversation and what its slash commands change."""

    def __init__(
        self,
        llama: SafeLlama,
        gene: AttachedAdapter | None,
        lines: Lines,
        names: _Names,
        system: str | None,
        options: dict[str, Any],
    ) -> None:
        self.llama, self.gene, self.lines, self.names = llama, gene, lines, names
        self.options = options
        self.opening = [_Message("system", system)] if system else []
        self.messages = list(self.opening)
        self.answered: bool | None = None  # None: nothing was asked
        self.strength = 1.0  # the scale that /safe on returns to

    def turn(self) -> bool:
        """Read a message and act on it; False ends the chat."""
        try:
            text = self.lines.message(self._mark())
        except EOFError:
            if self.lines.at_keyboard:
                _say("")
            return False
        except KeyboardInterrupt:
            if not self.lines.at_keyboard:
                raise
            _say("\n(Ctrl-D or /quit ends the chat)")
            return True
        if not text.startswith("/") or "\n" in text:
            if text.strip():
                self._ask(text.strip())
            return True
        verb, _, rest = text.strip().partition(" ")
        if verb in ("/quit", "/exit"):
            return False
        try:
            self._command(verb, rest.strip())
        except SafeGeneError as error:
            _say(str(error))
        return True

    def _mark(self) -> str:
        if self.gene is None:
            return "> "
        return f"[safe {self.gene.scale:g}] > " if self.gene.scale else "[safe off] > "

    # -- commands ---------------------------------------------------------

    def _command(self, verb: str, rest: str) -> None:
        commands = {
            "/safe": self._safe,
            "/scale": self._scale,
            "/gene": self._facts,
            "/again": self._again,
            "/new": self._new,
            "/save": self._save,
        }
        if verb in commands:
            commands[verb](rest)
            return
        if verb != "/help":
            _say(f"{verb} is no command; to say it, put a space before it")
        _say(_HELP)

    def _safe(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise SettingError("/safe wants on or off")
        self._set_scale(self.strength if rest == "on" else 0.0)

    def _scale(self, rest: str) -> None:
        if not rest:
            _say(f"the gene's scale is {self._loaded().scale:g}")
            return
        try:
            scale = float(rest)
        except ValueError:
            raise SettingError("/scale wants a number, such as /scale 0.8") from None
        self._set_scale(scale)
        self.strength = scale or self.strength

    def _set_scale(self, scale: float) -> None:
        self.llama.set_scale(self._loaded(), scale)

    def _loaded(self) -> AttachedAdapter:
        if self.gene is None:
            raise SettingError("no gene is loaded: start with --gene GENE.gguf")
        return self.gene

    def _facts(self, rest: str) -> None:
        from ..gene import SafetyGene

        handle = self._loaded()
        gene = handle.content
        family = gene.family if isinstance(gene, SafetyGene) else ""
        known = gene.coefficients if isinstance(gene, SafetyGene) else {}
        shown = ", ".join(f"{layer}: {value:.3g}" for layer, value in known.items())
        rows = {
            "file": handle.name,
            "family": family or "not said: an adapter, but no gene",
            "architecture": gene.architecture,
            "layers": f"{len(gene.layers)} ({', '.join(map(str, gene.layers))})",
            "parameters": f"{gene.n_parameters:,}",
            "strengths": shown or "1 in every layer: not recalibrated",
            "scale": f"{handle.scale:g}" if handle.scale else "0 (off)",
        }
        for key, value in rows.items():
            _say(f"{paint(f'{key:<12}')} {value}")

    def _new(self, rest: str) -> None:
        self.messages = list(self.opening)

    def _again(self, rest: str) -> None:
        if len(self.messages) == len(self.opening):
            raise SettingError("nothing was asked yet")
        del self.messages[-1]
        self._ask(self.messages.pop().content)

    def _save(self, rest: str) -> None:
        from ..files import write_text

        makers = {".json": self._as_json, ".md": self._as_markdown}
        try:
            path = Path(rest).expanduser()
        except RuntimeError as error:  # there is no such user
            raise SettingError(f"{rest}: {error}") from error
        if path.suffix.lower() not in makers:
            raise SettingError("/save wants a file that ends in .json or .md")
        write_text(path, makers[path.suffix.lower()](), self.names.inputs)
        _say(f"{path}: {len(self.messages)} messages")

    def _as_json(self) -> str:
        messages = [
            {"role": m.role, "content": m.content}
            | ({} if m.scale is None else {"gene_scale": m.scale})
            for m in self.messages
        ]
        facts = {
            "model": self.names.model,
            "gene": self.names.gene,
            "adapters": list(self.names.adapters),
            **self.options,
            "messages": messages,
        }
        return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"

    def _as_markdown(self) -> str:
        parts = [f"# Chat with {self.names.model}"]
        if self.names.gene:
            parts.append(f"Gene: {self.names.gene}")
        for message in self.messages:
            scale = "" if message.scale is None else f" (gene at {message.scale:g})"
            parts += [f"## {message.role.capitalize()}{scale}", message.content]
        return "\n\n".join(parts) + "\n"

    # -- answers ----------------------------------------------------------

    def _ask(self, text: str) -> None:
        self.messages.append(_Message("user", text))
        pieces: list[str] = []
        finish = None
        try:
            for chunk in self.llama.create_chat_completion(
                messages=[{"role": m.role, "content": m.content} for m in self.messages],
                stream=True,
                **self.options,
            ):
                choice = chunk["choices"][0]
                piece = choice["delta"].get("content") or ""
                pieces.append(piece)
                finish = choice["finish_reason"]
                click.echo(printable(piece), nl=False)
        except (SafeGeneError, ValueError, RuntimeError) as error:  # refused, or too long
            _say(f"{error}; /new starts afresh")
            self.messages.pop()
            self.answered = bool(self.answered)
            return
        except KeyboardInterrupt:
            if not self.lines.at_keyboard:
                raise
            # else: stop this answer, keep what was said
        click.echo()
        if finish == "content_filter":
            _say("(the guard refused this; --no-guard switches it off)")
        self.answered = True
        scale = None if self.gene is None else self.gene.scale
        self.messages.append(_Message("assistant", "".join(pieces), scale))
