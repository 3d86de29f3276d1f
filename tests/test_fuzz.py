"""Hundreds of damaged files: each loads or is refused with a SafeGeneError, and nothing else.

What loads must also save, and load again. Seeds are fixed: a failure is the same for all.
"""

from __future__ import annotations

import json
import os
import warnings
from importlib import resources

import pytest
from adapters import adapter_for
from mutations import mutations
from test_imatrix import imatrix_for

from safegene_edge.cli.adapters import _adapter_facts, _as_lines, _model_facts
from safegene_edge.compat import check, open_model
from safegene_edge.converters.names import BaseNames
from safegene_edge.errors import SafeGeneError
from safegene_edge.gene import SHIPPED, Adapter, SafetyGene
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.merge.imatrix import read_imatrix
from safegene_edge.runtime.loadable import require_loadable

COUNT = int(os.environ.get("SAFEGENE_FUZZ", "150"))  # mutations of each file
SEED = int(os.environ.get("SAFEGENE_FUZZ_SEED", "0"))


def read_gene(path):
    gene = SafetyGene.load(path)
    shown(_adapter_facts(gene, GGUFFile(path)))
    for content in (gene, Adapter.load(path)):
        content.save(path.with_suffix(".again"))
        again = type(content).load(path.with_suffix(".again"))
        assert again.sha256 == content.sha256
        assert repr(again.extra) == repr(content.extra)  # a NaN equals itself only as text
        assert {k: again.types[k] for k in again.extra} == {k: gene.types[k] for k in again.extra}


def read_model(path):
    model = open_model(path)
    shown(_model_facts(model))
    for key in ("tokens", "merges"):
        model.strings(f"tokenizer.ggml.{key}")
    check(SafetyGene.shipped(), model)
    require_loadable(model)
    BaseNames(model).to_gguf_rows("blk.0.attn_q.weight", model.floats("blk.0.attn_q.weight"))


def shown(facts):
    json.dumps(facts)
    _as_lines(facts)


def header_end(path):
    return max(end for _, end in GGUFFile(path).spans.values()) + 2000  # and tensor records


@pytest.fixture
def files(tiny, tmp_path):
    """Name to a good file, the end of its header, and what reads it."""
    model, shipped = tiny("llama").gguf_path, tmp_path / "shipped.gguf"
    shipped.write_bytes((resources.files("safegene_edge") / "data" / SHIPPED).read_bytes())
    adapter = adapter_for(model, tmp_path, family="tiny", coefficients={0: 0.5, 2: 1.0})
    made = {"gene": (shipped, read_gene), "adapter": (adapter, read_gene)}
    made |= {"model": (model, read_model)}
    for binary in (False, True):
        name = "old imatrix" if binary else "imatrix"
        imatrix_for(model, tmp_path / name, binary)
        made[name] = tmp_path / name, read_imatrix
    return made


@pytest.mark.parametrize("name", ["gene", "adapter", "model", "imatrix", "old imatrix"])
def test_a_damaged_file_loads_or_is_refused(name, files, tmp_path):
    path, read = files[name]
    end = path.stat().st_size if name == "old imatrix" else header_end(path)
    broken, refused = tmp_path / "broken.gguf", 0
    for what, data in mutations(path.read_bytes(), end, COUNT, SEED):
        broken.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # numpy's would be a line on the user's terminal
                read(broken)
        except SafeGeneError as error:
            refused += 1
            assert str(broken) in str(error), what
            assert str(error).isprintable(), what
        except Exception as error:
            raise AssertionError(f"{name}, seed {SEED}, {what}: {error!r}") from error
    assert 0 < refused < COUNT  # else nothing was damaged, or nothing read
