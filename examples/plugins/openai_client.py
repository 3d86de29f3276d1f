"""OpenAI's client against `safegene-edge serve`.

pip install openai
safegene-edge serve MODEL.gguf --gene FITTED.gguf &
python examples/plugins/openai_client.py http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import sys

from common import server_arguments
from openai import OpenAI


def main() -> None:
    arguments = server_arguments(__doc__)
    with OpenAI(base_url=arguments.base_url, api_key=arguments.api_key) as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": arguments.prompt}],
            max_tokens=arguments.max_tokens,
            stream=True,
        )
        fingerprint = None
        for chunk in stream:
            fingerprint = chunk.system_fingerprint or fingerprint
            for choice in chunk.choices:
                sys.stdout.write(choice.delta.content or "")
    print(f"\n(answered by {model}, {fingerprint})")


if __name__ == "__main__":
    main()
