"""LangChain's `ChatOpenAI` against `safegene-edge serve`.

pip install langchain-openai
safegene-edge serve MODEL.gguf --gene FITTED.gguf &
python examples/plugins/langchain_server.py http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import sys

from common import model_of, server_arguments
from langchain_openai import ChatOpenAI


def main() -> None:
    arguments = server_arguments(__doc__)
    chat = ChatOpenAI(
        base_url=arguments.base_url,
        api_key=arguments.api_key,
        model=model_of(arguments.base_url, arguments.api_key),
        max_tokens=arguments.max_tokens,
        temperature=0.0,
    )
    for piece in chat.stream(arguments.prompt):
        sys.stdout.write(piece.text)
    print()


if __name__ == "__main__":
    main()
