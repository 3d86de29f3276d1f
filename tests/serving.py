"""A real server in a thread on a port of its own, and a plain socket to talk to it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from safegene_edge.serve import ServeSettings
from safegene_edge.serve.run import Server, address, bound, opened

# 0 is ggml's number for float32; a tiny model gains nothing from a second thread.
EXACT = {"type_k": 0, "type_v": 0, "flash_attn": False, "n_threads": 1}


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    port: int
    server: Server

    def client(self, key: str = "none") -> OpenAI:
        """OpenAI's client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def send(self, data: bytes, *, timeout: float = 20, end: bool = False) -> bytes:
        """Bytes in, and all bytes out until the server hangs up."""
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout)) as sock:
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
            found = b""
            while piece := sock.recv(1 << 16):
                found += piece
            return found

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """One request on a connection of its own, byte by byte as given."""
        fields = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if body:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        answer = self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
        return Reply.parse(answer)

    def post(self, path: str, fields: Any, **headers: str) -> Reply:
        """A JSON body."""
        return self.ask("POST", path, json.dumps(fields).encode(), **headers)


@dataclass(frozen=True)
class Reply:
    """A response: status, headers (lower case), body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def parse(cls, data: bytes) -> Reply:
        """The first response in these bytes; its body is what follows, as it was sent."""
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        return cls(int(first.split()[1]), {name.lower(): v for name, _, v in pairs}, body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def running(model: Path, gene: Path | None = None, **settings: Any) -> Iterator[Running]:
    """Serve until the block ends; then everything is closed in good order.

    Keys and values are float32, and so is attention: then answers in company are those of a
    question asked alone. In float16, which flash attention sums in, the order of sums shows.
    """
    chosen = ServeSettings(**{"port": 0, "slots": 4, "ctx": 2048, "max_tokens": 256, **settings})
    with bound(chosen) as sock, opened(model, gene, [], chosen, **EXACT) as server:
        listens = threading.Event()
        server.ready = lambda _: listens.set()
        url, port = address(sock), sock.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        assert listens.wait(30)
        try:
            yield Running(url, port, server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
