"""SafeLlama: adapters on a live model, proven, and never a trace of the one before."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
from adapters import random_adapter

from safegene_edge import SafeLlama
from safegene_edge.errors import MismatchError, NoEffectError, SafeGeneError, SettingError
from safegene_edge.gene import Adapter, Pair

PROMPT = "What is it that the weather is like in an old town by the sea?"


def logits(llama, text=PROMPT):
    llama.clear()
    tokens = llama.tokenize(text.encode())
    llama.eval(tokens)
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.array(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)))


def answer(llama, prompt=PROMPT):
    return llama.create_completion(prompt, max_tokens=24, temperature=0.0)["choices"][0]["text"]


@pytest.fixture()
def model(tiny):
    return tiny("llama").gguf_path


@pytest.fixture()
def llama(model):
    with_model = SafeLlama(model, n_ctx=256)
    yield with_model
    with_model.close()


def test_it_is_a_llama_that_stays_mapped(llama, model):
    assert isinstance(llama, llama_cpp.Llama)
    llama.attach(random_adapter(model))
    assert llama.model_params.load_mode == llama_cpp.LLAMA_LOAD_MODE_MMAP
    assert llama.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=2)


def test_scale_zero_and_detaching_give_the_base_model_bit_for_bit(llama, model):
    base = logits(llama)
    handle = llama.attach(random_adapter(model))
    moved = logits(llama)
    assert np.abs(moved - base).max() > 0.1
    llama.set_scale(handle, 0.0)
    np.testing.assert_array_equal(logits(llama), base)
    llama.set_scale(handle, 1.0)
    np.testing.assert_array_equal(logits(llama), moved)
    llama.detach(handle)
    np.testing.assert_array_equal(logits(llama), base)
    assert llama.adapters == ()


def test_attaching_at_scale_zero_changes_nothing_yet(llama, model):
    base = logits(llama)
    handle = llama.attach(random_adapter(model), scale=0.0)
    np.testing.assert_array_equal(logits(llama), base)
    llama.set_scale(handle, 1.0)
    assert not np.array_equal(logits(llama), base)


def test_two_adapters_add_up(llama, model):
    """Two adapters at their scales are one adapter of both ranks, B scaled."""
    first, second = (random_adapter(model, alpha=4.0, seed=seed) for seed in (1, 2))
    llama.attach(first, 0.5)
    llama.attach(second, 1.5)
    both = logits(llama)
    joined = Adapter(
        "llama",
        8.0,  # rank 8: the factor alpha / r stays 1
        {
            name: Pair(
                np.vstack([pair.a, second.pairs[name].a]),
                np.hstack([0.5 * pair.b, 1.5 * second.pairs[name].b]),
            )
            for name, pair in first.pairs.items()
        },
    )
    for handle in llama.adapters:
        llama.detach(handle)
    llama.attach(joined)
    np.testing.assert_allclose(logits(llama), both, atol=2e-3)


def test_an_adapter_that_does_nothing_is_refused(llama, model):
    base = logits(llama)
    gene = random_adapter(model, size=0.0)
    with pytest.raises(NoEffectError, match="logits did not move"):
        llama.attach(gene)
    assert llama.adapters == ()
    np.testing.assert_array_equal(logits(llama), base)


def test_an_adapter_that_explodes_is_refused(llama, model):
    with pytest.raises(NoEffectError, match="NaN or infinite"):
        llama.attach(random_adapter(model, size=1e30))
    assert llama.adapters == ()
    assert np.isfinite(logits(llama)).all()


def test_bad_calls_are_refused(llama, model, tiny):
    handle = llama.attach(random_adapter(model))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(SettingError, match="finite"):
            llama.set_scale(handle, scale)
    llama.detach(handle)
    with pytest.raises(SettingError, match="not attached"):
        llama.detach(handle)
    with pytest.raises(MismatchError, match="'phi3'"):
        llama.attach(random_adapter(tiny("phi3").gguf_path))
    with pytest.raises(SettingError, match="lora_path"):
        SafeLlama(model, lora_path="x.gguf")


def test_without_clearing_the_cache_leaks(llama, model, tmp_path):
    """Shows the fault that the next tests guard against, so that they can fail."""
    random_adapter(model).save(tmp_path / "gene.gguf")
    handle = llama.attach(tmp_path / "gene.gguf", scale=0.0)
    answer(llama)
    llama.set_adapters_on(llama.ctx, {handle: 1.0})  # as llama.cpp does it: nothing is cleared
    leaked = answer(llama)
    llama.clear()
    assert leaked != answer(llama)


FRESH = """
import json, sys
from safegene_edge import SafeLlama
model, gene, scale, prompt = json.loads(sys.argv[1])
llama = SafeLlama(model, [(gene, scale)], n_ctx=256)
out = llama.create_completion(prompt, max_tokens=24, temperature=0.0)
print(json.dumps(out["choices"][0]["text"]))
"""


def fresh_process(model, gene, scale, prompt):
    argument = json.dumps([str(model), str(gene), scale, prompt])
    run = subprocess.run(
        [sys.executable, "-c", FRESH, argument], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_switching_midway_gives_what_a_fresh_process_gives(llama, model, tmp_path):
    path = tmp_path / "gene.gguf"
    random_adapter(model).save(path)
    without = answer(llama)
    handle = llama.attach(path)
    with_gene = answer(llama)
    longer = PROMPT + with_gene + " And then?"
    continued = answer(llama, longer)
    llama.set_scale(handle, 0.0)
    continued_without = answer(llama, longer)
    assert with_gene != without and continued != continued_without
    assert with_gene == fresh_process(model, path, 1.0, PROMPT)
    assert continued == fresh_process(model, path, 1.0, longer)
    assert continued_without == fresh_process(model, path, 0.0, longer)


def test_a_cache_of_states_is_emptied_too(llama, model):
    handle = llama.attach(random_adapter(model))
    expected = answer(llama)
    llama.set_cache(llama_cpp.LlamaRAMCache())
    llama.set_scale(handle, 0.0)
    answer(llama)  # leaves a state of the bare model in the cache
    llama.set_scale(handle, 1.0)
    assert answer(llama) == expected


def test_pickling_keeps_the_adapters(llama, model):
    llama.attach(random_adapter(model), 0.7)
    again = pickle.loads(pickle.dumps(llama))
    assert [handle.scale for handle in again.adapters] == [0.7]
    np.testing.assert_array_equal(logits(again), logits(llama))
    again.close()


def test_adapters_given_at_the_start(llama, model, tmp_path):
    path = tmp_path / "gene.gguf"
    random_adapter(model).save(path)
    llama.attach(path, 0.5)
    with SafeLlama(model, [(path, 0.5)], n_ctx=256) as other:
        np.testing.assert_array_equal(logits(other), logits(llama))


def test_rendering_follows_the_ggufs_template(llama):
    tokens = llama.render([{"role": "user", "content": "Hi"}])
    shown = llama.detokenize(tokens, special=True).decode()
    assert shown == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_model_that_is_none(tmp_path):
    (tmp_path / "x.gguf").write_text("hello")
    with pytest.raises(SafeGeneError, match="not a GGUF"):
        SafeLlama(tmp_path / "x.gguf")
