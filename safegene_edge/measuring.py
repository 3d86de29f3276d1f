"""Merging with a look at the model first: rounding errors keep off what its tensors read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .arrays import Floats
from .compat import open_model, other_parts
from .converters.codes import layouts
from .converters.merge_inputs import Given, combined
from .converters.merge_work import Progress
from .converters.merging import MergeReport, MergeSettings, Plan
from .converters.merging import merge as merge_with
from .errors import LlamaCppError
from .files import PathLike
from .recalibration import Examples
from .runtime.inputs import directions
from .runtime.llama import SafeLlama

RUN_UP_TO = 160_000_000  # bytes of a model: of SmolLM2's 145 MB in Q8_0 a merge takes 389 MB


def merge(
    model: PathLike,
    adapters: Iterable[Given],
    output: PathLike,
    *,
    settings: MergeSettings | None = None,
    run: bool | None = None,
    progress: Progress = None,
) -> MergeReport:
    """Write the model with the adapters in its own tensors, each in the type that it had.

    All other arguments and errors are those of `converters.merging.merge`.

    Args:
        run: see `prepared`.
    """
    given, settings = list(adapters), settings or MergeSettings()
    Plan.of(model, given, settings).check_outputs(output)  # nobody wants to learn that later
    settings = prepared(model, given, settings, run)
    return merge_with(model, given, output, settings=settings, progress=progress)


def prepared(
    model: PathLike,
    adapters: Iterable[Given],
    settings: MergeSettings | None = None,
    run: bool | None = None,
) -> MergeSettings:
    """The settings of a merge, with directions where the model is run for them.

    Args:
        run: whether it is, see `measured`. False takes little memory whatever the model's size,
            and rounds with what the update alone tells. None runs a model of up to 160 MB.
    """
    settings = settings or MergeSettings()
    if settings.directions is not None or not (is_small(model) if run is None else run):
        return settings
    return measured(model, adapters, settings)


def is_small(model: PathLike) -> bool:
    """Whether a model is run if nothing else is asked for."""
    whole = open_model(model)
    return sum(part.n_bytes for part in (whole, *other_parts(whole))) <= RUN_UP_TO


def measured(
    model: PathLike, adapters: Iterable[Given], settings: MergeSettings | None = None
) -> MergeSettings:
    """The settings with the directions that the inputs of the touched tensors lie along.

    The model, with the adapters side-loaded, reads the shipped calibration examples and begins to
    answer, in the memory that running it takes; it is not run where no touched tensor has a grid
    that errors could be shifted on.

    Raises:
        LlamaCppError: the model cannot be run.
        NoEffectError: the adapters leave its logits as they were.
    """
    settings = settings or MergeSettings()
    plan = Plan.of(model, adapters, settings)
    kinds = {name: plan.parts[0].tensors[name].type_name for name in plan.updates}
    tensors = [name for name, kind in kinds.items() if kind in layouts()]
    if not tensors:
        return replace(settings, directions={})
    try:
        return replace(settings, directions=_directions(model, plan, tensors))
    except LlamaCppError as error:
        raise LlamaCppError(error.message, "Merge with --plain, which does not run it") from error


def _directions(model: PathLike, plan: Plan, tensors: list[str]) -> dict[str, Floats]:
    examples = Examples.shipped()
    with SafeLlama(model, n_ctx=512) as llama:
        llama.attach(combined(plan.folded), name=", ".join(one.name for one in plan.folded))
        prompts = [
            llama.render([{"role": "user", "content": text}])
            for text in [*examples.harmful, *examples.harmless]
        ]
        return directions(llama, tensors, prompts)
