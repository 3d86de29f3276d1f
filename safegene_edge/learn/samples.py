"""The prompts that a gene is learnt from, and what answers to them say."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from ..errors import SettingError
from ..evals.judge import judge
from ..prompts import Prompt, rows, training_prompts
from ..runtime.llama import SafeLlama

LOOK = 12  # tokens of an answer that say whether it refuses
_HEADER, _LONGEST = 3, 12  # tokens of the assistant's header where the template does not tell


@dataclass(frozen=True)
class Chosen:
    """The prompts of one run.

    Attributes:
        harmless: borderline and plain ones, as many as harmful ones.
        tasks: harmless, too: requests of many kinds of task, and those of a task that was named.
    """

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    tasks: tuple[Prompt, ...]


def choose(count: int, share: float, task: Iterable[Prompt | str] = ()) -> Chosen:
    """So many harmful training prompts, as many harmless ones, and those of a task.

    Requests of many kinds of task (classify, extract, summarise, translate, arithmetic, code,
    JSON) stand in for tasks that nobody named, one for every four prompts. Time goes with length:
    of each form, the shorter half is taken.

    Args:
        share: of the harmless prompts that are borderline, most of them twins of harmful ones.

    Raises:
        SettingError: there are not so many.
    """
    known = {kind: _shuffled(_shorter(prompts)) for kind, prompts in training_prompts().items()}

    def enough(count: int) -> bool:
        most, twins = {kind: len(prompts) for kind, prompts in known.items()}, round(count * share)
        plain = count - twins
        return count <= most["harmful"] and twins <= most["borderline"] and plain <= most["plain"]

    if not enough(count):
        most = max(filter(enough, range(count)))
        raise SettingError(
            f"{count} prompts of a kind are more than there are", f"Give at most {most}"
        )
    borderline = known["borderline"][: round(count * share)]
    plain = known["plain"][: count - len(borderline)]
    given = [p if isinstance(p, Prompt) else Prompt("", p) for p in task]
    tasks = (*task_kinds()[: count // 4], *given)
    return Chosen(known["harmful"][:count], (*borderline, *plain), tasks)


def _shorter(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The shorter half of the prompts of each form, in their order."""
    lengths: dict[str, list[int]] = {}
    for prompt in prompts:
        lengths.setdefault(prompt.form, []).append(_length(prompt))
    middle = {form: median(found) for form, found in lengths.items()}
    return [prompt for prompt in prompts if _length(prompt) <= middle[prompt.form]]


def _length(prompt: Prompt) -> int:
    return sum(len(text) for _, text in prompt.messages)


def _shuffled(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    return tuple(random.Random(0).sample(prompts, len(prompts)))


def task_kinds() -> tuple[Prompt, ...]:
    """Requests of many kinds of task, the package's own."""
    return tuple(Prompt(str(n), row["prompt"]) for n, row in enumerate(rows("tasks.jsonl")))


def header_of(llama: SafeLlama) -> int:
    """How many tokens open the assistant's turn in a template, with those of an empty thought."""
    messages = [{"role": "user", "content": "Hello"}]
    whole = llama.render_answer(messages)
    bare = llama.render(messages, add_generation_prompt=False)
    if whole[: len(bare)] != bare or not 0 < len(whole) - len(bare) <= _LONGEST:
        return _HEADER
    return len(whole) - len(bare)


def rendered(llama: SafeLlama, prompts: Iterable[Prompt], system: str = "") -> list[list[int]]:
    """Prompts by the model's template, behind a system prompt if there is one."""
    before = [{"role": "system", "content": system}] if system else []
    return [llama.render_answer(before + prompt.as_dicts()) for prompt in prompts]


def refused(llama: SafeLlama, prompts: Sequence[Prompt], said: Sequence[list[int]]) -> list[bool]:
    """Which answers the judge takes for refusals, by their first tokens."""
    return [
        judge(prompt.text, llama.text(tokens)).label == "refused"
        for prompt, tokens in zip(prompts, said, strict=True)
    ]
