"""Importance matrices: both of llama-imatrix's forms, and what a merge does with them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from adapters import adapter_for, random_adapter
from gguf import GGMLQuantizationType, GGUFWriter
from tiny import WIDE

from safegene_edge.compat import open_model
from safegene_edge.errors import FileFormatError, SettingError
from safegene_edge.gguf_file import GGUFFile, kernels, write_gguf
from safegene_edge.merge import MergeSettings, merge
from safegene_edge.merge.imatrix import read_imatrix


def imatrix_for(path, output, binary=False):
    """An importance matrix of random mean squares, in one of llama-imatrix's two forms."""
    random_, file = np.random.default_rng(0), GGUFFile(path)
    means = {
        name: random_.uniform(0.1, 4, info.shape[1]).astype(np.float32)
        for name, info in file.tensors.items()
        if len(info.shape) == 2
    }
    if binary:
        body = struct.pack("<i", len(means))
        for name, values in means.items():
            body += struct.pack("<i", len(name)) + name.encode()
            body += struct.pack("<ii", 5, values.size) + (values * 5).tobytes()
        output.write_bytes(body)
        return means
    writer = GGUFWriter(output, "")
    writer.add_type("imatrix")
    for name, values in means.items():
        writer.add_tensor(f"{name}.in_sum2", (values * 7)[None, :])
        writer.add_tensor(f"{name}.counts", np.array([[7.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


@pytest.mark.parametrize("binary", [False, True])
def test_both_forms_of_an_importance_matrix_are_read(binary, quantised, tmp_path):
    means = imatrix_for(quantised(), tmp_path / "imatrix", binary)
    found = read_imatrix(tmp_path / "imatrix")
    assert set(found) == set(means)
    for name, values in means.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_a_type_that_needs_an_importance_matrix_gets_it_or_is_refused(tiny, tmp_path):
    """IQ2_XXS, written by ggml's own quantiser, since llama.cpp's refuses to without a matrix."""
    source, target = open_model(tiny("llama", **WIDE).gguf_path), tmp_path / "iq2.gguf"
    name = "blk.1.ffn_down.weight"
    values = source.floats(name)
    kind = GGMLQuantizationType.IQ2_XXS
    raw = kernels.quantise(values, int(kind), np.ones(values.shape[1], np.float32))
    writer = GGUFWriter(target, source.architecture)
    writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gene = tmp_path / "gene.gguf"
    random_adapter(target, size=0.2).save(gene)
    with pytest.raises(SettingError, match="needs an importance matrix"):
        merge(target, [gene], tmp_path / "out.gguf")
    imatrix_for(target, tmp_path / "imatrix.gguf")
    settings = MergeSettings(imatrix=tmp_path / "imatrix.gguf")
    merge(target, [gene], tmp_path / "out.gguf", settings=settings)
    assert open_model(tmp_path / "out.gguf").tensors[name].type_name == "IQ2_XXS"


def test_an_importance_matrix_steers_the_rounding(quantised, tmp_path):
    source = quantised()
    gene = adapter_for(source, tmp_path)
    imatrix_for(source, tmp_path / "imatrix.gguf")
    for name, file in (("with", tmp_path / "imatrix.gguf"), ("without", None)):
        merge(source, [gene], tmp_path / name, settings=MergeSettings(imatrix=file))
    assert (tmp_path / "with").read_bytes() != (tmp_path / "without").read_bytes()


def entry(name=b"blk.0.ffn_up.weight", calls=5, size=3, values=(1.0, 2.0, 3.0), length=None):
    """One entry of the older form, with what a broken one says."""
    head = struct.pack("<ii", 1, len(name) if length is None else length) + name
    return head + struct.pack("<ii", calls, size) + struct.pack(f"<{len(values)}f", *values)


BROKEN = {
    "cut off": b"\x01\0\0\0",
    "a count below 0": b"\xff" * 64,
    "a magic alone": b"GGUF",
    "numbers": struct.pack("<i", 2) * 9,
    "a size below 0": entry(size=-1),
    "a size of 0": entry(size=0),
    "a size beyond the file": entry(size=1 << 30),
    "a name below 0": entry(length=-8),
    "a name of 0": entry(length=0),
    "a name beyond the file": entry(length=1 << 30),
    "a name that is not UTF-8": entry(name=b"\xff\xfe"),
    "calls below 0": entry(calls=-3),
    "a name twice": struct.pack("<i", 2) + entry()[4:] * 2,
    "a value of NaN": entry(values=(1.0, float("nan"), 1.0)),
    "an infinite value": entry(values=(1.0, float("inf"), 1.0)),
    "a value below 0": entry(values=(1.0, -1.0, 1.0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_matrix_of_the_older_form_is_refused(name, tmp_path):
    path = tmp_path / "imatrix"
    path.write_bytes(entry())
    assert read_imatrix(path)["blk.0.ffn_up.weight"].tolist() == pytest.approx([0.2, 0.4, 0.6])
    path.write_bytes(BROKEN[name])
    with pytest.raises(FileFormatError, match=str(path)):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        ([1.0, np.nan], [1.0]), ([1.0, np.inf], [1.0]), ([1.0, -1.0], [1.0]),
        ([1.0, 1.0], [np.nan]), ([1.0, 1.0], [-1.0]), ([1.0, 1.0], [np.inf]),
        ([3e38, 3e38], [1e-3]), ([1.0, 1.0], [1.0, 1.0, 1.0]),
    ],
)  # fmt: skip
def test_a_broken_matrix_in_gguf_is_refused(sums, counts, tmp_path):
    arrays = [("t.in_sum2", np.array([sums], np.float32)), ("t.counts", np.array([counts], "f4"))]
    write_gguf(tmp_path / "imatrix", "", {"general.type": "imatrix"}, arrays)
    with pytest.raises(FileFormatError, match="imatrix: 't'"):
        read_imatrix(tmp_path / "imatrix")


def test_sums_without_counts_are_refused(tmp_path):
    sums = [("t.in_sum2", np.array([[1.0, 2.0]], np.float32))]
    write_gguf(tmp_path / "imatrix", "", {"general.type": "imatrix"}, sums)
    with pytest.raises(FileFormatError, match="imatrix: 't' has no counts"):
        read_imatrix(tmp_path / "imatrix")


@pytest.mark.parametrize("data", [b"\x01\0\0\0", BROKEN["a size below 0"]])
def test_what_is_no_importance_matrix_is_refused(data, quantised, tmp_path):
    (tmp_path / "imatrix").write_bytes(data)
    gene = adapter_for(quantised(), tmp_path)
    with pytest.raises(FileFormatError):
        merge(
            quantised(),
            [gene],
            tmp_path / "o",
            settings=MergeSettings(imatrix=tmp_path / "imatrix"),
        )
