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
from safegene_edge.gguf_file import GGUFFile, kernels
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


@pytest.mark.parametrize("data", [b"\x01\0\0\0", b"\xff" * 64, b"GGUF", struct.pack("<i", 2) * 9])
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
