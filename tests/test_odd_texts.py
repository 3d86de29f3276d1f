"""Files of text that look right and are not: other encodings, names twice, halves of characters.

And what a user gives twice, or names wrongly.
"""

from __future__ import annotations

import json
import os

import pytest
from adapters import adapter_for
from click.testing import CliRunner

from safegene_edge import SafeLlama, evaluate, export
from safegene_edge.cli import cli, main
from safegene_edge.errors import FileFormatError, OutputError, SafeGeneError, SettingError
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.costs import load_task
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.files import check_output, parse_json, require_file
from safegene_edge.gene import SafetyGene
from safegene_edge.merge import MergeSettings, merge
from safegene_edge.prompts import load_prompts
from safegene_edge.recalibrate import Examples
from safegene_edge.serve.errors import ApiError
from safegene_edge.serve.schema import ChatRequest, parse
from safegene_edge.serve.settings import ServeSettings

ROWS = [
    {"prompt": "Name a harm.", "kind": "harmful", "answer": "no"},
    {"prompt": "Name a tree.", "kind": "harmless", "answer": "oak"},
]
TWICE = r"given twice|the same adapter"
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
READERS = {"suite": load_suite, "examples": Examples.load, "prompts": load_prompts,
           "task": load_task}  # fmt: skip


def invoke(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert isinstance(result.exception, (SystemExit, SafeGeneError)), result.exception
    return f"{result.output} {result.exception}"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1"])
def test_another_encoding_is_refused_with_its_cause(reader, encoding, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(JSONL.replace("tree", "trée").replace("\\u00e9", "é").encode(encoding))
    with pytest.raises(FileFormatError, match=r"UTF-8"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("end", ["\r", "\r\n", "\n\r\n", "\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_systems_line_ends_and_the_mark_of_utf_8(reader, end, mark, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(mark + JSONL.replace("\n", end).encode())
    found = READERS[reader](path)
    count = {
        "suite": lambda: sum(len(suite.prompts) for suite in found),
        "examples": lambda: len(found.harmful) + len(found.harmless),
        "prompts": lambda: len(found),
        "task": lambda: len(found.items),
    }
    assert count[reader]() == len(ROWS)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "row",
    ['{"prompt": "a", "prompt": "b", "kind": "harmful", "answer": "x"}',
     r'{"prompt": "half \ud83d", "kind": "harmful", "answer": "x"}'],
    ids=["a name twice", "half a character"],
)  # fmt: skip
def test_rows_that_json_alone_would_take(reader, row, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(JSONL + row + "\n")
    with pytest.raises(FileFormatError, match=r"(line|row) 3"):
        READERS[reader](path)


def test_a_whole_character_by_escapes_is_one():
    assert parse_json(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}
    assert parse_json(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}
    assert parse_json('{"a": 1, "a": 2}', foreign=True) == {"a": 2}


@pytest.mark.parametrize("cell", ["na\0me", "\0"])
def test_a_nul_in_a_table(cell, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(f"kind,prompt\nharmful,{cell}\n")
    with pytest.raises(FileFormatError, match="row 2: holds a NUL character"):
        load_suite(path)


def test_variables_of_a_template_given_twice():
    with pytest.raises(SettingError, match="is no JSON object"):
        ServeSettings(chat_template_kwargs='{"a": 1, "a": 2}')


# -- given twice ---------------------------------------------------------------


@pytest.fixture
def model(tiny):
    return tiny("llama").gguf_path


@pytest.fixture
def adapter(model, tmp_path):
    return adapter_for(model, tmp_path)


@pytest.mark.parametrize("again", ["same", "copy", "link", "memory"])
def test_an_adapter_given_twice_does_not_count_twice(again, model, adapter, tmp_path):
    copy = tmp_path / "copy.gguf"
    if again == "copy":
        copy.write_bytes(adapter.read_bytes())
    elif again == "link":
        copy.symlink_to(adapter)
    other = {"same": adapter, "memory": SafetyGene.load(adapter)}.get(again, copy)
    with pytest.raises(SettingError, match=TWICE):
        SafeLlama(model, [adapter, (other, 0.5)])
    with pytest.raises(SettingError, match=TWICE):
        merge(model, [adapter, other], tmp_path / "o.gguf", settings=MergeSettings(run=False))
    with pytest.raises(SettingError, match=TWICE):
        export("llama-server", model, [adapter, other], tmp_path / "out")
    with SafeLlama(model) as llama:
        with pytest.raises(SettingError, match=TWICE):
            evaluate(llama, other, adapters=[adapter])
        assert llama.adapters == ()  # as it was
    assert not (tmp_path / "o.gguf").exists() and not (tmp_path / "out").exists()


def test_a_gene_that_is_also_the_adapter(model, adapter, tmp_path):
    given = (model, "--gene", adapter, "--adapter", adapter)
    assert "given twice" in invoke("chat", *given, "--no-history")
    assert "given twice" in invoke("serve", *given, "--port", "0")
    assert "given twice" in invoke("scan", model, "--adapter", adapter, "--adapter", adapter)


def test_two_attached_by_hand_are_two(model, adapter):
    """Whoever attaches twice in a program has a handle of each, with a scale of its own."""
    with SafeLlama(model) as llama:
        first, second = llama.attach(adapter), llama.attach(adapter, 0.5)
        assert llama.adapters == (first, second)


# -- names of files ------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "chat", "serve", "scan"])
def test_an_empty_name_is_no_folder(command):
    assert "name is empty" in invoke(command, "")


@pytest.mark.parametrize("name", ["", "-"])
def test_an_output_without_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="Name an output file"):
        check_output(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("goal", ["o.gguf", "nowhere.gguf"])
def test_a_link_that_leads_nowhere_is_not_replaced(goal, tmp_path):
    path = tmp_path / "o.gguf"
    path.symlink_to(tmp_path / goal)
    with pytest.raises(OutputError, match="a link that leads nowhere"):
        check_output(path)
    assert path.is_symlink()
    with pytest.raises(FileFormatError):
        require_file(path)


@pytest.mark.parametrize("text", ["m.gguf,", ",m.gguf", "m.gguf,,a.gguf"])
def test_a_comma_without_a_file(text, tmp_path):
    for options in (("--degraded", text), ("--degraded", "m.gguf", "--aligned", text)):
        said = invoke("learn", *options, "-o", tmp_path / "g.gguf")
        assert "names no file before or after a comma" in said


def test_a_folder_or_a_pipe_in_place_of_a_key(adapter, tmp_path):
    pytest.importorskip("minisign")
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder" in invoke("inspect", adapter, "--signed-by", tmp_path)
    assert "no regular file" in invoke("inspect", adapter, "--signed-by", tmp_path / "pipe")
    assert "neither a minisign public key" in invoke("inspect", adapter, "--signed-by", "x" * 5000)


def test_a_line_break_in_a_name_does_not_split_an_error(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a\nb.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr("sys.argv", ["safegene-edge", "scan", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_serve_says_what_is_wrong_before_it_says_that_it_loads(model, tmp_path):
    said = invoke("serve", model, "--gene", tmp_path / "none.gguf")
    assert "no such file" in said and "loading" not in said


# -- what does not fit into the context ------------------------------------------


def test_prompts_that_do_not_fit_are_counted_aloud(model, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(JSONL + json.dumps({"prompt": "long " * 400, "kind": "harmful"}) + "\n")
    settings = EvalSettings(max_tokens=4, n_parallel=1, n_ctx=256)
    report = evaluate(model, suites=[path], settings=settings)
    assert "1 prompt was not scored, because the context was too small." in report.table()


def test_where_nothing_fits_there_is_no_report(model, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(JSONL)
    said = invoke("eval", model, "--suite", path, "--max-tokens", "100000", "--no-resume")
    assert "no prompt fits into the context, with 100000 tokens of answer" in said


# -- fields without effect, of the wrong type --------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("user", {}), ("user", 5), ("metadata", 5), ("metadata", "x")],
)
def test_what_is_passed_over_has_its_type(field, value):
    body = {"messages": [{"role": "user", "content": "Hello"}], field: value}
    with pytest.raises(ApiError, match=f"{field}: should be"):
        parse(ChatRequest, json.dumps(body).encode())


@pytest.mark.parametrize(
    "fields",
    [{"user": "u1"}, {"metadata": {"a": "b"}}, {"store": False}, {"user": None, "metadata": None}],
)
def test_what_is_passed_over_as_clients_send_it(fields):
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    assert parse(ChatRequest, json.dumps(body).encode()).messages
