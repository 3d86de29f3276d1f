"""What is asked and what is answered, whoever answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from ...prompts import Prompt

Advance: TypeAlias = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Chat:
    """What is sent: (role, content) messages, and words put into the model's mouth.

    `prefill` opens the assistant's answer; the model goes on from there.
    """

    messages: tuple[tuple[str, str], ...]
    prefill: str = ""

    @classmethod
    def user(cls, text: str) -> Chat:
        """One message of the user."""
        return cls((("user", text),))

    @classmethod
    def of(cls, prompt: Prompt) -> Chat:
        """The prompt after its earlier turns."""
        return cls(prompt.messages)

    @property
    def text(self) -> str:
        """The last message: the user's request."""
        return self.messages[-1][1]

    def saying(self, text: str) -> Chat:
        """The same chat with another last message."""
        return replace(self, messages=(*self.messages[:-1], (self.messages[-1][0], text)))

    def after(self, *messages: tuple[str, str]) -> Chat:
        """The same chat with messages before the last."""
        return replace(self, messages=(*self.messages[:-1], *messages, self.messages[-1]))

    def without_system(self, *, keep: bool = True) -> Chat:
        """The same chat, its system messages put before the first other one, or left out."""
        system = [content for role, content in self.messages if role == "system"]
        others = [message for message in self.messages if message[0] != "system"]
        if not system or not others:
            return self
        (role, first), *rest = others
        opening = "\n\n".join([*system, first]) if keep else first
        return replace(self, messages=((role, opening), *rest))

    def as_dicts(self) -> list[dict[str, str]]:
        """The messages as chat templates and servers want them."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer's text, without its thought, and all of its tokens.

    `text` is None where there is no answer to judge: the chat did not fit the context, or, if
    `thinking`, the thought never ended.
    """

    text: str | None
    tokens: tuple[int, ...] = ()
    thinking: bool = False


class Asker(Protocol):
    """Whatever can be evaluated: a local model, or a server."""

    @property
    def columns(self) -> tuple[str, ...]:
        """ "before" and, where there are two sides, "after"."""

    @property
    def attack_columns(self) -> tuple[str, ...]:
        """Those, and "guarded" where attacks are asked with a guard, too."""

    def ask(
        self, column: str, chats: Sequence[Chat], advance: Advance | None = None
    ) -> list[Reply]:
        """Greedy answers in the order of the chats; `advance` is called for each."""

    def refusal(self, column: str, chat: Chat) -> float:
        """Log-probability in nats that the answer opens with a refusal.

        Raises:
            SettingError: this model shows no likelihoods.
        """
