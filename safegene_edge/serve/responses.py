"""An answer in the form of OpenAI's responses API: one object, or a stream of typed events."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ..runtime.batcher import Ask
from .errors import ApiError

_AT = {"output_index": 0, "content_index": 0}


class ResponseForm:
    """The shape of the answer to one request.

    Args:
        model: the served name; fingerprint: the gene's id.
        settings: what was asked for, as the answer repeats it.
    """

    def __init__(self, model: str, fingerprint: str, settings: dict[str, Any]) -> None:
        self._settings = {**settings, "model": model, "system_fingerprint": fingerprint}
        number = uuid.uuid4().hex
        self._id, self._message = f"resp_{number}", f"msg_{number}"
        self._created = int(time.time())
        self._pieces: list[str] = []
        self._events = 0

    def whole(self, text: str, reason: str, ask: Ask) -> dict[str, Any]:
        """The answer in one object."""
        why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason)
        status, cut = ("incomplete", {"reason": why}) if why else ("completed", None)
        output = [self._item(status, [_part(text)])]
        return self._object(status, output, incomplete_details=cut, usage=_usage(ask))

    def opening(self) -> bytes:
        """The events before the text."""
        begun = {"response": self._object("in_progress", [])}
        item = {"output_index": 0, "item": self._item("in_progress", [])}
        return (
            self._event("response.created", begun)
            + self._event("response.in_progress", begun)
            + self._event("response.output_item.added", item)
            + self._event("response.content_part.added", {**self._at(), "part": _part("")})
        )

    def piece(self, text: str) -> bytes:
        """The event with some of the text."""
        self._pieces.append(text)
        return self._event(
            "response.output_text.delta", {**self._at(), "delta": text, "logprobs": []}
        )

    def closing(self, reason: str, ask: Ask) -> bytes:
        """The events behind the text."""
        text = "".join(self._pieces)
        whole = self.whole(text, reason, ask)
        item = {"output_index": 0, "item": whole["output"][0]}
        return (
            self._event("response.output_text.done", {**self._at(), "text": text, "logprobs": []})
            + self._event("response.content_part.done", {**self._at(), "part": _part(text)})
            + self._event("response.output_item.done", item)
            + self._event(f"response.{whole['status']}", {"response": whole})
        )

    def failing(self, error: ApiError) -> bytes:
        """The event in place of an end."""
        cause = {"code": "server_error", "message": error.message}
        failed = self._object("failed", [], error=cause)
        return self._event("response.failed", {"response": failed})

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._message, **_AT}

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        fields = {"type": kind, "sequence_number": self._events, **content}
        self._events += 1
        data = json.dumps(fields, separators=(",", ":")).encode()
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _object(self, status: str, output: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            **self._settings,
            **more,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(ask: Ask) -> dict[str, Any]:
    return {
        "input_tokens": len(ask.prompt),
        "input_tokens_details": {"cached_tokens": ask.reused},
        "output_tokens": ask.n_new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(ask.prompt) + ask.n_new,
    }
