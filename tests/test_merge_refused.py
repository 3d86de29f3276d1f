"""What a merge refuses: adapters and models in which nothing, or no number, is right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from adapters import adapter_for, random_adapter
from adapters import merge_plain as merge

from safegene_edge import export
from safegene_edge.compat import open_model
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    NoEffectError,
    OutputError,
    SafeGeneError,
)
from safegene_edge.gene import Pair, SafetyGene
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.merge import MergeSettings
from safegene_edge.merge.inputs import require_mergeable
from safegene_edge.merge.plan import Plan


def test_an_update_that_changes_nothing_is_refused(quantised, tmp_path):
    source = quantised("Q4_0")
    gene = adapter_for(source, tmp_path, size=1e-9)
    with pytest.raises(NoEffectError, match="nothing would change"):
        merge(source, [gene], tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [gene]


def test_an_infinite_update_names_its_tensor(quantised, tmp_path):
    source = quantised()
    huge = random_adapter(source)
    name, pair = next(iter(huge.pairs.items()))
    huge = SafetyGene("llama", 8.0, {name: Pair(pair.a * 1e30, pair.b * 1e30)})
    with pytest.raises(Exception, match=name):
        merge(source, [huge], tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_merged_into_are_named(quantised, tmp_path):
    model = open_model(quantised("Q4_0"))
    name = "blk.0.attn_q.weight"
    with pytest.raises(MismatchError, match=r"has 256 columns, the importance matrix 255"):
        require_mergeable(model, name, {name: np.ones(255, np.float32)})
    require_mergeable(model, name, {name: np.ones(256, np.float32), "other": np.ones(3)})
    with pytest.raises(MismatchError, match="has 1 dimensions, not two"):
        require_mergeable(model, "blk.0.attn_norm.weight", {})
    plan = Plan.of(model.path, [adapter_for(model.path, tmp_path)])
    with pytest.raises(OutputError, match="also an input"):
        plan.check_outputs(model.path)


@pytest.mark.parametrize("options", [{}, {"promote": 2}])
def test_an_adapter_of_zeros_is_refused(quantised, tmp_path, options):
    model = quantised("Q4_K_M")
    whole = random_adapter(model)
    pairs = {name: Pair(pair.a, 0 * pair.b) for name, pair in whole.pairs.items()}
    nothing = replace(whole, pairs=pairs)
    assert nothing.zero_pairs == len(pairs) and whole.zero_pairs == 0
    settings = MergeSettings(**options)
    with pytest.raises(NoEffectError, match="every update in it is zero"):
        merge(model, [nothing], tmp_path / "m.gguf", settings=settings)
    with pytest.raises(NoEffectError, match="every update in it is zero"):
        export("llama-server", model, [nothing], tmp_path / "served")
    assert not any(tmp_path.rglob("*.gguf"))


def test_ggml_is_not_asked_for_what_would_end_the_process(quantised, tmp_path):
    model = quantised("IQ3_S")
    huge = random_adapter(model, size=1e16)
    with pytest.raises(SafeGeneError, match=r"the update of 'blk.* is not finite"):
        merge(model, [huge], tmp_path / "m.gguf")
    info = GGUFFile(model).tensors["blk.0.attn_q.weight"]
    broken = tmp_path / "broken.gguf"
    data = bytearray(model.read_bytes())
    data[info.offset : info.offset + 2] = b"\x00\x7e"  # the first scale: NaN
    broken.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"its tensor 'blk.0.attn_q.weight' holds NaN"):
        merge(broken, [random_adapter(model)], tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf"]
