"""Chats on a `llama_cpp.Llama`: the template in the GGUF, thoughts, messages as tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import (
    FileFormatError,
    SafeGeneError,
    SafeGeneWarning,
    SettingError,
    UnsupportedError,
)
from ..gguf_file import GGUFFile
from .chat import PLAIN_TEMPLATE, RESERVED, ChatTemplate, template_fault
from .controls import ControlTexts
from .guard import alone
from .shared import SharedLlama
from .thinking import CLOSE, OPEN, Thinking

_TEMPLATE = "tokenizer.chat_template"
_DIALOGUES = ("user", "system user", "user assistant user", "system user assistant user",
              "user assistant tool")  # fmt: skip
_SUM, _BEGINNING = "What is 17 times 24?", 8  # tokens of an answer: <think> may be several


def _marks(source: str, template: ChatTemplate) -> str:
    """What a template has in its source, and what it shows between messages of every role.

    Marks of thoughts are left out: templates look for them in messages.
    """
    found = [source]
    for dialogue in _DIALOGUES:
        turns = [{"role": role, "content": "?"} for role in dialogue.split()]
        with suppress(Exception):  # a template may refuse a role, and raises what it likes
            parts = template.parts(turns, add_generation_prompt=True, variables={})
            found += [text for text, _ in parts]
    return " ".join(found).replace(OPEN, " ").replace(CLOSE, " ")


class ChattingLlama(SharedLlama):
    """What `SafeLlama` knows of chats."""

    _file: GGUFFile
    _controls: ControlTexts

    def _prepare_chats(self, variables: Mapping[str, Any] | None) -> None:
        """Called before llama-cpp-python loads the model.

        Args:
            variables: of the chat template, for every chat.

        Raises:
            SettingError: one of them is set by each chat itself.
        """
        self.chat_template_kwargs = dict(variables or {})
        self._thinking: Thinking | None = None
        self._formatter: ChatTemplate | None = None
        if own := sorted(RESERVED & self.chat_template_kwargs.keys()):
            raise SettingError(
                f"'{own[0]}' is no variable to set: a chat gets its own", "Leave it out"
            )

    @property
    def metadata(self) -> dict[str, str]:
        """The GGUF's metadata, as text."""
        return self._metadata

    @metadata.setter
    def metadata(self, found: dict[str, str]) -> None:
        # llama-cpp-python compiles every template as it loads a model. One that it cannot compile
        # is kept from it, since a merge, say, needs none.
        templates = {key: text for key, text in found.items() if key.startswith(_TEMPLATE)}
        self._unread = {key: text for key, text in templates.items() if template_fault(text)}
        self._metadata = {key: text for key, text in found.items() if key not in self._unread}

    @property
    def chat_template(self) -> ChatTemplate:
        """What `render` fills in: the template in the GGUF, or a plain one.

        Raises:
            FileFormatError: jinja cannot compile it.
        """
        if self._formatter is None:
            self._formatter = self._chat_formatter()
        return self._formatter

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Messages as tokens, through the chat template in the GGUF.

        Only the template's own control tokens become such: in a message they are plain text.

        Args:
            messages: each with a role and a content, which is a string or parts of type
                "text". An assistant's content may be None.
            add_generation_prompt: open the assistant's turn at the end.
            chat_template_kwargs: variables of the template, such as Qwen3's `enable_thinking`;
                they go before those that the model was opened with.
            variables: the same, one by one, such as `tools`.

        Raises:
            SettingError: the template refuses these messages (a system role, say), or one of
                them is not text.
            FileFormatError: the template cannot be compiled.
        """
        template = self.chat_template
        variables = {**(chat_template_kwargs or {}), **variables}
        parts = self._parts(messages, add_generation_prompt, variables)
        if not parts:
            raise SettingError(f"{self._file.path}: its chat template shows none of these messages")
        written = template.bos and parts[0][0].startswith(template.bos)
        # Not by llama.cpp's own flag, which would end the text, too, in files that ask for it.
        tokens = [] if written or not self._model.add_bos_token() else [self.token_bos()]
        for text, trusted in parts:
            tokens += self.tokenize(text.encode(), add_bos=False, special=trusted)
        return tokens

    def _parts(
        self, messages: Sequence[Mapping[str, Any]], prompted: bool, variables: Mapping[str, Any]
    ) -> list[tuple[str, bool]]:
        given = {**self.chat_template_kwargs, **variables}
        try:
            return self.chat_template.parts(
                messages, add_generation_prompt=prompted, variables=given
            )
        except SafeGeneError:
            raise
        except Exception as error:  # a template may raise anything
            reason = str(error) or type(error).__name__
            raise SettingError(
                f"{self._file.path}: its chat template failed ({reason})",
                "Give a model whose template takes these messages; `safegene-edge inspect` shows "
                "what is suspicious in one",
            ) from error

    @property
    def thinking(self) -> Thinking:
        """How the model thinks before it answers, as its template has it.

        Raises:
            SettingError, FileFormatError: as `render`.
            UnsupportedError: it marks thoughts otherwise than is known here.
        """
        if self._thinking is None:
            word = "Hello"

            def end_of_prompt(variables: Mapping[str, Any]) -> str:
                parts = self._parts([{"role": "user", "content": word}], True, variables)
                return "".join(text for text, _ in parts).rpartition(word)[2]

            try:
                self._thinking = Thinking.of(
                    self.metadata.get(_TEMPLATE, ""), end_of_prompt, self._begins_with_a_thought
                )
            except UnsupportedError as error:
                error.message = f"{self._file.path}: {error.message}"
                raise
        return self._thinking

    def _begins_with_a_thought(self, variables: Mapping[str, Any]) -> bool:
        tokens = self.render([{"role": "user", "content": _SUM}], **variables)
        if len(tokens) + _BEGINNING > self.n_ctx():  # as a template's own long system message is
            return False
        said = self.first_tokens(tokens, _BEGINNING)
        return self.text(said, special=True).lstrip().startswith(OPEN)

    def render_answer(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """As `render`, up to where the answer itself begins: behind a thought, and that empty.

        What a model that thinks says first is no answer. Refusals are looked for here.
        """
        thinking = self.thinking
        if thinking.switch:
            variables = {thinking.switch: False, **variables}
        tokens = self.render(messages, **variables)
        if not thinking.missing:
            return tokens
        rest = self.tokenize(thinking.missing.encode(), add_bos=False, special=True)
        return [*tokens, *rest]

    def spoken(self, text: str) -> list[int]:
        """The tokens of a text with which the assistant's answer begins.

        What stands before decides: behind a line's end SentencePiece puts no space before the
        first word, as it does in a text of its own, and behind "Assistant:" a byte-level BPE has
        one. Where the template shows no such answer, the text stands alone.
        """
        user = {"role": "user", "content": "Hello"}
        alone: list[int] = self.tokenize(text.encode(), add_bos=False, special=False)
        try:
            before = self.render_answer([user])
            turns = [user, {"role": "assistant", "content": f"{text} a"}]
            whole = self.render(turns, add_generation_prompt=False)
        except SettingError:
            return alone
        if whole[: len(before)] != before:
            return alone
        behind = whole[len(before) :]
        for more in (0, 1, -1, 2, -2):  # a space may be a token
            said = behind[: max(1, len(alone) + more)]
            if self.text(said).strip() == text.strip():
                return said
        return alone

    def render_alone(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> list[int] | None:
        """The user's last message under the system messages, up to where the answer begins.

        None where nothing else was said. The arguments are those of `render`.
        """
        turns = alone(messages)
        return None if turns is None else self.render_answer(turns, **variables)

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Any = None,
        function_call: Any = None,
        tools: Any = None,
        tool_choice: Any = None,
        temperature: float = 0.0,
        *more: Any,
        **options: Any,
    ) -> Any:
        """An answer to a chat, in one piece or as a stream of chunks.

        As `llama_cpp.Llama.create_chat_completion`, but for two things. The prompt is what
        `render` gives, so that a control token in a message is plain text and cannot forge a
        turn. And the default is greedy (`temperature` 0.0), as in every figure of this project.

        Args:
            messages: as `render` takes them.
            temperature: 0.0 takes the likeliest token; more samples.
            more, options: as of `llama_cpp.Llama`: `stream`, `stop`, `max_tokens`, `tools`,
                `response_format` and the rest.

        Raises:
            SettingError: as `render`.
            ValueError: the chat is longer than the context.
        """
        with self._in_use():
            return super().create_chat_completion(
                messages, functions, function_call, tools, tool_choice, temperature, *more,
                **options,
            )  # fmt: skip

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Tokens as text, without special tokens unless asked for."""
        return str(self.detokenize(list(tokens), special=special).decode("utf-8", "replace"))

    def _chat_formatter(self) -> ChatTemplate:
        template = self.metadata.get(_TEMPLATE, "")
        if fault := template_fault(template):
            raise FileFormatError(
                f"{self._file.path}: its chat template cannot be read ({fault})",
                "Give a model whose template is Jinja, as Hugging Face has it; gguf-py's "
                "`gguf-new-metadata --chat-template` puts one in",
            )
        eos, bos = self._token_text(self.token_eos()), self._token_text(self.token_bos())
        if not template.strip():
            template = PLAIN_TEMPLATE
            warnings.warn(
                f"{self._file.path}: has no chat template, as base models have none; messages are "
                "written as 'User: ...' lines. gguf-py's `gguf-new-metadata --chat-template` puts "
                "one in",
                SafeGeneWarning, stacklevel=2,
            )  # fmt: skip
        made = partial(ChatTemplate, template, bos=bos, eos=eos)
        shown = _marks(template, made(controls=self._controls))
        return made(controls=self._controls.with_markers(shown))

    def _token_text(self, token: int) -> str:
        return str(self._model.token_get_text(token)) if token >= 0 else ""
