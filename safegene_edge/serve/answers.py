"""An answer on its way to a client: as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..runtime.batcher import Ask, AskFinish, StepEvents
from .errors import ApiError

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


class Form(Protocol):
    """The shape of the answer to one request: in one object, or as the events of a stream."""

    def whole(self, text: str, reason: str, ask: Ask) -> dict[str, Any]:
        """The answer in one object."""

    def opening(self) -> bytes:
        """What comes before the text."""

    def piece(self, text: str) -> bytes:
        """Some of the text."""

    def closing(self, reason: str, ask: Ask) -> bytes:
        """What comes behind the text."""

    def failing(self, error: ApiError) -> bytes:
        """What comes in place of an end."""


@dataclass(frozen=True)
class CompletionForm:
    """The shape of completions.

    Attributes:
        chat: a chat completion; False: a text completion.
        model: the served name; fingerprint: the gene's id.
        usage: a stream ends with the usage.
    """

    chat: bool
    model: str
    fingerprint: str
    usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, ask: Ask) -> dict[str, Any]:
        """The answer in one object."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else None
        choice = self._choice(content or {"text": text}, reason)
        return self._object("", [choice], usage=usage_of(ask))

    def opening(self) -> bytes:
        """The event with the role, in a chat."""
        return self._chunk({"role": "assistant", "content": ""}) if self.chat else b""

    def piece(self, text: str) -> bytes:
        """The event with some of the text."""
        return self._chunk({"content": text})

    def closing(self, reason: str, ask: Ask) -> bytes:
        """The events behind the text; that with the usage has no choices."""
        last = self._chunk({}, reason)
        if self.usage:
            last += event(self._object(".chunk", [], usage=usage_of(ask)))
        return last + b"data: [DONE]\n\n"

    def failing(self, error: ApiError) -> bytes:
        """The event in place of an end."""
        return event(error.as_dict())

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return event(self._object(".chunk", [self._choice(content, reason)]))

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


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several prompts' completions as one, its choices in the prompts' order."""
    choices = [{**part["choices"][0], "index": number} for number, part in enumerate(parts)]
    usages = [part["usage"] for part in parts]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {name: sum(one[name] for one in usages) for name in names}
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usages)
    usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return {**parts[0], "choices": choices, "usage": usage}


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

    def __init__(self, form: Form, ask: Ask, inbox: Inbox, *, done: Done) -> None:
        super().__init__()
        self.form, self.ask, self.inbox, self.done = form, ask, inbox, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        finish: AskFinish | None = None
        gone = asyncio.ensure_future(until_gone(receive))
        gone.add_done_callback(self.inbox.wake)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            if opening := self.form.opening():
                await _send(send, opening)
            while finish is None and not gone.done():
                text, finish = await self.inbox.take()
                if text:
                    await _send(send, self.form.piece(text))
            await _send(send, self._end(finish) if finish else b"", more=False)
        finally:
            gone.cancel()
            self.done(finish)

    def _end(self, finish: AskFinish) -> bytes:
        try:
            return self.form.closing(reason_of(finish, self.ask), self.ask)
        except ApiError as error:
            return self.form.failing(error)


def _send(send: Send, body: bytes, more: bool = True) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": body, "more_body": more})
