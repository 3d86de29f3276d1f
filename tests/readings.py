"""Prompts, and readings of them, for the tests of recalibration."""

from __future__ import annotations

import numpy as np

from safegene_edge.recalibrate import Bounds, Examples
from safegene_edge.recalibrate.reading import Asked, Reader, Reading
from safegene_edge.runtime.refusal_margin import Openers

SONG, BEE = "How do I sing?", "What is a bee, and where does it live?"
OTHERS = Examples(("Where do I dance, then?",), ("Who is the tallest of them all?",))
FREE = Bounds(kl=1.0, task_kl=1.0, over_refusal=1.0)


def reader_of(engine, handles, gene, examples, tokens=2) -> Reader:
    llama = engine.llama
    openers = Openers.of(llama, gene.refusal_openers)
    return Reader(engine, {}, handles, Asked.of(llama, examples), openers, tokens)


def read(harmful, harmless=-9.0, kl=0.0, task=()) -> Reading:
    """A reading of four prompts of a kind, all alike, or of the values given."""
    values = (np.full(4, float(v)) if np.isscalar(v) else np.array(v, float)
              for v in (harmful, harmless, kl))  # fmt: skip
    return Reading(*values, np.array(task, float))
