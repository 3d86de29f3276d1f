"""LlamaIndex on this machine: `LlamaCPP` around a `SafeLlama`.

    pip install llama-index-llms-llama-cpp
    python examples/plugins/llamaindex_local.py MODEL.gguf --gene EXPRESSED.gguf

`LlamaCPP(model_path=...)` would load a plain `Llama`, and would put every prompt into the
template of one model family. This one is given the loaded model, and its own template.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from common import local_arguments, opened
from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP

from safegene_edge import SafeLlama


class SafeLlamaCPP(LlamaCPP):
    """A LlamaIndex LLM that asks a loaded `SafeLlama`."""

    def __init__(self, llama: SafeLlama, max_new_tokens: int = 64, **settings: Any) -> None:
        beginning = llama.tokenize(b"", add_bos=True)  # empty for models that want none

        def to_prompt(messages: Sequence[ChatMessage]) -> str:
            turns = [{"role": m.role.value, "content": m.content or ""} for m in messages]
            tokens = llama.render(turns)
            if tokens[:1] == beginning:  # llama-cpp-python puts it there again
                tokens = tokens[1:]
            return llama.detokenize(tokens, special=True).decode("utf-8", "replace")

        super(LlamaCPP, self).__init__(  # past its loading of a model, to the fields
            model_path=llama.model_path,
            model_url=None,
            max_new_tokens=max_new_tokens,
            context_window=llama.n_ctx(),
            generate_kwargs={"max_tokens": max_new_tokens, "temperature": 0.0},
            messages_to_prompt=to_prompt,
            completion_to_prompt=lambda text: to_prompt([ChatMessage(content=text)]),
            **settings,
        )
        self._model = llama


def main() -> None:
    arguments = local_arguments(__doc__)
    with opened(arguments) as llama:
        model = SafeLlamaCPP(llama, arguments.max_tokens)
        for piece in model.stream_chat([ChatMessage(content=arguments.prompt)]):
            sys.stdout.write(piece.delta or "")
    print()


if __name__ == "__main__":
    main()
