"""LlamaIndex on this machine: `LlamaCPP` around a `SafeLlama`.

    pip install llama-index-llms-llama-cpp
    python examples/plugins/llamaindex_local.py MODEL.gguf --gene FITTED.gguf

`LlamaCPP(model_path=...)` would load a plain `Llama`, and would put every prompt into the
template of one model family, as text in which "<|im_end|>" ends a turn. This one is given the
loaded model, and asks through `create_chat_completion`, where it does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from common import local_arguments, opened
from llama_index.core.base.llms.generic_utils import (
    chat_response_to_completion_response,
    stream_chat_response_to_completion_response,
)
from llama_index.core.llms import (
    ChatMessage,
    ChatResponse,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
)
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.llms.llama_cpp import LlamaCPP

from safegene_edge import SafeLlama


class SafeLlamaCPP(LlamaCPP):
    """A LlamaIndex LLM that asks a loaded `SafeLlama`."""

    def __init__(self, llama: SafeLlama, max_new_tokens: int = 64, **settings: Any) -> None:
        super(LlamaCPP, self).__init__(  # past its loading of a model, to the fields
            model_path=llama.model_path,
            model_url=None,
            max_new_tokens=max_new_tokens,
            context_window=llama.n_ctx(),
            generate_kwargs={"max_tokens": max_new_tokens, "temperature": 0.0},
            **settings,
        )
        self._model = llama

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        reply = self._model.create_chat_completion(_turns(messages), **self.generate_kwargs)
        return _response(reply["choices"][0]["message"]["content"], "", reply)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        chunks = self._model.create_chat_completion(
            _turns(messages), stream=True, **self.generate_kwargs
        )

        def responses() -> ChatResponseGen:
            text = ""
            for chunk in chunks:
                delta = chunk["choices"][0]["delta"].get("content") or ""
                text += delta
                yield _response(text, delta, chunk)

        return responses()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return chat_response_to_completion_response(self.chat([ChatMessage(content=prompt)]))

    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        return stream_chat_response_to_completion_response(
            self.stream_chat([ChatMessage(content=prompt)])
        )


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": m.role.value, "content": m.content or ""} for m in messages]


def _response(text: str, delta: str, raw: Any) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role="assistant", content=text), delta=delta, raw=raw)


def main() -> None:
    arguments = local_arguments(__doc__)
    with opened(arguments) as llama:
        model = SafeLlamaCPP(llama, arguments.max_tokens)
        for piece in model.stream_chat([ChatMessage(content=arguments.prompt)]):
            sys.stdout.write(piece.delta or "")
    print()


if __name__ == "__main__":
    main()
