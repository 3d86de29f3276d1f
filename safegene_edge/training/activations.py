"""A sample of what a gene's tensors read, and the directions that it lies along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..activations import Floats, directions_of
from .models import LiveModel, Source

_TOKENS = 1536  # of a sample


def directions(
    live: LiveModel, source: Source, modules: Mapping[str, str], prompts: Sequence[Sequence[int]]
) -> dict[str, Floats]:
    """The directions (k×in) of each tensor's input, over a source's prompts without the gene.

    Args:
        modules: tensor to the name of its module; prompts: token sequences.
    """
    samples = _samples(live, source, modules, prompts)
    found: dict[str, Floats] = {}
    shared: dict[bytes, Floats] = {}  # projections of one input have it in common
    for tensor, sample in samples.items():
        key = sample.tobytes()
        if key not in shared:
            shared[key] = directions_of(sample)
        found[tensor] = shared[key]
    return found


def _samples(
    live: LiveModel, source: Source, modules: Mapping[str, str], prompts: Sequence[Sequence[int]]
) -> dict[str, Floats]:
    """Inputs (tokens×in) of each tensor."""
    import torch

    # Fewer prompts rather than fewer tokens of each: the template's tokens are those of every
    # conversation, and the first of all is the one that attention rests on.
    chosen = prompts[:: max(1, -(-sum(map(len, prompts)) // _TOKENS))]
    seen: dict[str, list[Floats]] = {tensor: [] for tensor in modules}

    def keep(tensor: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen[tensor].append(rows.float().cpu().numpy())

        return hook

    with live.as_source(source, gene=False) as model, torch.no_grad():
        known = dict(model.named_modules())
        handles = [known[name].register_forward_pre_hook(keep(t)) for t, name in modules.items()]
        try:
            for prompt in chosen:
                model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return {tensor: np.concatenate(rows) for tensor, rows in seen.items()}
