"""A look at the model before a merge: what its touched tensors read, adapters on.

Rounding errors are then kept off those directions (`rounding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..aliases import Floats
from ..errors import LlamaCppError, SafeGeneError
from ..prompts import Prompt
from ..recalibrate.examples import Examples
from ..runtime.activations import directions
from ..runtime.llama import SafeLlama
from .inputs import Folded, combined

_EVERY = 3  # of the examples: 16 of a kind, in most forms


def read_directions(
    model: Path, adapters: Sequence[Folded], tensors: Iterable[str]
) -> dict[str, Floats]:
    """The directions (k×in) that the inputs of tensors lie along, by tensor.

    The model, with the adapters side-loaded, reads a third of the shipped examples and begins
    to answer, in the memory that running it takes.

    Raises:
        LlamaCppError: the model cannot be run.
        NoEffectError: the adapters leave its logits as they were.
    """
    examples = Examples.shipped()
    try:
        with SafeLlama(model, n_ctx=512) as llama:
            llama.attach(combined(adapters), name=", ".join(one.name for one in adapters))
            prompts = [
                _tokens(llama, prompt)
                for prompt in [*examples.harmful[::_EVERY], *examples.harmless[::_EVERY]]
            ]
            return directions(llama, tensors, prompts)
    except LlamaCppError as error:
        raise LlamaCppError(error.message, "Merge with --plain, which does not run it") from error


def _tokens(llama: SafeLlama, prompt: Prompt) -> list[int]:
    try:
        return llama.render(prompt.as_dicts())
    except SafeGeneError:  # of the template: a merge does without
        return list(llama.tokenize(prompt.text.encode(), add_bos=True, special=False))
