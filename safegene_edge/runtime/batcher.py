"""Answers that stream: requests join, leave and are cancelled while others run.

Where `Engine.generate` runs a list to its end, a `Batcher` has a thread that decodes one
token for everyone at each step, samples each with its own chain, and delivers the text of all
in one call. A slot that falls idle keeps its keys and values: the next turn of the same
conversation, which begins with the same tokens, goes on from there, and a slot that is given
away leaves a copy (`kept`). What goes wrong with one request ends that request with "error",
and no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import llama_cpp

from ..errors import LlamaCppError, SafeGeneError, SettingError
from .batch import common, trim
from .engine import Engine
from .guard import Guard
from .kept import KeptStates
from .sampling import Pieces, Sampling, TextStream, free_chain
from .schedule import Scales

_LOG = logging.getLogger(__name__)
AskFinish = Literal["stop", "length", "timeout", "error", "content_filter"]
_MIN_PREFIX = 16  # fewer common tokens are not worth keeping a newer conversation out


class QueueFullError(SafeGeneError):
    """As many requests wait as may wait; `retry_after` is a guess in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already", "Try again later")
        self.retry_after = retry_after


@dataclass(eq=False, slots=True)
class Ask:
    """One request for an answer.

    Attributes:
        prompt: its tokens, at least one.
        max_tokens: new tokens at most.
        stop: strings that end the answer; they are not part of it.
        stream: deliver text as it comes; False: all of it at the end.
        alone: the user's last message alone as a prompt, which a guard reads first; None where
            the prompt has nothing else. See `SafeLlama.render_alone`.
        deadline: `time.monotonic()` after which the answer ends with "timeout".
        listener: called with text and, with the last of it, the reason why the answer ended.
            The batcher's `deliver` decides in which thread. If it raises, the answer ends.
    """

    prompt: Sequence[int]
    max_tokens: int
    listener: Callable[[str, AskFinish | None], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stream: bool = True
    alone: Sequence[int] | None = None
    deadline: float = float("inf")
    reused: int = 0
    """Prompt tokens that were still in the cache."""
    n_new: int = 0
    """Tokens of the answer so far."""
    cancelled: bool = False
    _failed: bool = False
    _tokens: list[int] = field(default_factory=list)
    _fed: int = 0
    _slot: int = -1
    _sequence: int = -1  # the slot, or its spare while the last message alone is read
    _chain: Any = None
    _text: TextStream = field(default_factory=TextStream)
    _whole: list[str] = field(default_factory=list)
    _began: float = 0.0

    @property
    def cells(self) -> int:
        """KV cells that it needs at most."""
        return len(self.prompt) + self.max_tokens


StepEvents = list[tuple[Ask, str, AskFinish | None]]
"""For each request: new text, and why the answer ended if it did."""


class Batcher:
    """A thread that answers `Ask`s together on an `Engine`, which does nothing else until then.

    `close` it, or the engine, or the `SafeLlama`: each ends the thread before memory is freed.
    Until then its thread keeps it and all three in memory, even if nobody else does.

    Args:
        engine: its context and its slots.
        adapters: for every answer; None: as set on the model. They never change, so that a
            prefix kept in the cache is always that of the same weights; nor can they be
            detached before the batcher is closed.
        guard: looks at every answer, on an engine made with `guarded`.
        max_waiting: asks that wait for a slot, at most.
        keep: bytes of memory for keys and values of slots that were given away.
        deliver: called from the thread with the events of a step, and must return soon; by
            default each ask's `listener` is called there and then.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        adapters: Scales | None = None,
        guard: Guard | None = None,
        max_waiting: int = 64,
        keep: int = 0,
        deliver: Callable[[StepEvents], None] | None = None,
    ) -> None:
        if guard and not engine.guarded:
            raise SettingError("the engine has no sequences to look on", "Give guarded=True")
        self.engine, self.guard, self.max_waiting = engine, guard, max_waiting
        self._deliver = deliver or _deliver_each
        llama = engine.llama
        trained = int(llama._model.n_ctx_train()) or engine.n_ctx
        self._room = guard.room if guard else 0
        self.n_ctx = min(engine.n_ctx, trained) - self._room
        """Tokens that prompt and answer may have together."""
        self._pieces = Pieces(llama._model.vocab, engine.n_vocab)
        self._waiting: deque[Ask] = deque()
        self._active: list[Ask] = []
        # The idle slots, longest idle first, each with the tokens that it still holds.
        self._slots = range(1, engine.n_parallel + 1)
        self._idle: dict[int, list[int]] = {slot: [] for slot in self._slots}
        self._kept = KeptStates(engine._context, keep)
        self._seconds = 1.0  # a running mean of what an answer takes
        self._closed = False
        self._wake = threading.Condition()
        self._ended = threading.Event()  # Thread.join, interrupted, takes it for ended (3.11)
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        with self._wake:  # who closes the engine now waits for the thread, and ends it
            engine.reserve(self, adapters)
            self._thread.start()

    # -- from any thread --------------------------------------------------

    def submit(self, ask: Ask) -> None:
        """Put a request in the queue.

        Raises:
            SettingError: it is empty, or can never fit.
            QueueFullError: too many wait.
        """
        if not ask.prompt or ask.max_tokens < 1:
            raise SettingError("a request needs a prompt, and at least one token of answer")
        if ask.cells > self.n_ctx:
            raise SettingError(
                f"the prompt's {len(ask.prompt)} tokens and {ask.max_tokens} of answer are more "
                f"than the context of {self.n_ctx}",
                "Send a shorter prompt or ask for fewer tokens",
            )
        if self.guard and ask.alone and len(ask.alone) > self.n_ctx:
            raise SettingError(
                f"the last message's {len(ask.alone)} tokens are more than the context of "
                f"{self.n_ctx}",
                "Send a shorter one",
            )
        with self._wake:
            if self._closed:
                raise LlamaCppError("the batcher is closed", "Make a new one")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(len(self._waiting), self._wait_seconds())
            self._waiting.append(ask)
            self._wake.notify()

    def cancel(self, ask: Ask) -> None:
        """Drop a request, running or not; its listener is called no more."""
        ask.cancelled = True

    @property
    def n_active(self) -> int:
        """Requests that are being answered."""
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread; unfinished requests end with "error". Again does nothing.

        Called by a listener, it returns at once, and the thread ends after this step.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        if not self.in_own_thread:
            self._ended.wait()

    @property
    def in_own_thread(self) -> bool:
        """Whether a listener is asking."""
        return threading.current_thread() is self._thread

    def _wait_seconds(self) -> int:
        rounds = len(self._waiting) / self.engine.n_parallel
        return min(60, max(1, round(rounds * self._seconds)))

    # -- the thread -------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._rest():
                events: StepEvents = []
                try:
                    self._drop(events)
                    self._admit(events)
                    if self._active:
                        self._step(events)
                except Exception:  # llama.cpp could not decode: these fail, the next may not
                    _LOG.exception("a step failed")
                    self._fail(events)
                self._hand_over(events)
        finally:
            self._end()

    def _end(self) -> None:
        events: StepEvents = []
        try:
            with self._wake:
                self._closed = True
                waiting = list(self._waiting)
                self._waiting.clear()
            self._fail(events)
            events += [(ask, "", "error") for ask in waiting if not ask.cancelled]
            self._hand_over(events)
        finally:
            self._kept.clear()
            self.engine.unreserve()
            self._ended.set()

    def _hand_over(self, events: StepEvents) -> None:
        if not events:
            return
        try:
            self._deliver(events)
        except Exception:
            _LOG.exception("the text of a step could not be delivered")
            for ask, _, _ in events:
                ask._failed = True

    def _rest(self) -> bool:
        """Wait until there is something to do; False when closed."""
        with self._wake:
            while not (self._active or self._waiting or self._closed):
                self._wake.wait()
            return not self._closed

    def _drop(self, events: StepEvents) -> None:
        now = time.monotonic()
        for ask in list(self._active):
            if ask._failed:
                self._finish(ask, "error", events)
            elif ask.cancelled or now > ask.deadline:
                self._finish(ask, "timeout", events, ask._text.rest())
        with self._wake:
            late = [a for a in self._waiting if a.cancelled or now > a.deadline]
            for ask in late:
                self._waiting.remove(ask)
        events += [(ask, "", "timeout") for ask in late if not ask.cancelled]

    def _fail(self, events: StepEvents) -> None:
        for ask in list(self._active):
            self._finish(ask, "error", events)
        llama_cpp.llama_memory_clear(self.engine._memory, False)
        self._idle = {slot: [] for slot in self._slots}

    # -- seats ------------------------------------------------------------

    def _admit(self, events: StepEvents) -> None:
        """Seat those who wait, in their order, while there are slots and cells."""
        taken = sum(map(self._cells, self._active))
        while self._waiting and self._idle:
            ask = self._waiting[0]
            if taken + self._cells(ask) > self.engine.n_ctx:
                return
            with self._wake:
                self._waiting.popleft()
            try:
                self._seat(ask, self.engine.n_ctx - taken - self._cells(ask))
            except Exception:
                _LOG.exception("a request could not be begun")
                events.append((ask, "", "error"))
                continue
            taken += self._cells(ask)

    def _cells(self, ask: Ask) -> int:
        alone = len(ask.alone) if self.guard and ask.alone else 0
        return max(ask.cells, alone) + self._room

    def _seat(self, ask: Ask, cells: int) -> None:
        """Give an ask a slot; so many cells are then left for the idle ones."""
        last = len(ask.prompt) - 1  # must be decoded anew
        alike = {s: common(ask.prompt, kept, min(last, len(kept)))
                 for s, kept in self._idle.items()}  # fmt: skip
        slot = max(alike, key=lambda s: alike[s])  # the first of equals is the longest idle
        state, length = self._kept.best(ask.prompt, last)
        # Cells that a kept state takes at first, beyond the request's own.
        beyond = max(0, len(state.tokens) - self._cells(ask))
        apart = length >= alike[slot] + _MIN_PREFIX and beyond <= cells
        if apart or alike[slot] < _MIN_PREFIX:
            slot = next((s for s, kept in self._idle.items() if not kept), next(iter(self._idle)))
            alike[slot] = 0
        # All that may fail comes first: then the slot is still as it was.
        ask._tokens, ask._text = [int(token) for token in ask.prompt], TextStream(ask.stop)
        ask._chain = ask.sampling.chain(self.engine.n_vocab)
        self._keep(slot, alike[slot])
        ask._slot, ask.reused = slot, trim(self.engine._memory, slot, alike[slot])
        del self._idle[slot]
        self._free_cells(cells - beyond * apart)
        if apart and self._kept.load(state, slot):
            ask.reused = trim(self.engine._memory, slot, length)
        ask._fed, ask._began, ask._sequence = ask.reused, time.monotonic(), slot
        self._active.append(ask)
        if self.guard and ask.alone and len(ask.alone) > 1:
            self._read_alone(ask, ask.alone)

    def _keep(self, slot: int, alike: int) -> None:
        """Copy what an idle slot holds, where more than a few tokens of it would be lost."""
        if len(self._idle[slot]) >= alike + _MIN_PREFIX:
            self._kept.keep(slot, self._idle[slot])

    def _free_cells(self, cells: int) -> None:
        """Let the longest idle slots forget until all idle ones take no more than `cells`."""
        held = sum(map(len, self._idle.values()))
        for slot, kept in self._idle.items():
            if held <= cells:
                return
            self._keep(slot, 0)
            trim(self.engine._memory, slot, 0)
            held -= len(kept)
            self._idle[slot] = []

    # -- a step -----------------------------------------------------------

    def _step(self, events: StepEvents) -> None:
        """One decode: a token for each that answers, then prompt tokens as they fit."""
        batch = self.engine._batch
        batch.clear()
        outputs: list[tuple[Ask, int]] = []
        for ask in sorted(self._active, key=lambda ask: len(ask._tokens) - ask._fed):
            end = min(len(ask._tokens), ask._fed + batch.capacity - batch.size)
            last = len(ask._tokens) - 1
            for position in range(ask._fed, end):
                batch.add(ask._tokens[position], position, ask._sequence, position == last)
            if end > last:
                outputs.append((ask, batch.size - 1))
            ask._fed = end
        self.engine._decode()
        sample, context = llama_cpp.llama_sampler_sample, self.engine._context
        chosen = [(ask, sample(ask._chain, context, row)) for ask, row in outputs
                  if ask._sequence == ask._slot]  # fmt: skip
        if self.guard is not None:  # its looks decode, and then the logits are gone
            alone = [ask for ask, _ in outputs if ask._sequence != ask._slot]
            chosen = self._watched(self.guard, alone, chosen, events)
        for ask, token in chosen:
            self._grow(ask, token, events)

    # -- the guard --------------------------------------------------------

    def _read_alone(self, ask: Ask, alone: Sequence[int]) -> None:
        """Let an ask read the last message alone before its prompt, on its slot's spare."""
        memory, slot = self.engine._memory, ask._slot
        if ask.reused + len(alone) > self._cells(ask):
            ask.reused = trim(memory, slot, 0)
        keep = common(alone, ask._tokens, min(ask.reused, len(alone) - 2))
        ask._sequence = self.engine.spare(slot)
        if keep:
            llama_cpp.llama_memory_seq_cp(memory, slot, ask._sequence, 0, keep)
        # The last token is read when the margin is.
        ask._tokens, ask._fed = [int(token) for token in alone[:-1]], keep

    def _read_prompt(self, ask: Ask) -> None:
        """Let it go on to its prompt; what both open with is not read again."""
        memory, spare, slot = self.engine._memory, ask._sequence, ask._slot
        prompt = [int(token) for token in ask.prompt]
        keep = common(prompt, ask._tokens, min(ask._fed, len(prompt) - 1))
        ask._tokens, ask._fed, ask._sequence = prompt, ask.reused, slot
        if keep > ask.reused and llama_cpp.llama_memory_seq_pos_min(memory, spare) == 0:
            llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, spare, slot, 0, keep)
            ask._fed = keep
        llama_cpp.llama_memory_seq_rm(memory, spare, -1, -1)

    def _watched(
        self, guard: Guard, alone: list[Ask], chosen: list[tuple[Ask, int]], events: StepEvents
    ) -> list[tuple[Ask, int]]:
        """Look at last messages alone, and at answers before a token; the tokens that go on."""
        looks = {ask: guard.look_alone(ask._sequence, ask.alone or ()) for ask in alone}
        for ask, token in chosen:
            if guard.due(ask.n_new, ask._tokens) and token not in self._pieces.ends:
                looks[ask] = guard.look(ask._slot, ask._fed, self.engine.spare(ask._slot))
        refused = set()
        if looks:
            margins = self.engine.forks().margins(guard.openers, list(looks.values()))
            refused = {a for (a, look), m in zip(looks.items(), margins, strict=True)
                       if m > look.above}  # fmt: skip
        for ask in looks:
            if ask in refused:
                said = ask.n_new > 0 or guard.begun(ask.prompt)
                text = ask._text.rest() + guard.ending(said)
                self._finish(ask, "content_filter", events, text)
            elif ask._sequence != ask._slot:
                self._read_prompt(ask)
        return [(ask, token) for ask, token in chosen if ask not in refused]

    def _grow(self, ask: Ask, token: int, events: StepEvents) -> None:
        ask.n_new += 1
        if token in self._pieces.ends:
            self._finish(ask, "stop", events, ask._text.rest())
            return
        text, stopped = ask._text.push(self._pieces[token])
        if stopped:
            self._finish(ask, "stop", events, text)
        elif ask.n_new == ask.max_tokens:
            self._finish(ask, "length", events, text + ask._text.rest())
        else:
            ask._tokens.append(token)
            if ask.stream and text:
                events.append((ask, text, None))
            elif text:
                ask._whole.append(text)

    def _finish(self, ask: Ask, reason: AskFinish, events: StepEvents, text: str = "") -> None:
        self._active.remove(ask)
        free_chain(ask._chain)
        ask._chain = None
        if ask._sequence != ask._slot:
            self._read_prompt(ask)
        self._idle[ask._slot] = ask._tokens[: ask._fed]
        if not ask.cancelled:
            events.append((ask, "".join(ask._whole) + text, reason))
            self._seconds += 0.1 * (time.monotonic() - ask._began - self._seconds)


def _deliver_each(events: StepEvents) -> None:
    for ask, text, finish in events:
        try:
            ask.listener(text, finish)
        except Exception:
            _LOG.exception("a listener failed, which ends its request")
            ask._failed = True
