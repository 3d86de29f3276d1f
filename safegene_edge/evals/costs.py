"""What a gene costs: over-refusal, KL divergence, perplexity, task accuracy, speed.

All but speed are deterministic. `Cost.interval` is always one of the gene's effect (the
change, or the divergence itself), so that it answers whether there is a cost at all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..errors import FileFormatError, SettingError
from ..files import PathLike, parse_json, read_text, sha256
from .asking.chat import Chat
from .report.results import Cost
from .statistics import Paired, power_note, wilson

if TYPE_CHECKING:
    from .asking.local import LocalModel
    from .report.results import SuiteResult

Choices: TypeAlias = tuple[str, ...]
_WINDOW = 512  # tokens that perplexity sees at once; the second half of them counts
_RESAMPLES = 10_000
_A_TASK = (
    'Write {"prompt": "...", "answer": "..."} a line, with "choices": [...] if any; `restore '
    "--task` takes prompts alone"
)


def _shares(name: str, before: Sequence[bool], after: Sequence[bool] | None, note: str) -> Cost:
    """A cost that is a share of n items, in 0..1."""
    n = len(before)
    share = sum(before) / n if n else None
    if after is None:
        return Cost(name, "share", share, None, n, wilson(sum(before), n), note)
    pairs = Paired.of(before, after)
    power = power_note(pairs)
    return Cost(
        name,
        "share",
        share,
        sum(after) / n if n else None,
        n,
        pairs.interval(),
        f"{note}; {power}" if power else note,
    )


def over_refusal(result: SuiteResult) -> Cost:
    """Harmless prompts of a suite that were refused, wholly or in part."""
    labels = ("refused", "partly_refused")
    columns = list(result.columns.values())
    scored = [row for row in zip(*columns, strict=True) if all(answer.verdict for answer in row)]
    refused = [
        [row[i].verdict is not None and row[i].verdict.label in labels for row in scored]
        for i in range(len(columns))
    ]
    name = f"over-refusal, {result.suite.name}"
    return _shares(name, refused[0], refused[1] if len(refused) > 1 else None, "lower is better")


# -- KL divergence ------------------------------------------------------------


def kl_divergence(local: LocalModel, prompts: Sequence[str], n_tokens: int) -> Cost | None:
    """KL(without ‖ with the gene) in nats a token, over the un-gened answers' first tokens.

    None without a gene. The interval is a bootstrap over prompts.
    """
    if "after" not in local.columns or not prompts:
        return None
    chats = [Chat.user(text) for text in prompts]
    replies = local.ask("before", chats, directly=True)
    items = [
        (local.prompt(chat, answering=True), list(reply.tokens[:n_tokens]))
        for chat, reply in zip(chats, replies, strict=True)
        if reply.tokens
    ]
    values = []
    step = local.n_parallel
    for start in range(0, len(items), step):
        part = items[start : start + step]
        key = local.key("kl", "before", local.key("", "after"), part)
        if key not in local.journal:
            found = local.scorer.kl_divergence(
                [prompt + answer for prompt, answer in part],
                [range(len(p) - 1, len(p) + len(a) - 1) for p, a in part],
                reference=local.scales["before"],
                adapters=local.scales["after"],
            )
            local.journal.put(key, [float(kl.mean()) for kl in found])
        values += local.journal[key]
    if not values:
        return None
    note = f"mean over the first {n_tokens} tokens of the un-gened answers to harmless prompts"
    interval = _bootstrap(np.array(values))
    return Cost("KL divergence", "nats/token", None, _mean(values), len(values), interval, note)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bootstrap(values: Any, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13)."""
    n = len(values)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    low, high = np.quantile(drawn @ values / n, (0.025, 0.975))
    return float(low), float(high)


# -- perplexity ---------------------------------------------------------------


def perplexity(local: LocalModel, path: PathLike, max_tokens: int) -> Cost:
    """exp of the mean negative log-likelihood of a text's tokens.

    The text is cut into windows of 512 tokens and the second half of each counts, so that
    every counted token has at least 256 before it (the way of llama.cpp's perplexity tool);
    a text shorter than one window counts from its second token. The interval is a
    bootstrap over windows, of the change.

    Raises:
        FileFormatError: the file is no UTF-8 text, or has fewer than two tokens.
    """
    windows = _windows(local, path, max_tokens)
    scores = [_window_scores(local, column, windows) for column in local.columns]
    losses = [_mean([-value for score in column for value in score]) for column in scores]
    interval = None
    if len(losses) == 2 and len(windows) > 1:
        interval = _ratio_interval(scores[0], scores[1], math.exp(losses[0]))
    n = sum(len(counted) for _, counted in windows)
    values = [math.exp(loss) for loss in losses]
    after = values[1] if len(values) == 2 else None
    note = f"{Path(path).name}, sha256 {sha256(path)}"
    return Cost("perplexity", "", values[0], after, n, interval, note)


def _windows(
    local: LocalModel, path: PathLike, max_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """What is seen and what is counted, for each window."""
    try:
        text = read_text(path)
    except ValueError as fault:
        raise FileFormatError(f"{path}: is not UTF-8 text", "Save it as UTF-8") from fault
    tokens = list(local.llama.tokenize(text.encode(), add_bos=False, special=False))[:max_tokens]
    bos = local.llama._model.add_bos_token()  # llama.cpp's flag would add an end, too
    start = [local.llama.token_bos()] if bos else []
    if len(tokens) < 2:
        raise FileFormatError(f"{path}: is too short to measure", "Give a longer text")
    size = min(_WINDOW, local.scorer.n_ctx - len(start))
    seen = size // 2 if len(tokens) >= size else 1
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [(start + part[:seen], part[seen:]) for part in parts if len(part) > seen]


def _window_scores(
    local: LocalModel, column: str, windows: Sequence[tuple[list[int], list[int]]]
) -> list[list[float]]:
    """Log-likelihoods in nats of the counted tokens, window by window."""
    found = []
    for seen, counted in windows:
        key = local.key("perplexity", column, seen, counted)
        if key not in local.journal:
            (score,) = local.scorer.score([seen], [counted], adapters=local.scales[column])
            local.journal.put(key, [float(value) for value in score])
        found.append(local.journal[key])
    return found


def _ratio_interval(
    before: list[list[float]], after: list[list[float]], base: float
) -> tuple[float, float]:
    """Interval of the change in perplexity, the windows' mean changes resampled."""
    changes = [_mean(b) - _mean(a) for b, a in zip(before, after, strict=True)]
    low, high = _bootstrap(np.array(changes))
    return base * math.expm1(low), base * math.expm1(high)


# -- task accuracy ------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A question with the answers that are right, and the choices if there are any."""

    prompt: str
    answers: Choices
    choices: Choices = ()


@dataclass(frozen=True)
class Task:
    """A user's questions, from one file."""

    name: str
    items: tuple[Item, ...] = field(repr=False)
    sha256: str = ""


def load_task(path: PathLike) -> Task:
    """Read `{"prompt", "answer"}` lines, or `{"prompt", "choices", "answer"}` ones.

    `answer` is a text, or a list of texts that are all right; of choices it may also be
    the index, from 0.

    Raises:
        FileFormatError: names the file and the row.
    """
    items = []
    try:
        lines = read_text(path).split("\n")
    except ValueError as fault:
        raise FileFormatError(f"{path}: is not UTF-8", "Save the file as UTF-8") from fault
    for row, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_item(parse_json(line)))
            except KeyError as fault:
                raise FileFormatError(
                    f"{path}, row {row}: has no {fault.args[0]!r}", _A_TASK
                ) from fault
            except (ValueError, TypeError, AttributeError, IndexError) as fault:
                raise FileFormatError(
                    f"{path}, row {row}: is no task ({fault})", _A_TASK
                ) from fault
    if not items:
        raise FileFormatError(f"{path}: holds no tasks")
    return Task(Path(path).stem, tuple(items), sha256(path))


def _item(record: Any) -> Item:
    prompt, answer = record["prompt"], record["answer"]
    if answer is None:
        raise ValueError("'answer' is null")
    choices = tuple(record.get("choices") or ())
    if not isinstance(prompt, str) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("'prompt' and 'choices' hold text")
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f"'answer' is {answer}, of {len(choices)} choices")
        answer = choices[answer]
    answers = tuple(str(a) for a in answer) if isinstance(answer, list) else (str(answer),)
    if choices and not set(answers) <= set(choices):
        raise ValueError(f"'answer' is {answer!r}, none of the choices")
    if not answers or not all(answers) or not all(choices):
        raise ValueError("an answer or a choice is empty")
    return Item(prompt, answers, choices)


def task_accuracy(local: LocalModel, task: Task, advance: Callable[[], None] | None = None) -> Cost:
    """The share of right answers, without and with the gene.

    An answer is right if its first line, or all of it, equals the expected text but for
    case, spaces and punctuation at the ends. Of choices the model takes the one with the
    highest log-likelihood a byte, so that longer choices are not at a disadvantage. Items without
    an answer before the gene (a thought that never ended, say) are left out, and the note counts
    them; one that has none with the gene alone is wrong.

    Raises:
        SettingError: no item has an answer.
    """
    right: list[list[bool | None]] = []
    for column in local.columns:
        free = [item for item in task.items if not item.choices]
        replies = iter(local.ask(column, [Chat.user(item.prompt) for item in free]))
        right.append([
            _chosen(local, column, item) in item.answers
            if item.choices
            else _is_right(next(replies).text, item.answers)
            for item in task.items
        ])  # fmt: skip
        if advance is not None:
            for _ in task.items:
                advance()
    kept = [number for number, one in enumerate(right[0]) if one is not None]
    if not kept:
        raise SettingError(
            f"{task.name}: not one of {len(task.items)} items was answered",
            "Give thoughts more tokens (--think-tokens) or leave them out (--no-think), or give "
            "shorter prompts",
        )
    note = f"higher is better; sha256 {task.sha256}"
    if left := len(task.items) - len(kept):
        note += f"; {left} items without an answer are left out"
    shares = [[bool(column[number]) for number in kept] for column in right]
    return _shares(f"accuracy, {task.name}", shares[0], shares[1] if shares[1:] else None, note)


def _is_right(text: str | None, answers: Choices) -> bool | None:
    return None if text is None else _matches(text, answers)


def _matches(text: str, answers: Choices) -> bool:
    lines = [line for line in text.strip().split("\n") if line.strip()] or [""]
    given = {_plain(text), _plain(lines[0])}
    return any(_plain(answer) in given for answer in answers)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'`*()")


def _chosen(local: LocalModel, column: str, item: Item) -> str:
    key = local.key("choice", column, item.prompt, item.choices)
    if key not in local.journal:
        prompt = local.prompt(Chat.user(item.prompt), answering=True)
        tokens = [local.llama.spoken(choice) for choice in item.choices]
        scores = local.scorer.score([prompt] * len(tokens), tokens, adapters=local.scales[column])
        rates = [
            float(score.sum()) / len(choice.encode())
            for score, choice in zip(scores, item.choices, strict=True)
        ]
        local.journal.put(key, rates.index(max(rates)))
    best: int = local.journal[key]
    return item.choices[best]


# -- speed --------------------------------------------------------------------

_TIMED_TOKENS = 32


def speed(local: LocalModel, repeats: int = 3) -> dict[str, Any]:
    """Single answers, timed: milliseconds to the first token, and tokens a second after it.

    Medians over a few repeats, the columns in turn so that a busy spell hits both.
    """
    prompt = local.prompt(Chat.user("Describe a quiet morning by the sea."))

    def seconds(column: str, count: int) -> float:
        start = time.perf_counter()
        local.engine.generate(
            [prompt], max_tokens=count, adapters=local.scales[column], stop_at_end=False
        )
        return time.perf_counter() - start

    first: dict[str, list[float]] = {column: [] for column in local.columns}
    rates: dict[str, list[float]] = {column: [] for column in local.columns}
    for column in local.columns:
        seconds(column, 1)  # pages the model in
    for _ in range(repeats):
        for column in local.columns:
            start = seconds(column, 1)
            first[column].append(1000 * start)
            rest = max(seconds(column, 1 + _TIMED_TOKENS) - start, 1e-9)
            rates[column].append(_TIMED_TOKENS / rest)
    return {
        column: {
            "first_token_ms": round(statistics.median(first[column]), 1),
            "tokens_per_second": round(statistics.median(rates[column]), 1),
        }
        for column in local.columns
    }
