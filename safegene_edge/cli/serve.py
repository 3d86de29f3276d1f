"""`serve`: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import click

from ..errors import MissingExtraError
from ..serve.settings import ServeSettings
from .adapters import say_where_unfitted
from .options import FILE, Number, examples, file_option, say_next, setting


@click.command(
    epilog=examples(
        "serve model.gguf --gene fitted.gguf",
        "serve model.gguf --gene fitted.gguf --host 0.0.0.0 --api-key KEY --chat-only",
    )
)
@click.argument("model", type=FILE)
@file_option("--gene", metavar="GENE.gguf", help="The safety adapter, on for every answer.")
@file_option("--adapter", multiple=True, metavar="TASK.gguf", help="Other adapters, always on.")
@setting(ServeSettings, "host")
@setting(ServeSettings, "port", type=click.IntRange(0, 65535))
@setting(ServeSettings, "slots", type=click.IntRange(min=1))
@setting(ServeSettings, "ctx", type=click.IntRange(min=64))
@setting(ServeSettings, "cache_ram", type=click.IntRange(min=0))
@setting(ServeSettings, "max_tokens", type=click.IntRange(min=1))
@setting(ServeSettings, "queue", type=click.IntRange(min=1))
@setting(ServeSettings, "seconds", type=Number(min=0, min_open=True))
@setting(ServeSettings, "temperature", type=Number(0, 2))
@setting(ServeSettings, "no_think", is_flag=True)
@setting(ServeSettings, "chat_template_kwargs", metavar="JSON")
@setting(ServeSettings, "api_key", envvar="SAFEGENE_API_KEY", metavar="KEY")
@setting(ServeSettings, "cors", multiple=True, metavar="ORIGIN")
@setting(ServeSettings, "allow_host", multiple=True, metavar="NAME")
@setting(ServeSettings, "require_signed", metavar="KEY")
@setting(ServeSettings, "compare", is_flag=True)
@setting(ServeSettings, "no_guard", is_flag=True)
@setting(ServeSettings, "chat_only", is_flag=True)
@setting(ServeSettings, "allow_edit", is_flag=True)
def serve(
    model: str,
    gene: str | None,
    adapter: tuple[str, ...],
    host: str,
    port: int,
    slots: int,
    ctx: int,
    cache_ram: int,
    max_tokens: int,
    queue: int,
    seconds: float,
    temperature: float,
    no_think: bool,
    chat_template_kwargs: str,
    api_key: str | None,
    cors: tuple[str, ...],
    allow_host: tuple[str, ...],
    require_signed: str | None,
    compare: bool,
    no_guard: bool,
    chat_only: bool,
    allow_edit: bool,
) -> None:
    """Serve a model to OpenAI clients, with a chat page at /.

    The gene is policy: no request can take it off. SAFEGENE_API_KEY sets the key, too.
    """
    try:
        from ..serve.run import serve as run
    except ImportError as error:
        raise MissingExtraError(
            f"the server needs {error.name}", "Run: pip install 'safegene-edge[serve]'"
        ) from error
    settings = ServeSettings(
        host=host,
        port=port,
        slots=slots,
        ctx=ctx,
        cache_ram=cache_ram,
        max_tokens=max_tokens,
        queue=queue,
        seconds=seconds,
        temperature=temperature,
        no_think=no_think,
        chat_template_kwargs=chat_template_kwargs,
        api_key=api_key,
        cors=cors,
        allow_host=allow_host,
        require_signed=require_signed,
        compare=compare,
        no_guard=no_guard,
        chat_only=chat_only,
        allow_edit=allow_edit,
    )

    def loading() -> None:
        if not settings.loopback and not api_key:
            click.echo("warning: anyone who reaches this machine can ask: give --api-key", err=True)
        say_where_unfitted(model, gene, adapter)
        click.echo(f"{model}{' with ' + gene if gene else ', without a gene'}: loading", err=True)

    run(model, gene, adapter, settings, ready=_ready, loading=loading)


def _ready(url: str) -> None:
    click.echo(f"{url} (Ctrl+C stops)", err=True)
    say_next(f"open {url} in a browser, or give a client the base URL {url}/v1")
