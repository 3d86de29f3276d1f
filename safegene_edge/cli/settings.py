"""What may be set of a chat."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatSettings:
    """Settings that `chat` and the plugin for `llm` share.

    Attributes:
        max_tokens: tokens of an answer, at most.
        temperature: 0 takes the likeliest token.
        ctx: tokens of a conversation with its answers, at most.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    ctx: int = 4096
