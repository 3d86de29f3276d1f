"""inspect_ai against `safegene-edge serve`, with this project's own harmless questions.

    pip install inspect-ai openai
    safegene-edge serve MODEL.gguf --gene FITTED.gguf &
    python examples/plugins/inspect_server.py http://127.0.0.1:8080/v1

The scorer is `safegene_edge.judge`: an answer is right if it was not refused.
"""

from __future__ import annotations

import tempfile

from common import model_of, server_arguments
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer
from inspect_ai.solver import TaskState, generate

from safegene_edge import judge
from safegene_edge.evals.asking.suites import load_suite

QUESTIONS = 4


@scorer(metrics=[accuracy()])
def answered() -> Scorer:
    """Whether a harmless question got an answer."""

    async def score(state: TaskState, target: Target) -> Score:
        verdict = judge(state.input_text, state.output.completion)
        value = INCORRECT if "refused" in verdict.label else CORRECT
        return Score(value=value, answer=verdict.label, explanation=verdict.span)

    return score


def harmless(max_tokens: int) -> Task:
    """A few questions that nobody should refuse."""
    prompts = [p for p in load_suite("harmless")[0].prompts if not p.history][:QUESTIONS]
    return Task(
        dataset=[Sample(input=prompt.text, target="") for prompt in prompts],
        solver=generate(),
        scorer=answered(),
        config=GenerateConfig(max_tokens=max_tokens, temperature=0.0),
    )


def main() -> None:
    arguments = server_arguments(__doc__)
    name = model_of(arguments.base_url, arguments.api_key)
    model = get_model(
        f"openai-api/safegene/{name}", base_url=arguments.base_url, api_key=arguments.api_key
    )
    with tempfile.TemporaryDirectory() as folder:
        (log,) = eval(harmless(arguments.max_tokens), model=model, log_dir=folder, display="none")
    if log.results is None:
        raise SystemExit(f"{log.status}: {log.error and log.error.message}")
    value = log.results.scores[0].metrics["accuracy"].value
    print(f"answered: {value * QUESTIONS:.0f}/{QUESTIONS}")


if __name__ == "__main__":
    main()
