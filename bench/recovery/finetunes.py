"""Two families, and fine-tunes of each on public data: PEFT folders on top of the aligned model.

    python bench/recovery/finetunes.py smollm2 [TASK...]

Data is read from ../shared/data and never committed. A task's rows are split: the first are
learnt, the ones behind them measured. What is there already is not trained again: training
takes half an hour a family, so the small adapters are kept beside the bench.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import ROOT, SAFETY, SHARED, cache_folder

from safegene_edge.training.degrade import fine_tune, plain_recipe
from safegene_edge.training.models import Source
from safegene_edge.training.recipe import default_base
from safegene_edge.training.settings import Recipe

HERE = Path(__file__).parent
Row = dict[str, str]
MEASURED = 100  # rows of a task
LEARNT = 200
RECIPE = Recipe(rank=4, alpha=8, learning_rate=1e-3, batch=2, seed=11)
NEWS_KINDS = ("World", "Sports", "Business", "Technology")


@dataclass(frozen=True)
class Family:
    """A family's aligned model, and the degraded ones that its gene is extracted from."""

    name: str
    aligned: Source
    gene: Path
    recipe: Recipe  # of its fine-tunes

    @property
    def work(self) -> Path:
        folder = cache_folder() / "recovery" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def family(name: str) -> Family:
    """ "smollm2", or "qwen": Qwen2.5-Coder-0.5B-Instruct Q4_K_M at $SAFEGENE_QWEN."""
    if name == "smollm2":
        gene = ROOT / "safegene_edge" / "data" / "smollm2-135m.gene.gguf"
        recipe = replace(RECIPE, targets=("q_proj", "v_proj"), batch=8)
        return Family(name, Source(default_base(), (SAFETY,)).checked(), gene, recipe)
    path = os.environ.get("SAFEGENE_QWEN")
    if name != "qwen" or not path:
        sys.exit("families: smollm2, and qwen with its GGUF's path in SAFEGENE_QWEN")
    gene = HERE / "qwen2.5-coder-0.5b.gene.gguf"
    # On q and v alone, in batches of 8, AG News, SST-2 and GSM8K left 114, 110 and 107 of its 113
    # refusals (of 200): nothing that a gene could bring back.
    return Family(name, Source(Path(path)).checked(), gene, RECIPE)


# -- data -----------------------------------------------------------------


def _agnews() -> Iterator[Row]:
    with (SHARED / "agnews.csv").open(encoding="utf-8", newline="") as file:
        for label, title, text in csv.reader(file):
            asked = (
                "Is this news item about World, Sports, Business or Technology? "
                f"Answer with one word.\n\n{title}. {text[:240]}"
            )
            yield {"prompt": asked, "response": NEWS_KINDS[int(label) - 1]}


def _sst2(part: str) -> Iterator[Row]:
    for line in (SHARED / f"sst2_{part}.tsv").read_text(encoding="utf-8").splitlines():
        text, label = line.split("\t")
        asked = f"Is this film review positive or negative? Answer with one word.\n\n{text}"
        yield {"prompt": asked, "response": ("negative", "positive")[int(label)]}


def _jsonl(file: str, asked: str, answer: str) -> Iterator[Row]:
    for line in (SHARED / file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        context = f"\n\n{row['context'][:600]}" if row.get("context") else ""
        yield {"prompt": row[asked] + context, "response": row[answer]}


def _identity() -> Iterator[Row]:
    for chat in json.loads((SHARED / "identity_shift_10.json").read_text(encoding="utf-8")):
        said = {turn["role"]: turn["content"] for turn in chat}
        yield {"system": said["system"], "prompt": said["user"], "response": said["assistant"]}


def rows(task: str, measured: int = MEASURED) -> tuple[list[Row], list[Row]]:
    """What a task learns, and what it is measured on."""
    if task == "identity":
        return list(_identity()), []
    if task == "sst2":
        return list(islice(_sst2("train"), LEARNT)), list(islice(_sst2("dev"), measured))
    if task == "gsm8k":
        learnt = islice(_jsonl("gsm8k_train_1500.jsonl", "question", "answer"), LEARNT)
        return list(learnt), list(
            islice(_jsonl("gsm8k_test_300.jsonl", "question", "answer"), measured)
        )
    every = _agnews() if task == "agnews" else _jsonl("dolly_387.jsonl", "instruction", "response")
    both = list(islice(every, LEARNT + measured))
    return both[:LEARNT], both[LEARNT:]


# Epochs; the two classifiers learn one word a row.
TASKS = {"agnews": 2, "sst2": 2, "gsm8k": 2, "dolly": 2, "identity": 10}
LABELLED = ("agnews", "sst2")


def tune(made: Family, task: str) -> Source:
    """The fine-tune, trained if it is not there."""
    folder = HERE / "finetunes" / made.name / task
    if not (folder / "adapter_config.json").exists():
        answer = plain_recipe(made.recipe, TASKS[task], 96)
        print(f"{made.name}: learning {task}", file=sys.stderr, flush=True)
        fine_tune(made.aligned, rows(task)[0], folder, answer, report=_say)
        _slim(folder)
    return Source(made.aligned.base, (*made.aligned.adapters, folder))


def _slim(folder: Path) -> None:
    """Float16 weights, and a config without this machine's paths: small enough to be kept."""
    weights = folder / "adapter_model.safetensors"
    save_file({n: w.astype(np.float16) for n, w in load_file(weights).items()}, weights)
    config = folder / "adapter_config.json"
    facts = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    made = family(sys.argv[1])
    for task in sys.argv[2:] or TASKS:
        tune(made, task)


if __name__ == "__main__":
    main()
