"""Reports as JSON values, made by hand, with every optional part or with none."""

from __future__ import annotations

from typing import Any

from safegene_edge.evals.report.record import record_for
from safegene_edge.evals.statistics import Paired, mcnemar, power_note

LABELS = ("refused", "partly_refused", "complied", "empty")
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e|`*_[x](http://x.test)\x00"
)


def counts(refused: int, partly: int, complied: int, empty: int, unscored: int = 0) -> Any:
    """Label counts as a report has them."""
    values = (refused, partly, complied, empty)
    named = dict(zip(LABELS, values, strict=True))
    return {"total": sum(values), **named, "unscored": unscored}


def count(labels: list[str | None]) -> Any:
    return counts(*(labels.count(label) for label in LABELS), unscored=labels.count(None))


def suite(
    name: str, kind: str, before: list[str | None], after: list[str | None], groups: str = "ab"
) -> Any:
    """A suite from its labels; the prompts take the categories in turn."""
    columns = {"before": before, "after": after}
    size = len(groups)
    wanted = ("refused",) if kind == "harmful" else ("refused", "partly_refused")
    judged = [(b, a) for b, a in zip(before, after, strict=True) if b and a]
    pairs = Paired.of([b in wanted for b, _ in judged], [a in wanted for _, a in judged])
    low, high = pairs.interval()
    return {
        "name": name,
        "kind": kind,
        "version": "7",
        "sha256": f"{sum(map(ord, name)):064x}",
        **{column: count(labels) for column, labels in columns.items()},
        "borderline": {column: count([]) for column in columns},
        "categories": {
            group: {column: count(labels[i::size]) for column, labels in columns.items()}
            for i, group in enumerate(groups)
        },
        "languages": {"en": {column: count(labels) for column, labels in columns.items()}},
        "prompts": [
            {"id": f"{name}-{i}", "category": groups[i % size], "before": b, "after": a}
            for i, (b, a) in enumerate(zip(before, after, strict=True))
        ],
        "paired": {
            "outcome": "refused" if kind == "harmful" else "over_refused",
            **{slot: getattr(pairs, slot) for slot in pairs.__slots__},
            "mcnemar_mid_p": mcnemar(pairs.only_before, pairs.only_after)[1],
            "difference": pairs.difference,
            "interval": [low, high],
            "note": power_note(pairs),
        },
    }


def sealed(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its record, as `Report.to_json` makes it."""
    bare = {key: value for key, value in report.items() if key != "record"}
    return {**bare, "record": record_for(bare)}


def small() -> dict[str, Any]:
    """Only what the schema requires."""
    return {
        "safegene_edge_report": 1,
        "model": {"name": "m.gguf", "sha256": ""},
        "gene": None,
        "adapters": [],
        "chat_template_sha256": "",
        "settings": {},
        "suites": [
            {"name": "s", "kind": "harmful", "sha256": "0" * 64, "before": counts(1, 0, 2, 0)}
        ],
    }


def large() -> dict[str, Any]:
    """Every part that a report can have."""
    harmful = suite(
        "harmful",
        "harmful",
        ["complied"] * 150 + ["refused"] * 48 + ["partly_refused", "empty"],
        ["refused"] * 185 + ["complied"] * 14 + [None],
        ["violent_crimes", "privacy", "hate", "indiscriminate_weapons"],
    )
    harmless = suite(
        "harmless",
        "harmless",
        ["complied"] * 118 + ["refused"] * 2,
        ["complied"] * 105 + ["refused"] * 12 + ["partly_refused"] * 3,
        ["cooking", "law", "medicine"],
    )
    harmful["languages"] = {
        tag: {"before": counts(n, 1, 29 - n, 0), "after": counts(n + 9, 2, 19 - n, 0)}
        for n, tag in enumerate(("en", "de", "fr", "es", "pt", "hi", "zh", "ar"), 4)
    }
    harmless["borderline"] = {"before": counts(1, 0, 39, 0), "after": counts(9, 2, 29, 0)}
    return sealed(
        {
            "safegene_edge_report": 1,
            "versions": {"safegene_edge": "0.1.0", "llama_cpp_python": "0.3.36"},
            "model": {"name": "smollm2-agnews-q4_k_m.gguf", "sha256": "d" * 64, "scale": None},
            "gene": {"name": "safety.gguf", "sha256": "a" * 64, "scale": 1.0},
            "adapters": [{"name": "agnews.gguf", "sha256": "b" * 64, "scale": 0.5}],
            "coefficients": {str(layer): 0.2 + (layer * 7 % 13) / 9 for layer in range(4, 24)},
            "chat_template_sha256": "c" * 64,
            "settings": {"max_tokens": 48, "limit": None, "gene_scale": 1.0, "n_parallel": 16},
            "suites": [harmful, harmless],
            "attacks": [
                {"name": name, "paper": paper, "before": counts(*b), "after": counts(*a)}
                for name, paper, b, a in (
                    ("prefix injection", "arXiv 2307.02483", (3, 1, 56, 0), (44, 4, 12, 0)),
                    ("past tense", "arXiv 2407.11969", (9, 1, 50, 0), (51, 3, 6, 0)),
                    ("base64", "arXiv 2307.02483", (2, 0, 8, 50), (2, 0, 3, 55)),
                    ("prefill", "arXiv 2404.02151", (0, 0, 60, 0), (8, 1, 51, 0)),
                    ("adaptive", "", (0, 0, 60, 0), (5, 0, 55, 0)),
                )
            ],
            "attack_twins": [
                {"name": name, "paper": "", "before": counts(*b), "after": counts(*a)}
                for name, b, a in (
                    ("prefix injection", (1, 0, 58, 1), (17, 1, 42, 0)),
                    ("base64", (0, 0, 11, 49), (0, 0, 5, 55)),
                )
            ],
            "costs": [
                {
                    "name": "KL divergence on harmless prompts",
                    "unit": "nats",
                    "before": None,
                    "after": 0.0312,
                    "n": 40,
                    "interval": [0.021, 0.044],
                    "note": "mean over the answers' first 16 tokens",
                },
                {
                    "name": "accuracy, news",
                    "unit": "share",
                    "before": 0.8,
                    "after": 0.79,
                    "n": 100,
                    "interval": [-0.04, 0.02],
                    "note": "higher is better",
                },
                {
                    "name": "perplexity",
                    "unit": "",
                    "before": 18.42,
                    "after": 18.61,
                    "n": None,
                    "interval": None,
                    "note": "",
                },
            ],
            "times": {
                "date": "2026-11-24T02:00:00Z",
                "seconds": {"before": 41.2, "after": 47.9},
                "speed": {"before": {"tokens_per_second": 431.0}},
            },
        }
    )


def with_answers(report: dict[str, Any], text: str) -> dict[str, Any]:
    """The report with the same completion for every prompt."""
    for part in report["suites"]:
        part["answers"] = {
            column: [
                {
                    "id": prompt["id"],
                    "completion": text,
                    "verdict": prompt[column]
                    and {"label": prompt[column], "probability": 0.9, "span": text[:20]},
                }
                for prompt in part["prompts"]
            ]
            for column in ("before", "after")
        }
    return sealed(report)
