"""SafeLlama: calls from several threads, and from within each other."""

from __future__ import annotations

import llama_cpp
import pytest
from adapters import random_adapter
from child import in_child
from llamas import PROMPT, answer

from safegene_edge import SafeLlama
from safegene_edge.errors import (
    LlamaCppError,
    SafeGeneError,
    SettingError,
)

ENDLESS = {"stream": True, "logit_bias": {70: 100.0}, "temperature": 0.0}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda llama, handle: llama.detach(handle),
        lambda llama, handle: llama.set_scale(handle, 0.5),
        lambda llama, handle: llama.attach(handle.content),
        lambda llama, handle: answer(llama),
        lambda llama, handle: llama.eval([1, 2]),
        lambda llama, handle: llama.clear(),
    ],
    ids=["detach", "set_scale", "attach", "another text", "eval", "clear"],
)
def test_a_stream_that_was_spoilt_says_so(llama, model, spoil):
    handle = llama.attach(random_adapter(model))
    chunks = llama.create_completion("Hello", max_tokens=200, **ENDLESS)
    tokens = llama.generate([1, 2, 3], temp=0.0)
    next(tokens)
    with pytest.raises(LlamaCppError, match="cannot go on"):
        next(chunks) and next(chunks) and next(tokens)
    chunks = llama.create_completion("Hello", max_tokens=200, **ENDLESS)
    next(chunks)
    llama.text([70])  # disturbs nothing
    llama.save_state()
    next(chunks)
    spoil(llama, handle)
    with pytest.raises(LlamaCppError, match="cannot go on"):
        next(chunks)
    assert len(list(llama.create_completion("Hello", max_tokens=20, **ENDLESS))) > 20


def test_what_an_answer_calls_changes_nothing(llama, model):
    handle = llama.attach(random_adapter(model))
    refused = []

    def processor(_, scores):
        for error, wrong in (
            (SettingError, lambda: llama.attach(handle.content)),
            (SettingError, lambda: llama.detach(handle)),
            (SettingError, lambda: llama.set_scale(handle, 0.0)),
            (LlamaCppError, llama.close),
        ):
            with pytest.raises(error, match="calls") as caught:
                wrong()
            refused.append(caught)
        return scores

    expected = answer(llama)
    found = llama.create_completion(
        PROMPT,
        max_tokens=24,
        temperature=0.0,
        logits_processor=llama_cpp.LogitsProcessorList([processor]),
    )
    assert found["choices"][0]["text"] == expected and len(refused) >= 4


SHARE = """
import sys, threading
from safegene_edge import SafeLlama
from safegene_edge.errors import LlamaCppError

sys.setswitchinterval(1e-5)
llama = SafeLlama(model, n_ctx=512, n_threads=1)
said, ends = [[], []], []

def answer():
    return llama.create_completion("Hello there", max_tokens=40, temperature=0.0)

def chat(mine):
    try:
        while True:
            mine.append(answer()["choices"][0]["text"])
    except LlamaCppError as error:
        ends.append(str(error))

bare = answer()["choices"][0]["text"]
handle = llama.attach(gene, prove=False)
with_gene = answer()["choices"][0]["text"]
llama.detach(handle)
threads = [threading.Thread(target=chat, args=(mine,)) for mine in said]
for thread in threads:
    thread.start()
for number in range(40):
    handle = llama.attach(gene, 0.5, prove=number % 2 == 0)
    llama.set_scale(handle, 1.0)
    llama.detach(handle)
half = SafeLlama(model, [(gene, 0.5)], n_ctx=512, n_threads=1).create_completion(
    "Hello there", max_tokens=40, temperature=0.0)["choices"][0]["text"]
llama.close()
for thread in threads:
    thread.join(60)
print(json.dumps({"ends": ends, "known": [bare, with_gene, half],
                  "said": sorted({text for mine in said for text in mine}),
                  "alive": [thread.is_alive() for thread in threads]}))
"""


@pytest.fixture()
def gene(model, tmp_path):
    path = tmp_path / "gene.gguf"
    random_adapter(model).save(path)
    return path


def test_chats_and_changes_of_adapters_take_turns(model, gene):
    """Each answer is all of one state of the adapters, and closing ends the last ones."""
    found = in_child(SHARE, model=model, gene=gene)
    assert found["said"] and set(found["said"]) <= set(found["known"])
    assert found["ends"] == ["the model is closed. Load it again"] * 2
    assert found["alive"] == [False] * 2 and not found["stderr"]


STREAM = """
import threading
from safegene_edge import SafeLlama
from safegene_edge.errors import LlamaCppError

ends = []
for round in range(6):
    llama = SafeLlama(model, n_ctx=512, n_threads=1)
    begun = threading.Event()

    def read():
        try:
            for _ in llama.create_completion("Hello", max_tokens=500, stream=True,
                                             logit_bias={70: 100.0}, temperature=0.0):
                begun.set()
            ends.append("read to its end")
        except LlamaCppError as error:
            ends.append(str(error).partition(":")[0])

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    if round % 2:
        llama.attach(gene, prove=False)  # gets its turn in between two tokens
    llama.close()
    thread.join(60)
print(json.dumps({"ends": ends}))
"""


def test_a_stream_in_another_thread_ends_with_its_model(model, gene):
    found = in_child(STREAM, model=model, gene=gene)
    assert found["ends"][::2] == ["the model is closed. Load it again"] * 3
    assert set(found["ends"][1::2]) <= {
        "an answer cannot go on",
        "the model is closed. Load it again",
    }
    assert not found["stderr"]


def test_a_model_that_is_none(tmp_path):
    (tmp_path / "x.gguf").write_text("hello")
    with pytest.raises(SafeGeneError, match="not a GGUF"):
        SafeLlama(tmp_path / "x.gguf")
