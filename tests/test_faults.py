"""A few faults in every command that writes; bench/faults does thousands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fault_inputs
import faults
import pytest
import tiny as tiny_models

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="forks, and looks at /proc: Linux alone"
)


@pytest.fixture(scope="module")
def trials(tiny, tiny_adapter, quantised, tmp_path_factory):
    """In a process that has run neither torch nor llama.cpp, since it forks."""
    folder = tmp_path_factory.mktemp("faults")
    shape = {"num_hidden_layers": 5, "max_position_embeddings": 2048}
    model, peft = tiny("llama", **shape), folder / "peft"
    tiny_models.build_adapter(model, peft)
    fault_inputs.build(folder / "in", model.gguf_path, quantised(), peft)
    run = subprocess.run(
        [sys.executable, faults.__file__, folder / "in", folder / "work"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("command", [*faults.QUICK, *faults.SLOW])
def test_a_fault_leaves_all_whole_and_says_one_line(command, trials):
    mine = [trial for trial in trials if trial["command"] == command]
    assert any(trial["hit"] for trial in mine)
    assert not [trial for trial in mine if trial["problems"]]
