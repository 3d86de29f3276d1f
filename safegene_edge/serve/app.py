"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from ..errors import LlamaCppError, SettingError
from ..runtime.batcher import Ask, AskFinish, Batcher, QueueFullError
from .answers import CompletionForm, Done, Events, Form, Inbox, Relay, collect, reason_of, together
from .errors import ApiError, wrong
from .guard import FILES, Guard, error_response
from .messages import Turn
from .metrics import Metrics
from .responses import ResponseForm
from .schema import AnyRequest, ChatRequest, CompletionRequest, RequestT, ResponseRequest, parse
from .settings import ServeSettings

# The tokens of a prompt, and of the user's last message alone where a guard reads that.
_Asked: TypeAlias = tuple[list[int], list[int] | None]
_LONG = 1 << 14  # characters; longer prompts are rendered off the event loop
_NOTHING = (
    "there is nothing at this address; the API is at /v1/chat/completions, /v1/responses, "
    "/v1/completions and /v1/models"
)
_PAGE = {"/": "index.html", **{f"/{name}": name for name in FILES}}
_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Served:
    """A name under which a client can ask.

    Attributes:
        fingerprint: "gene-" and twelve hex digits of the gene file's SHA-256, or "no-gene".
    """

    name: str
    fingerprint: str
    batcher: Batcher


def make_app(models: Sequence[Served], settings: ServeSettings, relay: Relay) -> ASGIApp:
    """The application that answers for these models; the first is the default.

    Args:
        relay: what their batchers deliver to.
    """
    return _App(models, settings, relay).guarded()


class _App:
    def __init__(self, models: Sequence[Served], settings: ServeSettings, relay: Relay) -> None:
        self.models = {served.name: served for served in models}
        self.default, self.settings, self.relay = models[0], settings, relay
        self.metrics, self.started = Metrics(), int(time.time())

    def guarded(self) -> ASGIApp:
        app = FastAPI(
            openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
        )  # the documentation pages would load scripts from elsewhere
        routes: dict[str, tuple[str, Callable[..., Any]]] = {
            "/v1/models": ("GET", self.list_models),
            "/v1/models/{name:path}": ("GET", self.one_model),
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/completions": ("POST", self.complete),
            "/v1/responses": ("POST", self.respond),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.show_metrics),
            **{path: ("GET", _page(name)) for path, name in _PAGE.items()},
        }
        for path, (method, handle) in routes.items():
            methods = ["GET", "HEAD"] if method == "GET" else [method]  # health checks ask HEAD
            app.add_api_route(path, handle, methods=methods, response_model=None)
        app.add_exception_handler(ApiError, _api_error)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _our_fault)
        return Guard(app, self.settings, self.metrics, frozenset(routes))

    # -- what is asked ----------------------------------------------------

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [*map(self._about, self.models.values())]})

    async def one_model(self, name: str) -> Response:
        return JSONResponse(self._about(self._served(name)))

    async def health(self) -> Response:
        alive = all(served.batcher.alive for served in self.models.values())
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        batchers = [served.batcher for served in self.models.values()]
        gauges = {
            "requests_active": sum(batcher.n_active for batcher in batchers),
            "requests_waiting": sum(batcher.n_waiting for batcher in batchers),
            "slots": sum(batcher.engine.n_parallel for batcher in batchers),
            "up_seconds": time.time() - self.started,
        }
        return PlainTextResponse(
            self.metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        served = self._served(body.model)
        asked = await self._rendered(served, body.turns(self.settings.max_messages), body.source)
        form = CompletionForm(True, served.name, served.fingerprint, body.wants_usage)
        return await self._answer(request, body, served, asked, form)

    async def respond(self, request: Request) -> Response:
        body = await self._read(request, ResponseRequest)
        served = self._served(body.model)
        asked = await self._rendered(served, body.turns(self.settings.max_messages), body.source)
        repeated = body.repeated(self.settings.temperature)
        form = ResponseForm(served.name, served.fingerprint, repeated)
        return await self._answer(request, body, served, asked, form)

    async def complete(self, request: Request) -> Response:
        if self.settings.chat_only:
            raise ApiError(404, "this server answers chats alone (--chat-only)", code="policy")
        body = await self._read(request, CompletionRequest)
        if body.stream and len(body.prompt) > 1:
            raise wrong("stream", "several prompts in one request are not streamed")
        served = self._served(body.model)
        tokenize = served.batcher.engine.llama.tokenize

        def plain(text: str) -> _Asked:  # no text of a prompt is ever a control token
            return list(tokenize(text.encode(), add_bos=True, special=False)), None

        form = CompletionForm(False, served.name, served.fingerprint, body.wants_usage)
        size = sum(map(len, body.prompt))
        asked = [
            await self._tokens(partial(plain, one), size, source)
            for one, source in zip(body.prompt, body.sources, strict=True)
        ]
        if len(asked) == 1:
            return await self._answer(request, body, served, asked[0], form)
        return await self._answer_all(request, body, served, asked, form)

    # -- how it is answered -----------------------------------------------

    async def _read(self, request: Request, kind: type[RequestT]) -> RequestT:
        limit = self.settings.max_body
        too_large = ApiError(413, f"the body is larger than {limit} bytes")
        media, *parameters = request.headers.get("content-type", "").lower().split(";")
        if media.strip() != "application/json":
            raise ApiError(415, "the body must be application/json")
        charsets = [p.partition("=")[2].strip(' "') for p in parameters if "charset" in p]
        if charsets not in ([], ["utf-8"], ["utf8"]):
            raise ApiError(415, "the body must be JSON in UTF-8")
        if (coding := request.headers.get("content-encoding", "identity")).lower() != "identity":
            raise ApiError(415, f"the body is encoded ({coding[:20]}); send it as it is")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
        except ClientDisconnect:
            raise ApiError(400, "the request was cut off") from None
        return parse(kind, bytes(body))

    async def _rendered(self, served: Served, turns: list[Turn], source: str) -> _Asked:
        llama, guard = served.batcher.engine.llama, served.batcher.guard

        def rendered() -> _Asked:
            return llama.render(turns), llama.render_alone(turns) if guard else None

        return await self._tokens(rendered, sum(len(str(turn)) for turn in turns), source)

    async def _tokens(self, make: Callable[[], _Asked], size: int, source: str) -> _Asked:
        try:
            asked = await asyncio.to_thread(make) if size > _LONG else make()
        except SettingError as error:  # the template refuses, a system role say
            raise ApiError(
                400, f"the chat template refuses these messages ({error})", param=source
            ) from error
        if not asked[0]:
            raise ApiError(400, "the prompt is empty", param=source)
        return asked

    async def _answer(
        self, request: Request, body: AnyRequest, served: Served, asked: _Asked, form: Form
    ) -> Response:
        if not body.stream:
            whole = await self._whole(request, body, served, asked, form)
            return JSONResponse(whole) if whole else Response(status_code=499)
        ask, inbox, done = self._ask(served, asked, body)
        self._submit(served.batcher, ask)
        return Events(form, ask, inbox, done=done)

    async def _answer_all(
        self,
        request: Request,
        body: CompletionRequest,
        served: Served,
        asked: Sequence[_Asked],
        form: Form,
    ) -> Response:
        """Several prompts' answers in one object; no more at a time than there are slots."""
        for (tokens, _), source in zip(asked, body.sources, strict=True):
            self._limit(served, tokens, body, source)
        slots = asyncio.Semaphore(min(served.batcher.engine.n_parallel, self.settings.queue))

        async def one(part: _Asked) -> dict[str, Any] | None:
            async with slots:
                return await self._whole(request, body, served, part, form)

        tasks = [asyncio.ensure_future(one(part)) for part in asked]
        try:
            parts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # where one has failed, nobody waits for the others
        found = [part for part in parts if part]
        return JSONResponse(together(found)) if found == parts else Response(status_code=499)

    async def _whole(
        self, request: Request, body: AnyRequest, served: Served, asked: _Asked, form: Form
    ) -> dict[str, Any] | None:
        """An answer in one object; None if nobody is there to read it."""
        ask, inbox, done = self._ask(served, asked, body)
        self._submit(served.batcher, ask)
        finish: AskFinish | None = None
        try:
            answer = await collect(inbox, request.receive)
            if answer is None:
                return None
            text, finish = answer
            return form.whole(text, reason_of(finish, ask), ask)
        finally:
            done(finish)

    def _ask(self, served: Served, asked: _Asked, body: AnyRequest) -> tuple[Ask, Inbox, Done]:
        """What a batcher is asked, where its answer arrives, and what to call in the end."""
        inbox, (tokens, alone) = Inbox(), asked
        ask = Ask(
            tokens,
            self._limit(served, tokens, body),
            inbox.put,
            sampling=body.sampling(self.settings.temperature),
            stop=body.stops,
            stream=bool(body.stream),
            alone=alone,
            deadline=time.monotonic() + self.settings.seconds,
        )
        start = time.monotonic()

        def done(finish: AskFinish | None) -> None:
            served.batcher.cancel(ask)  # no more is wanted, whether it ended or not
            self._count(ask, finish, time.monotonic() - start)

        return ask, inbox, done

    def _submit(self, batcher: Batcher, ask: Ask) -> None:
        self.relay.start()
        try:
            batcher.submit(ask)
        except QueueFullError as error:
            raise ApiError(
                429,
                str(error),
                code="queue_full",
                headers={"retry-after": str(error.retry_after)},
            ) from error
        except LlamaCppError as error:
            raise ApiError(503, "the server is stopping") from error
        except SettingError as error:  # the last message alone is longer than the context
            raise ApiError(400, str(error), code="context_length_exceeded") from error

    def _limit(self, served: Served, tokens: list[int], body: AnyRequest, source: str = "") -> int:
        """How long the answer may be: what was asked for, as far as server and context go."""
        left = served.batcher.n_ctx - len(tokens)
        if left < 1:
            raise ApiError(
                400,
                f"the prompt's {len(tokens)} tokens do not fit into the context of "
                f"{served.batcher.n_ctx}, with one of answer",
                param=source or body.source,
                code="context_length_exceeded",
            )
        most = self.settings.max_tokens
        return min(body.wanted_tokens or most, most, left)

    def _served(self, name: str | None) -> Served:
        if name is None:
            return self.default
        if name not in self.models:
            names = ", ".join(f"'{known}'" for known in self.models)
            raise ApiError(
                404, f"no such model; here are {names}", param="model", code="model_not_found"
            )
        return self.models[name]

    def _about(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": self.started,
            "owned_by": "safegene-edge",
            "gene": served.fingerprint,
            "guard": served.batcher.guard is not None,
            "context": served.batcher.n_ctx,
            "limits": {
                "max_tokens": self.settings.max_tokens,
                "temperature": self.settings.temperature,
            },
            "allow_edit": self.settings.allow_edit,
        }

    def _count(self, ask: Ask, finish: AskFinish | None, seconds: float) -> None:
        self.metrics.finished[finish or "cancelled"] += 1
        self.metrics.prompt_tokens += len(ask.prompt)
        self.metrics.reused_tokens += ask.reused
        self.metrics.answer_tokens += ask.n_new
        self.metrics.seconds += seconds


def _page(name: str) -> Callable[[], Any]:
    content = (resources.files(__package__) / "page" / name).read_bytes()
    media = _TYPES[name.rpartition(".")[2]]

    async def page() -> Response:
        return Response(content, media_type=media, headers={"cache-control": "no-cache"})

    return page


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: _NOTHING, 405: "the method is not allowed here"}
    message = words.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return error_response(ApiError(error.status_code, message, headers=headers))


async def _our_fault(_: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server failed", code="server_error"))
