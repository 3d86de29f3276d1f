"""Merging: types, bytes, truth, what survives, splits, kills, full disks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import pytest
from adapters import adapter_for
from adapters import merge_plain as merge
from gguf import GGMLQuantizationType, GGUFWriter

from safegene_edge.compat import model_hash, open_model
from safegene_edge.errors import (
    MismatchError,
    NoEffectError,
    OutputError,
    SettingError,
)
from safegene_edge.gene import Expression, SafetyGene
from safegene_edge.gguf_file import GGUFFile, kernels
from safegene_edge.merge import MergeSettings, bake, workers
from safegene_edge.merge import merge as merge_and_run
from safegene_edge.merge import plan as merge_plan
from safegene_edge.merge.plan import Plan, _promoted
from safegene_edge.merge.workers import TensorReport
from safegene_edge.runtime.llama import SafeLlama

KINDS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M",
    "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "TQ2_0", "MXFP4_MOE",
)  # fmt: skip


def bytes_of(file, name):
    return file.raw(name).tobytes()


def logits(path, adapters=(), text=b"The cat sat on the mat and"):
    with SafeLlama(str(path), adapters, n_ctx=64, logits_all=True) as llama:
        tokens = llama.tokenize(text)
        llama.clear()
        llama.eval(tokens)
        return np.array(llama.scores[: len(tokens)])


@pytest.mark.parametrize("kind", KINDS)
def test_types_and_untouched_bytes_stay(kind, quantised, tmp_path):
    source = quantised(kind)
    gene = adapter_for(source, tmp_path)
    output = tmp_path / "out.gguf"
    report = merge(source, [gene], output)
    before, after = open_model(source), open_model(output)
    assert list(before.tensors) == list(after.tensors)
    touched = {tensor.name for tensor in report.tensors}
    assert touched == set(SafetyGene.load(gene).pairs)
    changed = set()
    for name, info in before.tensors.items():
        assert after.tensors[name].ggml_type == info.ggml_type
        assert after.tensors[name].shape == info.shape
        if bytes_of(before, name) != bytes_of(after, name):
            changed.add(name)
    assert changed and changed <= touched
    data = sum(info.n_bytes for info in before.tensors.values())
    assert after.n_bytes - before.n_bytes < 2048 < data
    assert np.isfinite(logits(output)).all()


@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-3), ("F16", 2e-2)])
def test_merged_logits_are_the_side_loaded_ones(kind, bound, quantised, tmp_path):
    source = quantised(kind)
    gene = adapter_for(source, tmp_path)
    output = tmp_path / "out.gguf"
    merge(source, [(gene, 0.7)], output)
    side = logits(source, [(gene, 0.7)])
    assert np.abs(side - logits(source)).max() > 10 * bound
    assert np.abs(logits(output) - side).max() <= bound


def test_f32_holds_the_very_sum(quantised, tmp_path):
    source = quantised("F32")
    gene = adapter_for(source, tmp_path)
    output = tmp_path / "out.gguf"
    merge(source, [gene], output)
    content, before, after = SafetyGene.load(gene), open_model(source), open_model(output)
    for name in content.pairs:
        expected = before.floats(name) + content.delta(name)
        np.testing.assert_allclose(after.floats(name), expected, rtol=0, atol=1e-6)


def test_the_function_is_not_hidden_by_the_module_of_its_name():
    code = (
        "import safegene_edge.merge.plan, safegene_edge.converters.to_peft\n"
        "import safegene_edge as edge\n"
        "from safegene_edge import merge, to_peft\n"
        "assert edge.merge is merge is safegene_edge.merge\n"
        "assert edge.converters.to_peft is edge.to_peft is to_peft\n"
        "assert callable(merge) and callable(to_peft)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_adapters_add_up(quantised, tmp_path):
    source = quantised("F32")
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
    one = adapter_for(source, tmp_path / "1", seed=1)
    two = adapter_for(source, tmp_path / "2", seed=2, rank=2, alpha=3.0)
    output = tmp_path / "out.gguf"
    merge(source, [(one, 0.5), (two, -1.5)], output)
    side = logits(source, [(one, 0.5), (two, -1.5)])
    assert np.abs(logits(output) - side).max() <= 1e-3


def test_a_gene_goes_in_with_its_expression(quantised, tmp_path):
    source = quantised("F32")
    gene = adapter_for(source, tmp_path, family="tiny")
    expression = Expression({0: 0.0, 1: 1.5, 2: 0.3}, SafetyGene.load(gene).sha256)
    output = tmp_path / "out.gguf"
    report = merge(source, [(gene, expression)], output)
    assert not any(t.name.startswith("blk.0.") for t in report.tensors)
    expressed = SafetyGene.load(gene).express(expression)
    assert np.abs(logits(output) - logits(source, [expressed])).max() <= 1e-3
    facts = GGUFFile(output)
    assert facts.numbers("safegene.merge.0.layers") == [1, 2]
    np.testing.assert_allclose(facts.numbers("safegene.merge.0.coefficients"), [1.5, 0.3])
    merge(output, [(adapter_for(source, tmp_path), 0.5)], tmp_path / "again.gguf")
    assert "safegene.merge.0.layers" not in GGUFFile(tmp_path / "again.gguf").metadata


def test_all_metadata_stays_and_provenance_comes(quantised, tmp_path):
    source = quantised()
    gene = adapter_for(source, tmp_path)
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    merge(source, [gene], once)
    merge(once, [(gene, 0.5)], twice)
    before, after = GGUFFile(source), GGUFFile(twice)
    data = [path.read_bytes() for path in (source, twice)]
    for key, (start, end) in before.spans.items():
        a, b = after.spans[key]
        assert data[1][a:b] == data[0][start:end], key
    assert after.strings("safegene.merge.model_hashes") == [
        hashlib.sha256(once.read_bytes()).hexdigest()
    ]
    assert after.strings("safegene.merge.adapter_hashes") == [
        hashlib.sha256(gene.read_bytes()).hexdigest()
    ]
    assert after.numbers("safegene.merge.scales") == [0.5]
    assert set(after.spans) - set(before.spans) == {
        f"safegene.merge.{key}"
        for key in ("version", "model", "model_hashes", "adapters", "adapter_hashes", "scales")
    }


# -- what is reported -----------------------------------------------------


def test_more_survives_than_quantised_afresh_and_the_report_says_so(quantised, tmp_path):
    gene = adapter_for(quantised("Q4_0"), tmp_path, size=0.01)
    ours = merge(quantised("Q4_0"), [gene], tmp_path / "ours.gguf")
    whole, content = open_model(quantised("Q4_0")), SafetyGene.load(gene)
    there = wanted = 0.0
    for tensor in ours.tensors:
        weights, delta = whole.floats(tensor.name), content.delta(tensor.name)
        kind = whole.tensors[tensor.name].ggml_type
        made = kernels.dequantise(kernels.quantise(weights + delta, kind), kind, weights.shape)
        there, wanted = there + ((made - weights) * delta).sum(), wanted + (delta**2).sum()
    assert ours.survived > there / wanted + 0.3
    assert there / wanted < 0.8
    source, output = quantised("IQ4_NL"), tmp_path / "out.gguf"  # has no uniform grid
    afresh = merge(source, [gene], output)
    assert ours.survived > afresh.survived + 0.3
    assert ours.warnings == ()
    assert afresh.survived < 0.8
    assert "side-load" in afresh.warnings[-1] and "--promote" in afresh.warnings[-1]
    before, after = open_model(source), open_model(output)
    tensor = afresh.tensors[0]
    delta = content.delta(tensor.name)
    kept = after.floats(tensor.name) - before.floats(tensor.name)
    assert tensor.update == pytest.approx(np.linalg.norm(delta), rel=1e-4)
    assert tensor.error == pytest.approx(np.linalg.norm(kept - delta), rel=1e-3)
    assert tensor.survived == pytest.approx((kept * delta).sum() / (delta**2).sum(), abs=1e-3)


def test_promoting_gives_the_worst_tensors_a_larger_type(quantised, tmp_path):
    source = quantised("Q4_0")
    gene = adapter_for(source, tmp_path, size=0.01)
    settings = MergeSettings(promote=2)
    report = merge(source, [gene], tmp_path / "out.gguf", settings=settings)
    larger = [tensor for tensor in report.tensors if tensor.after != tensor.before]
    assert [tensor.after for tensor in larger] == ["Q8_0", "Q8_0"]
    assert min(tensor.survived for tensor in larger) > 0.8
    file = open_model(tmp_path / "out.gguf")
    assert all(file.tensors[tensor.name].type_name == "Q8_0" for tensor in larger)
    assert report.after - report.before == pytest.approx(
        sum(t.n_bytes for t in larger) * (1 - 18 / 34), abs=2048
    )
    assert np.isfinite(logits(tmp_path / "out.gguf")).all()


@pytest.fixture
def split(quantised, tmp_path):
    """The quantised model in files of ten tensors, as llama.cpp's gguf-split makes them."""
    whole = open_model(quantised("Q8_0"))
    writer = GGUFWriter(tmp_path / "split.gguf", whole.architecture, split_max_tensors=10)
    for key, value in whole.metadata.items():
        if key.startswith("llama.") and isinstance(value, (int, float)):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    for name, info in whole.tensors.items():
        kind = GGMLQuantizationType(info.ggml_type)
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, whole.floats(name))
        else:
            raw = whole.raw(name).reshape(info.shape[0], -1)
            writer.add_tensor(name, np.array(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("split-*.gguf"))


@pytest.mark.parametrize("joined", [False, True])
def test_a_split_model_stays_split_or_becomes_one_file(joined, split, quantised, tmp_path):
    gene = adapter_for(quantised("Q8_0"), tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    merge(quantised("Q8_0"), [gene], tmp_path / "whole.gguf")
    name = "one.gguf" if joined else f"two-00001-of-{len(split):05d}.gguf"
    merge(split[0], [gene], folder / name)
    assert len(list(folder.iterdir())) == (1 if joined else len(split))
    whole, made = open_model(tmp_path / "whole.gguf"), open_model(folder / name)
    assert ("split.count" in made.metadata) is not joined
    assert set(made.tensors) == set(whole.tensors)
    for tensor in whole.tensors:
        assert bytes_of(whole, tensor) == bytes_of(made, tensor)


def test_a_name_for_another_number_of_files_is_refused(split, quantised, tmp_path):
    gene = adapter_for(quantised("Q8_0"), tmp_path)
    with pytest.raises(OutputError, match="asks for 9 files"):
        merge(split[0], [gene], tmp_path / "two-00001-of-00009.gguf")


# -- what must not happen -------------------------------------------------


def test_an_expression_of_another_gene_is_refused(quantised, tmp_path):
    gene = adapter_for(quantised(), tmp_path, family="tiny")
    with pytest.raises(MismatchError, match="of another gene"):
        merge(quantised(), [(gene, Expression({0: 1.0}, "00"))], tmp_path / "out.gguf")


def test_an_expression_for_another_model_is_said(quantised, tmp_path):
    gene = adapter_for(quantised(), tmp_path, family="tiny")
    report = merge(quantised(), [(gene, Expression({0: 1.0}, "", "00"))], tmp_path / "out.gguf")
    assert "found for another model" in report.warnings[0]


def test_an_expression_for_all_parts_of_a_split_model_is_its_own(split, quantised, tmp_path):
    gene = adapter_for(quantised("Q8_0"), tmp_path, family="tiny")
    own = Expression({0: 1.0}, "", model_hash(split[0]))
    report = merge(split[0], [(gene, own)], tmp_path / "one.gguf")
    assert not any("another model" in warning for warning in report.warnings)


def test_killed_it_leaves_no_output(quantised, tmp_path):
    """SIGKILL at random moments; the bench does it fifty times on a real model."""
    source = quantised()
    gene = adapter_for(source, tmp_path)
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    command = [sys.executable, "-m", "safegene_edge", "merge", source, gene, "-o"]
    started = time.monotonic()
    subprocess.run([*command, tmp_path / "whole.gguf"], check=True, capture_output=True)
    whole, needed = (tmp_path / "whole.gguf").read_bytes(), time.monotonic() - started
    choice = random.Random(1)
    for number in range(3):
        output = tmp_path / f"{number}.gguf"
        with subprocess.Popen([*command, output], stderr=subprocess.DEVNULL) as process:
            time.sleep(choice.uniform(0.3, 1.0) * needed)
            process.send_signal(signal.SIGKILL)
        assert not output.exists() or output.read_bytes() == whole
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before


def test_a_full_disk_gives_one_line_and_no_output(quantised, tmp_path):
    """A limit on the file's size fails as a full disk does: when the room is reserved."""
    source = quantised()
    gene = adapter_for(source, tmp_path)
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from safegene_edge.cli import main; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "merge", source, gene, "-o", tmp_path / "out.gguf"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1 and "cannot be written" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gene.gguf"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_small_tmpfs_gives_one_line_and_no_output(quantised, tmp_path):
    source = quantised()
    gene = adapter_for(source, tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(OutputError, match="are free"):
            merge(source, [gene], small / "out.gguf")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_plan_reads_no_weights_and_writes_nothing(quantised, tmp_path):
    gene = adapter_for(quantised(), tmp_path)
    plan = Plan.of(quantised(), [gene])
    report, estimate = plan.report([]), plan.estimate()
    assert {t.name for t in report.tensors} == set(SafetyGene.load(gene).pairs)
    assert estimate.seconds > 0 and estimate.memory > 50 << 20
    assert list(tmp_path.iterdir()) == [gene]


def test_the_report_weighs_each_tensor_by_its_update(quantised, tmp_path):
    """Of the squared norms; and it warns below four fifths, with what promoting would cost."""
    plan = Plan.of(quantised("Q4_0"), [adapter_for(quantised("Q4_0"), tmp_path)])

    def row(name, update, error, survived, after="Q4_0"):
        return TensorReport(name, (64, 256), after, after, 64 * 144, update, error, survived)

    kept = [row("a", 3.0, 1.0, 0.9), row("b", 4.0, 2.0, 0.75), row("c", 0.0, 0.0, 0.0, "F32")]
    report = plan.report(kept)
    assert report.survived == pytest.approx((9 * 0.9 + 16 * 0.75) / 25)
    assert report.rms_error == pytest.approx((5 / 25) ** 0.5)
    assert report.warnings == plan.warnings
    assert report.untouched == len(open_model(quantised("Q4_0")).tensors) - len(plan.updates)
    assert plan.promotion_bytes(kept) == [64 * 272 - 64 * 144]  # Q8_0: 34 bytes for 32 weights
    lost = plan.report([row("a", 3.0, 1.0, 0.9), row("b", 4.0, 2.0, 0.5)])
    (warning,) = lost.warnings[len(plan.warnings) :]
    assert warning == (
        "only 64 % of the update survives the model's quantisation: side-load the adapter, or "
        "give --promote 1 (8,192 bytes more)"
    )
    assert plan.report([row("a", 1.0, 0.2, 0.8)]).warnings == plan.warnings
    assert plan.report([row("a", 0.0, 0.0, 0.0)]).survived == 0.0
    planned = plan.report([])
    assert (planned.survived, planned.rms_error) == (0.0, 0.0)
    assert planned.before == sum(part.n_bytes for part in plan.parts)
    found = [_promoted(kind).name for kind in ("Q4_K", "Q8_0", "F16", "BF16", "IQ2_XXS")]
    assert found == ["Q8_0", "F16", "F32", "F32", "Q8_0"]


def test_an_estimate_grows_with_the_work(quantised, tmp_path, monkeypatch):
    plan = Plan.of(quantised(), [adapter_for(quantised(), tmp_path)])
    clock = iter([10.0, 12.0, 20.0, 22.0])
    monkeypatch.setattr(merge_plan.time, "perf_counter", lambda: next(clock))
    sampled = [job.place.info.n_elements for job in plan.jobs(
        {p.info.ggml_type: p for p in reversed(plan.draft(0, 1).places)
         if p.info.name in plan.updates}.values())]  # fmt: skip
    one, two = (
        replace(plan, settings=replace(plan.settings, threads=n)).estimate() for n in (1, 2)
    )
    every = sum(p.info.n_elements for p in plan.draft(0, 1).places if p.info.name in plan.updates)
    copied = sum(part.n_bytes for part in plan.parts) / merge_plan._COPIED
    assert one.seconds == pytest.approx(2.0 * every / sum(sampled) + copied)
    assert two.seconds == pytest.approx(1.0 * every / sum(sampled) + copied)
    assert two.memory - one.memory == merge_plan.WORKER_MEMORY


def test_a_full_disk_and_a_wrong_number_of_parts_are_told_before_the_work(
    quantised, tmp_path, monkeypatch
):
    plan = Plan.of(quantised(), [adapter_for(quantised(), tmp_path)])
    needed = plan.draft(0, 1).n_bytes
    usage = shutil.disk_usage(tmp_path)
    for free, fine in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(
            merge_plan.shutil, "disk_usage", lambda _, f=free: usage._replace(free=f)
        )
        if fine:
            assert plan.check_outputs(tmp_path / "out.gguf") == [tmp_path / "out.gguf"]
            one = tmp_path / "out-00001-of-00001.gguf"
            assert plan.check_outputs(one) == [one]
            continue
        with pytest.raises(OutputError, match=rf"needs {needed:,} bytes, {free:,} are free"):
            plan.check_outputs(tmp_path / "out.gguf")
    for name in ("out-00001-of-00002.gguf", "out-00002-of-00001.gguf"):
        with pytest.raises(OutputError, match=r"the name asks for \d files, the model has 1"):
            plan.check_outputs(tmp_path / name)


def test_every_block_of_rows_is_read_and_written_where_it_lies(quantised, tmp_path, monkeypatch):
    """A tensor is worked on in blocks of rows; a tiny one's fit into a single block otherwise."""
    source = quantised("Q4_0")
    plan = Plan.of(source, [adapter_for(source, tmp_path)])
    monkeypatch.setattr(workers, "_ROWS", 64)
    output = tmp_path / "out"
    for job in plan.jobs(p for p in plan.draft(0, 1).places if p.info.name in plan.updates):
        info = job.place.info
        output.write_bytes(bytes(job.place.offset + job.place.n_bytes))
        handle = os.open(output, os.O_RDWR)
        try:
            report = job.run(handle)
        finally:
            os.close(handle)
        new = np.frombuffer(output.read_bytes()[job.place.offset :], np.uint8)
        old = plan.parts[0].raw(info.name)
        assert report.changed == (new != old).sum() > 0
        kind = kernels.TensorType.of(info.ggml_type).number
        before, after = (kernels.dequantise(raw.reshape(info.shape[0], -1), kind, info.shape)
                         for raw in (old, new))  # fmt: skip
        wanted = job.update.b @ job.update.a
        for rows in range(0, info.shape[0], 64):
            some = slice(rows, rows + 64)
            kept = ((after - before)[some] * wanted[some]).sum() / (wanted[some] ** 2).sum()
            assert 0.6 < kept < 1.4, (info.name, rows)
    assert any(update.b.shape[0] > 64 for update in plan.updates.values())


def test_a_baked_model_is_the_merged_file_and_goes_with_its_model(quantised, tmp_path, monkeypatch):
    source, work = quantised(), tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    gene = adapter_for(source, tmp_path)
    settings = MergeSettings(run=False)
    merge_and_run(source, [(gene, 0.5)], tmp_path / "merged.gguf", settings=settings)
    expected = logits(tmp_path / "merged.gguf")
    with bake(source, [(gene, 0.5)], settings=settings, n_ctx=64, logits_all=True) as llama:
        assert not llama.adapters and open_model(llama.model_path).tensors
        tokens = llama.tokenize(b"The cat sat on the mat and")
        llama.eval(tokens)
        np.testing.assert_array_equal(np.array(llama.scores[: len(tokens)]), expected)
        assert len(list(work.iterdir())) == 1
    assert not list(work.iterdir())
    huge = adapter_for(source, tmp_path, size=1e-9)
    with pytest.raises(NoEffectError, match="nothing would change"):
        bake(source, [huge], settings=settings)
    with pytest.raises(SettingError, match="lora_path is not used"):
        bake(source, [adapter_for(source, tmp_path)], settings=settings, lora_path="x")
    assert not list(work.iterdir())


def test_the_command_line(quantised, tmp_path):
    gene = adapter_for(quantised(), tmp_path, family="tiny")
    expression = tmp_path / "expression.json"
    Expression({0: 0.5, 1: 2.0, 2: 0.0}).save(expression)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "safegene_edge", "merge", *map(str, arguments)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip

    output = tmp_path / "out.gguf"
    facts = json.loads(run(quantised(), f"{gene}={expression}", "-o", output, "--json").stdout)
    assert {t["name"].split(".")[1] for t in facts["tensors"]} == {"0", "1"}
    assert 0.5 < facts["survived"] < 1.5
    shown = run(quantised(), f"{gene}=0.5", "--dry-run")
    assert "copied as they are" in shown.stdout and "MiB of memory" in shown.stdout
    assert "warning" not in shown.stderr  # a scale was chosen
    planned = run(quantised(), gene, "--promote", "1", "--plain", "--dry-run", "--json")
    assert "was never fitted" in planned.stderr and "--promote 1 --plain -o" in planned.stderr
    larger = run(quantised(), gene, "--promote", "1", "--plain", "-o", output, "--json")
    assert [json.loads(done.stdout)["after"] for done in (planned, larger)] == [
        output.stat().st_size
    ] * 2
    shutil.copy(gene, tmp_path / "a=1.gguf")
    run(quantised(), tmp_path / "a=1.gguf", "-o", output)
