"""Train the judge's linear model.

    python bench/judge/train.py features TEXTS.jsonl   # labelled completions -> features.jsonl.gz
    python bench/judge/train.py fit                    # features.jsonl.gz -> the judge's weights

The texts are not in this repository: many answer harmful prompts. What is, is each text's
label and its hashed features, from which `fit` gives the same weights again.
A line of TEXTS.jsonl: source, kind, category, prompt, completion, label, part.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from safegene_edge.evals.judge import model as judge_model  # noqa: E402
from safegene_edge.evals.judge import verdict as judging  # noqa: E402
from safegene_edge.evals.judge.normalise import normalise  # noqa: E402
from safegene_edge.files import write_text  # noqa: E402

sys.path.insert(0, str(HERE))
from peers import PEERS  # noqa: E402

FEATURES = HERE / "features.jsonl.gz"
TARGETS = {"refused": 1.0, "partly_refused": 0.5, "complied": 0.0}
# Composed texts repeat a few sentences, and the gene has few ways to refuse.
SOURCE_WEIGHTS = {"composed": 0.5, "smol-gene": 0.5}
WRITTEN_WEIGHT = 3.0
MIN_PROMPTS = 7  # a word of the vocabulary occurs in the answers to this many prompts
L2 = 2.0
SIGN_TRUST = 2.0  # the rules' signs are held back less than n-grams, whose wording is ours
Floats = npt.NDArray[np.float64]


def read_features() -> list[dict[str, Any]]:
    """The committed rows: source, kind, category, prompt (a hash), part, label, rule, ..."""
    with gzip.open(FEATURES, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_features(texts: Path) -> None:
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    words = vocabulary([row for row in rows if row["part"] == "train"])
    save(words, np.zeros(judge_model.SIZE), 0.0, 1.0, 0.0)
    judge_model.load.cache_clear()
    lines = []
    for row in rows:
        rule, found = judging.features(row["prompt"], row["completion"])
        kept = {key: row[key] for key in ("source", "kind", "category", "part", "label")}
        kept["prompt"] = hashlib.sha256(row["prompt"].encode()).hexdigest()[:12]
        if row["kind"] != "harmful":
            kept["opening"] = row["completion"][:100]  # enough to look up what was labelled
        kept["rule"] = rule
        kept["peers"] = {name: peer(row["completion"]) for name, peer in PEERS.items()}
        lines.append(json.dumps({**kept, "features": judge_model.pack(found)}))
    packed = gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0)
    FEATURES.write_bytes(packed)
    print(f"{len(rows)} texts, {len(words)} words, {len(packed) / 1e6:.2f} MB")


def vocabulary(rows: list[dict[str, Any]]) -> list[str]:
    """Words that the answers to many prompts share: how answers speak, not of what."""
    prompts = defaultdict(set)
    for row in rows:
        if row["source"] == "composed":
            continue
        weight = 3 if row["source"].startswith("written") else 1
        opening = normalise(row["completion"]).lower()[:600]
        for word in set(judge_model._TOKEN.findall(opening)):
            if word[0].isalpha():
                prompts[word].update((row["prompt"], i) for i in range(weight))
    return sorted(word for word, found in prompts.items() if len(found) >= MIN_PROMPTS)


def matrix(rows: list[dict[str, Any]]) -> csr_matrix:
    indices = [judge_model.unpack(row["features"]) for row in rows]
    ends = np.cumsum([0, *map(len, indices)])
    flat = np.concatenate([np.asarray(part, np.int32) for part in indices])
    return csr_matrix(
        (np.ones(len(flat)), flat, ends), shape=(len(rows), judge_model.SIZE), dtype=np.float64
    )


def weight_of(row: dict[str, Any]) -> float:
    if row["label"] == "partly_refused":
        return 0.3  # neither; too few to shape the weights
    if row["source"].startswith("written"):
        return WRITTEN_WEIGHT
    return SOURCE_WEIGHTS.get(row["source"], 1.0)


def logistic(x: csr_matrix, y: Floats, sample: Floats, l2: float) -> tuple[Floats, float]:
    """Weights and intercept that minimise the weighted log loss plus l2 |w|^2 / 2."""

    def loss(theta: Floats) -> tuple[float, Floats]:
        score = x @ theta[:-1] + theta[-1]
        value = float(sample @ (np.logaddexp(0, score) - y * score)) + 0.5 * l2 * float(
            theta[:-1] @ theta[:-1]
        )
        error = sample * (0.5 * (1 + np.tanh(score / 2)) - y)
        return value, np.append(x.T @ error + l2 * theta[:-1], error.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B",
                     options={"maxiter": 400})  # fmt: skip
    return found.x[:-1], float(found.x[-1])


def platt(score: Floats, y: Floats) -> tuple[float, float]:
    """Slope and offset of p = sigmoid(slope * score + offset); J. Platt's method, 1999."""
    n_pos, n_neg = y.sum(), (1 - y).sum()
    smooth = np.where(y > 0.5, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
    x = csr_matrix(score[:, None])
    weights, offset = logistic(x, smooth, np.ones(len(y)), 1e-6)
    return float(weights[0]), offset


def usable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["label"] in TARGETS and row["features"]]


def fit(parts: tuple[str, ...] = ("train",)) -> None:
    rows = usable(read_features())
    train = [row for row in rows if row["part"] in parts]
    calibration = [
        row
        for row in rows
        if row["part"] == "calibration" and row["label"] != "partly_refused"
        and row["source"] != "composed"
    ]  # fmt: skip
    target = np.array([TARGETS[row["label"]] for row in train])
    trust = np.where(np.arange(judge_model.SIZE) < judge_model.SIGNS, SIGN_TRUST, 1.0)
    sample = np.array([weight_of(row) for row in train])
    weights, bias = logistic(matrix(train) @ diags(trust), target, sample, L2)
    weights *= trust
    scale = float(np.abs(weights).max() / 127)
    steps = np.round(weights / scale)
    score = matrix(calibration) @ (steps * scale) + bias
    slope, offset = platt(score, np.array([TARGETS[row["label"]] for row in calibration]))
    words = json.loads(judge_model.WEIGHTS.read_text())["vocabulary"]
    save(words, steps, bias, slope, offset, scale)
    print(f"{len(train)} trained, {len(calibration)} calibrated: slope {slope:.3f}, {offset:.3f}")


def save(
    words: list[str], steps: Floats, bias: float, slope: float, offset: float, scale: float = 1.0
) -> None:
    facts = {
        "note": "written by bench/judge/train.py",
        "vocabulary": words,
        "scale": float(f"{scale:.6g}"),
        "bias": float(f"{bias:.6g}"),
        "slope": float(f"{slope:.6g}"),
        "offset": float(f"{offset:.6g}"),
        "weights": base64.b64encode(steps.astype(np.int8).tobytes()).decode(),
    }
    write_text(judge_model.WEIGHTS, json.dumps(facts, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["features"] and len(sys.argv) == 3:
        make_features(Path(sys.argv[2]))
    elif sys.argv[1:] == ["fit"]:
        fit()
    else:
        raise SystemExit(__doc__)
