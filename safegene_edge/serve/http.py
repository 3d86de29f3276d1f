"""HTTP with time limits: for a request to come in whole, and for an answer to be read.

uvicorn knows neither, so a client that sends a byte a minute, or never reads, would keep a
connection for good. Errors below the application speak the API's form as well.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .settings import ServeSettings

_LINGER = 1.0  # seconds


class _Transport:
    """A transport whose `close` lets a client that is still sending read the answer first.

    To close a socket with unread bytes resets the connection, and the client may never see
    why. So only the sending half is closed; what still comes is thrown away for a moment.
    """

    def __init__(self, inner: Any, protocol: LimitedProtocol) -> None:
        self._inner, self._protocol, self._closing = inner, protocol, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_closing(self) -> bool:
        return self._closing or bool(self._inner.is_closing())

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        if self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR):
            self._inner.write_eof()
            self._inner.resume_reading()
            self._protocol.loop.call_later(_LINGER, self._inner.close)
        else:
            self._inner.close()


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with limits; `protocol` makes the class for given settings."""

    settings: ServeSettings
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.settings.connections:
            headers = {"retry-after": "1"}
            self._refuse(ApiError(503, "too many connections are open", headers=headers))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch(afresh=True)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def _watch(self, afresh: bool = False) -> None:
        """Time the client while a request is still coming in."""
        coming = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if self._reading is not None and (afresh or not coming):
            self._reading.cancel()
            self._reading = None
        if coming and self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(self.settings.read_seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was asked, as browsers do that connect ahead
            return
        self._refuse(ApiError(408, "the request did not come in whole in time"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.settings.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _refuse(self, error: ApiError) -> None:
        """Say why, if no answer has begun, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.as_dict()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            response = h11.Response(status_code=error.status, headers=list(headers.items()))
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:
                self.cycle.disconnected = True  # the application has nothing to add
                self.cycle.message_event.set()
        self.transport.close()


def protocol(settings: ServeSettings) -> type[LimitedProtocol]:
    """The protocol class with the limits of these settings, as uvicorn wants it."""
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})
