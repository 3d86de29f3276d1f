"""What a gene's guard ends, what it ends wrongly, and what it costs: two fine-tunes on AG News.

    python bench/guard/run.py [smollm2|qwen] [--limit 40] [--seconds 220] [--so-far]

The target, the gene that was learnt from it and its strength are the bench of recovery's. A run
stops after the seconds given and the next goes on: finished answers lie in the cache folder until
everything is measured. They are reported as labels and counts alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cache_folder, table, write

from safegene_edge import Engine, Expression, SafeLlama, SafetyGene
from safegene_edge.evals.asking.attacks import ATTACKS
from safegene_edge.evals.asking.journal import Journal
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.evals.evaluate import evaluate
from safegene_edge.evals.report.findings import OVER_REFUSED, count
from safegene_edge.evals.report.json import label_counts
from safegene_edge.evals.report.results import AttackResult
from safegene_edge.evals.settings import EvalSettings
from safegene_edge.evals.statistics import Count
from safegene_edge.files import sha256
from safegene_edge.recalibrate import Examples
from safegene_edge.recalibrate.guard import guard_threshold
from safegene_edge.runtime.batcher import Ask, Batcher

HERE = Path(__file__).parent
RECOVERY = HERE.parent / "recovery"
LONG, LONG_TOKENS = 100, 256
ANSWER = 96  # tokens of an attack's answer: long enough for a look within it
FIRST = ("prefill", "many_shot", "crescendo")  # what the guard is for
ADAPTIVE_LIMIT = 8
ROUNDS, SPEED_TOKENS = 3, 128
SPEEDS = {  # clients at once, and whether a history stands before the question
    "1 at once": (1, False),
    "16 at once": (16, False),
    "1 at once, after a history": (1, True),
    "16 at once, after a history": (16, True),
}


@dataclass(frozen=True)
class Case:
    """A fine-tune of a family and the gene that was learnt from it, by column of the bench."""

    family: str
    column: str
    words: str
    results: str

    @property
    def target(self) -> Path:
        return cache_folder() / "recovery" / self.family / "targets" / "agnews.Q4_K_M.gguf"

    @property
    def gene(self) -> Path:
        name = f"agnews-{self.column.replace(': ', '-')}.gguf"
        return cache_folder() / "recovery" / self.family / "learnt" / name

    @property
    def strength(self) -> float:
        """What recalibration found for this very gene."""
        found = json.loads((RECOVERY / f"forms-{self.family}.json").read_text())
        cell = found["tasks"]["agnews"][self.column]
        if cell["gene"] != sha256(self.gene):
            sys.exit(f"{self.gene}: is not the gene of forms-{self.family}.json; run forms.py")
        return float(cell["strength"])

    def cached(self, suffix: str) -> Path:
        return cache_folder() / f"bench-guard-{self.family}{suffix}"


CASES = {
    "smollm2": Case(
        "smollm2", "learnt: direct",
        "SmolLM2-135M-Instruct fine-tuned on AG News, Q4_K_M, with the gene learnt from it",
        "results",
    ),
    "qwen": Case(
        "qwen", "learnt: no aligned model",
        "Qwen2.5-Coder-0.5B-Instruct fine-tuned on AG News, Q4_K_M, with the gene that it learnt "
        "from itself",
        "qwen",
    ),
}  # fmt: skip


class OutOfTimeError(Exception):
    """The seconds are over; the next run goes on."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", choices=CASES, default="smollm2")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=220)
    parser.add_argument("--so-far", action="store_true", help="write what is measured, and end")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    case = CASES[options.case]
    known = case.cached(".json")
    cells: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    try:
        for name, measure in [] if options.so_far else measurements(case, options.limit, until):
            if name not in cells:
                cells[name] = measure()
                known.write_text(json.dumps(cells))
                print(f"{name}: done", file=sys.stderr, flush=True)
    except OutOfTimeError:
        print("to be continued", file=sys.stderr)
        sys.exit(3)
    if "threshold" not in cells:
        sys.exit("nothing is measured yet")
    write(HERE, cells, text_of(case, cells), case.results)
    if not options.so_far:
        case.cached(".jsonl").unlink(missing_ok=True)  # it holds answers to harmful prompts


def measurements(case: Case, limit: int, until: float) -> list[tuple[str, Any]]:
    """Every cell of the table, by name."""
    fixed = [name for name, attack in ATTACKS.items() if attack.apply and name != "direct"]
    fixed.sort(key=lambda name: name not in FIRST)
    attacks = [(name, partial(attacked, case, name, limit, until)) for name in fixed]
    return [
        ("threshold", partial(fitted, case)),
        *attacks[: len(FIRST)],
        ("long", partial(long_answers, case)),
        *((name, partial(speed, case, *how)) for name, how in SPEEDS.items()),
        *attacks[len(FIRST) :],
        ("adaptive", partial(attacked, case, "adaptive", ADAPTIVE_LIMIT, until)),
    ]


def fitted(case: Case) -> dict[str, Any]:
    """Express the gene and measure its guard's threshold, as a recalibration does."""
    strength, gene = case.strength, SafetyGene.load(case.gene)
    expression = Expression(dict.fromkeys(gene.layers, strength), gene.sha256)
    with SafeLlama(case.target, [gene.express(expression)], n_ctx=512) as llama:
        prompts = [llama.render_answer(p.as_dicts()) for p in Examples.every_shipped().harmless]
        with Engine(llama, n_ctx=4096, flash_attn=True) as engine:
            found = guard_threshold(engine, llama.make_guard(), prompts, None)
    assert found is not None
    expression = Expression(expression.coefficients, gene.sha256, "", found.threshold)
    gene.express(expression).save(case.cached(".gguf"))
    return {"strength": strength, "nats": found.threshold, "answers": found.answers,
            "ended_at_0": found.ended}  # fmt: skip


def long_answers(case: Case) -> dict[str, Any]:
    """Harmless answers of up to 256 tokens: how many does the guard end?"""
    prompts = [p for suite in load_suite("harmless") for p in suite.sample(LONG).prompts]
    with SafeLlama(case.target, [case.cached(".gguf")], n_ctx=512) as llama:
        guard = llama.make_guard()
        with Engine(llama, n_ctx=8192, flash_attn=True, guarded=True) as engine:
            asked = [llama.render(p.as_dicts()) for p in prompts]
            made = engine.generate(asked, max_tokens=LONG_TOKENS, guard=guard)
    lengths = [len(answer.tokens) for answer in made]
    return {
        "prompts": len(made),
        "looked_at": sum(length >= guard.every for length in lengths),
        "whole": sum(answer.finish == "length" for answer in made),
        "ended": sum(answer.finish == "content_filter" for answer in made),
    }


def attacked(case: Case, name: str, limit: int, until: float) -> dict[str, Any]:
    """An attack and its harmless twins, without the gene, with it, and with its guard."""

    def in_time(done: int, total: int) -> None:
        if time.monotonic() > until:
            raise OutOfTimeError

    with Journal(case.cached(".jsonl")) as journal:
        report = evaluate(
            case.target,
            case.cached(".gguf"),
            suites=["harmful", "borderline"],
            settings=EvalSettings(max_tokens=ANSWER, limit=limit, attack_limit=limit, guard=True),
            attacks=[name],
            journal=journal,
            progress=in_time,
        )
    found: dict[str, Any] = {}
    for key, results, labels in (
        ("answered", report.attacks, ("complied",)),
        ("over_refused", report.attack_twins, OVER_REFUSED),
    ):
        for result in results:
            found.setdefault(result.name, {})[key] = counted(result, labels)
    return found


def counted(result: AttackResult, labels: tuple[str, ...]) -> dict[str, list[int]]:
    found = {column: count(label_counts(answers), labels)
             for column, answers in result.columns.items()}  # fmt: skip
    return {column: [value.n, value.total] for column, value in found.items()}


# -- what it costs ---------------------------------------------------------------


def speed(case: Case, clients: int, history: bool) -> dict[str, Any]:
    """Tokens a second and time to the first token, without the guard and with it, in turn."""
    texts = [p.text for suite in load_suite("harmless") for p in suite.sample(16).prompts]
    turns = [{"role": "user", "content": f"{text} Write at least ten sentences."} for text in texts]
    ways: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    with SafeLlama(case.target, [case.cached(".gguf")], n_ctx=512) as llama:
        asked = [chat(turn, turns, history) for turn in turns]
        for _ in range(ROUNDS):
            for way, rounds in ways.items():
                rounds.append(timed(llama, asked, clients, guarded=way == "with"))
    return {
        way: {
            "tokens_per_second": round(statistics.median(r for r, _ in rounds), 1),
            "first_token_ms": round(statistics.median(f for _, f in rounds), 1),
        }
        for way, rounds in ways.items()
    }


def chat(turn: dict[str, str], turns: list[dict[str, str]], history: bool) -> list[dict[str, str]]:
    before = [turns[0], {"role": "assistant", "content": "It depends on what you like best."}]
    return [*before * 3, turn] if history else [turn]


def timed(
    llama: SafeLlama, chats: list[list[dict[str, str]]], clients: int, *, guarded: bool
) -> tuple[float, float]:
    """Tokens a second while answers are given, and the mean time to the first token (ms)."""
    guard = llama.make_guard() if guarded else None
    with Engine(llama, n_ctx=16384, flash_attn=True, guarded=guarded) as engine:
        batcher = Batcher(engine, guard=guard)
        part, first, decoding, tokens = chats[: max(clients, 3)], [], 0.0, 0
        for start in range(0, len(part), clients):
            made = [_Timed(llama, turns, guarded) for turns in part[start : start + clients]]
            began = time.perf_counter()
            for one in made:
                batcher.submit(one.ask)
            for one in made:
                one.over.wait()
            first += [1000 * (one.first - began) for one in made]
            decoding += time.perf_counter() - max(one.first for one in made)
            tokens += sum(one.ask.n_new - one.at_last_first for one in _marked(made))
        batcher.close()
    return tokens / decoding, statistics.mean(first)


class _Timed:
    """An ask that notes when each of its texts came."""

    def __init__(self, llama: SafeLlama, turns: list[dict[str, str]], guarded: bool) -> None:
        self.over, self.times = threading.Event(), list[tuple[float, int]]()
        alone = llama.render_alone(turns) if guarded else None
        self.ask = Ask(llama.render(turns), SPEED_TOKENS, self.listen, alone=alone)
        self.at_last_first = 0

    def listen(self, text: str, finish: str | None) -> None:
        self.times.append((time.perf_counter(), self.ask.n_new))
        if finish:
            self.over.set()

    @property
    def first(self) -> float:
        return self.times[0][0]


def _marked(made: list[_Timed]) -> list[_Timed]:
    """Note how many tokens each had when the last one's first came."""
    last = max(one.first for one in made)
    for one in made:
        one.at_last_first = max((n for when, n in one.times if when <= last), default=0)
    return made


# -- the tables ------------------------------------------------------------------


def text_of(case: Case, cells: dict[str, Any]) -> str:
    threshold, long = cells["threshold"], cells.get("long")
    shares = [[name, *(str(Count(*row[key][column]))
                       for key in ("answered", "over_refused") if key in row
                       for column in ("before", "after", "guarded"))]
              for name, row in rows_of(cells)]  # fmt: skip
    head = ["attack", "harmful answered: fine-tuned", "gene", "gene and guard",
            "harmless over-refused: fine-tuned", "gene", "gene and guard"]  # fmt: skip
    speeds = ["asked", "tokens/s", "with the guard", "first token, ms", "with the guard"]
    costs = [
        [name, *(cells[name][way][key] for key in ("tokens_per_second", "first_token_ms")
                 for way in ("without", "with"))]
        for name in SPEEDS
        if name in cells
    ]  # fmt: skip
    timing = (
        f"\n{table(speeds, costs)}\nMedians of {ROUNDS} rounds in turn, answers of at most "
        f"{SPEED_TOKENS} tokens.\n"
    )
    answers = (
        ""
        if long is None
        else (
            f"\nOf {long['prompts']} answers to plain harmless prompts of at most {LONG_TOKENS} "
            f"tokens, {long['looked_at']} were long enough to be looked at, and the guard ended "
            f"{Count(long['ended'], long['prompts'])}.\n"
        )
    )
    adaptive = (
        " The adaptive attack chooses among the others by the gene's openers, on "
        f"{ADAPTIVE_LIMIT} prompts; it does not know of the guard."
    ) * ("adaptive" in cells)
    return (
        "# The guard\n\n"
        f"{case.words} at strength {threshold['strength']:.2f}. The "
        "guard ends an answer above "
        f"{threshold['nats']:.2f} nats, measured on {threshold['answers']} harmless answers, of "
        f"which {threshold['ended_at_0']} would be ended at 0.\n\n"
        "Greedy answers of at most "
        f"{ANSWER} tokens to prompts evenly sampled from the built-in suites, as the judge labels "
        "them: n/N (share, 95 % Wilson interval). The harmless prompts are borderline in wording."
        f"{adaptive}\n\n{table(head, [[*row, '', '', ''][:7] for row in shares])}"
        f"{answers}{timing if costs else ''}"
    )


def rows_of(cells: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each attack once; direct is in every cell."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ATTACKS:
        for attack, row in cells.get(name, {}).items():
            if name != "adaptive" or attack == "adaptive":
                rows.setdefault(attack, row)
    return list(rows.items())


if __name__ == "__main__":
    main()
