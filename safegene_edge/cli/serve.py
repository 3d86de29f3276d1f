"""`serve`: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import click

from ..errors import MissingExtraError


@click.command()
@click.argument("model", type=click.Path())
@click.option("--gene", metavar="GENE.gguf", help="The safety adapter, on for every answer.")
@click.option("--adapter", multiple=True, metavar="TASK.gguf", help="Other adapters, always on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--slots", default=4, show_default=True, type=click.IntRange(min=1),
    help="Requests answered together.",
)  # fmt: skip
@click.option(
    "--ctx", default=8192, show_default=True, type=click.IntRange(min=64),
    help="Tokens that all requests together may hold.",
)  # fmt: skip
@click.option(
    "--max-tokens", default=1024, show_default=True, type=click.IntRange(min=1),
    help="Tokens of an answer, at most and by default.",
)  # fmt: skip
@click.option(
    "--queue", default=64, show_default=True, type=click.IntRange(min=1),
    help="Requests that may wait; more get 429.",
)  # fmt: skip
@click.option(
    "--seconds", default=300.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
    help="A request's time, with waiting.",
)  # fmt: skip
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0, 2),
    help="Where a request names none.",
)  # fmt: skip
@click.option("--api-key", envvar="SAFEGENE_API_KEY", metavar="KEY", help="Clients must send it.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="A web origin that may ask.")
@click.option("--compare", is_flag=True, help="Also offer the model without the gene.")
@click.option("--chat-only", is_flag=True, help="No /v1/completions.")
def serve(
    model: str,
    gene: str | None,
    adapter: tuple[str, ...],
    host: str,
    port: int,
    slots: int,
    ctx: int,
    max_tokens: int,
    queue: int,
    seconds: float,
    temperature: float,
    api_key: str | None,
    cors: tuple[str, ...],
    compare: bool,
    chat_only: bool,
) -> None:
    """Serve a model to OpenAI clients, with a chat page at /.

    The gene is policy: no request can take it off. SAFEGENE_API_KEY sets the key, too.
    """
    try:
        from ..serve.run import serve as run
        from ..serve.settings import ServeSettings
    except ImportError as error:
        raise MissingExtraError(
            f"the server needs {error.name}", "Run: pip install 'safegene-edge[serve]'"
        ) from error
    settings = ServeSettings(
        host=host,
        port=port,
        slots=slots,
        ctx=ctx,
        max_tokens=max_tokens,
        queue=queue,
        seconds=seconds,
        temperature=temperature,
        api_key=api_key,
        cors=cors,
        compare=compare,
        chat_only=chat_only,
    )
    if not settings.loopback and not api_key:
        click.echo("warning: anyone who reaches this machine can ask: give --api-key", err=True)
    click.echo(f"{model}{' with ' + gene if gene else ', without a gene'}: loading", err=True)
    run(
        model,
        gene,
        adapter,
        settings,
        ready=lambda url: click.echo(f"{url} (Ctrl+C stops)", err=True),
    )
