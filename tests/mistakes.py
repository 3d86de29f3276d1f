"""Mistakes of a user on the command line, by name: what is typed, and what the one line names."""

from __future__ import annotations

import json
import shutil

from adapters import random_adapter
from safetensors.numpy import load_file, save_file

from safegene_edge.gene import Adapter


class Case:
    """A folder with a good model, adapter and PEFT folder, for one mistake at a time."""

    def __init__(self, folder, tiny, tiny_adapter):
        self.folder = folder
        self.output = folder / "out.gguf"
        self.model = folder / "model.gguf"
        shutil.copy(tiny("llama").gguf_path, self.model)
        self.gene = folder / "gene.gguf"
        self.adapter = random_adapter(self.model)
        self.adapter.save(self.gene)
        self.peft = folder / "peft"
        shutil.copytree(tiny_adapter("llama"), self.peft)
        self.tiny, self.tiny_adapter = tiny, tiny_adapter

    def convert(self, **changes):
        """`convert` of the PEFT folder, its config changed."""
        path = self.peft / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return ["convert", self.peft, "--base", self.model, "-o", self.output]

    def convert_tensors(self, change):
        """`convert` of the PEFT folder, its tensors changed by a function."""
        path = self.peft / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return self.convert()

    def evaluate(self, gene=None):
        return ["eval", self.model, "--gene", gene or self.gene, "--json", self.output]

    def evaluate_pairs(self, pairs, architecture="llama"):
        """`eval` with a gene of other pairs."""
        Adapter(architecture, 4.0, pairs).save(self.gene)
        return self.evaluate()


def first_pair(case):
    name = next(iter(case.adapter.pairs))
    return name, case.adapter.pairs[name]


def first_key(tensors, half="lora_A"):
    return next(key for key in tensors if half in key)


CASES = {}


def case(expected):
    def register(build):
        CASES[build.__name__] = (build, expected)
        return build

    return register
