"""lm-evaluation-harness against `safegene-edge serve`, with a task of four harmless questions.

    pip install 'lm-eval[api]'
    safegene-edge serve MODEL.gguf --gene FITTED.gguf &
    python examples/plugins/lm_eval_server.py http://127.0.0.1:8080/v1

The task lies beside this file, so that nothing is downloaded; name any other with --task, which
may be one of the harness's own. `local-chat-completions` asks /chat/completions, which applies
the model's chat template; `local-completions` asks /completions.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common import model_of, server_arguments

HERE = Path(__file__).parent / "lm_eval_task"
ENDPOINTS = {
    "local-chat-completions": "chat/completions",
    "local-completions": "completions",
}


def evaluated(base_url: str, api_key: str, kind: str, max_tokens: int) -> dict[str, Any]:
    """The harness's results for one of its two kinds of client."""
    os.environ["OPENAI_API_KEY"] = api_key
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=kind,
        model_args={
            "base_url": f"{base_url}/{ENDPOINTS[kind]}",
            "model": model_of(base_url, api_key),
            "num_concurrent": 2,
            "tokenizer_backend": None,  # the server has the tokenizer
            "tokenized_requests": False,
        },
        tasks=[_task()],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=kind == "local-chat-completions",
        gen_kwargs=f"max_gen_toks={max_tokens}",
        bootstrap_iters=0,
    )
    return dict(found["results"])


def _task() -> dict[str, Any]:
    """The task's settings, with the place of its questions."""
    facts = json.loads((HERE / "task.json").read_text(encoding="utf-8"))
    facts["dataset_kwargs"] = {"data_files": {"test": str(HERE / "questions.jsonl")}}
    return dict(facts)


def main() -> None:
    arguments = server_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_DATASETS_CACHE", folder)
        for kind in ENDPOINTS:
            found = evaluated(arguments.base_url, arguments.api_key, kind, arguments.max_tokens)
            for task, values in found.items():
                print(f"{kind}: {task}: {values['exact_match,last_word']:.2f}")


if __name__ == "__main__":
    main()
