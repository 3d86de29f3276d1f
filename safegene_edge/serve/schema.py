"""What a client may ask, field by field.

Every field of a request is one of four: used; known and without effect here (`IGNORED`);
neutral, allowed with the one value that asks for nothing (`NEUTRAL`); or refused. A field that
is refused would change the operator's policy (`POLICY`), or it is unknown.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime.sampling import Sampling


class ApiError(Exception):
    """An error in OpenAI's form: status, type, param and code, and headers if any."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def as_dict(self) -> dict[str, Any]:
        """The body of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


# How fields begin that would take the gene off, weaken it, or answer in the model's place. Every
# unknown field is refused; who sends one of these learns that no spelling of it would help.
POLICY = ("adapter", "chat_template", "control_vector", "gene", "grammar", "guided", "ignore_eos",
          "json_schema", "logit", "lora", "prefill", "safe")  # fmt: skip
_POLICY = re.compile(rf"(?:{'|'.join(POLICY)})s?(?:_|$)")
# Known to clients of OpenAI's API, and without a meaning here.
IGNORED = frozenset([
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "cache_prompt", "timings_per_token",
    "return_progress",
])  # fmt: skip
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
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message; null in the other fields is what clients send back with an answer."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart]
    tool_call_id: str | None = None  # not shown to the model
    name: None = None
    refusal: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Request(_Strict):
    model: str | None = Field(None, max_length=512)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens of answer that the client asked for, if it did."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, temperature: float) -> Sampling:
        """The sampler's settings, with the operator's temperature where none is named."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
                 "frequency_penalty")  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Sampling(**{"temperature": temperature, **given})


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)

    @property
    def wanted_tokens(self) -> int | None:
        """The newer name goes before the older."""
        return self.max_completion_tokens or self.max_tokens

    def as_messages(self, limit: int) -> list[dict[str, str]]:
        """Messages for the template.

        Raises:
            ApiError: too many, or the last one is the assistant's.
        """
        if len(self.messages) > limit:
            raise ApiError(
                400,
                f"{len(self.messages)} messages are more than the {limit} that are allowed",
                param="messages",
            )
        if self.messages[-1].role == "assistant":
            raise ApiError(
                400,
                "the last message is the assistant's: an answer that the client begins would "
                "pass over the gene, and is refused by the server's policy",
                param="messages",
                code="policy",
            )
        return [{"role": message.role, "content": message.text} for message in self.messages]


class CompletionRequest(_Request):
    """POST /v1/completions: raw text, one prompt."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


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
    if neutral or name in IGNORED or (value is None and name in NEUTRAL):
        return True
    shown = name[:64]
    if _POLICY.match(name):
        raise ApiError(
            400,
            f"'{shown}' would change the server's safety policy, which no request can",
            param=shown,
            code="policy",
        )
    if name in NEUTRAL:
        raise ApiError(
            400,
            f"'{shown}' is not supported with this value; leave it out",
            param=shown,
            code="unsupported_value",
        )
    return False  # unknown, and refused with the rest of the check


def _decode(body: bytes) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a field is there twice")
        return found

    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
        if "\\u" in text:  # escapes can spell half a character, which no encoding has
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeError:
        raise ApiError(400, "the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(step) for step in first["loc"]]
    where = ".".join(path)[:200]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field '{where}'", param=where, code="unknown_field")
    return ApiError(400, f"{where}: {first['msg']}", param=where or None, code="invalid_value")
