"""Every mistake of the user: exit code 2, one line with cause and remedy, no output left."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace

import numpy as np
import peft_mistakes  # noqa: F401 - its mistakes join the list
import pytest
from adapters import random_adapter
from mistakes import CASES, Case, case, first_pair

from safegene_edge.cli import main
from safegene_edge.gene import INVOCATION, Adapter, Pair
from safegene_edge.gguf_file import write_gguf

# -- the base and the gene -------------------------------------------------


def foreign(c):
    random_adapter(c.tiny("qwen2").gguf_path, family="another").save(c.gene)
    return c.gene


@case("'qwen2'")
def wrong_architecture(c):
    return c.evaluate(foreign(c))


@case("gene.gguf does not fit")
def restoring_with_a_gene_of_another_family(c):
    return ["restore", c.model, "--gene", foreign(c), "-o", c.output]


@case("gene.gguf: is also an input")
def restoring_over_the_gene(c):
    return ["restore", c.model, "--gene", c.gene, "-o", c.gene]


@case("gene.gguf does not fit")
def recalibrating_a_gene_of_another_family(c):
    return ["recalibrate", c.model, foreign(c), "-o", c.output]


@case("64×32")
def wrong_family_size(c):
    name, pair = first_pair(c)
    return c.evaluate_pairs({name: Pair(pair.a[:, :32], pair.b)})


@case("no such tensor")
def layer_that_the_model_has_not(c):
    _, pair = first_pair(c)
    return c.evaluate_pairs({"blk.77.attn_q.weight": pair})


@case("rank 4 in lora_a and 3")
def rank_mismatch(c):
    name, pair = first_pair(c)
    return c.evaluate_pairs({name: Pair(pair.a, pair.b[:, :3])})


@case("lacks its lora_b")
def missing_half(c):
    name, pair = first_pair(c)
    facts = {"general.type": "adapter", "adapter.type": "lora"}
    write_gguf(c.gene, "llama", facts, [(f"{name}.lora_a", pair.a)])
    return c.evaluate()


@case("NaN")
def nan_in_a_gene(c):
    name, pair = first_pair(c)
    return c.evaluate_pairs({name: Pair(pair.a, pair.b * np.nan)})


@case("logits did not move")
def gene_that_does_nothing(c):
    name, pair = first_pair(c)
    return c.evaluate_pairs({name: Pair(pair.a, pair.b * 0)})


@case("truncated")
def truncated_model(c):
    c.model.write_bytes(c.model.read_bytes()[:-200_000])
    return c.evaluate()


@case("truncated")
def truncated_gene(c):
    c.gene.write_bytes(c.gene.read_bytes()[:2000])
    return c.evaluate()


@case("empty")
def zero_length_model(c):
    c.model.write_bytes(b"")
    return c.evaluate()


@case("empty")
def zero_length_gene(c):
    c.gene.write_bytes(b"")
    return c.evaluate()


@case("not a GGUF file")
def text_file_named_gguf(c):
    c.gene.write_text("This is no gene.\n" * 50)
    return c.evaluate()


@case("but a pointer of Git LFS. Download the file itself")
def pointer_named_gguf(c):
    c.model.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return c.evaluate()


@case("but a PyTorch checkpoint. Convert it")
def pickled_model(c):
    c.model.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    return c.evaluate()


@case("no such file. Check the path")
def missing_gene(c):
    return c.evaluate(c.folder / "nowhere.gguf")


@case("/gene.gguf?")
def misspelt_gene(c):
    return c.evaluate(c.folder / "gnee.gguf")


@case("There is no folder")
def gene_in_a_folder_that_is_not_there(c):
    return c.evaluate(c.folder / "nowhere" / "gene.gguf")


@case("line 1 is no example")
def examples_without_a_kind(c):
    path = c.folder / "examples.jsonl"
    path.write_text('{"prompt": "How do I sing?"}\n')
    return ["recalibrate", c.model, c.gene, "--examples", path, "-o", c.output]


@case("kl_budget is -1")
def negative_kl_budget(c):
    return ["recalibrate", c.model, c.gene, "--kl-budget", "-1", "-o", c.output]


def merged(c, *more):
    return ["merge", c.model, c.gene, "-o", c.output, *more]


@case("give -o")
def merging_without_an_output(c):
    return ["merge", c.model, c.gene]


@case("'qwen2'")
def merging_another_architecture(c):
    random_adapter(c.tiny("qwen2").gguf_path).save(c.gene)
    return merged(c)


@case("blk.77.attn_q.weight")
def merging_a_pair_that_has_no_tensor(c):
    _, pair = first_pair(c)
    Adapter("llama", 4.0, {**c.adapter.pairs, "blk.77.attn_q.weight": pair}).save(c.gene)
    return merged(c)


@case("is also an input")
def merging_onto_the_model(c):
    return ["merge", c.model, c.gene, "-o", c.model]


@case("is also an input")
def merging_onto_the_adapter(c):
    return ["merge", c.model, c.gene, "-o", c.gene]


@case("lora_b' holds NaN")
def merging_nan(c):
    name, pair = first_pair(c)
    Adapter("llama", 4.0, {name: Pair(pair.a, pair.b * np.nan)}).save(c.gene)
    return merged(c)


@case("is not finite")
def merging_what_overflows(c):
    name, pair = first_pair(c)
    Adapter("llama", 4.0, {name: Pair(pair.a * 1e30, pair.b * 1e30)}).save(c.gene)
    return merged(c)


@case("neither a scale nor")
def merging_with_a_scale_that_is_none(c):
    return ["merge", c.model, f"{c.gene}=much", "-o", c.output]


@case("the scale is nan")
def merging_with_a_scale_of_nan(c):
    return ["merge", c.model, f"{c.gene}=nan", "-o", c.output]


@case("promote is -1")
def promoting_fewer_than_none(c):
    return merged(c, "--promote", "-1")


@case("is no importance matrix")
def an_importance_matrix_that_is_none(c):
    return merged(c, "--imatrix", c.model)


@case("does not exist")
def merging_into_a_missing_folder(c):
    return ["merge", c.model, c.gene, "-o", c.folder / "none" / "out.gguf"]


@case("'qwen2'")
def exporting_another_architecture(c):
    random_adapter(c.tiny("qwen2").gguf_path).save(c.gene)
    (c.folder / "there").mkdir()
    return ["export", "ollama", c.model, c.gene, "-o", c.folder / "there"]


@case("give -o")
def recalibration_without_an_output(c):
    return ["recalibrate", c.model, c.gene]


@case("gene.gguf: is also an input")
def gene_as_its_own_expression(c):
    return ["recalibrate", c.model, c.gene, "-o", c.gene]


@case("is a folder")
def folder_as_model(c):
    return ["eval", c.folder, "--json", c.output]


@case("safegene-edge convert")
def peft_folder_as_gene(c):
    return c.evaluate(c.peft)


@case("safegene-edge convert")
def peft_folder_as_an_adapter_to_merge(c):
    return ["merge", c.model, c.peft, "-o", c.output]


@case("safegene-edge convert")
def peft_folder_to_recalibrate(c):
    return ["recalibrate", c.model, c.peft, "-o", c.output]


@case("is of the type 'model', not a LoRA")
def model_as_gene(c):
    return c.evaluate(c.model)


@case("is of the type 'adapter', not a model")
def gene_as_model(c):
    return ["eval", c.gene, "--json", c.output]


@case("suite")
def unknown_suite(c):
    return ["eval", c.model, "--suite", "nonesuch", "--json", c.output]


@case("does not exist")
def output_in_no_folder(c):
    return ["eval", c.model, "--json", c.folder / "no" / "out.json"]


@case("also an input")
def report_over_the_gene(c):
    return ["eval", c.model, "--gene", c.gene, "--json", c.gene]


@case("max-tokens")
def senseless_option(c):
    return ["eval", c.model, "--max-tokens", "0", "--json", c.output]


@case("'FILE'")
def missing_argument(c):
    return ["inspect"]


@case("No such command")
def unknown_command(c):
    return ["improve", c.model]


@case("unknown tool")
def export_without_the_tool(c):
    return ["export", c.model, c.gene, "-o", c.folder / "new"]


@case("Give a gene after --gene")
def gene_without_its_option(c):
    return ["chat", c.model, c.gene]


# -- aLoRAs: meant to be on behind certain tokens alone -------------------


def alora(c):
    known = {"extra": {INVOCATION: [5, 9]}, "types": {INVOCATION: 4}}
    replace(c.adapter, **known).save(c.gene)
    return c.gene


@case("is an aLoRA")
def an_alora_as_a_gene(c):
    return c.evaluate(alora(c))


@case("is an aLoRA")
def merging_an_alora(c):
    return ["merge", c.model, alora(c), "-o", c.output, "--plain"]


@case("is an aLoRA")
def merging_an_alora_beside_another(c):
    c.adapter.save(c.folder / "other.gguf")
    return ["merge", c.model, c.folder / "other.gguf", alora(c), "-o", c.output]


@case("is an aLoRA")
def exporting_an_alora(c):
    (c.folder / "there").mkdir()
    return ["export", "ollama", c.model, alora(c), "-o", c.folder / "there"]


@case("is an aLoRA")
def exporting_an_alora_merged(c):
    (c.folder / "there").mkdir()
    return ["export", "lm-studio", c.model, alora(c), "-o", c.folder / "there"]


@case("is an aLoRA")
def an_alora_to_peft(c):
    return ["to-peft", alora(c), "--base", c.model, "-o", c.folder / "new"]


@case("is an aLoRA")
def recalibrating_an_alora(c):
    return ["recalibrate", c.model, alora(c), "-o", c.output]


@case("is an aLoRA")
def chatting_with_an_alora(c):
    return ["chat", c.model, "--gene", alora(c)]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gives_one_line_and_no_output(
    name, tmp_path, tiny, tiny_adapter, monkeypatch, capfd
):
    build, expected = CASES[name]
    made = Case(tmp_path, tiny, tiny_adapter)
    arguments = [str(argument) for argument in build(made)]
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["safegene-edge", *arguments])
    capfd.readouterr()  # what building the inputs printed
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capfd.readouterr()
    assert stopped.value.code == 2
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert contents(tmp_path) == before


def test_there_are_enough():
    assert len(CASES) >= 25


def test_an_unwritable_output_folder(tmp_path, tiny, tiny_adapter, monkeypatch, capfd):
    """A file where a folder is needed: holds for root too, whom permissions do not stop."""
    made = Case(tmp_path, tiny, tiny_adapter)
    capfd.readouterr()
    arguments = [*made.convert()[:-1], made.gene / "out.gguf"]
    monkeypatch.setattr(sys, "argv", ["safegene-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
