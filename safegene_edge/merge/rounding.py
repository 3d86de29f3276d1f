"""Back to a tensor's own quantisation, with as much of an update's effect as its grid can hold.

A tensor's scales stay; those codes move that carry the update. With e the error of a row (what the
codes changed minus the update), w the columns' weights, Q an orthonormal basis of the rows of A and
D the directions that the activations lie along (`runtime.activations`), sought is the least

    sum_j w_j e_j^2 + STRENGTH * |Q e|^2 + |D e|^2

With D: coordinate descent in groups of columns, which Q e and D e alone couple. It aims beyond the
update by OVERSHOOT times the share that the nearest codes lose.
Without D, and with Q e = 0 as a condition: e w = shift Q up to rounding (Lagrange), k numbers
`shift` a row; the codes are dithered by DITHER of a step.

Types without a uniform grid are quantised afresh by ggml. So are rows whose update leaves the range
of their codes, where that has the smaller objective. design/merging.md says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..aliases import Bytes, Floats
from ..gguf_file import kernels
from ..gguf_file.kernels import TensorType
from .codes import Codes, Layout, layouts

STRENGTH = 100.0  # see design/merging.md for what others do
OVERSHOOT = 0.05  # of an update that the grid would lose whole
DITHER = 0.75  # of a step
_AIMS = 8  # times that a row's shift is corrected, at most: with twelve no more was there
_GAIN = 0.7  # of what a correction would be without the grid, whose answer is the steeper one
_FAR = 0.6  # of an update that is missing
_NEAR = 0.001  # of |u|^2 may be left in |Q e|^2, over all rows
_ROUGH = 0.05  # where more is left, in a row, single codes are looked at
_CELLS = 1 << 17  # weights at a time in whole rows: their arrays fit a processor's cache
_GROUP = 256  # columns at a time: a super-block of the K-quants, eight blocks of the others
_PASSES = 256  # moves of a row's codes in a group, at most: with twice as many nothing changed


def basis_of(a: Floats) -> Floats:
    """An orthonormal basis (k×in) of A's rows (r×in); k is A's numerical rank."""
    wide = a.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)  # r×r: far cheaper than A's own SVD
    kept = values > values[-1] * 1e-10
    return np.asarray((vectors[:, kept] / np.sqrt(values[kept])).T @ wide, np.float32)


@dataclass(frozen=True, slots=True)
class Update:
    """The update b @ a of a tensor: a is R×in, b out×R.

    Attributes:
        seen: Q, which spans the rows of a, and below it D (k×in).
        spanned: how many rows Q has.
    """

    a: Floats
    b: Floats
    seen: Floats
    spanned: int

    @classmethod
    def of(cls, a: Floats, b: Floats, directions: Floats | None = None) -> Update:
        basis = basis_of(a)
        seen = basis if directions is None else np.concatenate([basis, directions])
        return cls(a, b, seen, len(basis))

    @property
    def alone(self) -> bool:
        """Whether nothing is known of the inputs."""
        return self.spanned == len(self.seen)

    def sees(self, first: int = 0, end: int | None = None) -> Floats:
        """What the rows of `seen` from `first` to `end` see of the update (out×k)."""
        return np.asarray(self.b @ (self.a @ self.seen[first:end].T), np.float32)

    def pull(self, strength: float) -> Floats:
        """The weight in the objective of what each row of `seen` sees (k)."""
        pull = np.ones(len(self.seen), np.float32)
        pull[: self.spanned] = strength
        return pull


def merged(
    raw: Bytes,
    kinds: tuple[TensorType, TensorType],
    update: Update,
    importance: Floats | None = None,
    strength: float = STRENGTH,
) -> tuple[Bytes, npt.NDArray[np.float64]]:
    """Rows of a tensor plus an update.

    Args:
        raw: the rows' bytes (rows×bytes a row).
        kinds: the tensor's type, before and after.
        update: with the b of these rows.
        importance: weight of each column (columns), from an importance matrix.
        strength: 0 rounds to the nearest code.

    Returns:
        The new bytes, and |u|^2, |e|^2, u C u and u C e (summed over the rows) of the update u and
        its error e, what the new bytes changed minus u. C is the second moment of what the tensor
        reads, I + D^T D, where directions are known, else I.

    Raises:
        FloatingPointError: the update is not finite.
    """
    rows = _Rows(raw, kinds, update, importance)
    pull, residual, over = None, np.zeros((len(raw), len(update.seen)), np.float32), np.float32(0)
    if rows.layout is not None and strength and update.alone:
        return rows.aimed(strength)
    if rows.layout is not None and strength:
        over = np.float32(OVERSHOOT * rows.lost())
        rows = replace(rows, update=replace(update, b=update.b * (1 + over)))
        pull, residual = update.pull(strength), rows.nearest()
    new, sums = np.empty((len(raw), kinds[1].width(update.a.shape[1])), np.uint8), np.zeros(4)
    for some in rows.pieces:
        done, aim, error = rows.rounded(some, pull, residual)
        new[:, kinds[1].width(some.start) : kinds[1].width(some.stop)] = done
        delta = aim / (1 + over)
        sums += _sums(delta, error + over * delta)
    if pull is not None:
        wanted = update.sees(update.spanned)  # D u
        error = residual[:, update.spanned :] + over * wanted
        sums[2:] += (wanted**2).sum(), (wanted * error).sum()
    return new, sums


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a tensor and their update, in groups of columns."""

    raw: Bytes
    kinds: tuple[TensorType, TensorType]
    update: Update
    importance: Floats | None

    @property
    def layout(self) -> Layout | None:
        before, after = self.kinds
        return layouts().get(before.name) if before == after else None

    @property
    def pieces(self) -> list[slice]:
        columns = self.update.a.shape[1]
        return [slice(n, min(columns, n + _GROUP)) for n in range(0, columns, _GROUP)]

    def part(self, some: slice) -> tuple[Bytes, Floats]:
        """The bytes of some columns, and their update."""
        before = self.kinds[0]
        part = np.ascontiguousarray(self.raw[:, before.width(some.start) : before.width(some.stop)])
        with np.errstate(over="ignore", invalid="ignore"):
            delta = self.update.b @ self.update.a[:, some]
        if not np.isfinite(delta).all():
            raise FloatingPointError
        return part, delta

    def group(self, layout: Layout, some: slice, delta: Floats, pull: Floats | None) -> _Group:
        seen, weights = self.update.seen[:, some], _weights(self.importance, some)
        aim = self.update.alone and pull is not None
        return _Group(layout, self.kinds[0].number, delta, seen, weights, pull, aim)

    def aimed(self, strength: float) -> tuple[Bytes, npt.NDArray[np.float64]]:
        """New bytes and sums, as of `merged`, without directions: some whole rows at a time."""
        columns = self.update.a.shape[1]
        new, sums, pull = np.empty_like(self.raw), np.zeros(4), self.update.pull(strength)
        count = max(1, _CELLS // columns)
        for first in range(0, len(self.raw), count):
            some = slice(first, first + count)
            piece = replace(
                self, raw=self.raw[some], update=replace(self.update, b=self.update.b[some])
            )
            residual = np.zeros((len(piece.raw), len(pull)), np.float32)
            new[some], delta, error = piece.rounded(slice(0, columns), pull, residual)
            sums += _sums(delta, error)
        return new, sums

    def nearest(self) -> Floats:
        """Q e and D e with every code the nearest one."""
        assert self.layout is not None
        residual = np.zeros((len(self.raw), len(self.update.seen)), np.float32)
        for some in self.pieces:
            part, delta = self.part(some)
            made = self.group(self.layout, some, delta, None)
            residual += made.nearest(part) @ made.seen.T
        return residual

    def lost(self) -> float:
        """The share of the update, 0 to 1, that is lost where every code is the nearest one."""
        error = self.nearest()[:, : self.update.spanned]  # raises where the update is not finite
        wanted = self.update.sees(0, self.update.spanned)
        whole = float((wanted**2).sum())
        return min(1.0, max(0.0, -float((wanted * error).sum()) / whole)) if whole else 0.0

    def rounded(
        self, some: slice, pull: Floats | None, residual: Floats
    ) -> tuple[Bytes, Floats, Floats]:
        """New bytes of some columns, their update and its error; `residual` is kept."""
        part, delta = self.part(some)
        diagonal = self.importance[some] if self.importance is not None else None
        if self.layout is None:
            before, after = self.kinds
            done, error = _afresh(part, before.number, after.number, delta, diagonal)
        else:
            group = self.group(self.layout, some, delta, pull)
            done, error = group.rounded(part, residual, diagonal)
        return done, delta, error


def _sums(delta: Floats, error: Floats) -> npt.NDArray[np.float64]:
    """What `merged` counts, of some columns, with inputs that are spread evenly."""
    delta, error = delta.reshape(-1), error.reshape(-1)
    whole, product = delta @ delta, delta @ error
    return np.array([whole, error @ error, whole, product], np.float64)


def _weights(importance: Floats | None, some: slice) -> Floats:
    """Of some columns; 1 on the mean."""
    if importance is None or not importance.any():
        return np.ones(some.stop - some.start, np.float32)
    return np.asarray(np.maximum(importance[some] / importance.mean(), 1e-3), np.float32)


def _afresh(
    raw: Bytes, source: int, target: int, delta: Floats, importance: Floats | None
) -> tuple[Bytes, Floats]:
    """Dequantise, add, quantise: new scales, new errors of every weight."""
    whole = kernels.dequantise(raw, source, delta.shape)
    whole += delta
    new = kernels.quantise(whole, target, importance)
    return new, kernels.dequantise(new, target, delta.shape) - whole


@dataclass(frozen=True, slots=True)
class _Group:
    """Some columns of some rows, on their way back to their own quantisation.

    Attributes:
        pull: see `Update.pull`; without it every code is the nearest one.
        aim: these are all columns, and nothing is known of the inputs.
    """

    layout: Layout
    ggml_type: int
    delta: Floats
    seen: Floats
    weights: Floats
    pull: Floats | None
    aim: bool

    def rounded(
        self, raw: Bytes, residual: Floats, importance: Floats | None
    ) -> tuple[Bytes, Floats]:
        """New bytes and error; `residual` (Q e and D e, rows×k) is kept up to date."""
        codes = self.layout.unpack(raw)
        moved, error, clipped = self._moved(codes, raw, residual)
        new = self.layout.pack(raw, codes + moved)
        rows = np.flatnonzero(clipped)
        if rows.size:
            fresh, other = _afresh(
                raw[rows], self.ggml_type, self.ggml_type, self.delta[rows], importance
            )
            seen = residual[rows] - error[rows] @ self.seen.T  # of all other groups
            wins = self._objective(other, seen) < self._objective(error[rows], seen)
            chosen = rows[wins]
            new[chosen], error[chosen] = fresh[wins], other[wins]
            residual[chosen] = seen[wins] + other[wins] @ self.seen.T
        return new, error

    def _objective(self, error: Floats, others: Floats) -> Floats:
        """Of some rows; `others` is what all other groups add to Q e and D e."""
        own = (error**2 * self.weights).sum(axis=1)
        if self.pull is None:
            return np.asarray(own, np.float32)
        seen = others + error @ self.seen.T
        return np.asarray(own + seen**2 @ self.pull, np.float32)

    def nearest(self, raw: Bytes) -> Floats:
        """The error where every code is the nearest one (rows×columns)."""
        codes = self.layout.unpack(raw)
        steps = self.layout.steps(raw, self.ggml_type, codes.shape[1])
        moved = np.divide(self.delta, steps, out=np.zeros_like(steps), where=steps != 0)
        np.rint(moved, out=moved)
        np.clip(moved, self.layout.lowest - codes, self.layout.highest - codes, out=moved)
        moved *= steps
        moved -= self.delta
        return moved

    def _moved(
        self, codes: Codes, raw: Bytes, residual: Floats
    ) -> tuple[Codes, Floats, npt.NDArray[np.bool_]]:
        """By how much each code changes, the error left, the rows that leave the codes' range."""
        steps = self.layout.steps(raw, self.ggml_type, codes.shape[1])
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
        down = (self.layout.lowest - codes).astype(np.float32)
        up = (self.layout.highest - codes).astype(np.float32)
        grid = _Grid(steps, inverse, down, up)
        moved = self.delta * inverse
        clipped = np.any((moved < down - 1) | (moved > up + 1), axis=1)
        if self.aim:
            moved, residual[:] = self._aimed(grid)
        else:
            np.clip(np.rint(moved, out=moved), down, up, out=moved)
        error = moved * steps - self.delta
        if self.aim:
            off, whole = ((x**2).sum(axis=1) for x in (residual, self.delta))
            rows = np.flatnonzero(off > _ROUGH * whole)
            pieces = range(0, codes.shape[1], _GROUP) if rows.size else []
            for first in pieces:
                self._improve(moved, error, residual, grid, rows, slice(first, first + _GROUP))
        elif self.pull is not None:
            rows = np.arange(len(moved))
            self._improve(moved, error, residual, grid, rows, slice(None))
        return moved.astype(np.int16), error, clipped

    def _improve(
        self, moved: Floats, error: Floats, residual: Floats, grid: _Grid,
        rows: npt.NDArray[np.intp], some: slice,
    ) -> None:  # fmt: skip
        """Move single codes, of some columns of some rows, while the objective falls; in place."""
        assert self.pull is not None
        seen, weights = self.seen[:, some], self.weights[some]
        pulled = seen * self.pull[:, None]
        gram = seen.T @ pulled
        gram[np.diag_indices(len(gram))] += weights
        curvature = gram.diagonal().copy()
        # The best change of each error, were it not for the grid: the derivative there is 0.
        best = residual[rows] @ (pulled / -curvature)
        best -= error[rows, some] * (weights / curvature)
        able = np.flatnonzero(np.rint(best * grid.inverse[rows, some]).any(axis=1))
        if not able.size:
            return
        here = rows[able]
        steps, before = grid.steps[here, some], moved[here, some]
        limits = grid.down[here, some] - before, grid.up[here, some] - before
        total = _descend(best[able], steps, grid.inverse[here, some], *limits, gram, curvature)
        moved[here, some] += total
        total *= steps
        error[here, some] += total
        residual[here] += total @ seen.T

    def _aimed(self, grid: _Grid) -> tuple[Floats, Floats]:
        """The moves of the codes with which Q e is near 0, and Q e."""
        spread = self.seen / self.weights
        take = np.linalg.inv(spread @ self.seen.T) * np.float32(_GAIN)
        dither = _dither(grid.steps.shape, DITHER)
        wanted = self.delta @ self.seen.T

        def moves(shift: Floats) -> tuple[Floats, Floats]:
            moved = shift @ spread
            moved += self.delta
            moved *= grid.inverse
            moved += dither
            np.rint(moved, out=moved)
            np.clip(moved, grid.down, grid.up, out=moved)
            return moved, wanted - (moved * grid.steps) @ self.seen.T

        size = (wanted**2).sum(axis=1, keepdims=True)
        shift = best = np.zeros_like(wanted)
        least = np.full_like(size, np.inf)
        for _ in range(_AIMS):
            moved, missing = moves(shift)
            off = (missing**2).sum(axis=1, keepdims=True)
            if off.sum() <= _NEAR * size.sum():
                return moved, -missing
            best, least = np.where(off < least, shift, best), np.minimum(off, least)
            # Where codes hardly move yet, what is missing says not how far it is: go on by leaps.
            far = (missing * wanted).sum(axis=1, keepdims=True) > np.float32(_FAR) * size
            shift = shift + missing @ take + far * np.float32(_GAIN) * shift
        moved, missing = moves(best)
        return moved, -missing


@dataclass(frozen=True, slots=True)
class _Grid:
    """The steps of some weights (rows×columns), their inverses, how far each code may move."""

    steps: Floats
    inverse: Floats
    down: Floats
    up: Floats


@lru_cache(maxsize=4)
def _dither(shape: tuple[int, int], size: float) -> Floats:
    """Even between -size/2 and size/2; the same at every call, as a merge shall be."""
    random = np.random.default_rng(0).random(shape, np.float32)
    return np.asarray((random - np.float32(0.5)) * np.float32(size), np.float32)


def _descend(
    best: Floats, steps: Floats, inverse: Floats, down: Floats, up: Floats, gram: Floats,
    curvature: Floats,
) -> Floats:  # fmt: skip
    """Move the best code of each row, and the next best, while that lowers its objective.

    Args:
        best: change of each error that would be best without the grid (rows×columns); spent.
        down, up: how far each code may move.
        gram: half the objective's second derivative (columns×columns); curvature: its diagonal.

    Returns:
        The moves of the codes (rows×columns).
    """
    total = np.zeros_like(best)
    spread = gram / curvature  # what one unit of change in a row's column takes from its best
    left, each = np.arange(len(best)), np.arange(len(best))
    for _ in range(_PASSES):
        code = np.rint(best * inverse)
        np.clip(code, down, up, out=code)
        change = code * steps
        gain = best + best
        gain -= change
        gain *= change
        gain *= curvature
        column = gain.argmax(axis=1)
        wins = gain[each, column] > 0
        count = int(wins.sum())
        if not count:
            break
        if 2 * count < len(wins):  # copying costs: leave the rows that are done when half are
            keep = np.flatnonzero(wins)
            column, left, each = column[keep], left[keep], each[:count]
            code, change, best, steps = code[keep], change[keep], best[keep], steps[keep]
            inverse, down, up, wins = inverse[keep], down[keep], up[keep], wins[keep]
        by = code[each, column] * wins
        total[left, column] += by
        down[each, column] -= by
        up[each, column] -= by
        best -= (change[each, column] * wins)[:, None] * spread[column]
    return total
