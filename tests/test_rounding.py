"""Codes and their rounding: where ggml keeps them, and what of an update they hold."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from test_activations import leaning_inputs

from safegene_edge.gguf_file import kernels
from safegene_edge.merge import rounding
from safegene_edge.merge.codes import layouts
from safegene_edge.runtime.activations import directions_of


@pytest.mark.parametrize("kind", layouts())
def test_codes_are_where_ggml_looks_for_them(kind):
    """Taken apart and put together again the bytes are the same, and the grid is ggml's."""
    values = np.random.default_rng(3).normal(size=(5, 512)).astype(np.float32)
    ggml_type, layout = int(GGMLQuantizationType[kind]), layouts()[kind]
    raw = kernels.quantise(values, ggml_type)
    codes = layout.unpack(raw)
    assert codes.min() >= layout.lowest and codes.max() <= layout.highest
    assert len(np.unique(codes)) > 3
    assert (layout.pack(raw, codes) == raw).all()
    other = np.random.default_rng(4).integers(layout.lowest, layout.highest + 1, codes.shape)
    moved = layout.pack(raw, other.astype(np.int16))
    assert (layout.unpack(moved) == other).all()
    weights = [kernels.dequantise(bytes_, ggml_type, values.shape) for bytes_ in (raw, moved)]
    steps = layout.steps(raw, ggml_type, values.shape[1])
    np.testing.assert_allclose(weights[1] - weights[0], (other - codes) * steps, atol=1e-5)


@pytest.mark.parametrize("kind", layouts())
def test_an_update_below_half_a_step_survives(kind):
    """Quantised afresh, or rounded to the nearest code, next to nothing of it is left."""
    random_ = np.random.default_rng(5)
    values = random_.normal(size=(64, 512)).astype(np.float32)
    a = random_.normal(0, 512**-0.5, (4, 512)).astype(np.float32)
    b = random_.normal(0, 0.02, (64, 4)).astype(np.float32)
    delta, ggml_type = b @ a, int(GGMLQuantizationType[kind])
    raw = kernels.quantise(values, ggml_type)
    before = kernels.dequantise(raw, ggml_type, values.shape)

    def survived(new):
        kept = kernels.dequantise(new, ggml_type, values.shape) - before
        return float((kept * delta).sum() / (delta * delta).sum())

    kinds = (kernels.TensorType.of(ggml_type),) * 2
    update = rounding.Update.of(a, b)
    ours = survived(rounding.merged(raw, kinds, update, strength=1000.0)[0])
    nearest = survived(rounding.merged(raw, kinds, update, strength=0.0)[0])
    assert abs(ours - 1) < 0.3
    assert nearest < 0.6
    assert ours > nearest


def test_what_leaves_the_codes_range_gets_new_scales():
    random_ = np.random.default_rng(6)
    values = random_.normal(size=(8, 256)).astype(np.float32)
    a = random_.normal(size=(1, 256)).astype(np.float32)
    b = np.full((8, 1), 5.0, np.float32)
    kind = kernels.TensorType.of(int(GGMLQuantizationType.Q4_K))
    raw = kernels.quantise(values, kind.number)
    new, sums = rounding.merged(raw, (kind, kind), rounding.Update.of(a, b))
    before = kernels.dequantise(raw, kind.number, values.shape)
    error = kernels.dequantise(new, kind.number, values.shape) - before - b @ a
    assert sums[1] == pytest.approx((error**2).sum(), rel=1e-3)
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(b @ a)


def test_basis_spans_the_rows_and_forgets_repeated_ones():
    a = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    basis = rounding.basis_of(np.concatenate([a, a[:1] * 2, a[1:2] - a[2:]]))
    assert basis.shape == (3, 40)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(a @ basis.T @ basis, a, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_merging_leaves_less_error_along_them(kind):
    inputs, basis = leaning_inputs(width=512)
    random = np.random.default_rng(2)
    type_ = kernels.TensorType.of(int(GGMLQuantizationType[kind]))
    values = random.normal(size=(64, 512)).astype(np.float32)
    a = random.normal(0, 512**-0.5, (4, 512)).astype(np.float32)
    b = random.normal(0, 0.02, (64, 4)).astype(np.float32)
    raw = kernels.quantise(values, type_.number)
    before = kernels.dequantise(raw, type_.number, values.shape)

    def error(directions, times=1, strength=rounding.STRENGTH):
        update = rounding.Update.of(a, times * b, directions)
        new, _ = rounding.merged(raw, (type_, type_), update, strength=strength)
        return kernels.dequantise(new, type_.number, values.shape) - before - times * b @ a

    def lost(error, times=1):
        return np.linalg.norm(error @ rounding.basis_of(a).T) / np.linalg.norm(times * b @ a)

    leaning = directions_of(inputs, 3)
    with_, without = error(leaning), error(None)
    along = [np.linalg.norm(e @ basis.T) for e in (with_, without)]
    effect = [np.linalg.norm(inputs @ e.T) for e in (with_, without)]
    assert along[0] < 0.6 * along[1]
    assert effect[0] < effect[1]
    # The default gives up more of an update as small as this one than of a larger one.
    assert lost(error(leaning, strength=400.0)) < 0.3
    assert lost(error(leaning, times=3), times=3) < 0.3


def test_what_survives_is_counted_as_the_inputs_see_it():
    """By projection of the kept update's effect on the whole one's, over all inputs."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(256, 3)))[0].T
    inputs = np.float32(16 * (np.eye(256) + 9 * basis.T @ basis))  # as even as a sample can be
    random = np.random.default_rng(3)
    a = random.normal(0, 1 / 16, (4, 256)).astype(np.float32)
    b = random.normal(0, 0.02, (64, 4)).astype(np.float32)
    kind = kernels.TensorType.of(int(GGMLQuantizationType.Q4_0))
    raw = kernels.quantise(random.normal(size=(64, 256)).astype(np.float32), kind.number)
    update = rounding.Update.of(a, b, directions_of(inputs, 3))
    new, sums = rounding.merged(raw, (kind, kind), update)
    before, after = (kernels.dequantise(bytes_, kind.number, (64, 256)) for bytes_ in (raw, new))
    kept, wanted = inputs @ (after - before).T, inputs @ (b @ a).T
    seen, plain = (kept * wanted).sum() / (wanted**2).sum(), ((after - before) * (b @ a)).sum()
    assert 1 + sums[3] / sums[2] == pytest.approx(seen, abs=1e-3)
    assert abs(plain / sums[0] - seen) > 0.02


def test_the_search_aims_beyond_what_the_grid_loses_and_no_further(monkeypatch):
    """On inputs that it has not seen more of a small update is there; a large one is as it was."""
    random = np.random.default_rng(7)
    mixed = random.normal(size=(32, 512)) / np.arange(1, 33)[:, None]
    inputs = random.normal(size=(600, 32)) @ mixed + random.normal(size=(600, 512))
    seen, others = np.float32(inputs[:300]), np.float32(inputs[300:])
    a = random.normal(0, 512**-0.5, (4, 512)).astype(np.float32)
    b = random.normal(0, 0.05, (64, 4)).astype(np.float32)
    kind = kernels.TensorType.of(int(GGMLQuantizationType.Q4_0))
    raw = kernels.quantise(random.normal(size=(64, 512)).astype(np.float32), kind.number)
    before = kernels.dequantise(raw, kind.number, (64, 512))

    def kept(times):
        update = rounding.Update.of(a, times * b, directions_of(seen, 64))
        new, _ = rounding.merged(raw, (kind, kind), update)
        got = others @ (kernels.dequantise(new, kind.number, (64, 512)) - before).T
        wanted = others @ (times * b @ a).T
        return float((got * wanted).sum() / (wanted**2).sum())

    aimed = kept(1), kept(40)
    monkeypatch.setattr(rounding, "OVERSHOOT", 0.0)
    plain = kept(1), kept(40)
    assert plain[0] < 0.96 < aimed[0] < 1.04
    assert abs(aimed[1] - plain[1]) < 0.01


def of_random(kind, times, *, spread=1.0, width=1024):
    """A quantised matrix, its type, a small update and the function that undoes quantisation."""
    random = np.random.default_rng(8)
    type_ = kernels.TensorType.of(int(GGMLQuantizationType[kind]))
    raw = kernels.quantise(random.normal(size=(48, width)).astype(np.float32), type_.number)
    sizes = np.where(np.arange(width) < width // 2, spread, 1)
    a = random.normal(0, width**-0.5, (4, width)) * sizes
    b = times * random.normal(0, 1, (48, 4))
    before = kernels.dequantise(raw, type_.number, (48, width))
    update = rounding.Update.of(np.float32(a), np.float32(b))

    def kept(**more):
        new, sums = rounding.merged(raw, (type_, type_), update, **more)
        return kernels.dequantise(new, type_.number, (48, width)) - before, sums

    return update, kept


@pytest.mark.parametrize("kind", layouts())
def test_without_directions_the_updates_own_see_it_whole(kind):
    """And no weight is quantised anew, so that most of them are as they were."""
    update, kept = of_random(kind, 0.5)
    wanted, (got, sums) = update.b @ update.a, kept()
    basis = update.seen.T
    assert np.linalg.norm((got - wanted) @ basis) < 0.15 * np.linalg.norm(wanted)
    assert (got * wanted).sum() / (wanted**2).sum() == pytest.approx(1, abs=0.03)
    assert sums[0] == pytest.approx((wanted**2).sum(), rel=1e-3)
    assert sums[1] == pytest.approx(((got - wanted) ** 2).sum(), rel=1e-3)


@pytest.mark.parametrize("times", [1e-1, 1e-2, 1e-3, 1e-5])
def test_an_update_far_below_the_grid_never_does_more_harm_than_left_out(times):
    update, kept = of_random("Q4_0", times)
    wanted, got = update.b @ update.a, kept()[0]
    shares = (got * wanted).sum(axis=1) / (wanted**2).sum(axis=1)
    assert shares.max() < 1.6 and shares.mean() < 1.01
    off = np.linalg.norm((got - wanted) @ update.seen.T, axis=1)
    assert (off <= 1.001 * np.linalg.norm(wanted, axis=1)).all()


def test_dithered_codes_move_where_the_update_is_small_as_well(monkeypatch):
    """Inputs may lie where a row of A has its small entries, and nowhere else."""
    update, kept = of_random("Q4_0", 1.0, spread=0.5)
    wanted = (update.b @ update.a)[:, :512]

    def share():
        return float((kept()[0][:, :512] * wanted).sum() / (wanted**2).sum())

    dithered = share()
    monkeypatch.setattr(rounding, "DITHER", 0.0)
    assert share() < 0.6
    assert dithered > share() + 0.2


def test_columns_that_weigh_more_take_less_of_the_error():
    update, kept = of_random("Q4_0", 0.5)
    importance = np.where(np.arange(1024) % 8 == 0, 16.0, 1.0).astype(np.float32)
    wanted = update.b @ update.a
    errors = [kept()[0] - wanted, kept(importance=importance)[0] - wanted]
    heavy = [np.linalg.norm(error[:, ::8]) for error in errors]
    assert heavy[1] < 0.7 * heavy[0]
    lost = np.linalg.norm(errors[1] @ update.seen.T)
    assert lost < 0.15 * np.linalg.norm(wanted)


@pytest.mark.parametrize("known", [False, True], ids=["the update alone", "directions"])
@pytest.mark.parametrize("times", [0.02, 0.5, 20.0], ids=["small", "usual", "out of range"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_what_a_group_reports_is_what_its_bytes_do(kind, times, known):
    """The error is the bytes' change minus the update, and the residual what `seen` sees of it."""
    random = np.random.default_rng(9)
    type_ = kernels.TensorType.of(int(GGMLQuantizationType[kind]))
    raw = kernels.quantise(random.normal(size=(24, 512)).astype(np.float32), type_.number)
    before = kernels.dequantise(raw, type_.number, (24, 512))
    a = np.float32(random.normal(0, 512**-0.5, (4, 512)))
    directions = np.float32(random.normal(0, 512**-0.5, (3, 512))) if known else None
    update = rounding.Update.of(a, np.float32(times * random.normal(0, 1, (24, 4))), directions)
    rows = rounding._Rows(raw, (type_, type_), update, None)
    pull = update.pull(rounding.STRENGTH)
    residual = rows.nearest() if known else np.zeros((24, len(update.seen)), np.float32)
    new, errors = np.empty_like(raw), np.empty_like(before)
    for some in rows.pieces if known else [slice(0, 512)]:
        done, delta, errors[:, some] = rows.rounded(some, pull, residual)
        new[:, type_.width(some.start) : type_.width(some.stop)] = done
        np.testing.assert_allclose(delta, update.b @ update.a[:, some], rtol=1e-5, atol=1e-7)
    change = kernels.dequantise(new, type_.number, (24, 512)) - before
    size = np.abs(before).max()
    np.testing.assert_allclose(errors, change - update.b @ update.a, atol=1e-5 * size)
    np.testing.assert_allclose(residual, errors @ update.seen.T, atol=1e-3 * size)


def test_a_descent_ends_where_no_single_code_lowers_the_objective():
    random = np.random.default_rng(10)
    rows, columns, seen = 40, 32, np.float32(random.normal(size=(3, 32)))
    gram = np.float32(seen.T @ seen * 5 + np.eye(columns))
    steps = np.float32(random.uniform(0.2, 1.5, (rows, columns)))
    start = np.float32(random.normal(0, 2, (rows, columns)))  # the errors at the beginning
    down, up = np.float32(np.full((rows, columns), -1)), np.float32(np.full((rows, columns), 2))
    up[:, ::5] = 0

    def objective(error):
        return np.einsum("ri,ij,rj->r", error, gram, error)

    best = np.float32(-(start @ gram) / gram.diagonal())
    limits = down.copy(), up.copy()
    total = rounding._descend(best, steps.copy(), 1 / steps, *limits, gram, gram.diagonal().copy())
    np.testing.assert_array_equal(total, np.rint(total))
    assert (total >= down).all() and (total <= up).all() and (total == down).any()
    ended = objective(start + total * steps)
    assert (ended <= objective(start) + 1e-4).all() and ended.mean() < 0.5 * objective(start).mean()
    for column in range(columns):
        for by in (-1, 1):
            other = total.copy()
            other[:, column] += by
            allowed = (other >= down)[:, column] & (other <= up)[:, column]
            worse = objective(start + other * steps) >= ended - 1e-3 * objective(start)
            assert worse[allowed].all()


def test_more_of_the_update_in_what_is_seen_and_never_more_error_than_the_nearest_code():
    """The objective, counted from the bytes, falls below that of rounding and of quantising."""
    update, kept = of_random("Q4_K", 0.5)
    wanted = update.b @ update.a

    def objective(got):
        error = got - wanted
        seen = ((error @ update.seen.T) ** 2).sum(axis=1)
        return (error**2).sum(axis=1) + rounding.STRENGTH * seen

    ours, nearest = objective(kept()[0]), objective(kept(strength=0.0)[0])
    assert (ours < nearest).mean() > 0.95 and ours.mean() < 0.5 * nearest.mean()


@pytest.mark.parametrize(("importance", "expected"), [
    (None, [1, 1]), ([0, 0, 0, 0], [1, 1]), ([2, 4, 1, 1], [1, 2]), ([0, 8, 0, 0], [1e-3, 4]),
])  # fmt: skip
def test_the_weight_of_a_column_is_its_importance_over_the_mean(importance, expected):
    given = None if importance is None else np.float32(importance)
    np.testing.assert_allclose(rounding._weights(given, slice(0, 2)), np.float32(expected))


def test_an_update_that_is_not_finite_is_refused():
    update, kept = of_random("Q4_0", 0.5)
    update.b[3, 1] = np.inf
    for strength in (0.0, rounding.STRENGTH):
        with pytest.raises(FloatingPointError):
            kept(strength=strength)


def test_what_is_seen_is_pulled_by_its_strength():
    a, b = np.float32(np.eye(2, 8)), np.ones((3, 2), np.float32)
    alone = rounding.Update.of(a, b)
    both = rounding.Update.of(a, b, np.float32(np.eye(3, 8)))
    assert (alone.alone, both.alone, both.spanned) == (True, False, 2)
    np.testing.assert_array_equal(alone.pull(7.0), np.float32([7, 7]))
    np.testing.assert_array_equal(both.pull(7.0), np.float32([7, 7, 1, 1, 1]))
    np.testing.assert_allclose(both.sees(2), b @ a @ np.eye(3, 8).T)
    np.testing.assert_allclose(np.abs(both.sees(0, 2)), np.ones((3, 2)), atol=1e-6)
