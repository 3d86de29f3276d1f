"""The training prompts are what they claim to be, and the recipe learns on a tiny model."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import tiny as tiny_models

from safegene_edge.errors import FileFormatError, SettingError
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.settings import BUILT_IN
from safegene_edge.prompts import Prompt, harmful_prompts, harmless_prompts
from safegene_edge.recalibrate.examples import Examples
from safegene_edge.training.corpus import (
    refusal,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NEAR = 0.35  # of the shorter prompt's word 5-grams


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def fivegrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 5]) for start in range(len(found) - 4)}


def near_copies(ours: list[str], others: list[str]) -> list[tuple[str, str]]:
    """Pairs that are equal but for case and punctuation, or share many word 5-grams."""
    grams = [(text, words(text), fivegrams(text)) for text in ours]
    found = []
    for other in others:
        other_words, other_grams = words(other), fivegrams(other)
        for text, own_words, own_grams in grams:
            shorter = min(len(own_grams), len(other_grams))
            close = shorter and len(own_grams & other_grams) / shorter >= NEAR
            if close or own_words == other_words:
                found.append((text, other))
    return found


def all_prompts() -> list[str]:
    return [prompt.text for prompt in (*harmful_prompts(), *harmless_prompts())]


def benchmark_prompts() -> Iterator[str]:
    with (SHARED / "advbench.csv").open(newline="", encoding="utf-8") as file:
        yield from (row["goal"] for row in csv.DictReader(file))
    with (SHARED / "harmbench_text.csv").open(newline="", encoding="utf-8") as file:
        yield from (row["Behavior"] for row in csv.DictReader(file))
    yield from (SHARED / "malicious_instruct.txt").read_text(encoding="utf-8").splitlines()


# -- the prompts ----------------------------------------------------------


def test_a_near_copy_is_found() -> None:
    ours = ["Please, how do I stop a rat from eating the wires in my attic?"]
    assert near_copies(ours, ["How do I stop a rat from eating the wires?"])
    assert not near_copies(ours, ["How do I stop a car from rusting in winter?"])


def test_no_prompt_is_a_near_copy_of_a_benchmark() -> None:
    if not SHARED.exists():
        pytest.skip(f"the benchmarks are not at {SHARED}")
    assert near_copies(all_prompts(), list(benchmark_prompts())) == []


def test_no_prompt_is_a_near_copy_of_the_projects_own_suites() -> None:
    suites = chain.from_iterable(load_suite(name) for name in BUILT_IN)
    measured = [prompt.text for suite in suites for prompt in suite.prompts]
    assert len(measured) > 100
    assert near_copies(all_prompts(), measured) == []


def test_no_prompt_is_a_near_copy_of_a_calibration_example() -> None:
    """A gene refuses what it has learnt from more readily: its coefficients would be too small."""
    both = Examples.every_shipped()
    examples = [prompt.text for prompt in (*both.harmful, *both.harmless)]
    suites = chain.from_iterable(load_suite(name) for name in BUILT_IN)
    measured = [prompt.text for suite in suites for prompt in suite.prompts]
    assert near_copies(all_prompts(), examples) == near_copies(examples, measured) == []
    if SHARED.exists():
        assert near_copies(examples, list(benchmark_prompts())) == []


def test_refusals_are_short_varied_and_open_alike() -> None:
    refusals = [refusal(prompt) for prompt in harmful_prompts()]
    assert all(text.startswith(("I'm sorry, but I can't help with", "I can't help with"))
               for text in refusals)  # fmt: skip
    assert all(len(words(text)) <= 45 for text in refusals)
    assert not any("{" in text for text in refusals)
    assert len(set(refusals)) > 400  # wordings do not grow with the prompts


def test_a_refusal_depends_on_prompt_and_seed_alone() -> None:
    prompt = harmful_prompts()[0]
    assert refusal(prompt, 1) == refusal(prompt, 1)
    assert len({refusal(prompt, seed) for seed in range(20)}) > 5


# -- the recipe, on a tiny random model -----------------------------------

HARMFUL = [Prompt(str(n), f"Help me to rob house {n}", "non_violent_crimes") for n in range(4)]
HARMLESS = [
    Prompt(str(n), f"How high is hill {n}?", trap="definition" if n % 2 == 0 else "")
    for n in range(4)
]


@pytest.fixture
def parts(tiny: tiny_models.ModelFactory):
    """Recipe, examples and a fresh PEFT model of the tiny llama."""
    from safegene_edge.runtime.llama import SafeLlama
    from safegene_edge.training import recipe as module

    recipe = module.Recipe(
        rank=4, targets=("q_proj", "down_proj"), epochs=12, batch=4, learning_rate=2e-2,
        refusal_tokens=24, kept_tokens=8,
    )  # fmt: skip
    base = tiny("llama").gguf_path
    llama = SafeLlama(base, n_ctx=256)
    examples = [
        *module.refusal_examples(llama, HARMFUL, recipe),
        *module.own_answer_examples(llama, HARMLESS, recipe),
    ]
    llama.close()
    model = module.add_lora(module.load_base(base, "float32"), recipe)
    return module, recipe, examples, model


def test_log_probabilities_are_those_of_one_plain_pass(parts) -> None:
    """Padding and the prefix that is computed once must not show."""
    import torch

    from safegene_edge.training import loss

    _, recipe, examples, model = parts
    mixed = [loss.Example(e.prompt, e.answer[: 3 + n], True) for n, e in enumerate(examples[:4])]
    assert loss.shared_prefix(mixed) >= 4
    with torch.no_grad():
        logs, target, weights = loss.log_probabilities(model, mixed, recipe)
        for row, example in enumerate(mixed):
            plain = model(input_ids=torch.tensor([[*example.prompt, *example.answer]])).logits
            start, count = len(example.prompt), len(example.answer)
            expected = plain[0, start - 1 : start + count - 1].log_softmax(-1)
            assert torch.allclose(logs[row, :count], expected, atol=1e-4)
            assert target[row, :count].tolist() == list(example.answer)
            assert (weights[row, :count] > 0).all() and not weights[row, count:].any()


def test_an_adapter_that_has_learnt_nothing_costs_no_kl(parts) -> None:
    module, recipe, examples, model = parts
    before = module.measure(model, examples, recipe)
    assert before.refusal > 1
    assert before.kept == pytest.approx(0, abs=1e-6)


def test_training_lowers_the_loss_and_the_folder_moves_llama_cpp_to_refuse(
    parts, tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    from safegene_edge import convert
    from safegene_edge.runtime.engine import Engine
    from safegene_edge.runtime.llama import SafeLlama

    module, recipe, examples, model = parts
    before = module.measure(model, examples, recipe)
    lines: list[str] = []
    losses = module.train(model, examples, recipe, lines.append)
    after = module.measure(model, examples, recipe)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert after.refusal < 0.7 * before.refusal
    assert lines and "loss" in lines[-1]

    folder = module.save(model, tmp_path / "adapter", "tiny")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    base = tiny("llama").gguf_path
    convert(folder, base=base, output=tmp_path / "gene.gguf")
    llama = SafeLlama(base, n_ctx=256)
    handle = llama.attach(tmp_path / "gene.gguf")
    harmful = [example for example in examples if example.harmful]
    asked = ([e.prompt for e in harmful], [e.answer for e in harmful])
    with Engine(llama) as engine:
        bare = sum(float(row.sum()) for row in engine.score(*asked, adapters={}))
        safe = sum(float(row.sum()) for row in engine.score(*asked, adapters={handle: 1.0}))
    llama.close()
    assert safe > bare + 10


def test_training_twice_gives_the_same_losses(parts, tiny: tiny_models.ModelFactory) -> None:
    module, recipe, examples, model = parts
    again = module.add_lora(module.load_base(tiny("llama").gguf_path, "float32"), recipe)
    assert module.train(model, examples, recipe) == module.train(again, examples, recipe)


def test_every_epoch_sees_every_example_once(parts) -> None:
    module, recipe, examples, _ = parts
    batches = list(module.batches(examples, recipe, 0))
    assert Counter(chain.from_iterable(batches)) == Counter(examples)
    assert all(0 < sum(e.harmful for e in batch) < len(batch) for batch in batches)


def test_settings_that_make_no_sense_are_refused() -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    from safegene_edge.training.recipe import load_base
    from safegene_edge.training.settings import Recipe

    with pytest.raises(SettingError, match="rank is 0"):
        Recipe(rank=0)
    with pytest.raises(SettingError, match="target"):
        Recipe(targets=())
    with pytest.raises(FileFormatError, match=r"absent\.gguf"):
        load_base("absent.gguf")


def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    from safegene_edge.training.recipe import main

    wrong = tmp_path / "words.gguf"
    wrong.write_text("not a model")
    assert main(["--base", str(wrong), "--output", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"Error: .*words\.gguf.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
