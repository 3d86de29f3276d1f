"""Models that are split over several files, files that are no model, genes fitted or not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from adapters import random_adapter
from gguf import GGUFWriter

from safegene_edge import Expression, SafeLlama
from safegene_edge.compat import open_model, unfitted
from safegene_edge.errors import FileFormatError
from safegene_edge.files import sha256
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.runtime.requantise import requantise


@pytest.fixture()
def split_model(tiny, tmp_path):
    """The tiny llama in files of ten tensors, as llama.cpp's gguf-split makes them."""
    whole = GGUFFile(tiny("llama").gguf_path)
    writer = GGUFWriter(tmp_path / "tiny.gguf", whole.architecture, split_max_tensors=10)
    for key, value in whole.metadata.items():
        if isinstance(value, ArrayValue):
            writer.add_array(key, value.values())
        elif key != "general.architecture":
            add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
            add.get(type(value), writer.add_uint32)(key, value)
    for name in whole.tensors:
        writer.add_tensor(name, whole.floats(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("tiny-*.gguf")), whole


def test_a_split_model_has_all_its_tensors(split_model):
    parts, whole = split_model
    assert len(parts) > 1
    model = open_model(parts[0])
    assert model.tensors.keys() == whole.tensors.keys()
    for name in whole.tensors:
        np.testing.assert_array_equal(model.floats(name), whole.floats(name))


def test_an_adapter_is_attached_to_a_split_model(split_model):
    parts, whole = split_model
    with SafeLlama(parts[0], [random_adapter(whole.path)], n_ctx=64) as llama:
        assert len(llama.adapters) == 1


def test_parts_that_are_missing_or_later_are_named(split_model):
    parts, _ = split_model
    with pytest.raises(FileFormatError, match="not the first"):
        open_model(parts[1])
    parts[1].unlink()
    with pytest.raises(FileFormatError, match=f"{parts[1].name}.*no such file"):
        open_model(parts[0])


@pytest.mark.parametrize("count", [math.nan, math.inf, 2.5, -2])
def test_a_number_of_parts_that_is_none(count, tmp_path):
    facts = {"split.count": count}
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write_gguf(path, "llama", facts, [("t.weight", np.ones((2, 2), np.float32))])
    with pytest.raises(FileFormatError, match=rf"split\.count is {count}"):
        open_model(path)


def test_a_tensor_in_two_parts_is_named(tmp_path):
    paths = [tmp_path / f"tiny-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in paths:
        write_gguf(path, "llama", {"split.count": 2}, [("t.weight", np.ones((2, 2), np.float32))])
    with pytest.raises(
        FileFormatError, match=rf"{paths[1].name}: tensor 't\.weight' is in another"
    ):
        open_model(paths[0])


def test_a_gene_that_was_not_fitted_to_this_model_is_known(tiny, tmp_path):
    model, other = tiny("llama").gguf_path, tmp_path / "other.gguf"
    requantise(model, other, "F16")  # of its family, and not the same
    gene, fitted = tmp_path / "gene.gguf", tmp_path / "fitted.gguf"
    whole = random_adapter(model, family="tiny")
    whole.save(gene)
    strengths = dict.fromkeys(whole.layers, 0.5)
    whole.express(Expression(strengths, whole.sha256, sha256(model))).save(fitted)
    assert "never fitted" in unfitted(gene, model)
    assert unfitted(fitted, model) == ""
    assert "another model" in unfitted(fitted, other)
    assert unfitted(fitted, tiny("qwen2").gguf_path) == ""  # it does not fit
    whole.express(Expression(strengths)).save(fitted)  # nobody says for which model
    assert unfitted(fitted, model) == ""
    replace(whole, family="").save(gene)  # a LoRA that is no gene
    assert unfitted(gene, model) == ""


def test_a_token_twice_is_refused_before_llama_cpp_ends_the_process(tiny, tmp_path):
    """An assertion of llama.cpp's: no error, but the end of whoever loads the model."""
    source = tiny("llama").gguf_path
    tokens = GGUFFile(source).strings("tokenizer.ggml.tokens")
    data, path = source.read_bytes(), tmp_path / "model.gguf"
    known, other = (bytes([1, 0, 0, 0, 0, 0, 0, 0]) + token.encode() for token in ("A", "B"))
    assert {"A", "B"} < set(tokens) and data.count(known) == 1
    path.write_bytes(data.replace(known, other))
    with pytest.raises(FileFormatError, match="has the token 'B' twice"):
        SafeLlama(path)
    path.write_bytes(data.replace("Ġand".encode(), "Ġ\0nd".encode()))  # llama.cpp reads "Ġ"
    with pytest.raises(FileFormatError, match="has the token 'Ġ' twice"):
        SafeLlama(path)
