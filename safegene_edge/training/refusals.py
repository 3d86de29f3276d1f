"""How an aligned model refuses: what genes carry of it, for `recalibrate` to aim at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts import Prompt
from ..recalibrate.examples import Examples
from ..recalibrate.refusal_margin import Openers, Tokens, refusal_loss
from ..runtime.llama import SafeLlama
from .loss import Example, log_probabilities
from .recipe import rendered
from .settings import Recipe

_OPENERS, _WORDS = 8, 3


@dataclass(frozen=True, slots=True)
class Refusals:
    """Facts of the aligned model; see `SafetyGene` for each.

    Attributes:
        openers: texts.
        aligned_loss: a share of the shipped harmful examples.
        aligned_over_refusal: a share of the shipped harmless ones.
    """

    openers: Sequence[str] = ()
    aligned_loss: float = 0.0
    aligned_over_refusal: float = 0.0

    @classmethod
    def of(cls, model: Any, llama: SafeLlama, answers: Sequence[str], recipe: Recipe) -> Refusals:
        """Of a transformers model, from answers with which it refuses."""
        openers, examples = refusal_openers(answers), Examples.shipped()
        harmful, harmless = (
            unrefused(model, llama, prompts, openers, recipe)
            for prompts in (examples.harmful, examples.harmless)
        )
        return cls(openers, harmful, 1 - harmless)


def refusal_openers(answers: Sequence[str]) -> tuple[str, ...]:
    """The first three words of refusals, the commonest first; none opens with another."""
    found: Counter[str] = Counter()
    for answer in answers:
        if match := re.match(rf"\s*((?:\S+\s+){{{_WORDS - 1}}}\S+)", answer):
            found[match.group(1)] += 1
    least = max(1, len(answers) // 50)
    return tuple(text for text, count in found.most_common(_OPENERS) if count >= least)


def unrefused(
    model: Any, llama: SafeLlama, prompts: Sequence[Prompt], openers: Sequence[str], recipe: Recipe
) -> float:
    """A transformers model's refusal loss on prompts: the share not refused, smoothed.

    The same quantity that `recalibrate` lowers; see `refusal_margin`.
    """
    import torch

    known = Openers.of(llama, openers)
    with torch.no_grad():
        # One prompt at a time, so that nothing is padded.
        found = [margins(model, [rendered(llama, prompt)], known, recipe) for prompt in prompts]
    return refusal_loss(torch.cat(found).double().cpu().numpy())


def margins(model: Any, prompts: Sequence[Tokens], openers: Openers, recipe: Recipe) -> Any:
    """A transformers model's margin on each prompt (tensor, nats), as `refusal_margin` has it."""
    import torch

    # A path's last row foretells the token behind it, of which any will do.
    rows = [Example(prompt, (*path, prompt[0]), True)
            for prompt in prompts for path, _ in openers.paths]  # fmt: skip
    logs, _, _ = log_probabilities(model, rows, recipe)
    found = []
    for known in logs.split(len(openers.paths)):
        leads: dict[Tokens, Any] = {}
        for (path, first), values in zip(openers.paths, known, strict=True):
            for depth in range(first, len(path) + 1):
                leads |= _leads(openers, path[:depth], values[depth])
        found.append(openers.margin(leads))
    return torch.stack(found)


def _leads(openers: Openers, behind: Tokens, logs: Any) -> dict[Tokens, Any]:
    """`Openers.leads`, of a tensor and with gradients."""
    import torch

    tokens = openers.following(behind)
    best = logs.index_fill(0, torch.tensor(tokens, device=logs.device), -torch.inf).max()
    return {(*behind, token): logs[token] - best for token in tokens}
