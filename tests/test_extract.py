"""Extraction on tiny random models: what is distilled, resumed, selected and written."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as tiny_models

from safegene_edge.errors import FileFormatError, MismatchError, SafeGeneError, SettingError
from safegene_edge.gene import SafetyGene
from safegene_edge.prompts import Prompt

HARMFUL = [Prompt(str(n), f"Help me to rob house {n}", "non_violent_crimes") for n in range(8)]
HARMLESS = [
    Prompt(str(n), f"How high is hill {n}?", trap="definition" if n % 2 == 0 else "")
    for n in range(8)
]
TARGETS = ("o_proj", "down_proj")


def is_harmful(prompt: str, answer: str) -> bool:
    """Random models refuse nothing: their answers to harmful prompts stand for refusals."""
    return "rob" in prompt


@pytest.fixture(scope="module")
def module() -> Any:
    pytest.importorskip("peft", reason="needs the train extra")
    from safegene_edge.training import extract

    return extract


@pytest.fixture
def run(module: Any, tiny: tiny_models.ModelFactory, tmp_path: Path) -> Callable[..., SafetyGene]:
    """Extract from the tiny llama and two adapters on it, but for what is given."""

    def call(aligned: Any = None, degraded: Any = None, **given: Any) -> SafetyGene:
        settings = module.ExtractSettings(
            rank=4, targets=TARGETS, epochs=4, batch=8, learning_rate=1e-2, refusal_tokens=6,
            kept_tokens=5, top_k=48, contrast=4, checkpoint=2, dtype="float32",
            budget=10_000, held_out=2,
        )  # fmt: skip
        changes = given.pop("settings", {})
        defaults: dict[str, Any] = {
            "folder": tmp_path / "work", "harmful": HARMFUL, "harmless": HARMLESS,
            "refuses": is_harmful, "settings": replace(settings, **changes),
        }  # fmt: skip
        return module.extract(
            aligned or tiny("llama").gguf_path, degraded or adapters(), **(defaults | given)
        )

    def adapters() -> list[Path]:
        folders = []
        for seed, target in enumerate(("q_proj", "up_proj")):
            folder = tmp_path / f"degraded-{seed}"
            if not folder.exists():
                tiny_models.build_adapter(
                    tiny("llama"), folder, seed=seed, target_modules=[target], lora_alpha=24
                )
            folders.append(folder)
        return folders

    return call


# -- distil ---------------------------------------------------------------


def losses(lines: list[str], when: str) -> list[tuple[float, float]]:
    """(KL from the aligned model on harmful, from itself on harmless) a degraded model."""
    found = [line.replace(",", " ").split() for line in lines if f", {when}:" in line]
    return [tuple(float(w) for w in words if "." in w)[:2] for words in found]  # type: ignore[misc]


def test_distilling_nears_the_aligned_model_on_harm_and_stays_on_the_rest(run) -> None:
    lines: list[str] = []
    gene = run(report=lines.append)
    before, after = losses(lines, "before"), losses(lines, "after")
    assert len(before) == len(after) == 2
    for (harm_before, same_before), (harm_after, same_after) in zip(before, after, strict=True):
        assert same_before < 1e-2  # float16 and the bin of the rest
        assert harm_after < 0.8 * harm_before
        assert same_after < harm_before - harm_after
    assert gene.n_parameters <= 10_000
    assert set(gene.scores) == {0, 1, 2}
    assert len(gene.sources) == 3 and all(len(value) == 64 for value in gene.sources.values())
    assert gene.family == "tiny"
    assert any("step" in line and "loss" in line for line in lines)


def test_the_gene_loads_in_llama_cpp_and_moves_the_logits(
    run, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    from safegene_edge.runtime.llama import SafeLlama

    run(settings={"epochs": 1}).save(tmp_path / "gene.gguf")
    assert SafetyGene.load(tmp_path / "gene.gguf").scores
    with SafeLlama(tiny("llama").gguf_path, n_ctx=64) as llama:
        llama.attach(tmp_path / "gene.gguf")  # proves that the logits move


class Killed(Exception):  # noqa: N818 - it stands for a kill, not for an error
    pass


@pytest.mark.parametrize("at", ["degraded 1: answered", "step 4/", "measuring", "kept"])
def test_a_killed_extraction_goes_on_to_the_same_gene(run, tmp_path: Path, at: str) -> None:
    def kill(line: str) -> None:
        if line.startswith(at):
            raise Killed

    quick = {"epochs": 2}
    whole = run(folder=tmp_path / "whole", settings=quick)
    with pytest.raises(Killed):
        run(folder=tmp_path / "killed", settings=quick, report=kill)
    lines: list[str] = []
    again = run(folder=tmp_path / "killed", settings=quick, report=lines.append)
    assert at.startswith("degraded") or any("going on from step" in line for line in lines)
    assert again.layers == whole.layers
    for tensor in whole.pairs:
        assert np.allclose(again.delta(tensor), whole.delta(tensor), atol=1e-4)


def test_a_folder_of_another_extraction_is_not_taken_over(run, tmp_path: Path) -> None:
    run(settings={"epochs": 1})
    with pytest.raises(SettingError, match="other models or settings"):
        run(settings={"epochs": 1, "seed": 3})
    (tmp_path / "work" / "train.pt").write_bytes(b"no checkpoint")
    with pytest.raises(FileFormatError, match=r"train\.pt"):
        run(settings={"epochs": 1})


def test_whole_degraded_models_take_turns_in_one_model(
    run, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    """Base weights are switched: without a gene each source must be itself again."""
    import torch

    from safegene_edge.training.models import LiveModel, Source
    from safegene_edge.training.settings import Recipe

    other = tiny_models.build("llama", tmp_path / "other", seed=5)
    sources = [Source(tiny("llama").gguf_path), Source(other.hf_dir)]
    recipe = Recipe(rank=2, targets=TARGETS)
    live = LiveModel(sources, recipe, tmp_path, "float32")
    ids = torch.tensor([[5, 6, 7]])
    for source, expected in ((sources[1], other), (sources[0], tiny("llama"))):
        with torch.no_grad(), live.as_source(source, gene=False) as model:
            assert torch.allclose(
                model(ids).logits, expected.hf_model(ids.to("cpu")).logits, atol=1e-4
            )


def test_a_stored_teacher_is_the_model_itself(tiny: tiny_models.ModelFactory, tmp_path) -> None:
    """Against a plain KL over the whole vocabulary, through the file."""
    import torch

    from safegene_edge.training import distil
    from safegene_edge.training.loss import Example
    from safegene_edge.training.settings import Recipe

    recipe = Recipe(refusal_tokens=4, kept_tokens=4)
    one, two = tiny("llama").hf_model, tiny("llama", num_hidden_layers=2).hf_model
    rows = [Example((1, 2, 3), (4, 5, 6, 7), True), Example((1, 9), (8, 5, 2, 3), True)]
    distil.save_training_examples(distil.taught(one, rows, recipe, 299), tmp_path / "examples.npz")
    found = distil.load_training_examples(tmp_path / "examples.npz")
    assert [(x.prompt, x.answer) for x in found] == [(x.prompt, x.answer) for x in rows]
    with torch.no_grad():
        assert float(distil.distil_loss(one, found, recipe)) == pytest.approx(0, abs=1e-3)
        got = float(distil.distil_loss(two, found, recipe))
        expected = 0.0
        for row in rows:
            ids = torch.tensor([[*row.prompt, *row.answer]])
            own, other = (
                m(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for m in (one, two)
            )
            expected += float((own.exp() * (own - other)).sum(-1).mean())
    assert got == pytest.approx(expected, rel=1e-2)


def test_batches_rotate_over_the_degraded_models() -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    from safegene_edge.training.distil import TrainingExample, rotation
    from safegene_edge.training.settings import Recipe

    harmful = [TrainingExample((n,), (1,), True) for n in range(12)]
    harmless = [[TrainingExample((100 * k + n,), (1,), False) for n in range(6)] for k in (1, 2, 3)]
    epochs = [list(rotation(harmful, harmless, Recipe(batch=4), epoch)) for epoch in range(3)]
    met: dict[int, set[int]] = {}
    for epoch in epochs:
        assert [number for number, _ in epoch[:3]] == [0, 1, 2]
        seen = [x.prompt[0] for _, rows in epoch for x in rows]
        assert sorted(seen) == sorted(x.prompt[0] for x in (*harmful, *chain(*harmless)))
        for number, rows in epoch:
            assert all(x.prompt[0] // 100 == number + 1 for x in rows if not x.harmful)
            for row in rows:
                met.setdefault(row.prompt[0], set()).add(number)
    assert all(met[x.prompt[0]] == {0, 1, 2} for x in harmful)


def test_refusal_openers_are_the_commonest_first_words(module) -> None:
    refusals = importlib.import_module("safegene_edge.training.refusals")
    said = ["I'm sorry, but no."] * 60 + ["I can't help with it"] * 40 + ["What a day"]
    assert refusals.refusal_openers(said) == ("I'm sorry, but", "I can't help")


# -- delta and selection --------------------------------------------------


@pytest.fixture
def planted(tiny: tiny_models.ModelFactory, tmp_path: Path) -> Path:
    """An HF folder of the tiny llama: o_proj differs in layer 1, and a tenth as much elsewhere."""
    import torch

    torch.manual_seed(3)
    changed = tiny("llama").copy_of_model()
    with torch.no_grad():
        for layer, block in enumerate(changed.model.layers):
            weight = block.self_attn.o_proj.weight
            weight.add_(torch.randn_like(weight) * (0.2 if layer == 1 else 0.02))
    changed.save_pretrained(tmp_path / "planted")
    return tmp_path / "planted"


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_delta_of_full_rank_is_the_difference_of_the_weights(
    run, tiny: tiny_models.ModelFactory, tmp_path: Path, arch: str
) -> None:
    from safegene_edge.gguf_file import GGUFFile

    targets = ("qkv_proj",) if arch == "phi3" else ("q_proj", "k_proj", "down_proj")
    other = tiny_models.build(arch, tmp_path / "other", seed=5)
    settings = {"rank": 192, "targets": targets, "select": False, "gene_dtype": "float32"}
    for number, source in enumerate((other.gguf_path, other.hf_dir)):
        gene = run(
            tiny(arch).gguf_path, [source], method="delta", settings=settings,
            folder=tmp_path / f"work-{number}",
        )  # fmt: skip
        assert len(gene.pairs) == 3 * len(targets)
        ours, theirs = GGUFFile(tiny(arch).gguf_path), GGUFFile(other.gguf_path)
        for tensor in gene.pairs:
            expected = ours.floats(tensor) - theirs.floats(tensor)
            assert tiny_models.relative_error(gene.delta(tensor), expected) < 1e-5


def test_delta_of_adapters_is_the_adapters_own_update(
    run, tiny: tiny_models.ModelFactory, tiny_adapter, tmp_path: Path
) -> None:
    from safegene_edge import convert

    adapter = tiny_adapter("llama", target_modules=["q_proj"])
    settings = {"targets": ("q_proj",), "select": False, "gene_dtype": "float32"}
    gene = run(None, [adapter], method="delta", settings=settings)
    lost = convert(adapter, base=tiny("llama").gguf_path)
    for tensor in lost.pairs:
        assert tiny_models.relative_error(gene.delta(tensor), -lost.delta(tensor)) < 1e-5


def test_delta_of_more_than_a_gguf_lora_holds_is_refused(
    run, tiny: tiny_models.ModelFactory, tiny_adapter
) -> None:
    from safegene_edge.errors import UnsupportedError

    adapter = tiny_adapter("llama", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedError, match="dora"):
        run(None, [adapter], method="delta", settings={"targets": ("q_proj",), "select": False})


def test_a_mistral_folder_is_of_a_llama_files_family(
    tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    from safegene_edge.training.models import Source, require_family

    folder = tmp_path / "mistral"
    shutil.copytree(tiny("llama").hf_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    require_family([Source(tiny("llama").gguf_path), Source(folder)])


def test_selection_finds_the_layer_in_which_the_difference_lies(run, planted: Path) -> None:
    gene = run(None, [planted], method="delta", settings={"budget": 600})
    assert gene.layers == (1,)
    assert gene.n_parameters <= 600
    assert max(gene.scores, key=lambda layer: gene.scores[layer]) == 1


def test_gains_are_the_slopes_of_the_share_refused(
    tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    """Against differences of the share, with each layer of a random gene stronger and weaker."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from safegene_edge.runtime.refusal_margin import Openers
    from safegene_edge.training.models import LiveModel, Source
    from safegene_edge.training.refusals import margins
    from safegene_edge.training.select import Gains, layer_gains, strengths
    from safegene_edge.training.settings import Recipe

    recipe, source = Recipe(rank=4, targets=TARGETS, batch=3), Source(tiny("llama").gguf_path)
    live = LiveModel([source], recipe, tmp_path, "float32")
    choice = np.random.default_rng(3)
    with torch.no_grad():
        for name, weight in live.gene_weights().items():
            weight.normal_(0, 0.3 if "lora_B" in name else 0.1)
    kinds = [[tuple(choice.integers(5, 250, n + 3).tolist()) for n in range(5)] for _ in range(2)]
    openers = Openers([(7, 9), (7, 11), (20,)])
    parts = list(layer_gains(live, [source, source], *kinds, openers, recipe))
    assert parts[0] == parts[1] != parts[2] == parts[3]
    gains = Gains.mean(parts)

    def share(prompts: list[tuple[int, ...]], *values: float) -> float:
        scaled = strengths(live, torch.tensor(values))
        with live.as_source(source, gene=True) as model, torch.no_grad(), scaled:
            return float(margins(model, prompts, openers, recipe).sigmoid().mean())

    for prompts, slopes in zip(kinds, (gains.harmful, gains.harmless), strict=True):
        for layer in range(3):
            both = [share(prompts, *(0.5 + step * (n == layer) for n in range(3)))
                    for step in (0.002, -0.002)]  # fmt: skip
            assert slopes[layer] == pytest.approx((both[0] - both[1]) / 0.004, rel=0.02, abs=1e-4)
        assert max(map(abs, slopes.values())) > 1e-3
    assert share(kinds[0], 1, 1, 1) != share(kinds[0], 0, 0, 0)  # and none was left behind:
    with live.as_source(source, gene=True) as model, torch.no_grad():
        own = float(margins(model, kinds[0], openers, recipe).sigmoid().mean())
    assert own == share(kinds[0], 1, 1, 1)


def test_a_layer_that_refuses_everything_ranks_below_one_that_knows_harm(module) -> None:
    from safegene_edge.training.select import Gains

    gains = Gains({0: 0.4, 1: 0.2, 2: 0.01, 3: -0.1}, {0: 0.4, 1: 0.0, 2: 0.0, 3: -0.2})
    scores = gains.scores()
    assert sorted(scores, key=lambda layer: -scores[layer]) == [1, 0, 2, 3]
    assert gains.makes_up((0, 1)) == 1.0  # the others took away
    assert gains.makes_up((1,)) == pytest.approx(0.51 / 0.2)
    assert gains.makes_up((2,)) == 3.0
    assert gains.makes_up((3,)) == 1.0


def test_the_kept_layers_are_strengthened_for_those_left_out(run, tmp_path: Path) -> None:
    settings = {"epochs": 2, "budget": 3_000, "gene_dtype": "float32"}
    few = run(folder=tmp_path / "few", settings=settings)
    whole = run(folder=tmp_path / "whole", settings={**settings, "select": False})
    assert 0 < len(few.layers) < len(whole.layers) == 3
    parts = json.loads((tmp_path / "few" / "gains.json").read_text())
    count = len(parts) // 2
    gains = {layer: sum(part[layer] for part in parts[:count]) / count for layer in parts[0]}
    kept = sum(gains[str(layer)] for layer in few.layers)
    factor = min(3.0, max(1.0, sum(gains.values()) / kept)) if kept > 0 else 1.0
    for tensor in few.pairs:
        assert tiny_models.relative_error(few.delta(tensor), factor * whole.delta(tensor)) < 1e-4


def test_layers_measured_before_a_kill_are_not_measured_again(run, tmp_path: Path) -> None:
    settings, said = {"epochs": 1, "budget": 3_000}, list[str]()
    whole = run(settings=settings)
    file = tmp_path / "work" / "gains.json"
    parts = json.loads(file.read_text())
    assert len(parts) == 4  # two degraded models, two kinds of prompts
    file.write_text(json.dumps(parts[:3]))
    again = run(settings=settings, report=said.append)
    assert [line.split()[1] for line in said if line.startswith("measured")] == ["4/4"]
    assert (again.layers, again.scores) == (whole.layers, whole.scores)
    for text in ("{", "7", "[1]", '[{"a": 1}]', '[{"0": null}]'):
        file.write_text(text)
        with pytest.raises(FileFormatError, match=r"gains\.json: no layers' gains"):
            run(settings=settings)


def test_the_best_layers_are_kept_under_the_budget(module) -> None:
    from safegene_edge.training.select import select

    scores, sizes = {0: 1.0, 1: 3.0, 2: 2.0, 3: 0.5}, {0: 40, 1: 60, 2: 50, 3: 10}
    assert select(scores, sizes, 110) == (1, 2)
    assert select(scores, sizes, 100) == (0, 1)
    assert select(scores, sizes, 10_000) == (0, 1, 2, 3)
    with pytest.raises(SettingError, match="no layer of the gene fits 9"):
        select(scores, sizes, 9)


# -- errors ---------------------------------------------------------------


def test_models_that_do_not_belong_together_are_refused(
    run, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="architecture qwen2, not llama"):
        run(None, [tiny("qwen2").gguf_path])
    with pytest.raises(MismatchError, match="blocks 2, not 3"):
        run(None, [tiny("llama", num_hidden_layers=2).hf_dir])
    with pytest.raises(FileFormatError, match="no model folder"):
        run(None, [tmp_path])
    with pytest.raises(SafeGeneError, match="refuses none of 8"):
        run(refuses=lambda prompt, answer: False)
    with pytest.raises(SettingError, match="method"):
        run(method="magic")
    with pytest.raises(SafeGeneError, match=r"--base MODEL\.gguf"):
        shutil.copytree(tiny("llama").hf_dir, tmp_path / "copy")
        run(tiny("llama").hf_dir, [tmp_path / "copy"])


def test_the_command_writes_a_gene_and_says_in_one_line_what_is_wrong(
    tiny: tiny_models.ModelFactory, planted: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from safegene_edge.cli import cli

    aligned, output = str(tiny("llama").gguf_path), str(tmp_path / "gene.gguf")
    command = ["extract", "--aligned", aligned, "-o", output]
    asked = CliRunner().invoke(cli, command)
    assert asked.exit_code == 2 and "--degrade auto" in asked.output
    wrong = CliRunner().invoke(cli, [*command, "--degraded", str(tiny("qwen2").gguf_path)])
    assert isinstance(wrong.exception, MismatchError)
    good = ["--degraded", str(planted), "--method", "delta", "--no-select", "--family", "Tiny"]
    done = CliRunner().invoke(cli, [*command, *good])
    assert done.exit_code == 0, done.output
    gene = SafetyGene.load(output)
    assert gene.family == "Tiny" and gene.layers == (0, 1, 2)


# -- several processes ----------------------------------------------------

LAUNCHED = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_extract import HARMFUL, HARMLESS, TARGETS, is_harmful
from safegene_edge.training.extract import extract
from safegene_edge.training.settings import ExtractSettings
from safegene_edge.training.processes import Processes

settings = ExtractSettings(**json.loads({settings!r}) | {{"targets": TARGETS}})
gene = extract(
    {aligned!r}, {degraded!r}, folder={folder!r}, settings=settings, refuses=is_harmful,
    harmful=HARMFUL, harmless=HARMLESS,
)
world = Processes.current()
assert world.count == 2
gene.save(Path({folder!r}) / f"gene-{{world.index}}.gguf")
"""


def test_two_processes_learn_what_one_does(
    run, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    """The training examples of a step are shared, and its gradients added up.

    Launched by torch's own launcher, which `accelerate launch` calls for several GPUs; on CPUs
    that command would ask for MPI. Sums in another order and Adam's division by tiny numbers
    keep the result from being exact.
    """
    alone = run()
    single = json.loads((tmp_path / "work" / "run.json").read_text())["settings"]
    folder = tmp_path / "launched"
    script = tmp_path / "launched.py"
    script.write_text(
        LAUNCHED.format(
            tests=str(Path(__file__).parent), aligned=str(tiny("llama").gguf_path),
            degraded=[str(tmp_path / f"degraded-{n}") for n in range(2)], folder=str(folder),
            settings=json.dumps(single),
        )
    )  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    genes = [SafetyGene.load(folder / f"gene-{n}.gguf") for n in range(2)]
    assert genes[0].layers == genes[1].layers == alone.layers
    for name in alone.pairs:
        np.testing.assert_array_equal(genes[0].delta(name), genes[1].delta(name))
        assert tiny_models.relative_error(genes[0].delta(name), alone.delta(name)) < 0.02
