"""Which layers of a gene matter: those that move harmful and harmless prompts differently.

With the gene on in layer l alone, its output h_l behind a prompt's last token moves by
d_l(x). With m the mean over prompts of a kind, relative to the mean length of h_l,

    s_l = |m_harmful(d_l)| / (mean over layers of |m_harmless(d)| + |m_harmless(d_l)|)

The mean keeps a layer that does next to nothing from winning by a ratio of noises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import SettingError
from .models import GENE, LiveModel, Source

Prompts = Sequence[Sequence[int]]


def layer_scores(
    live: LiveModel, sources: Sequence[Source], harmful: Prompts, harmless: Prompts
) -> dict[int, float]:
    """Layer to score, the mean over the degraded models; prompts are token sequences."""
    if not harmful or not harmless:
        raise SettingError("selection needs harmful and harmless prompts")
    totals = dict.fromkeys(range(len(live.blocks())), 0.0)
    for source in sources:
        moved = [_shifts(live, source, prompts) for prompts in (harmful, harmless)]
        floor = sum(moved[1]) / len(moved[1]) or 1e-12
        for layer in totals:
            score = moved[0][layer] / (floor + moved[1][layer])
            totals[layer] += score / len(sources)
    return totals


def _shifts(live: LiveModel, source: Source, prompts: Prompts) -> list[float]:
    """|mean over prompts of d_l| / mean |h_l| for every layer l."""
    import torch

    found = []
    for layer, block in enumerate(live.blocks()):
        with live.as_source(source, gene=True) as model:
            with only_layer(live, None):
                bare = _outputs(model, block, prompts)
            with only_layer(live, layer):
                with_gene = _outputs(model, block, prompts)
        length = torch.linalg.vector_norm(bare, dim=-1).mean()
        shift = torch.linalg.vector_norm((with_gene - bare).mean(0))
        found.append(float(shift / length.clamp(min=1e-12)))
    return found


def _outputs(model: Any, block: Any, prompts: Prompts) -> Any:
    """A block's outputs behind each prompt's last token (prompts×width, float32)."""
    import torch

    class Reached(Exception):  # noqa: N818 - no error: what lies behind the block is not needed
        pass

    def stop(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[:, -1].float().cpu())
        raise Reached

    seen: list[Any] = []
    handle = block.register_forward_hook(stop)
    try:
        with torch.no_grad():
            for ids, mask in _padded(prompts):
                try:
                    model(
                        input_ids=ids.to(model.device),
                        attention_mask=mask.to(model.device),
                        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
                        use_cache=False,
                    )
                except Reached:
                    continue
    finally:
        handle.remove()
    return torch.cat(seen)


def _padded(prompts: Prompts, batch: int = 16) -> Iterator[tuple[Any, Any]]:
    """Token ids and masks (batch×longest), padded on the left."""
    import torch

    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        yield ids, mask


@contextmanager
def only_layer(live: LiveModel, layer: int | None) -> Iterator[None]:
    """The gene at work in one layer alone, or in none."""
    scales = []
    for number, block in enumerate(live.blocks()):
        if number == layer:
            continue
        for module in block.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and GENE in scaling:
                scales.append((scaling, scaling[GENE]))
                scaling[GENE] = 0.0
    try:
        yield
    finally:
        for scaling, value in scales:
            scaling[GENE] = value


def select(scores: Mapping[int, float], sizes: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """The layers to keep: best score first, as long as their parameters fit the budget.

    Args:
        scores: layer to score; sizes: layer to the gene's parameters in it.

    Raises:
        SettingError: not even one layer fits.
    """
    kept: list[int] = []
    left = budget
    for layer in sorted(sizes, key=lambda number: (-scores.get(number, 0.0), number)):
        if sizes[layer] <= left:
            kept.append(layer)
            left -= sizes[layer]
    if not kept:
        raise SettingError(
            f"no layer of the gene fits {budget:,} parameters (the smallest has "
            f"{min(sizes.values()):,})",
            "Lower the rank or raise the budget",
        )
    return tuple(sorted(kept))
