"""Directions of activations: found, packed, kept with the gene, and spared by merging."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from test_gene import random_gene

from safegene_edge import Expression, SafetyGene
from safegene_edge.activations import directions_of, packed, unpacked
from safegene_edge.converters import kernels, rounding
from safegene_edge.converters.merge_inputs import updates_of
from safegene_edge.errors import FileFormatError
from safegene_edge.gguf_file import write_gguf


def leaning_inputs(tokens=400, width=256, count=3, seed=0):
    """A sample that lies along a few directions, ten times as far as along any other."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(width, count)))[0].T
    return (
        random.normal(size=(tokens, width)) + 10 * random.normal(size=(tokens, count)) @ basis
    ).astype(np.float32), basis.astype(np.float32)


def test_directions_weigh_an_error_as_the_activations_do():
    inputs, basis = leaning_inputs()
    rows = directions_of(inputs, 3)
    for error, tolerance in ((basis[0], 0.15), (basis.sum(axis=0), 0.15)):
        true = float(np.mean((inputs @ error) ** 2))
        even = float(np.mean((inputs - inputs @ basis.T @ basis) ** 2))
        assert (error @ error + np.sum((rows @ error) ** 2)) * even == pytest.approx(
            true, rel=tolerance
        )


@pytest.mark.parametrize(
    ("tokens", "width", "count"), [(1, 8, 1), (40, 8, 1), (40, 300, 3), (40, 4000, 16), (4, 600, 6)]
)
def test_wide_inputs_have_more_directions(tokens, width, count):
    rows = directions_of(np.random.default_rng(0).normal(size=(tokens, width)).astype(np.float32))
    assert rows.shape[1] == width and 1 <= len(rows) <= count
    assert len(rows) == min(count, tokens) or tokens < count
    assert np.isfinite(rows).all()


def test_no_activations_have_no_directions():
    assert directions_of(np.zeros((5, 200), np.float32)).shape == (0, 200)


def test_coding_is_exact_for_directions_and_leftovers_are_taken_up():
    """One token that dwarfs the others: 4 bits hold its direction to a few per cent at first."""
    inputs, _ = leaning_inputs()
    inputs[::40] = 1000 * inputs[0]
    rows = directions_of(inputs, 4)
    again = unpacked(*packed({"t": rows}), {"t": 256})["t"]
    np.testing.assert_allclose(again, rows, rtol=1e-5)
    error = np.random.default_rng(4).normal(size=256)
    basis = np.linalg.qr(rows.T)[0]
    error -= basis @ (basis.T @ error)  # an error that no direction sees
    assert np.abs(inputs[0] @ error) < 0.01 * np.linalg.norm(inputs[0]) * np.linalg.norm(error)


def known(gene):
    random = np.random.default_rng(1)
    rows = {layer: random.normal(size=(3, 8)).astype(np.float32) for layer in gene.layers}
    return replace(gene, activations={n: rows[int(n[4])] for n in gene.pairs})


def test_a_gene_keeps_them_in_four_bits_and_shares_what_is_the_same(tmp_path):
    gene = known(random_gene())
    assert len(packed(gene.activations)[0]) == len(gene.layers) < len(gene.pairs)
    gene.save(tmp_path / "gene.gguf")
    again = SafetyGene.load(tmp_path / "gene.gguf")
    assert list(again.activations) == list(gene.pairs)
    for name, rows in gene.activations.items():
        np.testing.assert_allclose(again.activations[name], rows, atol=np.abs(rows).max() / 13)
    again.save(tmp_path / "twice.gguf")
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "gene.gguf").read_bytes()
    again.express(Expression({0: 0.0, 1: 0.5})).save(tmp_path / "part.gguf")
    part = SafetyGene.load(tmp_path / "part.gguf")
    assert set(part.activations) == set(part.pairs) == {n for n in gene.pairs if n[4] != "0"}


@pytest.mark.parametrize("text", ["", "~", "not base 85 \x00", "0" * 50, "width"])
def test_damaged_ones_are_refused_by_name(text, tmp_path):
    gene = random_gene()
    name = next(iter(gene.pairs))
    if text == "width":
        text = packed({name: np.ones((2, 7), np.float32)})[1][0]
    facts = {"safegene.activations.tensors": [name], "safegene.activations": [text]}
    write_gguf(tmp_path / "bad.gguf", "llama", {**gene.metadata(), **facts}, list(gene._tensors()))
    with pytest.raises(FileFormatError, match=rf"bad.gguf.*activations of '{name}'"):
        SafetyGene.load(tmp_path / "bad.gguf")


def test_steps_that_are_not_finite_are_refused():
    with np.errstate(invalid="ignore"):
        names, texts = packed({"t": np.full((1, 4), np.inf, np.float32)})
    with pytest.raises(FileFormatError, match="finite"):
        unpacked(names, texts, {"t": 4})


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_merging_leaves_less_error_along_them(kind):
    inputs, basis = leaning_inputs(width=512)
    random = np.random.default_rng(2)
    type_ = kernels.Kind.of(int(GGMLQuantizationType[kind]))
    values = random.normal(size=(64, 512)).astype(np.float32)
    a = random.normal(0, 512**-0.5, (4, 512)).astype(np.float32)
    b = random.normal(0, 0.02, (64, 4)).astype(np.float32)
    raw = kernels.quantise(values, type_.number)
    before = kernels.dequantise(raw, type_.number, values.shape)

    def error(directions):
        update = rounding.Update.of(a, b, directions)
        new, _ = rounding.merged(raw, (type_, type_), update)
        return kernels.dequantise(new, type_.number, values.shape) - before - b @ a

    with_, without = error(directions_of(inputs, 3)), error(None)
    along = [np.linalg.norm(e @ basis.T) for e in (with_, without)]
    effect = [np.linalg.norm(inputs @ e.T) for e in (with_, without)]
    assert along[0] < 0.6 * along[1]
    assert effect[0] < effect[1]
    lost = np.linalg.norm(with_ @ rounding.basis_of(a).T)
    assert lost < 0.3 * np.linalg.norm(b @ a)


def test_the_sum_of_adapters_keeps_what_a_gene_knows():
    gene = known(random_gene())
    plain = random_gene(seed=3)
    name = next(iter(gene.pairs))
    for order in ([gene, plain], [plain, gene]):
        update = updates_of(order)[name]
        assert len(update.seen) == update.spanned + 3
        np.testing.assert_array_equal(update.seen[update.spanned :], gene.activations[name])
