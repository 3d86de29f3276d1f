"""What a client may ask, field by field.

Every field of a request is one of four: used; known and without effect here (`IGNORED`);
neutral, allowed with the one value that asks for nothing (`NEUTRAL`); or refused. A field that
is refused would change the operator's policy (`POLICY`), or it is unknown. A field with null is
a field that is not there, at any depth.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from ..files import no_constant, parse_json
from ..runtime.sampling import Sampling
from .errors import ApiError, wrong
from .messages import Turn, turn_of, turns_of_items

# How fields begin that would take the gene off, weaken it, or answer in the model's place. Every
# unknown field is refused; who sends one of these learns that no spelling of it would help.
POLICY = ("adapter", "chat_template", "control_vector", "gene", "grammar", "guided", "ignore_eos",
          "json_schema", "logit", "lora", "prefill", "safe")  # fmt: skip
_POLICY = re.compile(rf"(?:{'|'.join(POLICY)})s?(?:_|$)")
MOST_PROMPTS = 64  # in one request for completions
# Known to clients of OpenAI's API, and without a meaning here.
IGNORED = frozenset([
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "cache_prompt", "timings_per_token",
    "return_progress", "reasoning", "reasoning_effort", "verbosity", "include", "max_tool_calls",
])  # fmt: skip
_IGNORED_TYPES = {"user": str, "metadata": dict}
_JSON_NAMES = {str: "a string", dict: "an object"}
# Allowed with a value that asks for nothing, which clients send unasked.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "background": (False,),
    "truncation": ("auto", "disabled"),
    "previous_response_id": (),
    "conversation": (),
}
_STORED = ("previous_response_id", "conversation")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _listed(value: Any) -> Any:
    """One string as a list, so that an error names the part at fault and not a kind of value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise ValueError("should be a string or a list")


def _some(number: int) -> int:
    if number == 0:
        raise ValueError("should be 1 or more, or -1 for the server's default")
    return number


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Limit = Annotated[int, Field(ge=-1), AfterValidator(_some)]


class _Request(_Strict):
    source: ClassVar[str]  # the field that the prompt is made of

    model: str | None = Field(None, max_length=512)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_listed)] = []
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens of answer that the client asked for, if it did."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, temperature: float) -> Sampling:
        """The sampler's settings, with the operator's temperature where none is named."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
                 "frequency_penalty")  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("seed") == -1:  # llama-server's name for a random one
            del given["seed"]
        if given.get("top_k") == -1:  # and for none
            given["top_k"] = 0
        return Sampling(**{"temperature": temperature, **given})


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    source: ClassVar[str] = "messages"

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: Limit | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The newer name goes before the older."""
        if self.max_completion_tokens is None:
            return super().wanted_tokens
        return None if self.max_completion_tokens == -1 else self.max_completion_tokens

    def turns(self, limit: int) -> list[Turn]:
        """Messages for the template.

        Raises:
            ApiError: too many, one is none, or the last one is the assistant's.
        """
        _require_few(self.messages, limit, self.source)
        found = [turn_of(value, f"messages.{n}") for n, value in enumerate(self.messages)]
        return _require_no_prefill(found, self.source)


class TextFormat(_Strict):
    """The format of a response's text; plain is the only one."""

    type: Literal["text"]


class TextSettings(_Strict):
    """How a response's text shall be."""

    format: TextFormat | None = None
    verbosity: str | None = None  # without effect


class ResponseRequest(_Request):
    """POST /v1/responses."""

    source: ClassVar[str] = "input"

    input: Annotated[list[Any], Field(min_length=1), BeforeValidator(_listed)]
    instructions: str | None = None
    max_output_tokens: Limit | None = None
    text: TextSettings | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """As `max_tokens` of a chat."""
        if self.max_output_tokens is None:
            return super().wanted_tokens
        return None if self.max_output_tokens == -1 else self.max_output_tokens

    def turns(self, limit: int) -> list[Turn]:
        """Messages for the template; the instructions go first.

        Raises:
            ApiError: as of a chat.
        """
        _require_few(self.input, limit, self.source)
        items = [{"role": "user", "content": i} if isinstance(i, str) else i for i in self.input]
        turns = _require_no_prefill(turns_of_items(items), self.source)
        if not self.instructions:
            return turns
        words = [self.instructions]
        if turns[0]["role"] == "system":  # many templates take one system message alone
            words.append(turns.pop(0)["content"])
        return [{"role": "system", "content": "\n\n".join(words)}, *turns]

    def repeated(self, temperature: float) -> dict[str, Any]:
        """What the answer repeats of the request; `temperature` is the operator's."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_p": Sampling().top_p if self.top_p is None else self.top_p,
        }


def _require_few(values: list[Any], limit: int, where: str) -> None:
    if len(values) > limit:
        text = f"{len(values)} messages are more than the {limit} that are allowed"
        raise ApiError(400, text, param=where)


def _require_no_prefill(turns: list[Turn], where: str) -> list[Turn]:
    if not turns:
        raise wrong(where, "holds no message")
    if turns[-1]["role"] == "assistant":
        raise ApiError(
            400,
            "the last message is the assistant's: an answer that the client begins would "
            "pass over the gene, and is refused by the server's policy",
            param=where,
            code="policy",
        )
    return turns


class CompletionRequest(_Request):
    """POST /v1/completions: raw text, of one prompt or of several that are not streamed."""

    source: ClassVar[str] = "prompt"

    prompt: Annotated[
        list[str], Field(min_length=1, max_length=MOST_PROMPTS), BeforeValidator(_listed)
    ]

    @property
    def sources(self) -> list[str]:
        """Each prompt's name in an error: of several, with its place."""
        count = len(self.prompt)
        return [f"prompt.{n}" for n in range(count)] if count > 1 else [self.source]


AnyRequest = ChatRequest | CompletionRequest | ResponseRequest
RequestT = TypeVar("RequestT", bound=_Request)


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """A request's body, checked.

    Raises:
        ApiError: 400, with the field at fault as `param`.
    """
    fields = _decode(body)
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    used = {name: value for name, value in fields.items() if not _passed_over(kind, name, value)}
    try:
        return kind.model_validate(used)
    except ValidationError as error:
        raise _explained(error) from None


def _passed_over(kind: type[_Request], name: str, value: Any) -> bool:
    """True for a field without effect; ApiError for one that is known and refused."""
    if name in kind.model_fields:
        return False
    neutral = any(type(value) is type(ok) and value == ok for ok in NEUTRAL.get(name, ()))
    if name in IGNORED and not isinstance(value, _IGNORED_TYPES.get(name, object)):
        raise wrong(name, f"should be {_JSON_NAMES[_IGNORED_TYPES[name]]}")
    if neutral or name in IGNORED:
        return True
    shown = name[:64]
    if _POLICY.match(name):
        raise ApiError(
            400,
            f"'{shown}' would change the server's safety policy, which no request can",
            param=shown,
            code="policy",
        )
    if name in _STORED:
        text = f"'{shown}': this server keeps no answers; send the earlier turns in 'input'"
        raise ApiError(400, text, param=shown, code="unsupported_value")
    if name in NEUTRAL:
        raise ApiError(
            400,
            f"'{shown}' is not supported with this value; leave it out",
            param=shown,
            code="unsupported_value",
        )
    return False  # unknown, and refused with the rest of the check


def _without_nulls(value: Any) -> Any:
    """The value without the fields that are null: clients write so what they leave out."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _decode(body: bytes) -> Any:
    try:
        return _without_nulls(parse_json(body.decode("utf-8"), parse_constant=no_constant))
    except UnicodeError:
        raise ApiError(400, "the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:  # Python's own bound is nearer than json's
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(step) for step in first["loc"]]
    where = ".".join(path)[:200]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field '{where}'", param=where, code="unknown_field")
    return wrong(where, first["msg"].removeprefix("Value error, "))
