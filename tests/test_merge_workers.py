"""A merge in processes of its own writes what one process writes, and fails as one does."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from adapters import adapter_for, random_adapter
from adapters import merge_plain as merge

from safegene_edge.errors import SafeGeneError
from safegene_edge.gene import Pair, SafetyGene
from safegene_edge.merge import MergeSettings, workers
from safegene_edge.merge.plan import Plan


def test_the_same_merge_gives_the_same_bytes_with_any_number_of_threads(quantised, tmp_path):
    source = quantised()
    gene = adapter_for(source, tmp_path)
    outputs = [tmp_path / f"{threads}.gguf" for threads in (1, 3)]
    for threads, output in zip((1, 3), outputs, strict=True):
        merge(source, [gene], output, settings=MergeSettings(threads=threads))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_workers_write_what_one_process_writes(quantised, tmp_path, monkeypatch):
    """Small models are merged in one process: here the limit goes, and the workers come."""
    source = quantised()
    gene = adapter_for(source, tmp_path)
    merge(source, [gene], tmp_path / "one.gguf", settings=MergeSettings(threads=1))
    monkeypatch.setattr(workers, "_WORTH", 0)
    seen = []
    report = merge(
        source, [gene], tmp_path / "two.gguf", settings=MergeSettings(threads=2),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert len(seen) == len(report.tensors) and seen[-1][0] == seen[-1][1]


def test_an_error_in_a_worker_is_the_callers(quantised, tmp_path, monkeypatch):
    source = quantised()
    huge = random_adapter(source)
    name, pair = next(iter(huge.pairs.items()))
    pairs = {**huge.pairs, name: Pair(pair.a * 1e30, pair.b * 1e30)}
    monkeypatch.setattr(workers, "_WORTH", 0)
    with pytest.raises(SafeGeneError, match=name):
        merge(source, [SafetyGene("llama", 8.0, pairs)], tmp_path / "out.gguf",
              settings=MergeSettings(threads=2))  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_workers_take_the_package_from_where_their_caller_has_it(quantised, tmp_path, monkeypatch):
    """A folder of the package's name in the current folder is neither imported nor run."""
    gene = adapter_for(quantised(), tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "safegene_edge").mkdir(parents=True)
    trap = "import pathlib; pathlib.Path('executed').touch()"
    for name in ("safegene_edge/__init__.py", "pickle.py", "numpy.py", "signal.py"):
        (elsewhere / name).write_text(trap)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(workers, "_WORTH", 0)
    settings = MergeSettings(threads=2)
    assert merge(quantised(), [gene], tmp_path / "a.gguf", settings=settings).tensors
    for name in ("pickle.py", "numpy.py", "signal.py"):
        (elsewhere / name).unlink()
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])  # as `python -m` before 3.11
    assert merge(quantised(), [gene], tmp_path / "b.gguf", settings=settings).tensors
    assert not (elsewhere / "executed").exists()


def test_what_a_library_prints_in_a_worker_is_no_answer(quantised, tmp_path, monkeypatch, capfd):
    """A line before or amid the work made the merge wait for ever."""
    gene = adapter_for(quantised(), tmp_path)
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    (noisy / "sitecustomize.py").write_text("import os\nos.write(1, b'a notice\\nhalf a line')\n")
    monkeypatch.setenv("PYTHONPATH", str(noisy))
    monkeypatch.setattr(workers, "_WORTH", 0)
    merge(quantised(), [gene], tmp_path / "out.gguf", settings=MergeSettings(threads=2))
    said = capfd.readouterr()
    assert not said.out and "a notice\nhalf a line\n" in said.err


def test_any_error_of_a_worker_reaches_the_caller_as_itself(quantised, tmp_path, monkeypatch):
    gene = adapter_for(quantised(), tmp_path)
    plan = Plan.of(quantised(), [gene])
    jobs = plan.jobs([p for p in plan.draft(0, 1).places if p.info.name in plan.updates])
    jobs[0] = replace(jobs[0], importance=np.ones(3, np.float32))
    monkeypatch.setattr(workers, "_WORTH", 0)
    with pytest.raises(ValueError, match=r"shape|broadcast|operands") as caught:
        workers.run_jobs(jobs, None, 2, None)
    assert "workers.py" in str(caught.value.__cause__)  # the worker's traceback
