"""Turns in which tools were called, in the forms that chat templates read.

Clients send a call's arguments as JSON text. Some templates want them as an object, some as text,
and some know nothing of tools: they fail, or leave the call out. `forms` gives the same turns in
each form, the best first; `shown` says whether a rendered chat holds what was called and answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..files import parse_json

Turn = Mapping[str, Any]
_ANSWERS = ("tool", "function")  # the roles of what a tool answered


def forms(turns: Sequence[Turn]) -> list[list[Turn]]:
    """The turns in each form that a template may read; one alone where no tool was called."""
    as_given = list(turns)
    if not any(_calls(turn) or turn["role"] in _ANSWERS for turn in turns):
        return [as_given]
    as_objects = [_with_calls(turn, [_parsed(call) for call in _calls(turn)]) for turn in turns]
    return [as_objects, as_given, _written_out(turns)]


def shown(text: str, turns: Sequence[Turn]) -> bool:
    """Whether a rendered chat has every call's name, and every answer as it is or in JSON."""
    names = [str(_function(call).get("name", "")) for turn in turns for call in _calls(turn)]
    answers = [str(turn["content"]).strip() for turn in turns if turn["role"] in _ANSWERS]
    return all(name in text for name in names) and all(
        any(spelt in text for spelt in _spellings(answer)) for answer in answers
    )


def _spellings(answer: str) -> Iterator[str]:
    yield answer
    yield json.dumps(answer, ensure_ascii=False)[1:-1]
    yield json.dumps(answer)[1:-1]


def _calls(turn: Turn) -> Sequence[Any]:
    return turn.get("tool_calls") or ()


def _function(call: Any) -> Mapping[str, Any]:
    """A call's name and arguments, wherever they stand in it."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _with_calls(turn: Turn, calls: list[Any]) -> Turn:
    return {**turn, "tool_calls": calls} if calls else turn


def _parsed(call: Any) -> Any:
    """The call with its arguments as an object, where they are one."""
    function = _function(call)
    try:
        arguments = parse_json(function["arguments"], foreign=True)
    except (KeyError, TypeError, ValueError):
        return call
    if not isinstance(arguments, dict):
        return call
    if "function" in call:
        return {**call, "function": {**function, "arguments": arguments}}
    return {**call, "arguments": arguments}


def _written_out(turns: Sequence[Turn]) -> list[Turn]:
    """The turns as text of user and assistant in alternation, on which many templates insist."""
    found: list[Turn] = []
    for turn in turns:
        role = "user" if turn["role"] in _ANSWERS else turn["role"]
        written = [json.dumps(dict(_function(call)), ensure_ascii=False) for call in _calls(turn)]
        text = "\n".join(filter(None, [turn["content"], *written]))
        if found and found[-1]["role"] == role != "system":
            text = f"{found.pop()['content']}\n\n{text}"
        found.append({"role": role, "content": text})
    return found
