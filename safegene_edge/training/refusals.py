"""How an aligned model refuses: what genes carry of it, for `recalibrate` to aim at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..prompts import Prompt
from ..recalibrate.examples import Examples
from ..runtime.llama import SafeLlama
from ..runtime.refusal_margin import Openers, Tokens, refusal_loss, refusal_openers
from .distil import own_answers
from .loss import Example, log_probabilities
from .recipe import rendered
from .settings import Recipe

if TYPE_CHECKING:
    from .models import LiveModel, Source


@dataclass(frozen=True, slots=True)
class Refusals:
    """Facts of the aligned model; see `SafetyGene` for each.

    Attributes:
        openers: texts.
        aligned_loss: a share of the shipped harmful examples.
        aligned_over_refusal: a share of the shipped harmless ones.
        aligned_margins: of each, nats.
        aligned_kl: KL(degraded ‖ aligned), see `divergence`; None until it was measured.
    """

    openers: Sequence[str] = ()
    aligned_loss: float = 0.0
    aligned_over_refusal: float = 0.0
    aligned_margins: Sequence[float] = ()
    aligned_kl: float | None = None

    @classmethod
    def of(cls, model: Any, llama: SafeLlama, answers: Sequence[str], recipe: Recipe) -> Refusals:
        """Of a transformers model, from answers with which it refuses."""
        openers, examples = refusal_openers(answers), Examples.every_shipped()
        harmful, harmless = (
            margins_of(model, llama, prompts, openers, recipe)
            for prompts in (examples.harmful, examples.harmless)
        )
        every = tuple(map(float, (*harmful, *harmless)))
        return cls(openers, refusal_loss(harmful), 1 - refusal_loss(harmless), every)


def margins_of(
    model: Any, llama: SafeLlama, prompts: Sequence[Prompt], openers: Sequence[str], recipe: Recipe
) -> npt.NDArray[np.float64]:
    """A transformers model's margins on prompts (nats), as `recalibrate` reads them."""
    import torch

    known = Openers.of(llama, openers)
    with torch.no_grad():
        # One prompt at a time, so that nothing is padded.
        found = [margins(model, [rendered(llama, prompt)], known, recipe) for prompt in prompts]
    margins_found: npt.NDArray[np.float64] = torch.cat(found).double().cpu().numpy()
    return margins_found


def divergence(
    live: LiveModel, one: Source, other: Source, llama: SafeLlama, recipe: Recipe, tokens: int = 8
) -> float:
    """KL(one ‖ other) along one's own answers to the shipped harmless examples, nats a token.

    Both are sources of the live model. What `recalibrate` bounds the gene's own KL by.
    """
    import torch

    recipe = replace(recipe, kept_tokens=tokens)  # or a short one's weights would not reach
    prompts = [rendered(llama, prompt) for prompt in Examples.every_shipped().harmless]
    with live.as_source(one, gene=False) as model:
        said = own_answers(model, prompts, tokens, llama.token_eos())
    rows = [Example(prompt, answer, False) for prompt, answer in zip(prompts, said, strict=True)]
    total = 0.0
    for start in range(0, len(rows), recipe.batch):
        batch, logs = rows[start : start + recipe.batch], []
        for source in (one, other):
            with torch.no_grad(), live.as_source(source, gene=False) as model:
                logs.append(log_probabilities(model, batch, recipe)[0])
        values = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        total += sum(float(row[: len(example.answer)].mean())
                     for row, example in zip(values, batch, strict=True))  # fmt: skip
    return total / len(rows)


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
