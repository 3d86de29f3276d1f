"""What the recipe minimises: refusals learnt, everything else held to the bare model.

Logits are computed for the answers alone, and the prefix that all prompts share only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import Recipe


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer as tokens; `weight` scales its loss."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    harmful: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean over a set of examples, each token weighted by its place in the answer, in nats."""

    refusal: float
    kept: float


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all prompts open with (the template's start and system prompt)."""
    first, *others = (example.prompt for example in examples)
    length = len(first) - 1  # every row keeps a token of its own
    for other in others:
        length = min(length, len(other) - 1)
        while first[:length] != other[:length]:
            length -= 1
    return max(0, length)


def batch_loss(model: Any, examples: Sequence[Example], recipe: Recipe) -> tuple[Any, Any]:
    """The refusal term and the KL term of a batch, each a sum over its examples (scalars)."""
    import torch

    harmful = [example for example in examples if example.harmful]
    harmless = [example for example in examples if not example.harmful]
    refused, kept = torch.zeros((), device=model.device), torch.zeros((), device=model.device)
    if harmful:
        logs, target, weights = log_probabilities(model, harmful, recipe)
        surprise = -logs.gather(-1, target[..., None])[..., 0]
        refused = (surprise * weights).sum()
    if harmless:
        with torch.no_grad(), model.disable_adapter():
            bare, _, weights = log_probabilities(model, harmless, recipe)
        logs, _, _ = log_probabilities(model, harmless, recipe)
        kept = ((bare.exp() * (bare - logs)).sum(-1) * weights).sum()
    return refused, kept


def log_probabilities(
    model: Any, examples: Sequence[Example], recipe: Recipe
) -> tuple[Any, Any, Any]:
    """Log-probabilities (batch×answer×vocabulary, float32), answers and weights (batch×answer).

    The shared prefix is computed once. What is left of the prompts is padded on the left and
    the answers on the right, so that all answers begin in the same column, and logits are
    computed for the answers alone.
    """
    import torch

    shared = shared_prefix(examples)
    before = max(len(example.prompt) for example in examples) - shared
    answer = max(len(example.answer) for example in examples)
    ids = torch.zeros((len(examples), before + answer), dtype=torch.long)
    mask = torch.zeros((len(examples), shared + before + answer), dtype=torch.long)
    mask[:, :shared] = 1
    for row, example in enumerate(examples):
        tokens = [*example.prompt[shared:], *example.answer]
        start = before + len(example.answer) - len(tokens)
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, shared + start : shared + start + len(tokens)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = None
    if shared:
        prefix = torch.tensor([examples[0].prompt[:shared]], device=model.device)
        # use_cache is off by default while training
        cache = model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(examples))
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=bool(shared),
        logits_to_keep=answer + 1,
    ).logits
    logs = logits[:, -answer - 1 : -1].float().log_softmax(-1)
    weights = _token_weights(examples, answer, recipe).to(logs.device)
    return logs, ids[:, before:], weights


def _token_weights(examples: Sequence[Example], answer: int, recipe: Recipe) -> Any:
    """Weights (batch×answer): 0 on padding, high on the first tokens.

    A full-length answer's weights sum to the example's weight; a short answer's first tokens
    weigh as much as a long one's.
    """
    import torch

    limit = recipe.refusal_tokens if examples[0].harmful else recipe.kept_tokens + 1
    first = min(recipe.first_tokens, limit)
    row = torch.full((limit,), recipe.rest_weight)
    row[:first] = recipe.first_weight
    row = (row / row.sum())[:answer]
    lengths = torch.tensor([len(example.answer) for example in examples])
    inside = torch.arange(answer)[None, :] < lengths[:, None]
    scale = torch.tensor([example.weight for example in examples])
    return inside * row[None, :] * scale[:, None]


def measure(model: Any, examples: Sequence[Example], recipe: Recipe) -> Loss:
    """The two terms, each the mean over its kind, without learning."""
    import torch

    sums = [0.0, 0.0]
    with torch.no_grad():
        for start in range(0, len(examples), recipe.batch):
            terms = batch_loss(model, examples[start : start + recipe.batch], recipe)
            sums = [total + float(term) for total, term in zip(sums, terms, strict=True)]
    harmful = sum(example.harmful for example in examples)
    return Loss(sums[0] / max(1, harmful), sums[1] / max(1, len(examples) - harmful))
