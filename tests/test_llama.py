"""SafeLlama: adapters on a live model, proven, and never a trace of the one before."""

from __future__ import annotations

import ctypes
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
from adapters import random_adapter
from llamas import PROMPT, answer, logits

from safegene_edge import SafeLlama
from safegene_edge.errors import (
    FileFormatError,
    LlamaCppError,
    MismatchError,
    NoEffectError,
    SettingError,
    UnsupportedError,
)
from safegene_edge.gene import INVOCATION, Adapter, Pair, SafetyGene
from safegene_edge.gguf_file import GGUFFile


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


def test_an_adapter_that_moves_only_a_longer_text_is_attached(llama, model, monkeypatch):
    queries = random_adapter(model)
    pairs = {name: pair for name, pair in queries.pairs.items() if "attn_q" in name}
    # Behind a single token no query moves anything, so that all tokens of the text are read.
    monkeypatch.setattr("safegene_edge.runtime.llama._SHORT", 1)
    own, base = llama._probe(1), logits(llama)
    llama.attach(replace(queries, pairs=pairs))
    np.testing.assert_array_equal(llama._probe(1), own)
    assert not np.array_equal(logits(llama), base)


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


def test_a_path_or_an_adapter_stands_for_its_handle(llama, model, tmp_path, monkeypatch):
    """Whatever `attach` takes, `detach` and `set_scale` take, too."""
    path = tmp_path / "gene.gguf"
    random_adapter(model).save(path)
    base = logits(llama)
    handle = llama.attach(str(path))
    llama.set_scale(path, 0.0)
    assert handle.scale == 0.0
    np.testing.assert_array_equal(logits(llama), base)
    monkeypatch.chdir(tmp_path)
    llama.set_scale("gene.gguf", 1.0)
    assert not np.array_equal(logits(llama), base)
    llama.set_adapters_on(llama.ctx, {str(path): 0.0})
    np.testing.assert_array_equal(logits(llama), base)
    llama.detach("./gene.gguf")
    assert llama.adapters == ()
    inside = random_adapter(model, seed=2)
    llama.attach(inside)
    llama.set_scale(inside, 0.5)
    assert llama.adapters[0].scale == 0.5
    llama.detach(inside)
    np.testing.assert_array_equal(logits(llama), base)


def test_what_is_not_attached_or_ambiguous_is_named(llama, model, tmp_path):
    path, other = tmp_path / "gene.gguf", tmp_path / "other.gguf"
    random_adapter(model).save(path)
    first, second = llama.attach(path), llama.attach(path)
    for call in (llama.detach, lambda it: llama.set_scale(it, 0.5)):
        with pytest.raises(SettingError, match=r"gene\.gguf: is attached 2 times"):
            call(path)
        with pytest.raises(SettingError, match=r"other\.gguf: is not attached"):
            call(other)
        with pytest.raises(SettingError, match="in memory: is not attached"):
            call(random_adapter(model))
        for nothing in (None, 0, [path]):
            with pytest.raises(SettingError, match="is no adapter"):
                call(nothing)
    llama.detach(first)
    llama.detach(path)  # the one that is left
    assert second.pointer is None and llama.adapters == ()


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


def continued(llama, tokens):
    """Logits after tokens that follow what the context holds."""
    llama.eval(tokens)
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.array(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)))


def test_a_state_is_loaded_under_its_own_adapters_alone(llama, model):
    """It holds their keys and values: without them the text would go on as if they were on."""
    tokens = llama.tokenize(PROMPT.encode())
    gene = random_adapter(model)
    handle = llama.attach(gene)
    llama.eval(tokens[:-1])
    state = pickle.loads(pickle.dumps(llama.save_state()))  # as a cache on the disk keeps it
    expected = continued(llama, tokens[-1:])
    llama.set_scale(handle, 0.5)
    with pytest.raises(SettingError, match="other adapters"):
        llama.load_state(state)
    llama.set_scale(handle, 0.0)
    base = logits(llama)
    with pytest.raises(SettingError, match="other adapters"):
        llama.load_state(state)
    np.testing.assert_array_equal(logits(llama), base)
    llama.detach(handle)
    with pytest.raises(SettingError, match="other adapters"):
        llama.load_state(state)
    llama.attach(gene)  # another handle, the same weights
    llama.load_state(state)
    np.testing.assert_array_equal(continued(llama, tokens[-1:]), expected)
    with SafeLlama(model, [gene], n_ctx=256) as other:
        other.load_state(state)
        np.testing.assert_array_equal(continued(other, tokens[-1:]), expected)


def test_a_state_without_adapters_is_not_loaded_under_one(llama, model):
    tokens = llama.tokenize(PROMPT.encode())
    llama.eval(tokens)
    state = llama.save_state()
    llama.load_state(state)
    handle = llama.attach(random_adapter(model), scale=0.0)  # off, it is the model without it
    llama.load_state(state)
    llama.set_scale(handle, 1.0)
    with pytest.raises(SettingError, match="other adapters"):
        llama.load_state(state)
    plain = llama_cpp.Llama(str(model), n_ctx=256, verbose=False)
    plain.eval(tokens)
    with pytest.raises(SettingError, match="other adapters"):
        llama.load_state(plain.save_state())
    plain.close()


def test_a_cache_that_outlives_a_change_of_adapters_is_a_miss(llama, model):
    """A cache in a folder may be older than this process, and a user may set an old one again."""
    cache = llama_cpp.LlamaRAMCache()
    llama.set_cache(cache)
    answer(llama)
    llama.set_cache(None)
    llama.attach(random_adapter(model))
    expected = answer(llama)
    llama.clear()
    llama.set_cache(cache)
    assert answer(llama) == expected


def test_a_state_of_another_model_is_refused(llama, tiny):
    with SafeLlama(tiny("qwen2").gguf_path, n_ctx=256) as other:
        other.eval(other.tokenize(PROMPT.encode()))
        state = other.save_state()
    with pytest.raises(LlamaCppError, match="does not fit"):
        llama.load_state(state)
    assert llama.n_tokens == 0 and np.isfinite(logits(llama)).all()


def test_pickling_keeps_the_adapters(llama, model):
    llama.attach(random_adapter(model), 0.7)
    again = pickle.loads(pickle.dumps(llama))
    assert [handle.scale for handle in again.adapters] == [0.7]
    assert again.chat_handler is llama.chat_handler
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


# -- what llama.cpp refuses -----------------------------------------------


def test_an_alora_is_not_attached_always_on(llama, model, tmp_path):
    before = logits(llama)
    adapter = alora(model)
    adapter.save(tmp_path / "alora.gguf")
    for given in (adapter, tmp_path / "alora.gguf"):
        with pytest.raises(UnsupportedError, match=r"aLoRA.*\[5, 9\].*always on"):
            llama.attach(given, 0.5)
    assert llama.adapters == ()
    assert np.array_equal(logits(llama), before)


def test_llama_cpp_still_takes_an_alora_that_was_saved_again(llama, model, tmp_path):
    """It reads its tokens from an array of uint32, and refuses one of int32."""
    alora(model).save(tmp_path / "a.gguf")
    Adapter.load(tmp_path / "a.gguf").save(tmp_path / "b.gguf")
    assert GGUFFile(tmp_path / "b.gguf").types == GGUFFile(tmp_path / "a.gguf").types
    assert GGUFFile(tmp_path / "b.gguf").types[INVOCATION] == 4  # uint32
    pointer = llama_cpp.llama_adapter_lora_init(llama.model, bytes(tmp_path / "b.gguf"))
    assert pointer
    assert llama_cpp.llama_adapter_get_alora_n_invocation_tokens(pointer) == 2
    llama_cpp.llama_adapter_lora_free(pointer)


def alora(model):
    return replace(random_adapter(model), extra={INVOCATION: [5, 9]}, types={INVOCATION: 4})


def test_a_refused_adapter_comes_with_llama_cpps_reason(llama, model, tmp_path, monkeypatch):
    """Of a file that llama.cpp does not take, and our reader, patched, does."""
    path = tmp_path / "gap.gguf"
    random_adapter(model).save(path)
    data, file = bytearray(path.read_bytes()), GGUFFile(path)
    last = list(file.tensors.values())[-1]
    start = min(info.offset for info in file.tensors.values())
    at = data.rindex((last.offset - start).to_bytes(8, "little"), 0, start)
    data[at : at + 8] = (last.offset - start + 32).to_bytes(8, "little")
    path.write_bytes(bytes(data) + bytes(64))
    with pytest.raises(FileFormatError, match=f"'{last.name}' is at"):
        llama.attach(path)
    monkeypatch.setattr(SafetyGene, "load", lambda _: random_adapter(model))
    with pytest.raises(MismatchError, match=rf"'{last.name}' has offset") as raised:
        llama.attach(path)
    assert "verbose" not in str(raised.value)
    assert llama.attach(random_adapter(model))


def test_a_refused_model_comes_with_llama_cpps_reason(model, tmp_path, capfd):
    path = tmp_path / "model.gguf"
    path.write_bytes(model.read_bytes().replace(b"rms_epsilon", b"rms_epsilom"))
    with pytest.raises(LlamaCppError, match=r"key not found.*layer_norm_rms_epsilon"):
        SafeLlama(path)
    assert capfd.readouterr().err == ""


def test_reasons_reach_the_log_that_was_there_before(model, tmp_path):
    from safegene_edge.runtime.log import reason

    seen = []

    @llama_cpp.llama_log_callback
    def mine(level, text, _):
        seen.append((level, text))

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(mine, ctypes.c_void_p())
    try:
        with reason() as why:
            params = llama_cpp.llama_model_default_params()
            assert not llama_cpp.llama_model_load_from_file(b"/nowhere.gguf", params)
    finally:
        llama_cpp.llama_log_set(before, data)
    assert "nowhere.gguf" in str(why)
    assert "\n" not in str(why)
    assert any(level == 4 and b"nowhere.gguf" in text for level, text in seen)
