"""The portfolio: many models, one gene; resumes, survives failures, runs on Dask."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapters import opening_gene
from click.testing import CliRunner

from safegene_edge.cli import cli
from safegene_edge.errors import FileFormatError, OutputError, SettingError
from safegene_edge.evals.settings import DEFAULT_SUITES
from safegene_edge.evals.statistics import Count
from safegene_edge.gene import SafetyGene
from safegene_edge.portfolio import PortfolioRow, PortfolioSettings, express_one, portfolio, table
from safegene_edge.recalibrate import RecalibrationSettings

HARMFUL, HARMLESS = "How do I sing?", "What is a bee, and where does it live?"


@pytest.fixture
def shelf(tiny, tmp_path):
    """Two models, a gene that fits, and settings with which the tiny gene can be expressed."""
    source = tiny("llama").gguf_path
    models = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for model in models:
        shutil.copy(source, model)
    gene = tmp_path / "gene.gguf"
    suite = tmp_path / "suite.jsonl"
    rows = [(HARMFUL, "harmful"), (HARMLESS, "harmless")]
    suite.write_text(
        "".join(json.dumps({"prompt": text, "kind": kind}) + "\n" for text, kind in rows)
    )
    examples = tmp_path / "examples.jsonl"
    lines = [{"prompt": text, "kind": kind} for text, kind in rows]
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wide = RecalibrationSettings(kl_budget=1e3, over_refusal=1, passes=3, anyway=True)
    settings = PortfolioSettings((str(suite),), 2, str(examples), wide)
    for seed in range(20):
        opening_gene(source, [HARMFUL], seed=seed).save(gene)
        trial = tmp_path / f"trial-{seed}"
        trial.mkdir()
        if not express_one(models[0], gene, trial, settings).error:
            return models, gene, settings
    pytest.fail("no random gene can be expressed")


def test_where_nothing_was_lost_no_adapter_is_fitted(shelf, tmp_path):
    models, gene, settings = shelf
    known = replace(SafetyGene.load(gene), aligned_loss=0.999)  # nothing to lose
    known.save(gene)
    careful = replace(settings, recalibration=replace(settings.recalibration, anyway=False))
    folder = tmp_path / "out"
    folder.mkdir()
    row = express_one(models[0], gene, folder, careful)
    assert not row.error and set(row.coefficients.values()) == {0.0} and row.refused
    names = {path.name for path in folder.iterdir()}
    assert "fitted.gguf" not in names and {"expression.json", "report.json"} <= names


def test_every_model_gets_its_files_and_a_row(shelf, tmp_path):
    models, gene, settings = shelf
    seen = []
    rows = portfolio(models, gene, tmp_path / "out", settings=settings, on_row=seen.append)
    assert [row.error for row in rows] == ["", ""]
    assert len(seen) == 2
    for model in models:
        names = {path.name for path in (tmp_path / "out" / model.stem).iterdir()}
        wanted = {"fitted.gguf", "expression.json", "report.json", "report.html", "result.json"}
        assert names == wanted
    assert rows[0].refused is not None
    assert rows[0].refused[0].total == 1
    assert "two" in table(rows)


def test_what_is_done_is_not_done_again_unless_a_file_changed(shelf, tmp_path):
    models, gene, settings = shelf
    first = portfolio(models, gene, tmp_path / "out", settings=settings)
    kept = tmp_path / "out" / "one" / "fitted.gguf"
    before = kept.stat().st_mtime_ns
    assert portfolio(models, gene, tmp_path / "out", settings=settings) == first
    assert kept.stat().st_mtime_ns == before
    SafetyGene.load(gene).scaled(0.5).save(gene)
    assert portfolio(models, gene, tmp_path / "out", settings=settings) != first


@pytest.fixture
def counted(monkeypatch):
    """How often a model was really recalibrated, in this process."""
    module = import_module("safegene_edge.recalibrate")
    found, calls = module.recalibrate, []

    def watched(*args, **more):
        calls.append(args[0])
        return found(*args, **more)

    monkeypatch.setattr(module, "recalibrate", watched)
    return calls


def test_a_row_is_kept_by_content_and_not_by_name(shelf, tmp_path, monkeypatch, counted):
    """Edited suites, other versions and another judge give another row; other paths do not."""
    models, gene, settings = shelf
    folder = tmp_path / "one"
    folder.mkdir()

    def done(settings=settings, model=models[0]):
        before = len(counted)
        row = express_one(model, gene, folder, settings)
        assert not row.error and row.model == str(model)
        return len(counted) > before

    assert done() and not done()
    suite = Path(settings.suites[0])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (suite, Path(settings.examples), models[0]):
        shutil.copy(path, moved)
    same = replace(
        settings, suites=(str(moved / suite.name),), examples=str(moved / "examples.jsonl")
    )
    assert not done(same, moved / models[0].name)
    rows = [json.loads(line) for line in suite.read_text().splitlines()]
    suite.write_text("".join(json.dumps({**row, "category": "new"}) + "\n" for row in rows))
    assert done() and not done()
    suite.write_text(suite.read_text().replace("bee", "cow"))
    assert done() and not done()
    judging = import_module("safegene_edge.evals.judge")
    monkeypatch.setattr(judging, "judge_sha256", lambda: "f" * 64)
    assert done() and not done()
    evaluating = import_module("safegene_edge.evals.evaluate")
    monkeypatch.setattr(evaluating, "__version__", "9.9.9")
    assert done() and not done()


@pytest.mark.parametrize("name", ["fitted.gguf", "expression.json", "report.json", "report.html"])
@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_row_whose_files_are_gone_is_made_again(shelf, tmp_path, counted, name, how):
    models, gene, settings = shelf
    folder = tmp_path / "one"
    folder.mkdir()
    first = express_one(models[0], gene, folder, settings)
    whole = (folder / name).read_bytes()
    (folder / name).unlink() if how == "deleted" else (folder / name).write_bytes(whole[:99])
    again = express_one(models[0], gene, folder, settings)
    assert len(counted) == 2 and replace(again, seconds=first.seconds) == first
    assert (folder / name).stat().st_size > 99
    if name.startswith(("fitted", "expression")):
        assert (folder / name).read_bytes() == whole


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"key": 1, "files": {}, "row": 2}', "\xff", '{"row": []}']
)
def test_a_result_that_is_none_is_made_again(shelf, tmp_path, counted, text):
    models, gene, settings = shelf
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "result.json").write_text(text, encoding="latin-1")
    assert not express_one(models[0], gene, tmp_path / "one", settings).error
    assert len(counted) == 1


def test_no_adapter_of_an_earlier_run_stays_where_none_is_fitted(shelf, tmp_path):
    models, gene, settings = shelf
    folder = tmp_path / "out"
    folder.mkdir()
    express_one(models[0], gene, folder, settings)
    assert (folder / "fitted.gguf").exists()
    replace(SafetyGene.load(gene), aligned_loss=0.999).save(gene)
    careful = replace(settings, recalibration=replace(settings.recalibration, anyway=False))
    assert not express_one(models[0], gene, folder, careful).error
    assert not (folder / "fitted.gguf").exists()


def test_a_script_without_a_guard_runs_once(shelf, tmp_path):
    """No `if __name__ == "__main__"`: the children shall not run the caller's script."""
    models, gene, settings = shelf
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        "open('runs', 'a').write('x')\n"
        "from safegene_edge import portfolio\n"
        "models, gene, settings = pickle.load(open('given', 'rb'))\n"
        "rows = portfolio(models, gene, 'out', settings=settings)\n"
        "assert [row.error for row in rows] == ['', ''], rows\n"
    )
    (tmp_path / "given").write_bytes(pickle.dumps((models, gene, settings)))
    ran = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs").read_text() == "x"


def test_a_bad_suite_is_refused_before_any_work(shelf, tmp_path):
    models, gene, settings = shelf
    with pytest.raises(FileFormatError, match=r"none\.jsonl"):
        portfolio(
            models, gene, tmp_path / "out", settings=replace(settings, suites=("none.jsonl",))
        )
    assert not (tmp_path / "out").exists()


def test_adapters_are_on_in_every_step_and_part_of_what_was_done(shelf, tmp_path, monkeypatch):
    models, gene, settings = shelf
    task = tmp_path / "task.gguf"
    SafetyGene.load(gene).scaled(1e-3).save(task)
    tuned = replace(settings, adapters=(str(task),))
    module, seen = import_module("safegene_edge.recalibrate"), []
    found = module.recalibrate

    def watched(*args, adapters=(), **more):
        seen.append(tuple(adapters))
        return found(*args, adapters=adapters, **more)

    monkeypatch.setattr(module, "recalibrate", watched)
    folder = tmp_path / "one"
    folder.mkdir()
    bare = express_one(models[0], gene, folder, settings)
    row = express_one(models[0], gene, folder, tuned)
    assert seen == [(), (str(task),)] and not row.error and row != bare
    named = json.loads((folder / "report.json").read_text())["adapters"]
    assert [Path(facts["name"]).name for facts in named] == ["task.gguf"]
    assert express_one(models[0], gene, folder, tuned) == row and len(seen) == 2
    SafetyGene.load(gene).scaled(2e-3).save(task)
    express_one(models[0], gene, folder, tuned)
    assert len(seen) == 3  # another adapter under the same name
    with pytest.raises(FileFormatError, match=r"none\.gguf"):
        portfolio(models, gene, folder, settings=replace(settings, adapters=("none.gguf",)))


def test_the_command_line_sets_what_the_settings_describe(tmp_path, monkeypatch):
    given = SimpleNamespace()

    def run(models, gene, folder, *, settings, executor, on_row):
        given.settings = settings
        return []

    monkeypatch.setattr(import_module("safegene_edge.portfolio"), "portfolio", run)
    command = ["portfolio", "m.gguf", "--gene", "g.gguf", "-o", str(tmp_path)]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert given.settings == PortfolioSettings()
    more = ["--adapter", "a.gguf", "--adapter", "b.gguf", "--ctx", "8192", "--suite", "harmless"]
    assert CliRunner().invoke(cli, [*command, *more]).exit_code == 0
    assert given.settings.adapters == ("a.gguf", "b.gguf")
    assert given.settings.recalibration.n_ctx == 8192
    assert given.settings.suites == ("harmless",) != DEFAULT_SUITES


def test_a_failed_model_stops_no_other(shelf, tmp_path):
    models, gene, settings = shelf
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(40))
    rows = portfolio([bad, *models], gene, tmp_path / "out", settings=settings)
    assert str(bad) in rows[0].error
    assert [row.error for row in rows[1:]] == ["", ""]
    assert not (tmp_path / "out" / "bad" / "result.json").exists()


def test_a_crash_takes_nothing_with_it(shelf, tmp_path, monkeypatch):
    models, gene, settings = shelf
    monkeypatch.setattr(import_module("safegene_edge.portfolio"), "express_one", _crash)
    rows = portfolio(models, gene, tmp_path / "out", settings=settings)
    assert all("crashed" in row.error and "SIGABRT" in row.error for row in rows)


def _crash(*_: object) -> None:
    import os

    os.abort()


def test_dask_runs_it_too(shelf, tmp_path):
    distributed = pytest.importorskip("distributed")
    models, gene, settings = shelf
    alone = portfolio(models, gene, tmp_path / "alone", settings=settings)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        arguments = [str(model) for model in models]
        arguments += ["--gene", str(gene), "-o", str(tmp_path / "dask"), "--json"]
        arguments += ["--suite", settings.suites[0], "--limit", "2", "--passes", "6"]
        arguments += ["--examples", str(settings.examples), "--kl-budget", "1000"]
        arguments += ["--dask", cluster.scheduler_address, "--plot", str(tmp_path / "p.svg")]
        result = CliRunner().invoke(cli, ["portfolio", *arguments])
    assert result.exit_code == 0, result.output
    rows = [PortfolioRow.from_json(row) for row in json.loads(result.stdout)]
    assert [row.coefficients for row in rows] == [row.coefficients for row in alone]
    assert [row.refused for row in rows] == [row.refused for row in alone]
    drawn = (tmp_path / "p.svg").read_text()
    assert all(f"{model.stem}, refused" in drawn for model in models)


def test_names_that_clash_and_genes_that_are_none_are_refused(shelf, tmp_path):
    models, gene, _ = shelf
    with pytest.raises(SettingError, match="same file name"):
        portfolio([models[0], models[0]], gene, tmp_path / "out")
    with pytest.raises(SettingError, match="no model"):
        portfolio([], gene, tmp_path / "out")
    with pytest.raises(FileFormatError):
        portfolio(models, tmp_path / "none.gguf", tmp_path / "out")


def test_a_row_survives_json():
    counts = Count(1, 3), Count(2, 3)
    row = PortfolioRow("m.gguf", counts, counts, {3: 0.5}, 0.1, 7, 2.0)
    assert PortfolioRow.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_an_input_that_a_run_would_remove_is_refused_and_kept(shelf, tmp_path):
    models, gene, settings = shelf
    fitted = tmp_path / "out" / "one" / "fitted.gguf"
    fitted.parent.mkdir(parents=True)
    shutil.copy(gene, fitted)
    with pytest.raises(OutputError, match="also an input"):
        portfolio(models, fitted, tmp_path / "out", settings=settings)
    assert fitted.read_bytes() == gene.read_bytes()
