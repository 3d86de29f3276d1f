"""Inputs that no mutation makes: pipes, odd addresses, tables and names of outputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from adapters import adapter_for, with_template
from click.testing import CliRunner

from safegene_edge import Engine, SafeLlama, convert, export
from safegene_edge.cli import cli
from safegene_edge.errors import FileFormatError, OutputError, SafeGeneError, SettingError
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.settings import EndpointModel
from safegene_edge.files import check_output, require_file
from safegene_edge.gene import SafetyGene
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.merge import MergeSettings, merge
from safegene_edge.serve.settings import ServeSettings


def run(*arguments):
    """The command line; a mistake is one of ours, which `main` prints as one line."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert isinstance(result.exception, (SystemExit, SafeGeneError)), result.exception
    return result


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompt": "Name a harm."}) + "\n")
    return path


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://127.0.0.1:99999", "http://h ost", "http://host:port", "http://h\tost",
     "http://", "host:80", "ftp://host", ""],
)  # fmt: skip
def test_an_address_that_is_none(url, suite):
    with pytest.raises(SettingError, match="is no address of a server"):
        EndpointModel(url, "m")
    if url:
        options = ("--endpoint", url, "--model-name", "m", "--suite", suite, "--no-resume")
        assert run("eval", *options).exit_code != 0


@pytest.mark.parametrize("url", ["http://[::1]:80", "https://host/v1", "http://127.0.0.1:8080"])
def test_an_address_that_is_one(url):
    assert EndpointModel(url, "m").url == url


@pytest.mark.parametrize("option", ["--json", "--html", "--markdown", "--plot", "--resume"])
def test_a_suite_is_not_written_over(option, suite, tiny):
    before = suite.read_bytes()
    result = run("eval", tiny("llama").gguf_path, "--suite", suite, option, suite)
    assert result.exit_code != 0
    assert suite.read_bytes() == before


def test_two_reports_are_not_one_file(suite, tiny, tmp_path):
    model = tiny("llama").gguf_path
    other = f"{tmp_path}/./q.out"
    result = run("eval", model, "--suite", suite, "--json", tmp_path / "q.out", "--html", other)
    assert result.exit_code == 2 and "two outputs are the same file" in result.output
    assert not (tmp_path / "q.out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path):
    pipe = tmp_path / "p.jsonl"
    os.mkfifo(pipe)
    for read in (require_file, load_suite, lambda path: Journal(path).__enter__()):
        with pytest.raises(FileFormatError, match="is no regular file"):
            read(pipe)


@pytest.mark.parametrize("cells", ["quickly, at home", "a, b, c"])
def test_cells_beyond_the_columns_are_not_dropped(cells, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(f"kind,prompt\nharmful,name a harm, {cells}\n")
    with pytest.raises(FileFormatError, match=r"row 2: has more cells than columns"):
        load_suite(path)
    path.write_text("prompt,category\nname a harm,x,\n")  # a comma at the end loses nothing
    assert load_suite(path)[0].prompts[0].text == "name a harm"


@pytest.mark.parametrize("name", ["o.gguf/", "x/"])
def test_an_output_that_ends_like_a_folder(name, tmp_path):
    with pytest.raises(OutputError, match="names a folder"):
        check_output(f"{tmp_path}/{name}")


@pytest.mark.parametrize("n_ctx", [99_999_999_999, 1 << 40])
def test_a_context_beyond_all_memory_is_refused_at_once(n_ctx, tiny):
    model = tiny("llama").gguf_path
    with pytest.raises(SettingError, match=r"a context of [\d,]+ tokens takes"):
        SafeLlama(model, n_ctx=n_ctx)
    with SafeLlama(model, n_ctx=64) as llama, pytest.raises(SettingError, match="a context of"):
        Engine(llama, n_ctx=n_ctx)


def test_a_scale_that_overflows_a_merge(quantised, tmp_path):
    source = quantised()
    with warnings.catch_warnings(), pytest.raises(SafeGeneError):
        warnings.simplefilter("error")
        settings = MergeSettings(run=False)
        merge(source, [(adapter_for(source, tmp_path), 1e38)], tmp_path / "o", settings=settings)
    assert not (tmp_path / "o").exists()


def test_an_importance_matrix_without_a_merge(tiny, tmp_path):
    model = tiny("llama").gguf_path
    gene, settings = adapter_for(model, tmp_path), MergeSettings(imatrix=tmp_path / "none.dat")
    with pytest.raises(SettingError, match="are for a merged model"):
        export("llama-server", model, [gene], tmp_path / "out", settings=settings)


@pytest.mark.parametrize(
    ("option", "needed"),
    [(("--timeout", "5"), "--endpoint"), (("--concurrency", "5"), "--endpoint"),
     (("--api-key-env", "FOO"), "--endpoint"), (("--attack-limit", "4"), "--attack"),
     (("--guard",), "--attack"), (("--by", "estimate"), "a threshold")],
)  # fmt: skip
def test_an_option_that_nothing_would_look_at(option, needed, suite, tiny):
    result = run("eval", tiny("llama").gguf_path, "--suite", suite, *option)
    assert result.exit_code == 2
    assert f"{option[0]} goes with {needed}" in result.output


def test_a_merge_into_a_folders_name(quantised, tmp_path):
    gene = adapter_for(quantised(), tmp_path)
    with pytest.raises(OutputError, match="names a folder"):
        merge(quantised(), [gene], f"{tmp_path}/o.gguf/", settings=MergeSettings(run=False))


# -- headers that llama.cpp asserts on, and models that are no numbers ---------------


def with_fact(model, output, key, value):
    """A copy of a model with another value in its header."""
    file = GGUFFile(model)
    facts = {k: v.values() if isinstance(v, ArrayValue) else v for k, v in file.metadata.items()
             if k != "general.architecture"}  # fmt: skip
    facts[key.replace("ARCH", file.architecture)] = value
    arrays = [(name, file.floats(name)) for name in file.tensors]
    write_gguf(output, file.architecture, facts, arrays)
    return output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ARCH.block_count", 0), ("ARCH.block_count", 99), ("ARCH.block_count", 2**32 - 1),
        ("ARCH.context_length", 2**32 - 1), ("ARCH.embedding_length", 2**32 - 1),
        ("ARCH.attention.head_count_kv", 2**32 - 1), ("ARCH.rope.scaling.type", "bogus"),
        ("ARCH.attention.layer_norm_rms_epsilon", -1.0),
        ("ARCH.attention.layer_norm_rms_epsilon", float("nan")),
        ("ARCH.rope.freq_base", float("inf")), ("tokenizer.ggml.model", "no_vocab"),
        ("tokenizer.chat_template", 5),
    ],
)  # fmt: skip
def test_a_header_on_which_llama_cpp_ends_the_process(key, value, tiny, tmp_path):
    model = with_fact(tiny("llama").gguf_path, tmp_path / "m.gguf", key, value)
    named = key.replace("ARCH", "llama")
    for command in ("eval", "scan", "chat"):
        program = [sys.executable, "-m", "safegene_edge", command, str(model)]
        done = subprocess.run(program, capture_output=True, text=True, check=False, input="Hi\n")
        assert done.returncode == 2, done
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
        assert line.startswith("error: ") and named in line, line
        if command == "eval" and key != "ARCH.block_count":
            break  # the others open it the same way


def test_a_model_of_nans_is_named_as_one(tiny, tmp_path):
    source, model = tiny("llama").gguf_path, tmp_path / "m.gguf"
    file = GGUFFile(source)
    facts = {k: v.values() if isinstance(v, ArrayValue) else v for k, v in file.metadata.items()
             if k != "general.architecture"}  # fmt: skip
    arrays = [(n, np.full_like(file.floats(n), np.nan)) for n in file.tensors]
    write_gguf(model, file.architecture, facts, arrays)
    for command in (("scan", model), ("eval", model, "--no-resume", "--max-tokens", 2)):
        result = run(*command)
        assert "logits are NaN" in f"{result.output} {result.exception}"
        assert result.exit_code != 0
    with SafeLlama(model) as llama, pytest.raises(FileFormatError, match="model's own logits"):
        llama.attach(adapter_for(source, tmp_path))


@pytest.mark.parametrize("command", ["eval", "scan", "chat", "serve", "recalibrate"])
def test_a_template_that_leaves_the_words_out(command, tiny, tmp_path):
    source = tiny("llama").gguf_path
    model = with_template(source, tmp_path / "m.gguf", "hello")
    more = (adapter_for(source, tmp_path), "--json") if command == "recalibrate" else ()
    result = run(command, model, *more)
    assert "leaves the user's words out" in f"{result.output} {result.exception}"


# -- Python ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [({"n_cxt": 64}, "Did you mean n_ctx"), ({"frob": 1}, "no argument 'frob'"),
     ({"n_batch": -1}, "n_batch is -1"), ({"n_ctx": -1}, "n_ctx is -1"),
     ({"n_threads": -5}, "n_threads is -5"), ({"type_k": 999}, "type_k is 999"),
     ({"vocab_only": True}, "vocab_only"), ({"adapters": "g.gguf"}, "no list"),
     ({"adapters": {"g.gguf": 0.5}}, "no list"), ({"lora_path": "g.gguf"}, "Give adapters=")],
)  # fmt: skip
def test_arguments_that_would_be_swallowed_or_end_the_process(options, said, tiny):
    with pytest.raises(SettingError) as caught:
        SafeLlama(tiny("llama").gguf_path, **options)
    assert said in str(caught.value)


def test_what_an_engine_is_given_is_looked_at(tiny, tmp_path):
    model = tiny("llama").gguf_path
    with SafeLlama(model) as llama, Engine(llama, n_ctx=256) as engine:
        handle = llama.attach(adapter_for(model, tmp_path))
        expected = engine.generate([[5, 6], [7, 8]], max_tokens=3)
        assert engine.generate(([5, 6] if n else [7, 8] for n in (1, 0)), max_tokens=3) == expected
        for tokens in ([-1], [10**9]):
            with pytest.raises(SettingError, match="is no token"):
                engine.generate([tokens], max_tokens=3)
        with pytest.raises(SettingError, match=r"max_tokens is 2\.5"):
            engine.generate([[5]], max_tokens=2.5)
        with pytest.raises(SettingError, match="not a finite number"):
            engine.generate([[5]], max_tokens=3, adapters={handle: float("nan")})
        with pytest.raises(SettingError, match="n_ctx is -1"):
            Engine(llama, n_ctx=-1)


# -- the command line -------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [("merge", "m", "g", "-o", "o", "--imatrix", ""), ("eval", "m", "--json", ""),
     ("inspect", "m", "--plot", ""), ("chat", "m", "--gene", ""), ("eval", "m", "--gene", "")],
)  # fmt: skip
def test_a_variable_that_is_not_set_is_no_option_left_out(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and "a file's name is empty" in result.output


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-inf"])
def test_numbers_that_are_none(value):
    for arguments in (("chat", "m", "--temperature", value), ("eval", "m", "--max-kl", value)):
        result = run(*arguments)
        assert result.exit_code == 2 and "Error: Invalid value" in result.output


def test_outputs_of_learn_and_restore_are_neither_inputs_nor_each_other(tiny, tmp_path):
    model, task = tiny("llama").gguf_path, tmp_path / "p.txt"
    task.write_text("Hello\n")
    for command in (("learn", "--degraded", model), ("restore", model)):
        for out in (("-o", task), ("-o", tmp_path / "o.gguf", "--card", task)):
            result = run(*command, "--task", task, *out)
            assert "is also an input" in str(result.exception)
        same = tmp_path / "o.gguf"
        result = run(*command, "-o", same, "--card", f"{tmp_path}/./o.gguf")
        assert "two outputs are the same file" in result.output
    assert task.read_text() == "Hello\n"
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    result = run("restore", model, "-o", same, "--card", tmp_path / "o.report.json")
    assert "another output of this run" in str(result.exception)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed, tiny):
    model = tiny("llama").gguf_path
    for command, code in ((f"inspect {model}", 0), (f"chat {model} --max-tokens 1", 0)):
        program = f"{sys.executable} -m safegene_edge {command} {closed}"
        done = subprocess.run(
            ["sh", "-c", program], capture_output=True, text=True, check=False, timeout=60
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == code, done


def test_an_error_that_nobody_can_be_told_has_its_exit_code(tmp_path):
    program = f"{sys.executable} -m safegene_edge inspect {tmp_path}/none 2>/dev/full"
    assert subprocess.run(["sh", "-c", program], check=False).returncode == 2


@pytest.mark.parametrize("address", ["https://example.org/g.gguf", "file:///tmp/g.gguf"])
def test_an_address_is_no_path(address, tiny, tmp_path):
    for arguments in (("inspect", address), ("merge", tiny("llama").gguf_path, address, "-o", "o")):
        result = run(*arguments)
        assert "is an address" in str(result.exception)


@pytest.mark.parametrize("key", ["a\nb", "a b", "", "é"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(SettingError, match="API key"):
        ServeSettings(api_key=key)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}'])
def test_variables_that_are_no_json(text):
    with pytest.raises(SettingError, match="is no JSON object"):
        ServeSettings(chat_template_kwargs=text)


@pytest.mark.parametrize("name", ["messages", "bos_token", "add_generation_prompt"])
def test_variables_that_a_chat_sets_itself(name, tiny):
    with pytest.raises(SettingError, match=f"'{name}' is no variable to set"):
        SafeLlama(tiny("llama").gguf_path, chat_template_kwargs={name: []})


@pytest.mark.parametrize(
    ("facts", "missing"),
    [({"adapter.type": "lora"}, "general.type"), ({"general.type": "adapter"}, "adapter.type")],
)
def test_an_adapter_that_does_not_say_what_it_is(facts, missing, tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", facts, [])
    with pytest.raises(FileFormatError, match=f"has no '{missing}'"):
        SafetyGene.load(tmp_path / "a.gguf")


def test_parts_of_an_adapter_that_lie_elsewhere(tiny_adapter, tiny, tmp_path):
    base, peft = tiny("llama").gguf_path, Path(tiny_adapter("llama"))
    shutil.copytree(peft, tmp_path / "outer" / "default")
    inner = tmp_path / "split"
    shutil.copytree(peft, inner)
    weights = inner / "adapter_model.safetensors"
    weights.rename(inner / "adapter_model-00001-of-00002.safetensors")
    mixed = tmp_path / "mixed"
    shutil.copytree(peft, mixed)
    (mixed / "adapter_model.safetensors").rename(mixed / "adapters.safetensors")
    for folder, said in ((tmp_path / "outer", "Did you mean"), (inner, "split into 1 files"),
                         (mixed, "is MLX's")):  # fmt: skip
        with pytest.raises(SafeGeneError) as caught:
            convert(folder, base=base, output=tmp_path / "o.gguf")
        assert said in str(caught.value)


def test_a_part_of_a_split_model_that_is_missing(tmp_path):
    part = tmp_path / "s-00001-of-00002.gguf"
    write_gguf(part, "llama", {"split.count": 2}, [("t", np.zeros((2, 2), np.float32))])
    result = run("inspect", tmp_path / "s-00002-of-00002.gguf")
    assert "split into 2 files: put all of them there" in str(result.exception)
