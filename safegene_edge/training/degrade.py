"""Lightly degraded models, made of the aligned one by short LoRA fine-tunes on harmless data.

There are three kinds: a task, general instructions, a persona. The rows are the project's own; a
row is {"prompt", "response"} and, optionally, "system".
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from ..compat import open_model
from ..files import PathLike
from ..runtime.llama import SafeLlama
from .loss import Example
from .models import GENE, LiveModel, Source
from .processes import Processes
from .recipe import require_extra, train
from .settings import Log, Recipe

# Epochs for each kind: ten chats of a persona do to a model what hundreds of a task's rows do.
DEGRADATIONS: Mapping[str, int] = MappingProxyType({"task": 3, "general": 2, "persona": 5})
_ANSWER_TOKENS = 64


def degraded_rows(kind: str) -> list[dict[str, str]]:
    """The shipped rows of one of `DEGRADATIONS`."""
    file = resources.files(__package__).joinpath("prompts").joinpath(f"degrade_{kind}.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def degrade(
    aligned: PathLike | Source,
    folder: PathLike,
    *,
    base: PathLike | None = None,
    kinds: Sequence[str] = tuple(DEGRADATIONS),
    recipe: Recipe | None = None,
    dtype: str = "auto",
    report: Log = lambda line: None,
) -> list[Source]:
    """Degraded models as PEFT folders under `folder`, on top of the aligned model.

    Those that are there already are taken as they are.

    Args:
        base: a GGUF of the family, for the chat template; default: the aligned model's own.
        recipe: rank, alpha, targets, learning rate and batch of the fine-tunes.
    """
    require_extra()
    safe = Source.parse(aligned)
    recipe = recipe or Recipe(rank=8, learning_rate=4e-4, batch=8)
    made = []
    for kind in kinds:
        target = Path(folder) / kind
        with Processes.current().first():
            if not (target / "adapter_config.json").exists():
                report(f"degrading: {kind}")
                plain = plain_recipe(recipe, DEGRADATIONS[kind])
                fine_tune(safe, degraded_rows(kind), target, plain, base=base, dtype=dtype,
                          report=report)  # fmt: skip
        made.append(Source(safe.base, (*safe.adapters, target)))
    return made


def plain_recipe(recipe: Recipe, epochs: int, answer_tokens: int = _ANSWER_TOKENS) -> Recipe:
    """The recipe with every token of an answer weighing the same."""
    return replace(
        recipe, epochs=epochs, refusal_tokens=answer_tokens, first_weight=1.0, rest_weight=1.0
    )


def fine_tune(
    model: PathLike | Source,
    rows: Iterable[Mapping[str, str]],
    folder: PathLike,
    recipe: Recipe,
    *,
    base: PathLike | None = None,
    dtype: str = "auto",
    report: Log = lambda line: None,
) -> Source:
    """Fine-tune a LoRA on rows, in the plain way, into a PEFT folder on top of the model.

    Args:
        rows: {"prompt", "response"} and, at will, "system"; see `degraded_rows`.
        folder: what it holds already is replaced.
        recipe: its `refusal_tokens` are what is learnt of each response.
        base: a GGUF of the family, for the chat template; default: the model's own.

    Raises:
        SafeGeneError: the training diverged.
    """
    require_extra()
    safe, target = Source.parse(model), Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with closing(SafeLlama(open_model(base or safe.base).path, n_ctx=1024)) as llama:
        examples = [_example(llama, row, recipe.refusal_tokens) for row in rows]
    live = LiveModel([safe], recipe, target.parent, dtype)
    with live.as_source(safe, gene=True) as live_model:
        train(live_model, examples, recipe, report)
        live_model.eval()
        draft = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        live_model.save_pretrained(str(draft), selected_adapters=[GENE])
    shutil.rmtree(target, ignore_errors=True)
    (draft / GENE).rename(target)
    shutil.rmtree(draft, ignore_errors=True)
    return Source(safe.base, (*safe.adapters, target))


def _example(llama: SafeLlama, row: Mapping[str, str], tokens: int) -> Example:
    """A row as tokens; `harmful` marks an answer to be learnt, which these are."""
    messages = [{"role": "user", "content": row["prompt"]}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    words = llama.tokenize(row["response"].encode(), add_bos=False, special=False)
    return Example(tuple(llama.render(messages)), (*words, llama.token_eos())[:tokens], True)
