"""Reduced-rank ridge regression: the low-rank update that moves outputs by what is missing.

For rows x_i with weights w_i and wanted changes y_i, with S the features' root mean squares,

    W = argmin sum_i w_i |W x_i - y_i|^2 + lambda |W S|^2,   lambda = ridge * mean diagonal of Z^T Z

where Z has the rows sqrt(w_i) x_i / S. Its fitted values' second moments, lambda's part with them,
are M = C^T W (out×out) with C = Z^T V, V the rows sqrt(w_i) y_i. The r leading eigenvectors of M
are B, and A = B^T W (Izenman, "Reduced-rank regression for the multivariate linear model", 1975).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..aliases import Floats
from ..gene import Pair

_TINY = 1e-9
_EXTRA, _TURNS = 8, 12  # of the subspace iteration: more columns than asked for, and rounds
_SMALL = 512  # outputs up to which all eigenvectors are computed
Matrix = npt.NDArray[np.float64]


def reduced_rank(inputs: Floats, wanted: Floats, weights: Floats, rank: int, ridge: float) -> Pair:
    """The update of one tensor.

    Args:
        inputs: rows×in; wanted: rows×out; weights: rows, not negative.
        rank: of the update; it is less where rows or outputs are fewer.
        ridge: against the features' own size; 0.1 is mild.

    Returns:
        A (rank×in) and B (out×rank, orthonormal columns), float32.
    """
    roots = np.sqrt(weights.astype(np.float64))[:, None]
    z, v = inputs.astype(np.float64) * roots, wanted.astype(np.float64) * roots
    size = np.sqrt((z * z).sum(0) / max(float(weights.sum()), _TINY))
    size = np.maximum(size, _TINY + 1e-6 * float(size.max(initial=0.0)))
    z /= size
    whole = _ridge(z, v, ridge)
    b = _leading(z.T @ v, whole, min(rank, *v.shape, z.shape[1]))
    a = (whole @ b).T / size
    return Pair(a.astype(np.float32), b.astype(np.float32))


def _ridge(z: Matrix, v: Matrix, ridge: float) -> Matrix:
    """W (in×out), by the smaller of the two systems of equations."""
    rows, columns = z.shape
    added = ridge * float((z * z).sum()) / columns + _TINY
    if rows < columns:
        return np.asarray(z.T @ np.linalg.solve(z @ z.T + added * np.eye(rows), v))
    return np.asarray(np.linalg.solve(z.T @ z + added * np.eye(columns), z.T @ v))


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
