"""The regression of one tensor: the low-rank map is found, in parts or as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safegene_edge.learn.solve import Rows, explained, reduced_rank


def written(width: int, rows: int, rank: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Inputs (rows×width), a low-rank map of them, and the map."""
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, (rows, width)).astype(np.float32)
    a, b = random.normal(0, 1, (rank, width)), random.normal(0, 1, (40, rank))
    return x, (x @ a.T @ b.T).astype(np.float32), b @ a


@pytest.mark.parametrize("rows", [30, 300])  # fewer than columns: the dual system
def test_a_low_rank_map_is_found(rows: int) -> None:
    x, y, whole = written(64, rows, 3)
    pair = reduced_rank([Rows(x, y, np.ones(rows, np.float32))], 3, 1e-9)
    assert np.abs(x @ pair.a.T @ pair.b.T - y).max() < 1e-3 * np.abs(y).max()
    assert pair.b.T @ pair.b == pytest.approx(np.eye(3), abs=1e-5)
    if rows > 64:
        assert pair.b @ pair.a == pytest.approx(whole, abs=1e-2)


def test_the_rank_and_the_weights_say_what_is_kept() -> None:
    x, y, _ = written(64, 300, 3)
    found = [reduced_rank([Rows(x, y, np.ones(300, np.float32))], rank, 1e-9) for rank in (1, 2, 3)]
    left = [float(((x @ p.a.T @ p.b.T - y) ** 2).sum()) for p in found]
    assert left[0] > left[1] > left[2]
    # The best rank-1 map of these rows is the first principal component of the fitted values.
    values = np.linalg.svd(y, compute_uv=False)
    assert left[0] == pytest.approx(float((values[1:] ** 2).sum()), rel=1e-2)
    weights = np.where(np.arange(300) < 150, 1.0, 0.0).astype(np.float32)
    other = y.copy()
    other[150:] = 100.0  # rows of no weight
    pair = reduced_rank([Rows(x, other, weights)], 3, 1e-9)
    assert np.abs(x[:150] @ pair.a.T @ pair.b.T - y[:150]).max() < 1e-2


@pytest.mark.parametrize("rows", [50, 400])
def test_parts_give_what_the_whole_gives(rows: int) -> None:
    random = np.random.default_rng(2)
    x, y, _ = written(64, rows, 3)
    y += random.normal(0, 1, y.shape).astype(np.float32)
    weights = random.random(rows).astype(np.float32)
    whole = [Rows(x, y, weights)]
    parts = [Rows(x[at], y[at], weights[at]) for at in np.array_split(np.arange(rows), 7)]
    found = [reduced_rank(each, 5, 0.1) for each in (whole, parts)]
    one, other = (pair.b @ pair.a for pair in found)
    assert one == pytest.approx(other, abs=1e-5)
    left = y - x @ one.T
    share = 1 - float(weights @ (left**2).sum(1)) / float(weights @ (y**2).sum(1))
    for each in (whole, parts):
        assert explained(each, found[0]) == pytest.approx(share, abs=1e-5)


def test_many_outputs_take_the_same_way() -> None:
    random = np.random.default_rng(1)
    x = random.normal(0, 1, (200, 64)).astype(np.float32)
    y = (x @ random.normal(0, 1, (64, 4)) @ random.normal(0, 1, (4, 700))).astype(np.float32)
    pair = reduced_rank([Rows(x, y, np.ones(200, np.float32))], 4, 1e-9)
    assert np.abs(x @ pair.a.T @ pair.b.T - y).max() < 1e-3 * np.abs(y).max()
