"""What an operator may set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from ..files import no_constant, parse_json

# A web page's, or that of an app made of web pages: app://obsidian.md, tauri://localhost.
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#@*]+")
_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:]+")
_KEY = re.compile(r"[!-~]+")  # what a header can hold


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Settings of the server; sizes are in bytes, but for `cache_ram`, and times in seconds.

    Attributes:
        host: where to listen.
        port: the port; 0 takes a free one.
        slots: requests answered together; more wait.
        ctx: tokens that all requests together may hold, prompts and answers.
        cache_ram: MiB of memory for prompts and answers that gave up their slot and may come again;
            0 keeps none.
        api_key: clients must send it as `Authorization: Bearer KEY`, but for the page and /health.
        cors: a web origin whose pages may ask, such as http://localhost:3000.
        allow_host: a name by which a proxy, or clients in a container, reach a server that listens
            on this machine alone, such as host.docker.internal.
        require_signed: minisign's public key, or its file, that must have signed the gene and every
            adapter.
        compare: also offer the model without the gene, under a name of its own.
        no_guard: do not look again at answers and last messages, which a gene's guard does.
        chat_only: no /v1/completions.
        allow_edit: the page lets people change an answer, and marks it.
        max_tokens: tokens of an answer, at most and by default.
        queue: requests that may wait; the next one gets 429.
        seconds: a request's time, with waiting.
        temperature: where a request names none; 0 is what the gene was measured with.
        no_think: answers without a thought, by the chat template's switch (Qwen3's, say).
        chat_template_kwargs: variables of the chat template for every request, as a JSON object.
        max_body: bytes of a request.
        max_messages: messages of a request.
        read_seconds: for a client to send a request, and to read what it was sent.
        connections: connections open at once.
        stop_seconds: for running answers to finish when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    slots: int = 4
    ctx: int = 8192
    cache_ram: int = 256
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    require_signed: str | None = None
    compare: bool = False
    no_guard: bool = False
    chat_only: bool = False
    allow_edit: bool = False
    max_tokens: int = 1024
    queue: int = 64
    seconds: float = 300.0
    temperature: float = 0.0
    no_think: bool = False
    chat_template_kwargs: str = ""
    max_body: int = 1 << 20
    max_messages: int = 256
    read_seconds: float = 20.0
    connections: int = 512
    stop_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("slots", "ctx", "max_tokens", "seconds", "max_body", "max_messages",
                     "read_seconds", "connections", "queue"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} is {getattr(self, name)}", "Give more than 0")
        if self.cache_ram < 0:
            raise SettingError(f"cache_ram is {self.cache_ram}", "Give 0 or more")
        if not 0 <= self.temperature <= 2:
            raise SettingError(f"temperature is {self.temperature}", "Give 0 to 2")
        if not 0 <= self.port <= 65535:
            raise SettingError(f"port is {self.port}", "Give 0 to 65535")
        if self.stop_seconds < 0:
            raise SettingError(f"stop_seconds is {self.stop_seconds}", "Give 0 or more")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise SettingError(
                "the API key is empty, or holds a space or what is not ASCII",
                "Give letters and digits",
            )
        self._require_names()
        self.template_variables()  # or the error would come after minutes of loading

    def _require_names(self) -> None:
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise SettingError(
                    f"--cors {origin} is no origin",
                    "Give scheme and host, as in http://localhost:3000 or app://obsidian.md; there "
                    "is no wildcard",
                )
        for host in self.allow_host:
            if not _HOST.fullmatch(host):
                raise SettingError(
                    f"--allow-host {host} is no host's name", "Give one without scheme and port"
                )

    def template_variables(self) -> dict[str, Any]:
        """The chat template's variables.

        Raises:
            SettingError: they are no JSON object.
        """
        try:
            found = parse_json(self.chat_template_kwargs or "{}", parse_constant=no_constant)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise SettingError(
                f"chat_template_kwargs is no JSON object: {self.chat_template_kwargs}",
                """Give one such as '{"enable_thinking": false}'""",
            )
        return found

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        import ipaddress  # here, so that `--help` does without

        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
