"""An answer on its way to a client: as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..runtime.batcher import Ask, AskFinish, StepEvents
from .schema import ApiError

Done = Callable[[AskFinish | None], None]
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy would hold the stream back
]


class Relay:
    """Brings what batchers deliver into the event loop: one call for all events of a step."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Deliver into the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, events: StepEvents) -> None:
        """Called in a batcher's thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(_call_listeners, events)


def _call_listeners(events: StepEvents) -> None:
    for ask, text, finish in events:
        ask.listener(text, finish)


class Inbox:
    """Where the events of one ask arrive; used in the event loop alone."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._finish: AskFinish | None = None
        self._filled = asyncio.Event()

    def put(self, text: str, finish: AskFinish | None) -> None:
        """The ask's listener."""
        self._texts.append(text)
        self._finish = finish
        self._filled.set()

    def wake(self, _: object = None) -> None:
        """Let `take` return, with nothing if nothing came."""
        self._filled.set()

    async def take(self) -> tuple[str, AskFinish | None]:
        """All text that came since the last time, and the end if it came."""
        await self._filled.wait()
        self._filled.clear()
        text = "".join(self._texts)
        self._texts.clear()
        return text, self._finish


@dataclass(frozen=True)
class Form:
    """The shape of the answers of one request.

    Attributes:
        chat: a chat completion; False: a text completion.
        model: the served name; fingerprint: the gene's id.
    """

    chat: bool
    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one object."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else None
        return self._object("", [self._choice(content or {"text": text}, reason)], usage=usage)

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        """One event of a stream; `delta` has the role, the content, or nothing."""
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return event(self._object(".chunk", [self._choice(content, reason)]))

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The event with the usage, which has no choices."""
        return event(self._object(".chunk", [], usage=usage))

    def _choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _object(self, suffix: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}" if self.chat else f"cmpl-{self.id}",
            "object": f"chat.completion{suffix}" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def usage_of(ask: Ask) -> dict[str, Any]:
    """Tokens read and written."""
    return {
        "prompt_tokens": len(ask.prompt),
        "completion_tokens": ask.n_new,
        "total_tokens": len(ask.prompt) + ask.n_new,
        "prompt_tokens_details": {"cached_tokens": ask.reused},
    }


def reason_of(finish: AskFinish, ask: Ask) -> str:
    """OpenAI's word for how an answer ended; an answer that ran out of time was cut short.

    Raises:
        ApiError: there is no answer.
    """
    if finish == "error":
        raise ApiError(500, "the model could not answer", code="server_error")
    if finish == "timeout":
        if not ask.n_new:
            headers = {"retry-after": "5"}
            raise ApiError(503, "no answer was begun in time", code="timeout", headers=headers)
        return "length"
    return finish


async def until_gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(inbox: Inbox, receive: Receive) -> tuple[str, AskFinish] | None:
    """The whole answer and how it ended; None when the client went away."""
    gone = asyncio.ensure_future(until_gone(receive))
    gone.add_done_callback(inbox.wake)
    try:
        while not gone.done():
            text, finish = await inbox.take()
            if finish:
                return text, finish
        return None
    finally:
        gone.cancel()


class Events(Response):
    """A stream of chunks that ends early when the client hangs up.

    Args:
        done: called once when it is over, with the reason or None.
    """

    def __init__(self, form: Form, ask: Ask, inbox: Inbox, *, usage: bool, done: Done) -> None:
        super().__init__()
        self.form, self.ask, self.inbox = form, ask, inbox
        self.usage, self.done = usage, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        finish: AskFinish | None = None
        gone = asyncio.ensure_future(until_gone(receive))
        gone.add_done_callback(self.inbox.wake)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            if self.form.chat:
                await _send(send, self.form.chunk({"role": "assistant", "content": ""}))
            while finish is None and not gone.done():
                text, finish = await self.inbox.take()
                if text:
                    await _send(send, self.form.chunk({"content": text}))
            await _send(send, self._end(finish) if finish else b"", more=False)
        finally:
            gone.cancel()
            self.done(finish)

    def _end(self, finish: AskFinish) -> bytes:
        try:
            last = self.form.chunk({}, reason_of(finish, self.ask))
        except ApiError as error:
            return event(error.as_dict())
        if self.usage:
            last += self.form.usage_chunk(usage_of(self.ask))
        return last + b"data: [DONE]\n\n"


def _send(send: Send, body: bytes, more: bool = True) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": body, "more_body": more})
