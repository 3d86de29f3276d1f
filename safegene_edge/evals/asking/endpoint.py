"""An OpenAI-compatible server as the model: llama-server, vLLM, Ollama and their like.

Standard library only; the one place of the package that opens a connection, and only to
the server that the user named: redirects and proxies from the environment are not followed.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from ...errors import SafeGeneError, SettingError
from ...files import parse_json
from ...runtime.thinking import SWITCHES, Thinking
from ..settings import EndpointModel, EvalSettings
from .chat import Advance, Chat, Reply
from .journal import Journal, fingerprint

_REFUSED = {400, 422, 500}  # of which a chat template's own words may be the cause
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_MAX_ANSWER = 8 << 20  # bytes; a chat answer has some kilobytes
_LONGEST_PAUSE = 30.0


class EndpointError(SafeGeneError):
    """A server cannot be reached, refuses, or answers something else than a chat."""


class Endpoint:
    """Chats sent to one or two served models; an `Asker`."""

    def __init__(
        self,
        before: EndpointModel,
        after: EndpointModel | None,
        settings: EvalSettings,
        journal: Journal,
    ) -> None:
        self.served = {"before": before, **({} if after is None else {"after": after})}
        self.settings, self.journal = settings, journal
        self._connections = _Connections()
        self._stop = threading.Event()

    @property
    def attack_columns(self) -> tuple[str, ...]:
        return self.columns

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.served)

    def refusal(self, column: str, chat: Chat) -> float:
        """Raises SettingError: a chat server shows no likelihoods."""
        raise SettingError("a chat server shows no likelihoods", "Give a local model")

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    def ask(
        self, column: str, chats: Sequence[Chat], advance: Advance | None = None
    ) -> list[Reply]:
        """Answers at temperature 0; each is in the journal as soon as it is there.

        Raises:
            EndpointError: names the server and what it said.
        """
        served = self.served[column]
        keys = [
            fingerprint(
                "served",
                served.url,
                served.model,
                self.settings.max_tokens,
                chat.messages,
                *([self.settings.no_think] if self.settings.no_think else []),
                self.settings.think_tokens,
            )
            for chat in chats
        ]
        missing = {
            key: chat for key, chat in zip(keys, chats, strict=True) if key not in self.journal
        }
        if advance is not None:
            for _ in range(len(chats) - len(missing)):
                advance()

        def work(item: tuple[str, Chat]) -> None:
            if self._stop.is_set():
                return
            try:
                self.journal.put(item[0], self._answer(served, item[1]))
            except BaseException:
                self._stop.set()  # what waits is not sent; what is under way ends
                raise

        with ThreadPoolExecutor(served.concurrency) as pool:
            try:
                for _ in pool.map(work, missing.items()):
                    if advance is not None:
                        advance()
            except BaseException:
                self._stop.set()  # an interruption, too
                raise
        self._connections.close()  # they were the pool's threads'
        return [_reply(self.journal[key]) for key in keys]

    def _answer(self, served: EndpointModel, chat: Chat) -> Any:
        """An answer's text; None where the chat does not fit, False where a thought does not end.

        A server counts a thought's tokens, too: one that used all of them gets more, once.
        """
        settings = self.settings
        body: dict[str, Any] = {
            "model": served.model,
            "messages": chat.as_dicts(),
            "max_tokens": settings.max_tokens,
            "temperature": 0,
            "stream": False,
        }
        if settings.no_think:
            body["chat_template_kwargs"] = dict.fromkeys(SWITCHES, False)
        folded = chat.without_system().as_dicts()
        found = self._asked(served, body, folded)
        if found is False:
            longer = {**body, "max_tokens": settings.max_tokens + settings.think_tokens}
            found = self._asked(served, longer, folded)
        return found

    def _asked(
        self, served: EndpointModel, body: Mapping[str, Any], folded: Sequence[Mapping[str, str]]
    ) -> Any:
        """An answer; where the server takes no system message, one to the folded messages."""
        pause = served.pause
        for attempt in range(served.retries + 1):
            status, headers, text = self._send(served, body)
            if status == 200:
                return _content(served, text)
            if status == 400 and "context" in text.lower():
                return None  # too long for the server's context: unscored
            if status in _REFUSED and body["messages"] != folded and "system" in text.lower():
                return self._asked(served, {**body, "messages": folded}, folded)
            if status not in _RETRIED and status != 0:
                raise EndpointError(
                    f"{served.url}: answered {status}: {text[:200]}", _remedy(served, status)
                )
            if attempt < served.retries:
                self._stop.wait(_pause(headers, pause))
                pause = min(2 * pause, _LONGEST_PAUSE)
        what = f"answered {status}: {text[:200]}" if status else text
        kept = "; what is done is kept, run the command again to go on"
        raise EndpointError(
            f"{served.url}: {what}, {served.retries + 1} times",
            f"See whether the server runs{kept if self.journal.path else ''}",
        )

    def _send(
        self, served: EndpointModel, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text; status 0 where there was no answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(served.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connections.get(served)
        try:
            connection.request("POST", served.path, json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            self._connections.drop(served)
            return 0, {}, f"cannot be reached ({error or type(error).__name__})"
        if answer.will_close or len(data) == _MAX_ANSWER:
            self._connections.drop(served)
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, data.decode("utf-8", "replace")


class _Connections:
    """One open connection a thread and server, kept alive between requests."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[http.client.HTTPConnection] = []

    def get(self, served: EndpointModel) -> http.client.HTTPConnection:
        own: dict[str, http.client.HTTPConnection] = self._local.__dict__
        if served.url not in own:
            parts = urlsplit(served.url)
            kind: Callable[..., http.client.HTTPConnection] = (
                http.client.HTTPSConnection
                if parts.scheme == "https"
                else http.client.HTTPConnection
            )
            own[served.url] = kind(parts.hostname, parts.port, timeout=served.timeout)
            self._all.append(own[served.url])
        return own[served.url]

    def drop(self, served: EndpointModel) -> None:
        connection = self._local.__dict__.pop(served.url, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()


def _content(served: EndpointModel, text: str) -> str | bool:
    """The answer; False where the server stopped within a thought."""
    try:
        choice = parse_json(text, foreign=True)["choices"][0]
        message = choice["message"]
        content = message["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointError(
            f"{served.url}: answered no chat completion: {text[:200]}",
            "Give the address of an OpenAI-compatible API, such as http://localhost:8080/v1",
        ) from error
    if isinstance(content, list):  # in parts, as some servers answer
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "".join(text for text in parts if isinstance(text, str))
    said = content if isinstance(content, str) else ""  # null: the model said nothing
    said = said.encode("utf-8", "replace").decode()  # an escape may spell half a character
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought and not said.strip() and choice.get("finish_reason") == "length":
        return False
    answer = Thinking().answer(said)
    return False if answer is None else answer


def _reply(found: str | bool | None) -> Reply:
    return Reply(None, thinking=found is False) if not isinstance(found, str) else Reply(found)


def _pause(headers: Mapping[str, str], otherwise: float) -> float:
    """The server's own wish in seconds (RFC 9110, Retry-After), where it gives a number."""
    try:
        return min(max(float(headers.get("retry-after", "")), 0.0), _LONGEST_PAUSE)
    except ValueError:
        return otherwise


def _remedy(served: EndpointModel, status: int) -> str:
    if status in (401, 403):
        return f"Put the key into the environment variable {served.api_key_variable}"
    if status == 404:
        return f"Check the address and whether the server has a model '{served.model}'"
    return ""
