"""Messages as clients send them, checked and turned into what chat templates read.

Each part is looked at where it stands, so that an error names it: messages.3.content.1, say. The
responses API's items become the same messages. Fields with null never come here (`schema`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import ApiError, wrong

Turn = dict[str, Any]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
          "tool": "tool", "function": "tool"}  # fmt: skip
_FIELDS = frozenset(["role", "content", "name", "tool_call_id", "tool_calls", "function_call",
                     "refusal"])  # fmt: skip
# What comes back with an answer, or is meant for other servers: no template shows it.
_IGNORED = frozenset(["reasoning_content", "reasoning", "reasoning_details", "thinking_blocks",
                      "annotations", "audio", "cache_control", "provider_specific_fields", "id",
                      "status", "phase"])  # fmt: skip
_IGNORED_IN_PART = frozenset(
    ["type", "cache_control", "annotations", "logprobs", "id", "index", "extras"]
)
_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_OTHERS = {"image": "an image", "audio": "audio", "video": "a video", "file": "a file"}
_NAME = re.compile(r"[^\s<|\\/>]{1,256}\Z")


def turn_of(value: Any, where: str) -> Turn:
    """A message of a chat, for the template.

    Raises:
        ApiError: it is none; its part at fault is named.
    """
    fields = _object(value, where)
    _known(fields, _FIELDS | _IGNORED, where)
    role = _role(fields, where)
    turn: Turn = {"role": role, "content": _content(fields, role, where)}
    if "name" in fields:
        name = _name(fields["name"], f"{where}.name")
        if role == "tool":  # of others it is not shown
            turn["name"] = name
    if calls := _calls(fields, where):
        if role != "assistant":
            raise wrong(f"{where}.tool_calls", "only an assistant calls tools")
        turn["tool_calls"] = calls
    if role == "tool" and "tool_call_id" in fields:
        turn["tool_call_id"] = _string(fields["tool_call_id"], f"{where}.tool_call_id")
    return turn


def turns_of_items(items: list[Any]) -> list[Turn]:
    """The items of a response's input, for the template.

    Raises:
        ApiError: one is of a kind that is not read here, or not what it should be.
    """
    found: list[Turn] = []
    for number, item in enumerate(items):
        where = f"input.{number}"
        fields = _object(item, where)
        kind = fields.get("type", "message")
        if kind == "message":
            found.append(turn_of({k: v for k, v in fields.items() if k != "type"}, where))
        elif kind == "function_call":
            call = {"id": fields.get("call_id", ""), **_call(fields, where)}
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            found[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            text = text_of(fields.get("output", ""), f"{where}.output")
            turn = {"role": "tool", "content": text}
            call_id = _string(fields.get("call_id", ""), f"{where}.call_id")
            found.append({**turn, "tool_call_id": call_id})
        elif kind != "reasoning":
            raise wrong(f"{where}.type", f"{_shown(kind)} is not read here")
    return found


def text_of(content: Any, where: str) -> str:
    """A string, or the text of parts, one a line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "should be a string, or a list of parts")
    return "\n".join(_part(part, f"{where}.{number}") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    fields = _object(part, where)
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise wrong(f"{where}.type", 'should be "text"')
    if kind not in _TEXT:
        what = next((what for word, what in _OTHERS.items() if word in kind), _shown(kind))
        raise wrong(where, f"is {what}, and this server reads text alone")
    key = _TEXT[kind]
    _known(fields, _IGNORED_IN_PART | {key}, where)
    if key not in fields:
        raise wrong(f"{where}.{key}", "is missing")
    return _string(fields[key], f"{where}.{key}")


def _role(fields: Mapping[str, Any], where: str) -> str:
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"should be one of {', '.join(_ROLES)}")
    return _ROLES[role]


def _content(fields: Mapping[str, Any], role: str, where: str) -> str:
    if "content" in fields:
        return text_of(fields["content"], f"{where}.content")
    if "refusal" in fields:  # in place of a content, as OpenAI's models refuse
        return _string(fields["refusal"], f"{where}.refusal")
    if role in ("assistant", "tool"):  # it called a tool, or the tool had nothing to say
        return ""
    raise wrong(f"{where}.content", "is missing")


def _calls(fields: Mapping[str, Any], where: str) -> list[Turn]:
    calls = fields.get("tool_calls", [])
    if not isinstance(calls, list):
        raise wrong(f"{where}.tool_calls", "should be a list")
    found = []
    for number, call in enumerate(calls):
        at = f"{where}.tool_calls.{number}"
        inner = _object(call, at)
        if inner.get("type", "function") != "function":
            raise wrong(f"{at}.type", 'should be "function"')
        function = _call(_object(inner.get("function"), f"{at}.function"), f"{at}.function")
        found.append({"id": _string(inner.get("id", ""), f"{at}.id"), **function})
    if "function_call" in fields:  # its older form
        at = f"{where}.function_call"
        found.append({"id": "", **_call(_object(fields["function_call"], at), at)})
    return found


def _call(fields: Mapping[str, Any], where: str) -> Turn:
    name = _name(fields.get("name"), f"{where}.name")
    arguments = _string(fields.get("arguments", "{}"), f"{where}.arguments")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# -- what a value is ----------------------------------------------------------


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise wrong(where, "should be an object")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(where, "should be a string")
    return value


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise wrong(where, r"should be a name without spaces, < | \ / and >")
    return value


def _known(fields: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for name in fields:
        if name not in known:
            at = f"{where}.{name}"[:200]
            raise ApiError(400, f"unknown field '{at}'", param=at, code="unknown_field")


def _shown(kind: Any) -> str:
    return f"of type {str(kind)[:64]!r}"
