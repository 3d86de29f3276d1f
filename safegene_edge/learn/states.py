"""What a model answers, and the states of its residual stream while it does, in one pass."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..aliases import Floats
from ..errors import OutputError
from ..files import scratch_file
from ..runtime.batch import common_prefix
from ..runtime.llama import SafeLlama
from ..runtime.lockstep import Lane, States, answer
from ..runtime.schedule import Scales

_ROWS = 2048  # of a lane: what it computes with grows with their square
_SEQUENCES = 128  # of a lane
THIN = 4  # every so many of the text's tokens stand for all
_BLOCK = 1 << 24  # bytes
Ints = npt.NDArray[np.int64]


class Goals:
    """Rows by layer in a temporary file, for all layers' together may be larger than a model.

    A row is the stream's, then the root mean square of what `attn_output` gave (1 without a norm).

    Raises:
        OutputError: the folder for temporary files is full.
    """

    def __init__(self, layers: Sequence[int], rows: int, width: int) -> None:
        self._file = scratch_file()
        try:
            left = 4 * len(layers) * rows * (width + 1)
            while left > 0:  # a hole that cannot be filled would be fatal later
                left -= self._file.write(bytes(min(left, _BLOCK)))
        except OSError as error:
            self._file.close()
            raise OutputError(
                f"{tempfile.gettempdir()}: cannot hold the states of the layers ({error})",
                "Name a folder with free space in TMPDIR",
            ) from error
        self._shape = (rows, width + 1)
        self._starts = {layer: 4 * rows * (width + 1) * place for place, layer in enumerate(layers)}

    def _rows(self, layer: int) -> Any:
        """Mapped for one use: pages that stay mapped count as memory."""
        return np.memmap(self._file, np.float32, "r+", self._starts[layer], self._shape)

    def put(self, layer: int, places: Ints, rows: Floats) -> None:
        """Keep rows of a layer."""
        self._rows(layer)[places] = rows

    def get(self, layer: int, places: Ints) -> Floats:
        """Rows of a layer."""
        return np.asarray(self._rows(layer)[places])

    def __enter__(self) -> Goals:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        prompt: tokens that the target reads; answer: the first ones of the wanted answer.
        taught: whether the teacher's states are wanted, or else the target's own.
        offsets: the rows that count, from the prompt's end: negative in the prompt.
        goals: where each one's goal is kept.
        text: how many of the first are text before the assistant's header.
        other: where the other model's states of the header are kept, the target's own if `taught`;
            -1 where they are not.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    taught: bool
    offsets: Ints
    goals: Ints
    text: int
    other: int = -1

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Captured:
    """A model's answers to prompts, and its states.

    Attributes:
        answers: tokens, with the end token where one ends.
        header: tokens at a prompt's end that open the assistant's turn.
        prefix: tokens that all prompts open with, and `prefix_goals` where those rows are kept.
        read: tokens that were read.
    """

    goals: Goals
    prompts: Sequence[Sequence[int]]
    answers: list[list[int]]
    header: int
    prefix: int
    prefix_goals: Ints
    read: int
    _starts: list[int]
    _texts: list[Ints]
    _tokens: int

    def sample(
        self, number: int, prompt: Sequence[int], *, taught: bool, other: int = -1
    ) -> Sample:
        """What is learnt from one answer, by a target that reads `prompt`.

        Where that is not what this model has read, as behind another system prompt, the text is
        left out: its states are others.
        """
        kept, said = self._texts[number], self.answers[number][: self._tokens]
        text = kept if list(prompt) == list(self.prompts[number]) else kept[:0]
        behind = np.arange(-self.header, len(said))
        offsets = np.concatenate([text - len(self.prompts[number]), behind])
        goals = self._starts[number] + len(kept) - len(text) + np.arange(len(offsets))
        return Sample(tuple(prompt), tuple(said), taught, offsets, goals, len(text), other)


def header_goals(header: Captured | None, number: int) -> int:
    """Where the rows of a prompt's header begin; -1 if they were not kept."""
    if header is None or number >= len(header.prompts):
        return -1
    return header._starts[number] + len(header._texts[number])


class _Steps:
    """How far lanes are: each layer of a first decode is a step, and each token of the answers."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self._total, self._tell, self._done, self._lock = total, tell, 0, threading.Lock()
        tell(0, total)

    def one_more(self, counts: bool) -> None:
        """From any lane's thread."""
        with self._lock:
            self._done += counts
            if counts:
                self._tell(self._done, self._total)

    def finish(self) -> None:
        """Answers may have ended early."""
        if self._done < self._total:
            self._tell(self._total, self._total)


def capture(
    llama: SafeLlama,
    scales: Scales,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    header: int,
    tokens: int,
    look: int = 0,
    text: bool = False,
    lanes: int = 1,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Captured:
    """Let a model answer prompts, and keep the states of the rows that decide.

    Args:
        tokens: of each answer whose states are kept; look: tokens that it has, if more.
        text: keep every fourth row of the prompts' text, too.
        lanes: contexts side by side.
        tell: called with the steps done and all of them, from the lanes' threads, one at a time.
    """
    prefix = common_prefix(prompts)
    texts = [
        np.arange(prefix, max(prefix, len(prompt) - header) if text else prefix)[::THIN]
        for prompt in prompts
    ]
    sizes = [len(rows) + header + tokens for rows in texts]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    ends = np.arange(starts[-1], starts[-1] + prefix)
    numbers = spread([len(prompt) for prompt in prompts], lanes)
    goals = Goals(layers, starts[-1] + prefix, int(llama.n_embd()))
    made = [
        Lane(llama, [prompts[n] for n in own], scales, [[len(prompts[n]) - 1] for n in own],
             room=max(look, tokens))
        for own in numbers
    ]  # fmt: skip

    steps = _Steps(len(made) * (len(layers) + max(look, tokens)), tell)

    def see(place: int, step: int, active: list[int], layer: int, states: States) -> None:
        lane, own = made[place], numbers[place]
        steps.one_more(not step or layer == layers[0])
        if step > tokens:
            return
        if step:
            kept = np.array([starts[own[n]] + len(texts[own[n]]) + header + step - 1
                             for n in active])  # fmt: skip
            goals.put(layer, kept, goal_rows(states, np.arange(len(active))))
            return
        rows, kept_rows = [], []
        for i, n in enumerate(own):
            length = len(prompts[n])
            positions = [*texts[n], *range(length - header, length)]
            rows += [lane.row(i, position) for position in positions]
            kept_rows += list(range(starts[n], starts[n] + len(positions)))
        if not place:
            rows += [lane.row(0, position) for position in range(prefix)]
            kept_rows += ends.tolist()
        goals.put(layer, np.array(kept_rows), goal_rows(states, np.array(rows)))

    said = answer(made, layers, max(look, tokens), see, lanes)
    steps.finish()
    answers: list[list[int]] = [[] for _ in prompts]
    for own, found in zip(numbers, said, strict=True):
        for n, one in zip(own, found, strict=True):
            answers[n] = one
    read = sum(lane.rows for lane in made) + sum(map(len, answers))
    return Captured(goals, prompts, answers, header, prefix, ends, read, starts, texts, tokens)


def spread(lengths: Sequence[int], lanes: int) -> list[list[int]]:
    """Numbers of sequences in so many lanes, or more, evenly filled."""
    count = max(lanes, -(-sum(lengths) // _ROWS), -(-len(lengths) // _SEQUENCES))
    found: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    filled = [0] * len(found)
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        least = filled.index(min(filled))
        found[least].append(number)
        filled[least] += lengths[number]
    return [sorted(lane) for lane in found]


def goal_rows(states: States, rows: Ints) -> Floats:
    """The rows as `Goals` keeps them."""
    stream = states.stream[rows]
    size = np.ones(len(rows), np.float32) if states.output is None else rms(states.output[rows])
    return np.column_stack([stream, size])


def rms(output: Floats) -> Floats:
    """A norm's divisor of each row."""
    size = np.sqrt((output.astype(np.float64) ** 2).mean(1) + 1e-6)
    return np.asarray(size, np.float32)
