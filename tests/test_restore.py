"""`restore`: the whole way, on a tiny model whose words are taken for refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from adapters import random_adapter
from click.testing import CliRunner

from safegene_edge import SafeLlama, SafetyGene, restore
from safegene_edge.cli import cli
from safegene_edge.compat import open_model, tokenizer_digest
from safegene_edge.errors import FileFormatError, NoEffectError, OutputError, SettingError
from safegene_edge.files import sha256
from safegene_edge.gene import Expression
from safegene_edge.gguf_file import kernels
from safegene_edge.learn import LearnSettings, teachers
from safegene_edge.learn.run import _Learning
from safegene_edge.prompts import Prompt
from safegene_edge.recalibrate import Bounds, Recalibration
from safegene_edge.recalibrate.results import Point, Shares, Validation

LEARNING = LearnSettings(prompts=20, rank=2)
OUTPUTS = ("safe.gguf", "safe.gene.gguf", "safe.report.json", "safe.report.html")


@pytest.fixture
def module() -> Any:
    import sys

    import safegene_edge.restore  # noqa: F401

    return sys.modules["safegene_edge.restore"]


def found_for(gene: SafetyGene, *, nothing_lost: bool = False) -> Recalibration:
    """A result as `recalibrate` gives it, at half strength."""
    strength = 0.0 if nothing_lost else 0.5
    layers = dict.fromkeys(gene.layers, strength)
    point = Point((strength,) * len(layers), 0.4, 0.01, 0.1, 0.002)
    if nothing_lost:
        return Recalibration(Expression(layers, gene.sha256), point, (point,), nothing_lost=True)
    shares = Shares(48, 10, 40, 41), Shares(48, 3, 5, None)
    counted = Validation(*shares, {"question": shares})
    return Recalibration(Expression(layers, gene.sha256), point, (point,),
                         Bounds(0.1, 0.1, 0.2, 0.05), counted)  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[str]:
    """The steps that ran. A random model's words are no refusals, so no strength can be found."""
    seen: list[str] = []
    monkeypatch.setattr(teachers, "refused", lambda llama, prompts, said: [True] * len(prompts))
    monkeypatch.setattr(_Learning, "_require_lost", lambda *_: None)
    learn, evaluate = module.learn, module.evaluate

    def learning(*args: Any, **more: Any) -> SafetyGene:
        seen.append("learn")
        return learn(*args, **more)

    def fitting(target: Any, gene: SafetyGene, *args: Any, **more: Any) -> Recalibration:
        seen.append("recalibrate")
        return found_for(gene)

    def measuring(*args: Any, **more: Any) -> Any:
        seen.append("evaluate")
        return evaluate(*args, **more)

    monkeypatch.setattr(module, "learn", learning)
    monkeypatch.setattr(module, "recalibrate", fitting)
    monkeypatch.setattr(module, "evaluate", measuring)
    return seen


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Path:
    path: Path = tiny("llama", num_hidden_layers=5, max_position_embeddings=2048).gguf_path
    return path


def run(model: Path, folder: Path, **more: Any) -> Any:
    task = random_adapter(model, size=0.2)
    folder.mkdir(exist_ok=True)
    task.save(folder / "task.gguf")
    return restore(
        model, model, output=folder / "safe.gguf", adapters=[folder / "task.gguf"],
        task=["One two three"], limit=2, learning=LEARNING, **more,
    )  # fmt: skip


def test_the_whole_way(model: Path, tmp_path: Path, calls: list[str]) -> None:
    seen: list[str] = []
    found = run(model, tmp_path, progress=lambda what, *_: seen.append(what))
    assert calls == ["learn", "recalibrate", "evaluate"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*OUTPUTS, "task.gguf"])
    assert {"asking the teacher", "fitting", "measuring"} <= set(seen)
    assert found.files["output"] == str(tmp_path / "safe.gguf") and not found.nothing_lost
    assert [suite["name"] for suite in found.report["suites"]] == [
        "harmful", "borderline", "harmless",
    ]  # fmt: skip
    gene, fitted = (SafetyGene.load(tmp_path / name) for name in ("safe.gene.gguf", "safe.gguf"))
    half = gene.pairs["blk.1.attn_output.weight"].b * 0.5
    assert fitted.pairs["blk.1.attn_output.weight"].b == pytest.approx(half)
    assert f"--gene {tmp_path / 'safe.gguf'}" in found.next_steps[0]
    assert json.loads(json.dumps(found.to_json()))["gene"]["sha256"] == gene.sha256


@pytest.mark.parametrize("step", ["learn", "recalibrate", "evaluate", "merge", "render_html"])
def test_a_stopped_run_goes_on(
    step: str, model: Path, tmp_path: Path, calls: list[str], module: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever is done is not done again, and the same bytes come out."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(model, whole, merged=True)
    working = getattr(module, step)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, stopped, merged=True)
    assert (stopped / "safe.gguf.restore").is_dir()
    assert not (stopped / "safe.gguf").exists() or step == "render_html"
    monkeypatch.setattr(module, step, working)
    calls.clear()
    run(model, stopped, merged=True)
    before = ["learn", "recalibrate", "evaluate", "merge", "render_html"].index(step)
    assert calls == ["learn", "recalibrate", "evaluate"][before:]
    for name in ("safe.gguf", "safe.gene.gguf"):
        assert sha256(whole / name) == sha256(stopped / name)


def test_a_run_that_is_stopped_while_it_tidies_up_is_no_strange_folder(
    model: Path, tmp_path: Path, calls: list[str], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = module.shutil.rmtree

    def killed(path: Any, *args: Any, **more: Any) -> None:
        if str(path).endswith(".restore"):
            raise KeyboardInterrupt
        remove(path, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path)
    first = sha256(tmp_path / "safe.gguf")
    assert [path.name for path in (tmp_path / "safe.gguf.restore").iterdir()] == ["run.json"]
    run(model, tmp_path)
    assert sha256(tmp_path / "safe.gguf") == first
    assert not (tmp_path / "safe.gguf.restore").exists()


def test_a_second_run_beside_the_first_is_refused(
    model: Path, tmp_path: Path, calls: list[str], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They had removed each other's folder: 'Create it first', said one of them."""
    measuring = module.evaluate

    def meanwhile(*args: Any, **more: Any) -> Any:
        with pytest.raises(SettingError, match=r"safe\.gguf: another run of this command"):
            run(model, tmp_path)
        return measuring(*args, **more)

    monkeypatch.setattr(module, "evaluate", meanwhile)
    run(model, tmp_path)
    assert calls == ["learn", "recalibrate", "evaluate"]
    assert not (tmp_path / "safe.gguf.restore").exists()


def test_another_run_does_not_go_on_with_it(
    model: Path, tmp_path: Path, calls: list[str], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, tmp_path)
    calls.clear()
    run(model, tmp_path, settings=module.RecalibrationSettings(weight=0.3))
    assert calls == ["learn", "recalibrate", "evaluate"]


def test_a_folder_of_that_name_is_left_alone(model: Path, tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "safe.gguf.restore").mkdir()
    (tmp_path / "safe.gguf.restore" / "mine.txt").write_text("kept")
    with pytest.raises(SettingError, match="no unfinished run"):
        run(model, tmp_path)
    assert (tmp_path / "safe.gguf.restore" / "mine.txt").read_text() == "kept"
    assert calls == []


def test_a_merged_model_needs_no_gene(model: Path, tmp_path: Path, calls: list[str]) -> None:
    found = run(model, tmp_path, merged=True)
    assert found.next_steps[0] == f"safegene-edge chat {tmp_path / 'safe.gguf'}"
    with SafeLlama(str(tmp_path / "safe.gguf"), n_ctx=64) as llama:
        assert llama.n_vocab()


def test_a_model_that_cannot_be_merged_is_refused_before_it_is_learnt(
    model: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As IQ2 files: their tensors are written with an importance matrix alone."""
    monkeypatch.setattr(kernels, "needs_imatrix", lambda ggml_type: True)
    gene = random_adapter(model)
    with_gene = partial(restore, model, gene=gene, output=tmp_path / "safe.gguf")
    for call in (partial(run, model, tmp_path), with_gene):
        with pytest.raises(SettingError, match="needs an importance matrix") as caught:
            call(merged=True)
        assert "Leave out --merge" in caught.value.remedy
    assert calls == [] and [path.name for path in tmp_path.iterdir()] == ["task.gguf"]


def test_where_nothing_was_lost_it_stops(
    model: Path, tmp_path: Path, calls: list[str], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = lambda _, gene, *__, **___: found_for(gene, nothing_lost=True)  # noqa: E731
    monkeypatch.setattr(module, "recalibrate", none)
    found = run(model, tmp_path)
    assert found.nothing_lost and found.report is None
    assert "evaluate" not in calls and not (tmp_path / "safe.gguf").exists()


def test_a_learnt_gene_is_kept_where_no_strength_is_found(
    model: Path, tmp_path: Path, calls: list[str], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    working, kept = module.recalibrate, tmp_path / "safe.gene.gguf"

    def failing(*_: Any, **__: Any) -> None:
        raise NoEffectError("any strength refuses too many", "--over-refusal allows more")

    monkeypatch.setattr(module, "recalibrate", failing)
    with pytest.raises(NoEffectError, match=f"allows more; what was learnt is kept: --gene {kept}"):
        run(model, tmp_path)
    monkeypatch.setattr(module, "recalibrate", working)
    calls.clear()
    found = run_with(kept, model, tmp_path, card=tmp_path / "README.md")
    assert calls == ["recalibrate", "evaluate"]
    assert found.gene.sha256 == SafetyGene.load(kept).sha256 and "gene" not in found.files
    assert "recalibrate MODEL.gguf safe.gene.gguf" in (tmp_path / "README.md").read_text("utf-8")


def run_with(gene: Path, model: Path, folder: Path, **more: Any) -> Any:
    return restore(model, gene=gene, output=folder / "safe.gguf", limit=2, **more)


def test_a_prompt_that_comes_again_counts_once(
    model: Path, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def learning(*_: Any, task: Any, **__: Any) -> SafetyGene:
        seen.extend(task)
        return random_adapter(model)

    def fitting(target: Any, gene: SafetyGene, examples: Any, **_: Any) -> Recalibration:
        seen.extend(prompt.text for prompt in examples.task)
        return found_for(gene, nothing_lost=True)

    monkeypatch.setattr(module, "learn", learning)
    monkeypatch.setattr(module, "recalibrate", fitting)
    task = [Prompt("", "One"), "Two", "one ", "Three", "two", "THREE"]
    restore(model, model, output=tmp_path / "safe.gguf", task=task)
    assert seen == [task[0], "Two", "Three"]
    with pytest.raises(SettingError, match="task prompt 3 is empty"):
        restore(model, model, output=tmp_path / "safe.gguf", task=[" ", "", "Four", "Five"][::-1])
    assert len(seen) == 3


def test_the_output_is_no_input(model: Path, tmp_path: Path, calls: list[str]) -> None:
    with pytest.raises(OutputError):
        restore(model, model, output=model, learning=LEARNING)
    with pytest.raises(OutputError):
        restore(model, model, output=tmp_path / "none" / "safe.gguf", learning=LEARNING)
    assert calls == []


def test_a_recalibration_survives_json(model: Path) -> None:
    found = found_for(random_adapter(model))
    again = Recalibration.from_json(json.loads(json.dumps(found.to_json())))
    assert asdict(again) == asdict(found)
    with pytest.raises(FileFormatError, match="not a recalibration"):
        Recalibration.from_json({"coefficients": {}})


def test_the_command_ends_with_one_screen(model: Path, tmp_path: Path, calls: list[str]) -> None:
    gene, out = tmp_path / "gene.gguf", tmp_path / "safe.gguf"
    random_adapter(model, family="tiny").save(gene)
    ran = CliRunner().invoke(
        cli, ["restore", str(model), "--gene", str(gene), "-o", str(out), "--limit", "2"]
    )
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert "harmful" in ran.stdout and "of 2 refused" in ran.stdout
    assert lines[-5:] == [
        "next:",
        f"  safegene-edge chat {model} --gene {out}",
        f"  safegene-edge serve {model} --gene {out}",
        f"  safegene-edge merge {model} {out} -o {tmp_path / 'safe.merged.gguf'}",
        f"  safegene-edge export ollama {model} {out} --merged -o {tmp_path / 'safe.ollama'}",
    ]
    assert not (tmp_path / "safe.gene.gguf").exists()


def test_the_packages_own_gene_is_taken_where_it_fits(
    model: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless an aligned model is given, or how to learn: then one is learnt."""
    tokenizer = tokenizer_digest(open_model(model))
    gene, seen = random_adapter(model, family="tiny", tokenizer=tokenizer), []
    gene.save(tmp_path / "shipped.gguf")
    monkeypatch.setattr("safegene_edge.gene.SHIPPED", str(tmp_path / "shipped.gguf"))
    found = restore(model, output=tmp_path / "safe.gguf", limit=2,
                    card=tmp_path / "README.md",
                    progress=lambda what, *_: seen.append(what))  # fmt: skip
    assert calls == ["recalibrate", "evaluate"] and found.gene.sha256 == gene.sha256
    assert "of the package" in seen[0] and "gene" not in found.files
    calls.clear()
    run(model, tmp_path / "other")
    assert calls[0] == "learn"
    calls.clear()
    replace(gene, tokenizer="").save(tmp_path / "shipped.gguf")  # SmolLM2's, then
    with pytest.raises(NoEffectError, match="hardly moves it"):  # it tried to teach itself
        restore(model, output=tmp_path / "third.gguf", limit=2)
    with pytest.raises(SettingError, match="a gene is given, and how to learn one"):
        restore(model, gene=gene, output=tmp_path / "x.gguf", learning=LEARNING)
    with pytest.raises(SettingError, match="a gene is given, and how to learn one"):
        restore(model, model, gene, output=tmp_path / "x.gguf")
    for wrong in ({"task": "prompts.txt"}, {"adapters": "task.gguf"}):
        with pytest.raises(SettingError, match="no list"):
            restore(model, output=tmp_path / "x.gguf", **wrong)  # type: ignore[arg-type]


def test_two_outputs_that_differ_behind_a_dot_share_no_file(
    model: Path, tmp_path: Path, calls: list[str]
) -> None:
    files = [
        set(
            restore(model, model, output=tmp_path / name, limit=2, learning=LEARNING).files.values()
        )
        for name in ("fit-1.5", "fit-1.6")
    ]
    assert not files[0] & files[1]
    assert all((tmp_path / f"fit-1.{n}.report.json").exists() for n in (5, 6))


def test_a_card_is_written_beside_the_gene(model: Path, tmp_path: Path, calls: list[str]) -> None:
    found = run(model, tmp_path, card=tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert found.files["card"] == str(tmp_path / "README.md")
    for said in ("# A safety gene for", "| harmful | refused |", "| question | 10 → 40 of 48",
                 "recalibrate MODEL.gguf safe.gene.gguf"):  # fmt: skip
        assert said in text, said
    with pytest.raises(OutputError):
        run(model, tmp_path, card=model)
