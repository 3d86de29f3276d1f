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
STRENGTH = 100.0  # how many times more activations lie along Q than along any other direction
_CHUNK = 64


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
) -> kernels.Bytes:
    """Rows of a quantised tensor plus an update, in the tensor's own type.

    Args:
        raw: the rows' bytes (rows×bytes a row).
        delta: the update (rows×columns).
        basis: of the update's row space (k×columns), orthonormal.
        importance: weight of each column, from an importance matrix.
        strength: 0 rounds to the nearest code.
    """
    layout = layouts().get(type_name)
    if layout is None:
        return afresh(raw, ggml_type, ggml_type, delta, importance)
    weights = np.ones(delta.shape[1], np.float32)
    if importance is not None and importance.any():
        weights = np.maximum(importance / importance.mean(), np.float32(1e-3))
    steps = layout.steps(raw, ggml_type, delta.shape[1])
    codes = layout.unpack(raw)
    moved, clipped = _moved(codes, steps, delta, basis, weights, layout, strength)
    result = layout.pack(raw, codes + moved)
    if clipped.any():
        rows = np.flatnonzero(clipped)
        _better(result, raw, rows, ggml_type, delta, basis, weights, importance, strength)
    return result


def afresh(
    raw: kernels.Bytes, source: int, target: int, delta: Floats, importance: Floats | None
) -> kernels.Bytes:
    """Dequantise, add, quantise: new scales and new rounding errors for every weight."""
    return kernels.quantise(
        kernels.dequantise(raw, source, delta.shape) + delta, target, importance
    )


def _moved(
    codes: Codes, steps: Floats, delta: Floats, basis: Floats, weights: Floats, layout: Layout,
    strength: float,
) -> tuple[Codes, npt.NDArray[np.bool_]]:  # fmt: skip
    """By how much each code changes, and the rows whose update leaves the codes' range."""
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    down, up = (
        (layout.lowest - codes).astype(np.float32),
        (layout.highest - codes).astype(np.float32),
    )
    wanted = delta * inverse
    clipped = np.any((wanted < down - 1) | (wanted > up + 1), axis=1)
    moved = np.minimum(np.maximum(np.rint(wanted), down), up)
    residual = (moved * steps - delta) @ basis.T
    leverage = (basis**2).sum(axis=0)
    for some in _chunks(leverage, strength):
        grid = _Grid(
            basis[:, some], weights[some], strength, steps[:, some], inverse[:, some],
            down[:, some], up[:, some], moved[:, some], delta[:, some],
        )  # fmt: skip
        moved[:, some] = grid.descend(residual)
    return moved.astype(np.int16), clipped


class _Grid:
    """Some columns of some rows, and the codes that they may take."""

    def __init__(
        self, basis: Floats, weights: Floats, strength: float, steps: Floats, inverse: Floats,
        down: Floats, up: Floats, moved: Floats, delta: Floats,
    ) -> None:  # fmt: skip
        self.basis, self.weights, self.strength = basis, weights, np.float32(strength)
        self.steps, self.inverse, self.down, self.up = steps, inverse, down, up
        self.moved, self.delta = moved, delta
        self.curvature = weights + self.strength * (basis**2).sum(axis=0)

    def descend(self, residual: Floats) -> Floats:
        """Codes moved until no single one lowers its row's objective; `residual` follows."""
        rows = np.arange(len(residual))
        for _ in range(4 * len(self.weights)):  # each pass lowers every row in it: this is a stop
            rows = self._pass(rows, residual)
            if not rows.size:
                break
        return self.moved

    def _pass(self, rows: npt.NDArray[np.intp], residual: Floats) -> npt.NDArray[np.intp]:
        """Move the best code of each row; returns the rows that moved one."""
        steps, moved = self.steps[rows], self.moved[rows]
        error = moved * steps - self.delta[rows]
        slope = error * self.weights
        slope += self.strength * (residual[rows] @ self.basis)
        best = slope / -self.curvature  # the error's best change, were it not for the grid
        code = np.rint(best * self.inverse[rows])
        code = np.minimum(np.maximum(code, self.down[rows] - moved), self.up[rows] - moved)
        change = code * steps
        gain = change * (2 * best - change) * self.curvature
        column = gain.argmax(axis=1)
        each = np.arange(len(rows))
        wins = gain[each, column] > 0
        rows, column, each = rows[wins], column[wins], each[wins]
        self.moved[rows, column] += code[each, column]
        residual[rows] += change[each, column, None] * self.basis.T[column]
        return rows


def _chunks(leverage: Floats, strength: float) -> list[npt.NDArray[np.intp]]:
    """Columns in the order of their leverage, in chunks; none where nothing can be corrected."""
    if not strength or not leverage.any():
        return []
    order = np.argsort(-leverage, kind="stable")
    return [order[start : start + _CHUNK] for start in range(0, len(order), _CHUNK)]


def _better(
    result: kernels.Bytes, raw: kernels.Bytes, rows: npt.NDArray[np.intp], ggml_type: int,
    delta: Floats, basis: Floats, weights: Floats, importance: Floats | None, strength: float,
) -> None:  # fmt: skip
    """Quantise these rows afresh, and keep that where its objective is the smaller one."""
    shape = len(rows), delta.shape[1]
    before = kernels.dequantise(raw[rows], ggml_type, shape)
    fresh = kernels.quantise(before + delta[rows], ggml_type, importance)

    def objective(candidate: kernels.Bytes) -> Floats:
        error = kernels.dequantise(candidate, ggml_type, shape) - before - delta[rows]
        seen = ((error @ basis.T) ** 2).sum(axis=1)
        return np.asarray((error**2 * weights).sum(axis=1) + strength * seen, np.float32)

    wins = objective(fresh) < objective(result[rows])
    result[rows[wins]] = fresh[wins]
