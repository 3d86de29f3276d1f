"""Chats become text and tokens, and no message can forge a turn.

`ChatTemplate` fills in the template that lies in a GGUF. What people wrote (messages, and the
tools that a client names) stays plain characters; only the template's own control tokens become
such. `chat_handler` puts the same rendering under llama-cpp-python's `create_chat_completion`;
`template_fault` and `require_chat` say what a template cannot do.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    chat_formatter_to_chat_completion_handler,
)

from ..errors import SettingError
from ..template_scan import DEEPEST, nesting
from .controls import ControlTexts
from .template_bounds import BoundedFormatter, TemplateTooLargeError
from .tool_turns import forms, shown

# For a base model without a template: the plainest form that such models continue.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_Parts = list[tuple[str, bool]]
_Hide = Callable[[str, list[str]], str]
# Variables that every rendering sets by itself.
RESERVED = frozenset(["messages", "bos_token", "eos_token", "add_generation_prompt",
                      "raise_exception", "strftime_now"])  # fmt: skip


class ChatTemplate:
    """A chat template and the control texts that nobody but the template may write.

    Args:
        template: in Jinja, as the GGUF has it.
        bos, eos: the texts of the tokens that open and end a text; "" where there is none.
        controls: the vocabulary's control texts.
    """

    def __init__(self, template: str, *, bos: str, eos: str, controls: ControlTexts) -> None:
        self.bos, self.eos = bos, eos
        self._controls = controls
        # One for each value, because llama-cpp-python keeps the value in the formatter, and
        # threads render at once.
        self._formatters = {
            prompted: BoundedFormatter(
                template=template, eos_token=eos, bos_token=bos, add_generation_prompt=prompted
            )
            for prompted in (False, True)
        }

    def parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> _Parts:
        """The chat as text in parts, and whether each may contain control tokens.

        Turns in which tools were called take the form that the template shows.

        Raises:
            SettingError: a message is not text.
            Exception: whatever the template raises.
        """
        plain = [_plain(number, message) for number, message in enumerate(messages, 1)]
        formatter = self._formatters[add_generation_prompt]

        def with_hidden(turns: Any, hide: _Hide) -> _Parts:
            hidden: list[str] = []
            turns, given = (_hidden(value, hide, hidden) for value in (turns, dict(variables)))
            return list(self._controls.parts(formatter(messages=turns, **given).prompt, hidden))

        def rendered(turns: Sequence[Mapping[str, Any]]) -> _Parts:
            parts = with_hidden(turns, self._controls.hide)
            if self._controls.may_begin(turns, variables):
                self._require_own(parts, with_hidden(turns, self._controls.hide_all))
            return parts

        *others, last = forms(plain)
        for turns in others:
            try:
                parts = rendered(turns)
                if shown("".join(text for text, _ in parts), plain):
                    return parts
            except TemplateTooLargeError:  # it would be, in any form
                raise
            except Exception:
                continue
        return rendered(last)

    def _require_own(self, parts: _Parts, own: _Parts) -> None:
        """Raise where the template, by leaving something out, made control texts of a message's.

        Args:
            own: the same chat, where no control text begins in a message.
        """
        if self._controls.counted(parts) - self._controls.counted(own):
            raise SettingError(
                "the chat template makes a control token of what a message says",
                "Leave out what looks like one; a model whose template only shows the messages "
                "takes it",
            )


def _hidden(value: Any, hide: _Hide, hidden: list[str]) -> Any:
    """The value with stand-ins in all of its strings."""
    if isinstance(value, str):
        return hide(value, hidden)
    if isinstance(value, Mapping):
        return {_hidden(k, hide, hidden): _hidden(v, hide, hidden) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(item, hide, hidden) for item in value]
    return value


def template_fault(template: str) -> str:
    """Why jinja cannot compile a chat template; "" where it can."""
    if nesting(template) > DEEPEST:
        return f"more than {DEEPEST} brackets and blocks within each other"
    try:
        BoundedFormatter(template=template, eos_token="", bos_token="")
    except Exception as error:  # its own family, and what its parser runs into
        line = getattr(error, "lineno", None)
        reason = getattr(error, "message", None) or str(error) or type(error).__name__
        return f"line {line}: {reason}" if line else str(reason)
    return ""


def require_template(llama: Any) -> None:
    """SettingError for a model whose file has no chat template."""
    if not llama.metadata.get("tokenizer.chat_template", "").strip():
        raise SettingError(
            f"{llama.model_path}: has no chat template: a base model, which neither refuses nor "
            "answers",
            "Give a chat model",
        )


def require_chat(llama: Any, *, system: bool = False) -> None:
    """Check that a model's template takes a message, and a system message before it if asked.

    Raises:
        SettingError: the template refuses one, or leaves it out.
        FileFormatError: the template cannot be read.
    """
    user, before = {"role": "user", "content": "Hello"}, {"role": "system", "content": "Be kind."}
    alone = llama.render([user])
    if alone == llama.render([{**user, "content": "Goodbye"}]):
        raise SettingError(
            f"{llama.model_path}: its chat template leaves the user's words out",
            "Give a model whose template shows the messages",
        )
    if not system:
        return
    try:
        reason = "it leaves the message out"
        if llama.render([before, user]) != alone:
            return
    except SettingError as error:
        reason = error.message
    raise SettingError(
        f"{llama.model_path}: its chat template takes no system message ({reason})",
        "Say it in the first message of the user",
    )


def _plain(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one string."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise SettingError(
            f"message {number} has no role", 'Give {"role": "user", "content": "..."}'
        )
    content = message.get("content")
    if content is None and role == "assistant":  # as it is where the model called a tool
        content = ""
    if isinstance(content, (list, tuple)):
        content = "\n".join(_text(number, part) for part in content)
    if not isinstance(content, str):
        raise SettingError(f"message {number} ({role}) has no text", "Give its content as a string")
    return {**message, "content": content}


def _text(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, Mapping) else {}
    if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
        raise SettingError(
            f"message {number} has a part of type {fields.get('type')!r}, and text is all that "
            "is read here",
            'Give parts such as {"type": "text", "text": "..."}',
        )
    return str(fields["text"])


def chat_handler(
    *,
    llama: Any,
    messages: Sequence[Mapping[str, Any]],
    functions: Any = None,
    function_call: Any = None,
    tools: Any = None,
    tool_choice: Any = None,
    **options: Any,
) -> Any:
    """llama-cpp-python's own chat handler, but for the prompt, which `SafeLlama.render` makes."""
    for_template = {
        "functions": functions,
        "function_call": function_call,
        "tools": tools,
        "tool_choice": tool_choice,
    }
    tokens, eos = llama.render(messages, **for_template), llama.chat_template.eos

    def formatter(**_: Any) -> ChatFormatterResponse:
        return ChatFormatterResponse(prompt="", stop=[eos] if eos else None, added_special=True)

    answer = chat_formatter_to_chat_completion_handler(formatter)
    rendered = _Rendered(llama, tokens)
    if guard := llama.guard:
        alone = llama.render_alone(messages, **for_template)
        if alone and llama.refuses(alone, guard):
            rendered.create_completion = partial(_refused, llama, tokens, guard.refusal)
            for_template = {}  # a refusal is text, whatever tool was to be called
    return answer(llama=rendered, messages=messages, **for_template, **options)


class _Rendered:
    """A model to which llama-cpp-python's handler can give no other prompt than these tokens."""

    def __init__(self, llama: Any, tokens: list[int]) -> None:
        self.verbose, self.create_completion = llama.verbose, llama.create_completion
        self._tokens = tokens

    def tokenize(self, *_: Any, **__: Any) -> list[int]:
        return self._tokens


def _refused(
    llama: Any, tokens: list[int], refusal: str, *, stream: bool = False, **_: Any
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """The completion of a prompt that a guard refuses."""
    made = {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": llama.model_path,
    }

    def saying(text: str, finish: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}
        return {**made, "choices": [choice]}

    if stream:
        return iter([saying(refusal, None), saying("", "content_filter")])
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 0, "total_tokens": len(tokens)}
    return {**saying(refusal, "content_filter"), "usage": usage}
