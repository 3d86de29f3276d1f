"""Reduced-rank ridge regression: the low-rank update that moves outputs by what is missing.

For rows x_i with weights w_i and wanted changes y_i, with S the features' root mean squares,

    W = argmin sum_i w_i |W x_i - y_i|^2 + lambda |W S|^2,   lambda = ridge * mean diagonal of Z^T Z

where Z has the rows sqrt(w_i) x_i / S. Its fitted values' second moments, lambda's part with them,
are M = C^T W (out×out) with C = Z^T V, V the rows sqrt(w_i) y_i. The r leading eigenvectors of M
are B, and A = B^T W (Izenman, "Reduced-rank regression for the multivariate linear model", 1975).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..aliases import Floats
from ..gene import Pair

_TINY = 1e-9
_EXTRA, _TURNS = 8, 12  # of the subspace iteration: more columns than asked for, and rounds
_SMALL = 512  # outputs up to which all eigenvectors are computed
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Some of a regression's rows.

    Attributes:
        inputs: rows×in; wanted: rows×out; weights: rows, not negative.
    """

    inputs: Floats
    wanted: Floats
    weights: Floats

    def scaled(self, size: Matrix) -> tuple[Matrix, Matrix]:
        """Z and V, see the top; S is `size`."""
        roots: Matrix = np.sqrt(self.weights.astype(np.float64))[:, None]
        return np.multiply(self.inputs, roots / size), np.multiply(self.wanted, roots)


def reduced_rank(rows: Sequence[Rows], rank: int, ridge: float) -> Pair:
    """The update of one tensor.

    Args:
        rows: in parts, so that their float64 copies need no more memory than one part's.
        rank: of the update; it is less where rows or outputs are fewer.
        ridge: against the features' own size; 0.1 is mild.

    Returns:
        A (rank×in) and B (out×rank, orthonormal columns), float32.
    """
    squares, weight = np.zeros(rows[0].inputs.shape[1]), _TINY
    for part in rows:
        squares += part.weights @ np.square(part.inputs, dtype=np.float64)
        weight += float(part.weights.sum())
    size = np.sqrt(squares / weight)
    size = np.maximum(size, _TINY + 1e-6 * float(size.max(initial=0.0)))
    count = sum(len(part.weights) for part in rows)
    c, whole = _ridge(rows, count, size, ridge)
    b = _leading(c, whole, min(rank, count, c.shape[1], c.shape[0]))
    a = (whole @ b).T / size
    return Pair(a.astype(np.float32), b.astype(np.float32))


def explained(rows: Sequence[Rows], pair: Pair) -> float:
    """The share of the wanted changes' squares that an update makes."""
    left = whole = 0.0
    for part in rows:
        missing = part.wanted - (part.inputs @ pair.a.T) @ pair.b.T
        left += float(part.weights @ (missing * missing).sum(1))
        whole += float(part.weights @ (part.wanted * part.wanted).sum(1))
    return 1 - left / whole if whole else 0.0


def _ridge(rows: Sequence[Rows], count: int, size: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
    """C and W (both in×out), by the smaller of the two systems of equations."""
    columns = len(size)
    if count < columns:
        parts = [part.scaled(size) for part in rows]
        z, v = (np.concatenate(each) for each in zip(*parts, strict=True))
        added = ridge * float((z * z).sum()) / columns + _TINY
        return z.T @ v, np.asarray(z.T @ np.linalg.solve(z @ z.T + added * np.eye(count), v))
    moments, c = np.zeros((columns, columns)), np.zeros((columns, rows[0].wanted.shape[1]))
    for part in rows:
        z, v = part.scaled(size)
        moments += z.T @ z
        c += z.T @ v
    moments[np.diag_indices(columns)] += ridge * float(np.trace(moments)) / columns + _TINY
    return c, np.asarray(np.linalg.solve(moments, c))


def _leading(c: Matrix, whole: Matrix, rank: int) -> Matrix:
    """The eigenvectors (out×rank) of the largest eigenvalues of M = C^T W."""
    width = c.shape[1]
    if width <= _SMALL or rank + _EXTRA >= width // 2:
        moments = c.T @ whole
        return np.linalg.eigh((moments + moments.T) / 2)[1][:, ::-1][:, :rank]
    basis = np.random.default_rng(0).standard_normal((width, rank + _EXTRA))
    for _ in range(_TURNS):
        basis = np.linalg.qr(c.T @ (whole @ basis))[0]
    small = basis.T @ (c.T @ (whole @ basis))
    return np.asarray(basis @ np.linalg.eigh((small + small.T) / 2)[1][:, ::-1][:, :rank])
