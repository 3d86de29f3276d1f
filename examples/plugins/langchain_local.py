"""LangChain on this machine: `ChatLlamaCpp` around a `SafeLlama`.

    pip install langchain-community
    python examples/plugins/langchain_local.py MODEL.gguf --gene FITTED.gguf

`ChatLlamaCpp(model_path=...)` would load a plain `Llama`, which knows nothing of genes.
`model_construct` is pydantic's way to build an object from parts that are ready.
"""

from __future__ import annotations

import sys

from common import local_arguments, opened
from langchain_community.chat_models import ChatLlamaCpp
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from safegene_edge import SafeLlama


def chat_model(llama: SafeLlama, max_tokens: int = 64) -> ChatLlamaCpp:
    """A LangChain chat model that asks `llama`."""
    return ChatLlamaCpp.model_construct(
        client=llama, model_path=llama.model_path, max_tokens=max_tokens, temperature=0.0
    )


def main() -> None:
    arguments = local_arguments(__doc__)
    with opened(arguments) as llama:
        prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
        chain = prompt | chat_model(llama, arguments.max_tokens) | StrOutputParser()
        for piece in chain.stream({"question": arguments.prompt}):
            sys.stdout.write(piece)
    print()


if __name__ == "__main__":
    main()
