"""Deep, not only in the first word: would the model refuse, if it were asked again?

A gene moves how an answer opens, and whoever writes the opening has stepped past it. The guard asks
twice. Before an answer that follows a history, or that is begun for the model, or whose request is
encoded, it reads the user's last message alone and in the clear. Within an answer it puts the
template's own end of turn and assistant header behind what was said, as if another answer began
(Any-Depth Alignment, arXiv 2510.18081). Each time it reads the margin of a refusal
(`refusal_margin`), on a fork of the sequence that is dropped afterwards: the answer itself goes on
from the same keys and values.

The guard is policy of whoever runs the model, and no proof; docs/guard.md says what gets past it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import llama_cpp
import numpy as np

from ..aliases import Floats
from ..errors import SettingError, UnsupportedError
from ..gene import SafetyGene
from .batch import Batch, common, logit_rows
from .encodings import in_the_clear
from .refusal_margin import Openers, Tokens

EVERY = 64  # tokens of an answer between two looks at it
DEFAULT_THRESHOLD = 4.0  # nats, of genes that were not calibrated for the model; see docs/guard.md
_SYSTEM = ("system", "developer")
REFUSAL = "I can't help with that."
_SWITCH_OFF = "Switch it off (guard=False, --no-guard)"


@dataclass(frozen=True, slots=True)
class Look:
    """What to read: some tokens behind the first `keep` of a sequence.

    Attributes:
        sequence: that holds them.
        spare: the sequence to read on, empty afterwards, or cut back if it is `sequence` itself.
        tokens: at least one; the margin is that of an answer behind them.
        above: a margin that is not above it need not be read: some number that is not.
    """

    sequence: int
    keep: int
    spare: int
    tokens: Sequence[int]
    above: float = -inf


@dataclass(frozen=True)
class Guard:
    """When to look at an answer, and from where on it is refused.

    Attributes:
        openers: how refusals open.
        header: the tokens of the template's end of turn and assistant header, up to where an
            answer begins.
        openings: the tokens that a prompt ends with where its answer is not begun: one of these.
        threshold: nats; an answer ends where its margin is above.
        request_threshold: the same, of the last message alone; at 0 it is refused as it would be
            if nothing had been said before.
        every: tokens of an answer between two looks.
        refusal: what the answer then ends with.
    """

    openers: Openers
    header: tuple[int, ...]
    openings: frozenset[tuple[int, ...]]
    threshold: float = DEFAULT_THRESHOLD
    request_threshold: float = 0.0
    every: int = EVERY
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SettingError(f"the guard looks every {self.every} tokens", "Give 1 or more")
        for name in ("threshold", "request_threshold"):
            if not np.isfinite(getattr(self, name)):
                raise SettingError(f"the guard's {name} is {getattr(self, name)}", "Give a number")

    @property
    def room(self) -> int:
        """KV cells that a look takes."""
        return len(self.header) + max(len(path) for path, _ in self.openers.paths)

    def begun(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt's answer is begun for the model, or the prompt is no chat."""
        ends = (tuple(prompt[len(prompt) - len(opening) :]) for opening in self.openings)
        return not self.openings.intersection(ends)

    def due(self, n_new: int, tokens: Sequence[int]) -> bool:
        """Whether to look at an answer of so many new tokens, the last of these."""
        return n_new % self.every == 0 and (n_new > 0 or self.begun(tokens))

    def ending(self, said: bool) -> str:
        """The refusal, as it follows what was said."""
        return f"\n\n{self.refusal}" if said else self.refusal

    def look(self, sequence: int, keep: int, spare: int) -> Look:
        """At an answer of which a sequence holds `keep` tokens, prompt included."""
        return Look(sequence, keep, spare, self.header, self.threshold)

    def look_alone(self, sequence: int, tokens: Sequence[int]) -> Look:
        """At the user's last message alone, of which a sequence holds all tokens but the last."""
        keep = len(tokens) - 1
        return Look(sequence, keep, sequence, tokens[keep:], self.request_threshold)


def guard_of(llama: Any, gene: SafetyGene | None) -> Guard:
    """A guard for a `SafeLlama`, with the openers and the threshold of a gene if there is one.

    Raises:
        UnsupportedError: the template opens no answer, or the model's memory cannot be forked.
    """
    if llama._is_recurrent or llama._is_hybrid:
        raise UnsupportedError(
            f"{llama.model_path}: the guard cannot look at a model with a recurrent memory",
            _SWITCH_OFF,
        )
    header, openings = _turn_tokens(llama)
    openers, threshold = (gene.refusal_openers, gene.guard_threshold) if gene else ((), None)
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    return Guard(Openers.of(llama, openers), header, openings, threshold)


def _turn_tokens(llama: Any) -> tuple[Tokens, frozenset[Tokens]]:
    """The template's end of turn with the assistant header; and how its prompts end."""
    word, thinking = "Hello", llama.thinking
    switched = {thinking.switch: False} if thinking.switch else {}

    def behind(role: str, variables: Mapping[str, Any], rest: str = "") -> Tokens:
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
        parts = llama._parts(turns if role == "assistant" else turns[:1], True, variables)
        _, found, end = "".join(text for text, _ in parts).rpartition(word)
        text = (end + rest if found else "").encode()
        return tuple(llama.tokenize(text, add_bos=False, special=True))

    openings = set()
    for variables, rest in (({}, ""), (switched, ""), (switched, thinking.missing)):
        said, asked = (behind(role, variables, rest) for role in ("assistant", "user"))
        count = common(said[::-1], asked[::-1], min(len(said), len(asked)))
        openings.add(said[len(said) - count :])
    if () in openings:
        raise UnsupportedError(
            f"{llama.model_path}: the guard finds no assistant header in its chat template",
            _SWITCH_OFF,
        )
    return behind("assistant", switched, thinking.missing), frozenset(openings)


def alone(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """What was said since the assistant last spoke, as one message of the user; or None.

    It stands under the system messages that open the chat; later ones are among what was said, as
    are the words of tools, behind the user's. What it carries encoded is in the clear. None where
    that is the whole chat as it stands.
    """
    turns = list(messages)
    found = _since_spoken(turns)
    *before, last = found or turns or [{"role": ""}]
    if last["role"] != "user":
        return found
    content = last.get("content")
    clear = _in_the_clear(content)
    return found if clear == content else [*before, {**last, "content": clear}]


def _since_spoken(turns: list[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The same, as it was said."""
    opening = next((i for i, turn in enumerate(turns) if turn["role"] not in _SYSTEM), len(turns))
    system, rest = turns[:opening], turns[opening:]
    while rest and rest[-1]["role"] == "assistant":  # an answer that is begun
        rest.pop()
    spoken = [i for i, turn in enumerate(rest) if turn["role"] == "assistant" and _speaks(turn)]
    start = spoken[-1] + 1 if spoken else 0
    if all(turn["role"] not in ("user", *_SYSTEM) for turn in rest[start:]):
        users = [i for i, turn in enumerate(rest) if turn["role"] == "user"]
        start = users[-1] if users else 0  # tools go with the request that they serve
    asked = [turn for turn in rest[start:] if turn["role"] != "assistant"]
    if not asked:  # system messages alone, then an answer that is begun for the model
        system, asked = system[:-1], system[-1:] if len(turns) > opening else []
    if not asked:
        return None
    if len(asked) == 1 and asked[0]["role"] == "user":
        return None if len(system) + 1 == len(turns) else [*system, asked[0]]
    parts = [part for turn in asked for part in _parts(turn.get("content"))]
    return [*system, {"role": "user", "content": parts}]


def _in_the_clear(content: Any) -> Any:
    """A message's content with what it carries encoded undone.

    What is decoded takes its code's place. What only looks moved may be a decoy that draws plain
    words along: such lines stand behind the message, which stays. Parts become one text if they
    carry anything.
    """
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in _parts(content)]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        return content  # an image, say; `render` refuses it
    text = "\n".join(texts)
    decoded, guessed = in_the_clear(text)
    if text == decoded == guessed:
        return content
    lines = set(decoded.splitlines())
    added = [line for line in guessed.splitlines() if line not in lines]
    return "\n".join([decoded, *([""] if added else []), *added])


def _speaks(turn: Mapping[str, Any]) -> bool:
    """Whether an assistant's turn says something, and does not only call a tool."""
    said = turn.get("content")
    return bool(said) and not turn.get("tool_calls")


def _parts(content: Any) -> list[Any]:
    return list(content) if isinstance(content, (list, tuple)) else [content or ""]


class Forks:
    """Reads margins on forks of a context's sequences.

    Args:
        context: llama.cpp's, with a unified cache.
        decode: decodes what `batch` holds, on that context.
        max_outputs: rows of logits a decode.
    """

    def __init__(
        self,
        context: Any,
        batch: Batch,
        decode: Callable[[], None],
        n_vocab: int,
        max_outputs: int,
    ) -> None:
        self._context, self._memory = context, llama_cpp.llama_get_memory(context)
        self._batch, self._decode = batch, decode
        self._n_vocab, self._max_outputs = n_vocab, max_outputs

    def margins(self, openers: Openers, looks: Sequence[Look]) -> list[float]:
        """The margin (nats) behind each look; all looks share their decodes."""
        leads: list[dict[Tokens, float]] = [defaultdict(lambda: -inf) for _ in looks]
        try:
            for look in looks:
                self._fork(look)
            first = [(i, look.spare, look.keep, look.tokens, 1) for i, look in enumerate(looks)]
            for i, _, row in self._rows(first):
                leads[i].update(openers.leads((), row))
            for path, known in openers.paths:
                self._read(openers, looks, leads, path, max(known, 1))
        finally:
            for look in looks:
                keep = look.keep if look.spare == look.sequence else -1
                llama_cpp.llama_memory_seq_rm(self._memory, look.spare, keep, -1)
        return [float(openers.margin(found)) for found in leads]

    def _fork(self, look: Look) -> None:
        memory = self._memory
        if look.spare != look.sequence:
            llama_cpp.llama_memory_seq_rm(memory, look.spare, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, look.sequence, look.spare, 0, look.keep)

    def _read(
        self,
        openers: Openers,
        looks: Sequence[Look],
        leads: Sequence[dict[Tokens, float]],
        path: Tokens,
        known: int,
    ) -> None:
        """Read an opener's further tokens, where it may still be above."""
        fed = []
        for i, look in enumerate(looks):
            if not path or _least(leads[i], path[:known]) <= look.above:
                continue
            begin = look.keep + len(look.tokens)
            llama_cpp.llama_memory_seq_rm(self._memory, look.spare, begin, -1)
            fed.append((i, look.spare, begin, path, len(path) + 1 - known))
        for i, offset, row in self._rows(fed):
            behind = path[: offset + 1]
            leads[i].update(openers.leads(behind, row))

    def _rows(
        self, fed: Iterable[tuple[int, int, int, Sequence[int], int]]
    ) -> Iterator[tuple[int, int, Floats]]:
        """Decode tokens; yields the last rows of each: its number, the token's, the logits.

        A row is valid until the next one is asked for.

        Args:
            fed: number, sequence, first position, tokens, and how many rows are wanted.
        """
        outputs: list[tuple[int, int]] = []
        self._batch.clear()
        for number, sequence, begin, tokens, wanted in fed:
            for offset, token in enumerate(tokens):
                if self._batch.full or len(outputs) == self._max_outputs:
                    yield from self._decoded(outputs)
                output = offset >= len(tokens) - wanted
                self._batch.add(token, begin + offset, sequence, output)
                if output:
                    outputs.append((number, offset))
        if self._batch.size:
            yield from self._decoded(outputs)

    def _decoded(self, outputs: list[tuple[int, int]]) -> Iterator[tuple[int, int, Floats]]:
        self._decode()
        rows = logit_rows(self._context, len(outputs), self._n_vocab)
        for (number, offset), row in zip(outputs, rows, strict=True):
            yield number, offset, row
        outputs.clear()
        self._batch.clear()


def _least(leads: Mapping[Tokens, float], path: Tokens) -> float:
    return min(leads[path[: depth + 1]] for depth in range(len(path)))
