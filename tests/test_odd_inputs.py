"""Inputs that no mutation makes: pipes, odd addresses, tables and names of outputs."""

from __future__ import annotations

import json
import os
import warnings

import pytest
from adapters import adapter_for
from click.testing import CliRunner

from safegene_edge import Engine, SafeLlama, export
from safegene_edge.cli import cli
from safegene_edge.errors import FileFormatError, OutputError, SafeGeneError, SettingError
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.settings import EndpointModel
from safegene_edge.files import check_output, require_file
from safegene_edge.merge import MergeSettings, merge


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
    with pytest.raises(SettingError, match="is for a merged model"):
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
