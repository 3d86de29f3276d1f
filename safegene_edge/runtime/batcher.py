"""Answers that stream: requests join, leave and are cancelled while others run.

Where `Engine.generate` runs a list to its end, a `Batcher` has a thread that decodes one
token for everyone at each step, samples each with its own chain, and hands the text of all
over in one call. A slot that falls idle keeps its keys and values: the next turn of the same
conversation, which begins with the same tokens, goes on from there.
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
from .engine import Engine, Scales
from .sampling import Pieces, Sampling, TextStream, free_chain

_LOG = logging.getLogger(__name__)
AskFinish = Literal["stop", "length", "timeout", "error"]
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
        stream: hand text over as it comes; False: all of it at the end.
        deadline: `time.monotonic()` after which the answer ends with "timeout".
        heard: called with text and, with the last of it, the reason why the answer ended; by
            whatever the batcher's `deliver` makes call it.
    """

    prompt: Sequence[int]
    max_tokens: int
    heard: Callable[[str, AskFinish | None], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stream: bool = True
    deadline: float = float("inf")
    reused: int = 0
    """Prompt tokens that were still in the cache."""
    n_new: int = 0
    """Tokens of the answer so far."""
    cancelled: bool = False
    _tokens: list[int] = field(default_factory=list)
    _fed: int = 0
    _slot: int = -1
    _chain: Any = None
    _text: TextStream = field(default_factory=TextStream)
    _whole: list[str] = field(default_factory=list)
    _began: float = 0.0

    @property
    def cells(self) -> int:
        """KV cells that it needs at most."""
        return len(self.prompt) + self.max_tokens


News = list[tuple[Ask, str, AskFinish | None]]


class Batcher:
    """A thread that answers `Ask`s together on an `Engine`, which must do nothing else.

    Args:
        engine: its context and its slots.
        adapters: for every answer; None: as set on the model. They never change, so that a
            prefix kept in the cache is always that of the same weights.
        max_waiting: asks that wait for a slot, at most.
        deliver: called from the thread with the news of a step, and must return soon; by
            default each ask's `heard` is called there and then.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        adapters: Scales | None = None,
        max_waiting: int = 64,
        deliver: Callable[[News], None] | None = None,
    ) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.deliver = deliver or _tell
        llama = engine.llama
        llama.set_adapters_on(engine._context, adapters)
        llama_cpp.llama_memory_clear(engine._memory, False)
        trained = int(llama._model.n_ctx_train()) or engine.n_ctx
        self.n_ctx = min(engine.n_ctx, trained)
        """Tokens that prompt and answer may have together."""
        self._pieces = Pieces(llama._model.vocab, engine.n_vocab)
        self._waiting: deque[Ask] = deque()
        self._active: list[Ask] = []
        # The idle slots, longest idle first, each with the tokens that it still holds.
        self._slots = range(1, engine.n_parallel + 1)
        self._idle: dict[int, list[int]] = {slot: [] for slot in self._slots}
        self._seconds = 1.0  # a running mean of what an answer takes
        self._closed = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
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
        with self._wake:
            if self._closed:
                raise LlamaCppError("the batcher is closed", "Make a new one")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(len(self._waiting), self._wait_seconds())
            self._waiting.append(ask)
            self._wake.notify()

    def cancel(self, ask: Ask) -> None:
        """Drop a request, running or not; it hears nothing more of it."""
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
        """End the thread; whoever still waits hears "error"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _wait_seconds(self) -> int:
        rounds = len(self._waiting) / self.engine.n_parallel
        return min(60, max(1, round(rounds * self._seconds)))

    # -- the thread -------------------------------------------------------

    def _work(self) -> None:
        while self._rest():
            news: News = []
            try:
                self._drop(news)
                self._admit()
                if self._active:
                    self._step(news)
            except Exception:  # llama.cpp could not decode: these fail, the next may not
                _LOG.exception("a step failed")
                self._fail(news)
            if news:
                self.deliver(news)
        news = []
        self._fail(news)
        news += [(ask, "", "error") for ask in self._waiting]
        self.deliver(news)

    def _rest(self) -> bool:
        """Wait until there is something to do; False when closed."""
        with self._wake:
            while not (self._active or self._waiting or self._closed):
                self._wake.wait()
            return not self._closed

    def _drop(self, news: News) -> None:
        now = time.monotonic()
        for ask in [a for a in self._active if a.cancelled or now > a.deadline]:
            self._finish(ask, "timeout", news, ask._text.rest())
        with self._wake:
            late = [a for a in self._waiting if a.cancelled or now > a.deadline]
            for ask in late:
                self._waiting.remove(ask)
        news += [(ask, "", "timeout") for ask in late if not ask.cancelled]

    def _fail(self, news: News) -> None:
        for ask in list(self._active):
            self._finish(ask, "error", news)
        llama_cpp.llama_memory_clear(self.engine._memory, False)
        self._idle = {slot: [] for slot in self._slots}

    # -- seats ------------------------------------------------------------

    def _admit(self) -> None:
        """Seat those who wait, in their order, while there are slots and cells."""
        taken = sum(ask.cells for ask in self._active)
        while self._waiting and self._idle:
            ask = self._waiting[0]
            if taken + ask.cells > self.engine.n_ctx:
                return
            with self._wake:
                self._waiting.popleft()
            taken += ask.cells
            self._seat(ask)
            self._make_room(self.engine.n_ctx - taken)

    def _seat(self, ask: Ask) -> None:
        last = len(ask.prompt) - 1  # must be decoded anew
        alike = {s: common(ask.prompt, kept, min(last, len(kept)))
                 for s, kept in self._idle.items()}  # fmt: skip
        slot = max(alike, key=lambda s: alike[s])  # the first of equals is the longest idle
        if alike[slot] < _MIN_PREFIX:
            slot = next((s for s, kept in self._idle.items() if not kept), next(iter(self._idle)))
            alike[slot] = 0
        ask._slot, ask.reused = slot, trim(self.engine._memory, slot, alike[slot])
        del self._idle[slot]
        ask._tokens, ask._fed = list(ask.prompt), ask.reused
        ask._text, ask._began = TextStream(ask.stop), time.monotonic()
        ask._chain = ask.sampling.chain(self.engine.n_vocab)
        self._active.append(ask)

    def _make_room(self, cells: int) -> None:
        """Let the longest idle slots forget until all idle ones take no more than `cells`."""
        held = sum(map(len, self._idle.values()))
        for slot, kept in self._idle.items():
            if held <= cells:
                return
            trim(self.engine._memory, slot, 0)
            held -= len(kept)
            self._idle[slot] = []

    # -- a step -----------------------------------------------------------

    def _step(self, news: News) -> None:
        """One decode: a token for each that answers, then prompt tokens as they fit."""
        batch = self.engine._batch
        batch.clear()
        outputs: list[tuple[Ask, int]] = []
        for ask in sorted(self._active, key=lambda ask: len(ask._tokens) - ask._fed):
            end = min(len(ask._tokens), ask._fed + batch.capacity - batch.size)
            last = len(ask._tokens) - 1
            for position in range(ask._fed, end):
                batch.add(ask._tokens[position], position, ask._slot, position == last)
            if end > last:
                outputs.append((ask, batch.size - 1))
            ask._fed = end
        self.engine._decode()
        sample, context = llama_cpp.llama_sampler_sample, self.engine._context
        for ask, row in outputs:
            self._grow(ask, sample(ask._chain, context, row), news)

    def _grow(self, ask: Ask, token: int, news: News) -> None:
        ask.n_new += 1
        if token in self._pieces.ends:
            self._finish(ask, "stop", news, ask._text.rest())
            return
        text, stopped = ask._text.push(self._pieces[token])
        if stopped:
            self._finish(ask, "stop", news, text)
        elif ask.n_new == ask.max_tokens:
            self._finish(ask, "length", news, text + ask._text.rest())
        else:
            ask._tokens.append(token)
            if ask.stream and text:
                news.append((ask, text, None))
            elif text:
                ask._whole.append(text)

    def _finish(self, ask: Ask, reason: AskFinish, news: News, text: str = "") -> None:
        self._active.remove(ask)
        free_chain(ask._chain)
        ask._chain = None
        self._idle[ask._slot] = ask._tokens[: ask._fed]
        if not ask.cancelled:
            news.append((ask, "".join(ask._whole) + text, reason))
            self._seconds += 0.1 * (time.monotonic() - ask._began - self._seconds)


def _tell(news: News) -> None:
    for ask, text, finish in news:
        ask.heard(text, finish)
