"""simonw's `llm`: a model with a gene under a name of its own.

    pip install llm     # beside this package
    python examples/plugins/llm_local.py MODEL.gguf --gene FITTED.gguf

On the command line the same is

    llm safegene add guarded MODEL.gguf --gene FITTED.gguf
    llm -m guarded "Hello!"
"""

from __future__ import annotations

import subprocess
import sys

import llm
from common import local_arguments

NAME = "guarded"


def main() -> None:
    arguments = local_arguments(__doc__)
    gene = ["--gene", arguments.gene] if arguments.gene else []
    command = ["-m", "llm", "safegene", "add", NAME, arguments.model, *gene]
    subprocess.run([sys.executable, *command], check=True)
    model = llm.get_model(NAME)
    for piece in model.prompt(arguments.prompt, max_tokens=arguments.max_tokens):
        sys.stdout.write(piece)
    print()


if __name__ == "__main__":
    main()
