"""From files to a running server: the model, its gene, the socket, the signals."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from ..errors import SettingError, SignatureError
from ..files import PathLike, require_file, sha256
from ..runtime.batcher import Batcher
from ..runtime.chat import require_chat
from ..runtime.engine import Engine
from ..runtime.guard import Guard
from ..runtime.llama import SafeLlama
from ..runtime.schedule import Scales, most_parallel
from ..signing import verify
from .answers import Relay
from .app import Served, make_app
from .http import protocol
from .settings import ServeSettings

NO_GENE = "no-gene"
# The model's own context only proves the adapters; the engines have theirs.
_SMALL = {"n_ctx": 256, "n_batch": 64}
Ready = Callable[[str], None]


def serve(
    model: PathLike,
    gene: PathLike | None = None,
    adapters: Sequence[PathLike] = (),
    settings: ServeSettings | None = None,
    ready: Ready | None = None,
    loading: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    """Serve a model until SIGINT or SIGTERM; running answers are finished first.

    Args:
        model: a GGUF model.
        gene: the safety adapter, on for every answer.
        adapters: others that are always on.
        ready: called with the address once the server listens.
        loading: called once before the model is loaded, behind the checks that need no model.
        options: any other argument of `SafeLlama`, such as n_threads or type_k.

    Raises:
        SettingError: the address is taken or does not exist, or settings make no sense.
        FileFormatError, MismatchError, NoEffectError: as `SafeLlama`.
        UnsupportedError: no guard can look at answers of this model.
    """
    settings = settings or ServeSettings()
    with ExitStack() as stack:
        sock = stack.enter_context(bound(settings))  # before minutes of loading
        for path in (model, *adapters, *([] if gene is None else [gene])):
            require_file(path)
        require_possible(gene, settings)
        if loading is not None:
            loading()
        server = stack.enter_context(opened(model, gene, adapters, settings, **options))
        server.ready = ready
        # uvicorn sends itself the signal again when it has stopped: it has been heeded.
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        server.run([sock])


class Server(uvicorn.Server):
    """uvicorn's server, which calls `ready` with its address when it listens."""

    ready: Ready | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started and self.ready is not None and sockets:
            self.ready(address(sockets[0]))


def require_possible(gene: PathLike | None, settings: ServeSettings) -> None:
    """Raise SettingError for settings that want a gene where there is none, or too many slots."""
    if settings.compare and gene is None:
        raise SettingError("there is nothing to compare without a gene", "Give --gene")
    if settings.require_signed is not None and gene is None:
        raise SettingError("there is no gene that could be signed", "Give --gene")
    most = most_parallel(guarded=gene is not None and not settings.no_guard)
    if settings.slots > most:
        raise SettingError(f"slots is {settings.slots}", f"Give 1 to {most}")


@contextmanager
def opened(
    model: PathLike,
    gene: PathLike | None,
    adapters: Sequence[PathLike],
    settings: ServeSettings,
    **options: Any,
) -> Iterator[Server]:
    """A server that does not run yet, and everything that it holds while it lives."""
    require_possible(gene, settings)
    signed = _signed(gene, adapters, settings.require_signed)
    variables = settings.template_variables()
    with SafeLlama(
        model, adapters, chat_template_kwargs=variables, **{**_SMALL, **options}
    ) as llama:
        require_chat(llama)  # or every chat would be refused
        if settings.no_think:
            llama.chat_template_kwargs[_switch(llama)] = False
        relay = Relay()
        name, fingerprint = Path(model).stem, NO_GENE
        others: Scales = {adapter: adapter.scale for adapter in llama.adapters}
        guard: Guard | None = None
        if gene is not None:
            llama.attach_each([gene])
            guard = None if settings.no_guard else llama.make_guard()
            fingerprint = f"gene-{sha256(gene)[:12]}"
        for path, digest in signed.items():
            if sha256(path) != digest:
                raise SignatureError(f"{path}: was changed while it was loaded", "Start again")

        def served(
            name: str, fingerprint: str, scales: Scales | None, guard: Guard | None
        ) -> Served:
            engine = Engine(
                llama,
                n_parallel=settings.slots,
                n_ctx=settings.ctx,
                flash_attn=bool(options.get("flash_attn", True)),
                guarded=guard is not None,
            )
            batcher = Batcher(
                engine,
                adapters=scales,
                guard=guard,
                max_waiting=settings.queue,
                keep=settings.cache_ram << 20,
                deliver=relay.deliver,
            )
            return Served(name, fingerprint, batcher)

        models = [served(name, fingerprint, None, guard)]
        if settings.compare:
            models.append(served(f"{name}:{NO_GENE}", NO_GENE, others, None))
        config = uvicorn.Config(
            make_app(models, settings, relay),
            http=protocol(settings),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.stop_seconds),
        )
        yield Server(config)


def _signed(
    gene: PathLike | None, adapters: Sequence[PathLike], key: str | None
) -> dict[PathLike, str]:
    """The hashes of the files that the key must have signed, and has."""
    if key is None:
        return {}
    assert gene is not None  # as `require_possible` has seen
    return {path: verify(path, key).sha256 for path in (gene, *adapters)}


def _switch(llama: SafeLlama) -> str:
    """The template's variable that turns thoughts off."""
    if not llama.thinking.switch:
        raise SettingError(
            f"{llama.model_path}: its chat template has no switch for thoughts",
            "Leave --no-think out",
        )
    return llama.thinking.switch


def address(sock: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bound(settings: ServeSettings) -> socket.socket:
    """A socket at the address of the settings.

    Raises:
        SettingError: it is taken, or not this machine's.
    """
    sock = None
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, number, _, target = found[0]
        sock = socket.socket(family, kind, number)
        if hasattr(socket, "SO_REUSEPORT"):  # POSIX: a port in TIME_WAIT is free
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of an answer that nobody reads, the system need not hold megabytes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        sock.bind(target)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise SettingError(
            f"cannot listen at {settings.host}:{settings.port} ({error.strerror or error})",
            "Give another --port or --host",
        ) from error
    return sock
