"""A model with its adapters in its own weights, for as long as it is loaded."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..aliases import Progress
from ..compat import open_model
from ..files import PathLike
from ..runtime.llama import SafeLlama
from .inputs import Given
from .plan import merge
from .settings import MergeSettings


def bake(
    model: PathLike,
    adapters: Iterable[Given],
    *,
    settings: MergeSettings | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SafeLlama:
    """Load a model with adapters merged into its tensors: full speed, and nothing to switch.

    What `merge` writes lies in a temporary folder (TMPDIR) until the model is closed, and needs as
    much room there as the model takes. Each tensor keeps its type, so that the answers are those
    of the merged file. Other adapters can be attached as usual.

    Args:
        model, adapters, settings, progress: as for `merge`.
        options: as for `SafeLlama`.

    Raises:
        SafeGeneError: what `merge` or `SafeLlama` raise.
    """
    source = open_model(model).path
    folder = Path(tempfile.mkdtemp(prefix="safegene-bake-"))
    try:
        merge(source, adapters, folder / "model.gguf", settings=settings, progress=progress)
        llama = SafeLlama(folder / "model.gguf", **options)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    gone = weakref.finalize(llama, shutil.rmtree, folder, True)
    llama._stack.callback(gone)
    return llama
