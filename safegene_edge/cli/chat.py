"""`chat`: talk to a model, and feel what the gene changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..runtime.llama import AttachedAdapter, SafeLlama

_HELP = """\
/safe on|off   switch the gene
/scale X       set the gene's scale
/again         ask the last question again
/new           forget the conversation
/help  /quit"""


@click.command()
@click.argument("model", type=click.Path())
@click.option("--gene", metavar="GENE.gguf", help="The safety adapter; switched with /safe.")
@click.option("--adapter", multiple=True, metavar="TASK.gguf", help="Other adapters, always on.")
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--ctx", default=4096, show_default=True, type=click.IntRange(min=64))
def chat(
    model: str,
    gene: str | None,
    adapter: tuple[str, ...],
    system: str | None,
    max_tokens: int,
    temperature: float,
    ctx: int,
) -> None:
    """Chat with a model in the terminal."""
    from ..runtime.llama import SafeLlama

    llama = SafeLlama(model, adapter, n_ctx=ctx)
    handle = llama.attach(gene) if gene else None
    session = _Session(llama, handle, system, max_tokens, temperature)
    click.echo(f"{model}{' with ' + gene if gene else ''}. /help lists the commands.", err=True)
    try:
        while session.turn():
            pass
    finally:
        llama.close()


class _Session:
    """A conversation and what its slash commands change."""

    def __init__(
        self,
        llama: SafeLlama,
        gene: AttachedAdapter | None,
        system: str | None,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self.llama, self.gene = llama, gene
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def turn(self) -> bool:
        """Read a line and act on it; False ends the chat."""
        try:
            line = click.prompt(self._mark(), prompt_suffix=" ", err=True).strip()
        except (EOFError, click.Abort):
            return False
        if not line.startswith("/"):
            self._ask(line)
            return True
        if line in ("/quit", "/exit"):
            return False
        self._command(line)
        return True

    def _mark(self) -> str:
        if self.gene is None:
            return ">"
        return f"[safe {self.gene.scale:g}] >" if self.gene.scale else "[safe off] >"

    def _command(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "/safe" and rest in ("on", "off"):
            self._scale(1.0 if rest == "on" else 0.0)
        elif verb == "/scale":
            try:
                self._scale(float(rest))
            except ValueError:
                click.echo("/scale wants a number, such as /scale 0.8", err=True)
        elif verb == "/new":
            self.messages = list(self.opening)
        elif verb == "/again" and len(self.messages) > len(self.opening):
            del self.messages[-1]
            self._ask(self.messages.pop()["content"])
        else:
            click.echo(_HELP, err=True)

    def _scale(self, scale: float) -> None:
        from ..errors import SettingError

        if self.gene is None:
            click.echo("no gene is loaded: start with --gene GENE.gguf", err=True)
            return
        try:
            self.llama.set_scale(self.gene, scale)
        except SettingError as error:
            click.echo(str(error), err=True)

    def _ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        pieces = []
        try:
            for chunk in self.llama.create_chat_completion(
                messages=self.messages, stream=True, **self.options
            ):
                piece = chunk["choices"][0]["delta"].get("content") or ""
                pieces.append(piece)
                click.echo(piece, nl=False)
        except ValueError as error:  # llama-cpp-python's word for a full context
            click.echo(f"\n{error}; /new starts afresh", err=True)
            self.messages.pop()
            return
        except KeyboardInterrupt:
            pass  # stop this answer, keep what was said
        click.echo()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
