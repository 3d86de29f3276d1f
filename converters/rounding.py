"""Back to a tensor's own quantisation, with as much of an update's effect as its grid can hold.

An update is often smaller than half a step of the grid: rounding to the nearest code swallows
it, and quantising the sum afresh drowns it in new rounding errors of every weight. Here the
scales stay, and those codes change that carry the update where it acts. With e the error of a
row (what the codes changed minus the update), w the columns' weights and Q an orthonormal basis
of the rows of A, minimised by coordinate descent is

    sum_j w_j e_j^2 + strength * |Q e|^2

An update B A acts on what Q sees of the activations, so Q e = 0 keeps the effect whole, however
few codes change. Columns come in the order of |Q_j|: coarse corrections first, fine ones last.
Types without a uniform grid, and rows whose update leaves the range of their codes, are
quantised afresh by ggml; of the two ways a row takes the one with the smaller objective.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import kernels
from .codes import Codes, Layout, layouts

Floats = npt.NDArray[np.float32]
STRENGTH = 10.0  # how much more of the activations lies along Q than along any other direction
_CHUNK = 64  # columns that are weighed against each other


def basis_of(a: Floats) -> Floats:
    """An orthonormal basis (k×in) of A's rows (r×in); k is A's numerical rank."""
    wide = a.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)  # r×r: far cheaper than A's own SVD
    kept = values > values[-1] * 1e-10
    return np.asarray((vectors[:, kept] / np.sqrt(values[kept])).T @ wide, np.float32)


def requantise(
    raw: kernels.Bytes,
    type_name: str,
    ggml_type: int,
    delta: Floats,
    basis: Floats,
    importance: Floats | None = None,
    strength: float = STRENGTH,
) -> tuple[kernels.Bytes, Floats]:
    """Rows of a quantised tensor plus an update, in the tensor's own type.

    Args:
        raw: the rows' bytes (rows×bytes a row).
        delta: the update (rows×columns).
        basis: of the update's row space (k×columns), orthonormal.
        importance: weight of each column, from an importance matrix.
        strength: 0 rounds to the nearest code.

    Returns:
        The new bytes, and the error (rows×columns): what they changed minus the update.
    """
    layout = layouts().get(type_name)
    if layout is None:
        return afresh(raw, ggml_type, ggml_type, delta, importance)
    weights = np.ones(delta.shape[1], np.float32)
    if importance is not None and importance.any():
        weights = np.maximum(importance / importance.mean(), np.float32(1e-3))
    steps = layout.steps(raw, ggml_type, delta.shape[1])
    codes = layout.unpack(raw)
    moved, error, clipped = _moved(codes, steps, delta, basis, weights, layout, strength)
    result = layout.pack(raw, codes + moved)
    rows = np.flatnonzero(clipped)
    if rows.size:
        fresh, other = afresh(raw[rows], ggml_type, ggml_type, delta[rows], importance)

        def objective(candidate: Floats) -> Floats:
            seen = ((candidate @ basis.T) ** 2).sum(axis=1)
            return np.asarray((candidate**2 * weights).sum(axis=1) + strength * seen, np.float32)

        wins = objective(other) < objective(error[rows])
        result[rows[wins]], error[rows[wins]] = fresh[wins], other[wins]
    return result, error


def afresh(
    raw: kernels.Bytes, source: int, target: int, delta: Floats, importance: Floats | None
) -> tuple[kernels.Bytes, Floats]:
    """Dequantise, add, quantise: new scales, new errors of every weight; as `requantise`."""
    whole = kernels.dequantise(raw, source, delta.shape)
    whole += delta
    new = kernels.quantise(whole, target, importance)
    return new, kernels.dequantise(new, target, delta.shape) - whole


def _moved(
    codes: Codes, steps: Floats, delta: Floats, basis: Floats, weights: Floats, layout: Layout,
    strength: float,
) -> tuple[Codes, Floats, npt.NDArray[np.bool_]]:  # fmt: skip
    """By how much each code changes, the error left, and the rows that leave the codes' range."""
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    down, up = layout.lowest - codes, layout.highest - codes
    moved = delta * inverse
    clipped = np.any((moved < down - 1) | (moved > up + 1), axis=1)
    np.clip(np.rint(moved, out=moved), down, up, out=moved)
    error = moved * steps
    error -= delta
    residual = error @ basis.T
    for start in range(0, delta.shape[1] if strength else 0, _CHUNK):
        some = slice(start, start + _CHUNK)
        part = basis[:, some]
        gram = np.float32(strength) * (part.T @ part)
        gram[np.diag_indices(len(gram))] += weights[some]
        curvature = gram.diagonal().copy()
        # The best change of each error, were it not for the grid: the derivative there is 0.
        best = residual @ (part * (np.float32(-strength) / curvature))
        best -= error[:, some] * (weights[some] / curvature)
        code = np.rint(best * inverse[:, some])
        rows = np.flatnonzero(code.any(axis=1))
        if rows.size:
            range_ = down[rows, some] - moved[rows, some], up[rows, some] - moved[rows, some]
            total = _descend(best[rows], steps[rows, some], inverse[rows, some], *range_,
                             gram, curvature)  # fmt: skip
            moved[rows, some] += total
            total *= steps[rows, some]
            error[rows, some] += total
            residual[rows] += total @ part.T
    return moved.astype(np.int16), error, clipped


def _descend(
    best: Floats, steps: Floats, inverse: Floats, down: Floats, up: Floats, gram: Floats,
    curvature: Floats,
) -> Floats:  # fmt: skip
    """Move the best code of each row until none lowers its row's objective; returns the moves.

    Args:
        best: change of each error that would be best without the grid (rows×columns); spent.
        down, up: how far each code may move.
        gram: half the objective's second derivative (columns×columns); curvature: its diagonal.
    """
    total = np.zeros_like(best)
    spread = gram / curvature  # what one unit of change in a row's column takes from its best
    left = np.arange(len(best))
    for _ in range(4 * len(curvature)):  # each pass lowers every row in it: this is a stop
        code = np.rint(best * inverse)
        np.clip(code, down, up, out=code)
        gain = code * steps
        gain *= (best + best - gain) * curvature
        column, each = gain.argmax(axis=1), np.arange(len(left))
        wins = gain[each, column] > 0
        if not wins.all():
            keep = np.flatnonzero(wins)
            if not keep.size:
                break
            column, each, left = column[keep], each[: len(keep)], left[keep]
            code, best, steps = code[keep], best[keep], steps[keep]
            inverse, down, up = inverse[keep], down[keep], up[keep]
        by = code[each, column]
        total[left, column] += by
        down[each, column] -= by
        up[each, column] -= by
        best -= (by * steps[each, column])[:, None] * spread[column]
    return total
