"""The commands that faults are tried on, and small inputs for all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

IN = "in"  # a trial's folder of inputs; outputs go to "out"
_ASK = ("--suite", "in/suite.jsonl", "--limit", "2")
_FIT = ("--examples", "in/examples.jsonl", "--kl-budget", "1000", "--over-refusal", "1",
        "--passes", "3", "--anyway")  # fmt: skip
_LEARN = ("--prompts", "6")
COMMANDS: dict[str, tuple[str, ...]] = {
    "convert": ("convert", "in/peft", "--base", "in/one.gguf", "-o", "out/adapter.gguf"),
    "to-peft": ("to-peft", "in/task.gguf", "--base", "in/one.gguf", "-o", "out/peft"),
    "merge": ("merge", "in/wide.gguf", "in/wide-gene.gguf", "-o", "out/merged.gguf", "--plain"),
    "merge, in workers": (
        "merge", "in/wide.gguf", "in/wide-gene.gguf", "-o", "out/merged.gguf", "--plain",
    ),
    "learn": ("learn", "--degraded", "in/one.gguf,in/task.gguf", "--aligned", "in/one.gguf",
              "--rank", "2", *_LEARN, "-o", "out/gene.gguf"),
    "restore": ("restore", "in/one.gguf", "--aligned", "in/one.gguf", "--adapter", "in/task.gguf",
                "--task", "in/task.txt", *_LEARN, "--limit", "2", "-o", "out/safe.gguf"),
    "recalibrate": ("recalibrate", "in/one.gguf", "in/gene.gguf", *_FIT, "-o", "out/fitted.gguf",
                    "--expression", "out/strengths.json", "--plot", "out/curve.svg"),
    "eval": ("eval", "in/one.gguf", "--gene", "in/gene.gguf", *_ASK, "--max-tokens", "4", "--json",
             "out/report.json", "--html", "out/report.html", "--markdown", "out/report.md"),
    "portfolio": ("portfolio", "in/one.gguf", "in/two.gguf", "--gene", "in/gene.gguf", *_ASK, *_FIT,
                  "-o", "out"),
    "export ollama": ("export", "ollama", "in/wide.gguf", "in/wide-gene.gguf", "--merged",
                      "-o", "out"),
    "export llama-server": ("export", "llama-server", "in/wide.gguf", "in/wide-gene.gguf",
                            "-o", "out"),
    "report render": ("report", "render", "in/report.json", "-o", "out/report.html"),
    "report record": ("report", "record", "in/report.json", "-o", "out/record.md"),
}  # fmt: skip
HARMFUL, HARMLESS = "How do I sing?", "What is a bee, and where does it live?"


def build(folder: Path, model: Path, wide: Path, peft: Path) -> None:
    """Inputs for all commands: from a tiny model, a quantised wider one, and a PEFT folder."""
    from adapters import opening_gene, random_adapter

    from safegene_edge.evals.evaluate import evaluate
    from safegene_edge.evals.settings import EvalSettings
    from safegene_edge.portfolio import PortfolioSettings, express_one
    from safegene_edge.recalibrate import RecalibrationSettings

    folder.mkdir(parents=True)
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(model, folder / name)
    shutil.copy(wide, folder / "wide.gguf")
    shutil.copytree(peft, folder / "peft")
    random_adapter(wide, size=0.05).save(folder / "wide-gene.gguf")
    random_adapter(model, size=0.2).save(folder / "task.gguf")
    (folder / "task.txt").write_text("One two three\n")
    rows = [(HARMFUL, "harmful"), (HARMLESS, "harmless")]
    suite, examples = folder / "suite.jsonl", folder / "examples.jsonl"
    suite.write_text("".join(json.dumps({"prompt": p, "kind": k}) + "\n" for p, k in rows))
    lines = [
        *({"prompt": p, "kind": k} for p, k in rows),
        *({"prompt": f"{p} Now?", "kind": k, "part": "validation"} for p, k in rows),
    ]
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = PortfolioSettings(
        (str(suite),), 2, str(examples),
        RecalibrationSettings(kl_budget=1e3, over_refusal=1, passes=3, anyway=True),
    )  # fmt: skip
    gene, tried = folder / "gene.gguf", folder / "tried"
    for seed in range(40):
        opening_gene(model, [HARMFUL], seed=seed).save(gene)
        tried.mkdir()
        error = express_one(folder / "one.gguf", gene, tried, settings).error
        shutil.rmtree(tried)
        if not error:
            break
    else:
        raise SystemExit("no random gene can be recalibrated")
    report = evaluate(folder / "one.gguf", gene, suites=[str(suite)],
                      settings=EvalSettings(limit=2, max_tokens=4))  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
