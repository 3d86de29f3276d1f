"""Models that think aloud before they answer: what is a thought, and where the answer begins.

A template may open the thought itself (R1's distills), leave it to the model (Qwen3, SmolLM3), and
may have a switch that puts an empty thought instead. Which it does is seen on a chat of one word.
Only the text `<think>` counts, which all of these use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateError, meta

from ..errors import UnsupportedError

OPEN, CLOSE = "<think>", "</think>"
SWITCHES = ("enable_thinking", "thinking")  # variables of templates; false turns thinking off
# Those of gpt-oss, Magistral, EXAONE Deep, Command A Reasoning and Seed-OSS.
_OTHERS = ("<|channel|>", "[THINK]", "<thought>", "<|START_THINKING|>", "<seed:think>")
_TAIL = 16  # tokens that hold the end of a thought
_HEAD = 8  # tokens that hold its beginning


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model thinks.

    Attributes:
        expected: the template knows thoughts, so that the model may think.
        opens: the template leaves one open at the end of the prompt.
        switch: the template's variable that turns thinking off; "" where there is none.
        missing: what to write behind a prompt, rendered with the switch off, so that the answer
            itself begins there: an empty thought, or the rest of one.
    """

    expected: bool = False
    opens: bool = False
    switch: str = ""
    missing: str = ""

    @classmethod
    def of(
        cls,
        template: str,
        end_of_prompt: Callable[[Mapping[str, Any]], str],
        begins: Callable[[Mapping[str, Any]], bool],
    ) -> Thinking:
        """See what a template does.

        Args:
            end_of_prompt: what a prompt has behind the user's words, by the template's variables.
            begins: whether the model itself begins its answer with a thought. Asked where the
                prompt shows none: many a template only takes thoughts out of earlier turns.
        """
        if CLOSE not in template and OPEN not in template:
            if other := next((mark for mark in _OTHERS if mark in template), ""):
                raise UnsupportedError(
                    f"its chat template marks thoughts by {other}, and {OPEN} alone is known here: "
                    "thoughts would count as answers",
                    "Give a model that thinks otherwise, or not; without a gene, `chat` and "
                    "`serve` take this one",
                )
            return cls()
        switch = _switch(template)
        end = end_of_prompt({})
        without: dict[str, Any] = {switch: False} if switch else {}
        off = end_of_prompt(without)
        if CLOSE in off or is_open(off) or begins(without):
            return cls(True, is_open(end), switch, _missing(off))
        return cls(True, is_open(end), switch)

    def answer(self, text: str, opened: bool | None = None) -> str | None:
        """The text without its thought; None where the thought never ends.

        Args:
            opened: whether the prompt left the thought open; default: as the template does.
        """
        opened = self.opens if opened is None else opened
        if not (opened or text.lstrip().startswith(OPEN)):
            return text
        _, closed, answer = text.rpartition(CLOSE)
        return answer.lstrip() if closed else None


def is_open(text: str) -> bool:
    """Whether a text ends within a thought."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def _switch(template: str) -> str:
    try:
        names = meta.find_undeclared_variables(Environment().parse(template))
    except TemplateError:  # a tag of llama.cpp's own, such as {% generation %}
        names = {name for name in SWITCHES if name in template}
    return next((name for name in SWITCHES if name in names), "")


def _missing(end: str) -> str:
    if is_open(end):
        return f"{'' if end.endswith(chr(10)) else chr(10)}\n{CLOSE}\n\n"
    return "" if CLOSE in end else f"{OPEN}\n\n{CLOSE}\n\n"


@dataclass(frozen=True)
class Thought:
    """What an engine must know so that a thought does not count as answer.

    Attributes:
        tokens: the thought's at most.
        text: tokens to text, control tokens included.
        opened: whether the prompts leave a thought open.
    """

    tokens: int
    text: Callable[[Sequence[int]], str]
    opened: bool

    def ended(self, tokens: list[int]) -> bool:
        """Whether a thought has just ended, or there is none. Called for each new token."""
        if CLOSE in self.text(tokens[-_TAIL:]):
            return True
        if self.opened or len(tokens) > _HEAD:
            return False
        head = self.text(tokens).lstrip()
        return not (OPEN.startswith(head) or head.startswith(OPEN))
