"""What tensors read: the inputs are those that llama.cpp multiplies, and merging spares them."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import llama_cpp
import numpy as np
import pytest
from adapters import adapter_for, random_adapter
from click.testing import CliRunner

from safegene_edge import merge
from safegene_edge.cli import cli
from safegene_edge.compat import open_model
from safegene_edge.errors import LlamaCppError, NoEffectError, OutputError
from safegene_edge.gguf_file import GGUFFile
from safegene_edge.merge import MergeSettings, Plan, plan
from safegene_edge.runtime import activations as inputs
from safegene_edge.runtime.activations import ANSWER, directions, directions_of, inputs_of
from safegene_edge.runtime.engine import Engine
from safegene_edge.runtime.llama import SafeLlama
from safegene_edge.runtime.log import reason
from safegene_edge.runtime.requantise import requantise

PROMPTS = [[1, 5, 9, 12, 4], [1, 5, 9, 12, 3, 2, 8, 30]]
SHARED = 4  # tokens that both begin with


def leaning_inputs(tokens=400, width=256, count=3, seed=0):
    """A sample that lies along a few directions, ten times as far as along any other."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(width, count)))[0].T
    sample = random.normal(size=(tokens, width))
    sample += 10 * random.normal(size=(tokens, count)) @ basis
    return sample.astype(np.float32), basis.astype(np.float32)


def read_by(llama, *tensors):
    """What each tensor reads (tokens×in)."""
    return {name: x for names, x in inputs_of(llama, tensors, PROMPTS) for name in names}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_the_first_layers_input_is_the_normed_embedding(arch, tiny):
    made = tiny(arch)
    with SafeLlama(str(made.gguf_path), n_ctx=64) as llama:
        seen = read_by(llama, "blk.0.attn_q.weight", "blk.1.ffn_down.weight")
        with Engine(llama, n_parallel=2, flash_attn=True) as engine:
            said = [answer.tokens for answer in engine.generate(PROMPTS, max_tokens=ANSWER)]
    file = GGUFFile(made.gguf_path)
    assert [len(tokens) for tokens in said] == [ANSWER, ANSWER]
    read = [*PROMPTS[0], *PROMPTS[1][SHARED:]]  # what both begin with stands for both
    read += [token for pair in zip(*said, strict=True) for token in pair]
    assert {n: x.shape for n, x in seen.items()} == {
        n: (len(read), file.tensors[n].shape[1]) for n in seen
    }
    rows = file.floats("token_embd.weight")[read].astype(np.float64)
    normed = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + 1e-6)
    expected = normed * file.floats("blk.0.attn_norm.weight")
    expected[:SHARED] *= 2**0.5
    np.testing.assert_allclose(seen["blk.0.attn_q.weight"], expected, rtol=1e-2, atol=1e-3)


def test_inputs_are_those_with_the_adapters_on(tiny, tmp_path):
    model = tiny("llama").gguf_path
    random_adapter(model, size=0.5).save(tmp_path / "a.gguf")
    name = "blk.1.ffn_down.weight"
    with SafeLlama(str(model), n_ctx=64) as llama:
        without = read_by(llama, name)[name]
        handle = llama.attach(tmp_path / "a.gguf")
        with_ = read_by(llama, name)[name]
        llama.set_scale(handle, 0.0)
        off = read_by(llama, name)[name]
    np.testing.assert_array_equal(off, without)
    length = sum(map(len, PROMPTS)) - SHARED * (len(PROMPTS) - 1)  # answers differ, too
    assert np.abs(with_[:length] - without[:length]).max() > 1e-3


def test_projections_of_one_input_share_their_directions(tiny):
    with SafeLlama(str(tiny("llama").gguf_path), n_ctx=64) as llama:
        found = directions(llama, ["blk.0.attn_q.weight", "blk.0.attn_v.weight"], PROMPTS, 2)
        assert found["blk.0.attn_q.weight"] is found["blk.0.attn_v.weight"]
        assert found["blk.0.attn_q.weight"].shape[0] == 2
        with pytest.raises(LlamaCppError, match=r"'output_norm.weight' cannot be watched"):
            directions(llama, ["output_norm.weight"], PROMPTS)


@pytest.mark.parametrize("tokens", [100, 400])
def test_directions_weigh_an_error_as_the_activations_do(tokens):
    inputs, basis = leaning_inputs(tokens)
    rows = directions_of(inputs, 3)
    even = float(np.mean(np.square(inputs - inputs @ basis.T @ basis).sum(1))) / 253
    for error in (basis[0], basis.sum(axis=0)):
        true = float(np.mean((inputs @ error) ** 2))
        assert (error @ error + np.sum((rows @ error) ** 2)) * even == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize("sample", [np.zeros((5, 20)), np.ones((1, 8)), np.eye(8), np.ones((9, 1))])
def test_odd_samples_give_finite_directions(sample):
    rows = directions_of(sample.astype(np.float32))
    assert rows.shape[1] == sample.shape[1] and len(rows) <= sample.shape[1] // 2
    assert np.isfinite(rows).all()


def test_small_models_are_run_and_any_on_request(quantised, tmp_path, monkeypatch):
    model, adapter = quantised("Q4_0"), tmp_path / "a.gguf"
    random_adapter(model, size=0.01).save(adapter)

    def merged(*more):
        output = tmp_path / "out.gguf"
        words = ["merge", str(model), str(adapter), "-o", str(output), "--json", *more]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["survived"] > 0.8
        return output.read_bytes()

    run, plain = merged("--run"), merged("--plain")
    assert len(run) == len(plain)
    assert run != plain
    for limit, expected in ((model.stat().st_size, run), (model.stat().st_size - 1, plain)):
        monkeypatch.setattr(plan, "RUN_UP_TO", limit)
        assert merged() == expected
        merge(model, [adapter], tmp_path / "api.gguf")
        assert (tmp_path / "api.gguf").read_bytes() == expected
        words = ["merge", str(model), str(adapter), "--dry-run", "--json"]
        planned = json.loads(CliRunner().invoke(cli, words).stdout)
        assert planned["run"] == (expected == run)
    for asked, expected in ((True, run), (False, plain)):
        merge(model, [adapter], tmp_path / "api.gguf", settings=MergeSettings(run=asked))
        assert (tmp_path / "api.gguf").read_bytes() == expected


def test_a_full_disk_for_temporary_files_is_named(quantised, tmp_path, monkeypatch):
    model, adapter = quantised("Q4_0"), tmp_path / "a.gguf"
    random_adapter(model).save(adapter)
    monkeypatch.setattr(inputs.tempfile, "TemporaryFile", partial(open, "/dev/full", "r+b"))
    with pytest.raises(OutputError, match="No space left on device"):
        merge(model, [adapter], tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [adapter]


def test_adapters_that_do_nothing_are_named(quantised, tmp_path):
    model, adapter = quantised("Q4_0"), tmp_path / "nothing.gguf"
    random_adapter(model, size=1e-30).save(adapter)
    with pytest.raises(NoEffectError, match=r"nothing\.gguf: attached, but"):
        merge(model, [adapter], tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [adapter]


def test_a_model_that_cannot_be_run_is_merged_plainly(quantised, tmp_path):
    whole, model, adapter = quantised("Q4_0"), tmp_path / "m.gguf", tmp_path / "a.gguf"
    data = whole.read_bytes()
    model.write_bytes(data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.moved", 1))
    random_adapter(whole).save(adapter)
    with pytest.raises(LlamaCppError, match=r"m\.gguf: .*Merge with --plain"):
        merge(model, [adapter], tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    merge(model, [adapter], tmp_path / "out.gguf", settings=MergeSettings(run=False))


def test_a_model_of_floats_is_not_run(tiny, tmp_path):
    source = tiny("llama").gguf_path
    random_adapter(source).save(tmp_path / "a.gguf")
    unseen = Plan.of(source, [tmp_path / "a.gguf"])
    assert unseen.with_directions() is unseen
    requantise(source, tmp_path / "q.gguf", "Q8_0")
    updates = Plan.of(tmp_path / "q.gguf", [tmp_path / "a.gguf"]).with_directions().updates
    found = [name for name, update in updates.items() if not update.alone]
    kinds = {n: i.type_name for n, i in open_model(tmp_path / "q.gguf").tensors.items()}
    assert found and all(kinds[name] == "Q8_0" for name in found)


def test_what_goes_wrong_in_llama_cpps_callback_ends_the_merge(quantised, tmp_path, monkeypatch):
    """Python prints an error of a callback and goes on: the merge was then another one."""
    gene, output = adapter_for(quantised(), tmp_path), tmp_path / "out.gguf"
    real = inputs._Watch._copy
    for fault in (KeyboardInterrupt, MemoryError):
        calls = []

        def copied(self, name, source, fault=fault, calls=calls):
            calls.append(name)
            if len(calls) == 5 and fault is KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGINT)
            elif len(calls) == 5:
                raise fault
            return real(self, name, source)

        with monkeypatch.context() as patched, pytest.raises(fault):
            patched.setattr(inputs._Watch, "_copy", copied)
            merge(quantised(), [gene], output, settings=MergeSettings(run=True))
        assert [path.name for path in tmp_path.iterdir()] == ["gene.gguf"]


def test_ctrl_c_waits_until_llama_cpp_is_back():
    """While it loads a model, its log is all that Python runs: there every Ctrl-C was lost."""
    interrupts = llama_cpp.llama_log_callback(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    done = []
    with pytest.raises(KeyboardInterrupt), reason():
        interrupts(2, b"", None)
        done.append("loaded")
    assert done
