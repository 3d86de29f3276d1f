"""A gene without training: the low-rank part of the weights' difference, aligned - degraded.

Eckart and Young: the best approximation of a matrix by rank r is its truncated singular value
decomposition. With several degraded models, their mean is taken: what they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..converters.names import BaseNames
from ..errors import SafeGeneError
from ..gene import Adapter, Pair
from ..gguf_file import GGUFFile
from .models import Source, weight_reader
from .settings import Log


def delta_adapter(
    aligned: Source,
    degraded: Sequence[Source],
    base: GGUFFile,
    targets: Sequence[str],
    rank: int,
    report: Log = lambda line: None,
) -> Adapter:
    """Pairs of at most `rank` (float32) for every target whose weights differ, named as in GGUF.

    Raises:
        SafeGeneError: no target's weights differ.
    """
    names = BaseNames(base)
    wanted = [t for t, module in names.modules.items() if module.rpartition(".")[2] in targets]
    read_aligned = weight_reader(aligned, names)
    readers = [weight_reader(source, names) for source in degraded]
    pairs = {}
    for number, tensor in enumerate(wanted):
        lost = read_aligned(tensor)
        for reader in readers:
            lost = lost - reader(tensor) / len(readers)
        if lost.any():
            pairs[tensor] = truncated(lost, rank)
        if (number + 1) % 20 == 0 or number + 1 == len(wanted):
            report(f"weight differences: {number + 1}/{len(wanted)}")
    if not pairs:
        raise SafeGeneError(
            f"{aligned.base}: the degraded models differ from it in none of {', '.join(targets)}",
            "Give models fine-tuned from it",
        )
    return Adapter(names.architecture, 0.0, pairs)


def truncated(matrix: npt.NDArray[np.float64], rank: int) -> Pair:
    """The best approximation (out×in) of this rank; both halves share the singular values."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    a = (root[:, None] * right[:rank]).astype(np.float32)
    return Pair(a, np.ascontiguousarray(left[:, :rank] * root).astype(np.float32))
