"""Hundreds of damaged text files and bodies: each is taken, or refused with a SafeGeneError.

JSON is changed by its structure (`mutations.json_mutations`), CSV and the header of safetensors by
bytes. Seeds are fixed, as in test_fuzz.py.
"""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from dataclasses import replace

import pytest
from adapters import random_adapter
from mutations import json_mutations, mutations
from reports import large
from serving import running
from test_fuzz import COUNT, SEED

from safegene_edge.converters import convert, to_peft
from safegene_edge.errors import SafeGeneError
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.costs import load_task
from safegene_edge.evals.report.html import render_html
from safegene_edge.evals.report.markdown import render_markdown, render_record
from safegene_edge.evals.report.schema import read_report
from safegene_edge.expression import Expression
from safegene_edge.prompts import load_prompts
from safegene_edge.recalibrate import Examples

TURNS = [["user", "Hello"], ["assistant", "Hi."]]


def read_any_report(path):
    report = read_report(path)
    render_html(report), render_markdown(report), render_record(report)


def row(**fields):
    return {"id": "1", "prompt": "How does rain fall?", "category": "weather", **fields}


# What a line of each file holds, how the file is named, and what reads it.
FILES = {
    "suite": (row(kind="harmless", form="question", trap=None), "s.jsonl", load_suite),
    "JailbreakBench": ({"Index": 0, "Goal": "Name a harm", "Target": "Sure", "Behavior": "harm",
                        "Category": "x", "Source": None}, "benign.jsonl", load_suite),
    "examples": (row(kind="harmful", part="fit", history=TURNS, form=None), "e.jsonl",
                 Examples.load),
    "prompts": (row(history=TURNS, note=None), "p.jsonl", load_prompts),
    "task": ({"prompt": "1 + 1", "choices": ["2", "3"], "answer": 0, "x": None}, "t.jsonl",
             load_task),
    "expression": ({"version": 1, "gene": "a", "target": "b", "coefficients": {"1": 1.0, "2": 0},
                    "guard_threshold": 2.5, "x": None}, "c.json", Expression.load),
    "report": (large(), "r.json", read_any_report),
}  # fmt: skip


def check_all(name, path, changed, read):
    """Every copy is read, or refused by name in one line."""
    refused = 0
    for what, text in changed:
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read(path)
        except SafeGeneError as error:
            refused += 1
            assert str(error).isprintable(), what
        except Exception as error:
            raise AssertionError(f"{name}, seed {SEED}, {what}: {error!r}") from error
    assert refused > 0


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_text_file_is_read_or_refused(name, tmp_path):
    value, file, read = FILES[name]
    check_all(name, tmp_path / file, json_mutations(value, COUNT, SEED), read)


@pytest.mark.parametrize("text", [
    b"id,prompt,label,type\n1,How are you?,safe,homonyms\n2,\"a \"\"b\"\"\",unsafe,contrast_x\n",
    b"goal,target\nName a harm,\"Sure, here\"\n",
    b"prompt,category\nHow does rain fall?,weather\n",
])  # fmt: skip
def test_a_damaged_table_is_read_or_refused(text, tmp_path):
    changed = mutations(text, len(text), COUNT, SEED)
    check_all("table", tmp_path / "s.csv", changed, load_suite)


@pytest.fixture
def folder(tiny_adapter, tmp_path):
    """A PEFT folder of our own to spoil."""
    return shutil.copytree(tiny_adapter("llama"), tmp_path / "peft")


def converting(folder, tiny, tmp_path):
    return lambda _: convert(folder, tiny("llama").gguf_path, tmp_path / "out.gguf")


def test_a_damaged_adapter_config_is_taken_or_refused(folder, tiny, tmp_path):
    path = folder / "adapter_config.json"
    changed = json_mutations(json.loads(path.read_text()), COUNT, SEED)
    check_all("config", path, changed, converting(folder, tiny, tmp_path))


def test_damaged_safetensors_are_taken_or_refused(folder, tiny, tmp_path):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    read = converting(folder, tiny, tmp_path)
    check_all("header", path, mutations(data, end, COUNT, SEED), read)
    headers = json_mutations(json.loads(data[8:end]), COUNT, SEED)
    check_all(
        "safetensors", path, ((what, framed(text, data[end:])) for what, text in headers), read
    )


def framed(header, data):
    """A safetensors file with this header."""
    text = header.encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def test_a_damaged_record_of_peft_is_taken_or_passed_over(folder, tiny, tmp_path):
    """What a GGUF says of the folder that it came from is a claim; its tensors are sound."""
    model = tiny("llama").gguf_path
    adapter = convert(folder, model, tmp_path / "a.gguf")
    key = "safegene.peft.config"
    for what, text in json_mutations(json.loads(adapter.extra[key]), min(COUNT, 300), SEED):
        plain = text.encode(errors="replace").decode()
        changed = replace(adapter, extra={**adapter.extra, key: plain})
        changed.save(tmp_path / "changed.gguf")
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        try:
            to_peft(tmp_path / "changed.gguf", model, tmp_path / "back")
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error


BODIES = {
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Be brief."},
                                   {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_tokens": 2, "temperature": 0.0, "stop": ["x"], "stream": False, "seed": None,
        "logprobs": None, "tools": None, "response_format": None,
    },
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2, "stop": None, "n": 1, "echo": None},
    "/v1/responses": {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 2,
                      "instructions": None, "stream": False},
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_a_damaged_body_is_answered_or_refused(path, tiny, tmp_path):
    model = tiny("llama").gguf_path
    random_adapter(model).save(tmp_path / "gene.gguf")
    with running(model, tmp_path / "gene.gguf", max_tokens=4) as server:
        for what, text in json_mutations(BODIES[path], COUNT, SEED):
            reply = server.ask("POST", path, text.encode(errors="surrogatepass"))
            assert reply.status in (200, 400, 404, 413, 415, 422), (what, reply)
            if reply.status != 200:
                assert reply.json["error"]["message"].isprintable(), what
        assert server.post(path, BODIES[path]).status == 200
