"""Who may ask: checked before anything else is looked at.

A page on any web site can make a browser send requests to this machine. Three things keep it
out: the Host must be this machine's (else the site's own name, rebound to 127.0.0.1, would
do), a foreign Origin is refused unless the operator named it, and bodies must be JSON, which
a browser does not send across origins without asking first.
"""

from __future__ import annotations

import hmac
import re
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .settings import ServeSettings

FILES = ("page.css", "page.js", "markdown.js", "icon.svg")  # of the chat page
OPEN = frozenset({"/", "/health", *(f"/{name}" for name in FILES)})  # without a key
_LOCAL = ("localhost", "127.0.0.1", "::1")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"object-src 'none'",
    ),
)


# Clients end in a slash, double one, leave /v1 out, or add it twice.
_BEFORE = re.compile(r"(?:/v1)*(?=/(?:chat/completions|completions|responses|models)(?:/|$))")
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9-]+(, ?[A-Za-z0-9-]+)*")


def canonical(path: str) -> str:
    """The path that is meant."""
    path = re.sub("/{2,}", "/", path).rstrip("/") or "/"
    return f"/v1{path[found.end() :]}" if (found := _BEFORE.match(path)) else path


def error_response(error: ApiError) -> JSONResponse:
    """The error in OpenAI's form."""
    return JSONResponse(error.as_dict(), error.status, headers=error.headers)


class Guard:
    """ASGI middleware: Host, Origin, key; CORS for named origins; counts every response."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, paths
        self._key = settings.api_key.encode() if settings.api_key else None
        names = (*_LOCAL, settings.host, *settings.allow_host)
        self._hosts = {name.lower() for name in names} if settings.loopback else set()
        self._origins = {origin.lower() for origin in settings.cors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http":
            return
        scope = {**scope, "path": canonical(scope["path"])}
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = origin.lower() in self._origins

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests[path, message["status"]] += 1
                message["headers"] = [
                    *message["headers"],
                    *HEADERS,
                    *_cors(origin, allowed, headers),
                ]
            await send(message)

        try:
            self._check(scope, headers, origin, allowed)
        except ApiError as error:
            await error_response(error)(scope, receive, watched)
            return
        if allowed and scope["method"] == "OPTIONS":
            await JSONResponse({}, 200)(scope, receive, watched)
            return
        await self.app(scope, receive, watched)

    def _check(self, scope: Scope, headers: dict[bytes, bytes], origin: str, allowed: bool) -> None:
        if scope["http_version"] not in ("1.0", "1.1"):
            raise ApiError(505, "this server speaks HTTP/1.1")
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts and _name(host) not in self._hosts:
            raise ApiError(
                403, "the Host header does not name this machine", code="host_not_allowed"
            )
        if origin and not allowed and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(
                403, "pages of other origins may not ask this server", code="origin_not_allowed"
            )
        preflight = allowed and scope["method"] == "OPTIONS"
        if self._key is None or scope["path"] in OPEN or preflight:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise ApiError(
                401,
                "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _name(host: str) -> str:
    """The host of a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cors(origin: str, allowed: bool, asked: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """What lets an allowed page in, with its client's own headers (OpenAI's sends some)."""
    if not allowed:
        return []
    wanted = asked.get(b"access-control-request-headers", b"")
    names = wanted if _HEADER_NAMES.fullmatch(wanted) else b"authorization, content-type"
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", names),
        (b"vary", b"origin"),
    ]
