"""The batched engine: many sequences in one decode, on CPU or whatever llama.cpp offloads to.

Generation and scoring are jobs of one scheduler (`schedule`).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..aliases import Floats
from ..errors import LlamaCppError, SettingError
from .guard import Guard
from .logits import kl_from_logits, log_softmax, log_sum_exp
from .refusal_margin import Leads, Openers
from .schedule import Choose, Job, Scales, Scheduler
from .thinking import CLOSE, Thought

Finish = Literal["stop", "length", "context", "cancelled", "content_filter"]


@dataclass(slots=True)
class Generation:
    """An answer: its tokens (without the end token) and why it ended."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish = "cancelled"


class Engine(Scheduler):
    """Batched greedy generation and scoring on a `SafeLlama`'s model.

    It has a context of its own on the model's weights, so that it disturbs no chat; only
    one run at a time. Closing the `SafeLlama` closes it.

    Args:
        llama: the model; its adapters can be set anew for each run.
        n_parallel: sequences decoded together.
        n_ctx: KV cells for all of them together.
        n_batch: tokens a decode.
        max_outputs: rows of logits a decode; each costs n_vocab floats.
        n_threads: default: the model's.
        flash_attn: skips the KV cells of other sequences, so that many in parallel cost
            little more than one (a quarter of the time of a run of 16 on a small model); it
            sums in lower precision. None takes the model's own setting, which keeps scores
            those of its own context.
        watch: sees every decode.
        guarded: has sequences for a guard, too.
    """

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- generation -------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        adapters: Scales | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
        cancel: threading.Event | None = None,
        stop_at_end: bool = True,
        thought: Thought | None = None,
        guard: Guard | None = None,
    ) -> list[Generation]:
        """Greedy answers to token sequences, in the order of the prompts.

        Args:
            prompts: token sequences, such as `SafeLlama.render` gives.
            max_tokens: new tokens at most, for each.
            adapters: adapter to scale for this run; None: as set on the model.
            on_done: called with index and answer as each finishes.
            cancel: when set, unfinished answers are returned as "cancelled"; looked at
                between decodes.
            stop_at_end: False goes on past the end-of-text token (for timing).
            thought: the model may think first; `max_tokens` then counts after the thought. One
                that does not end within its own tokens leaves no answer, "length".
            guard: looks at each answer, of an engine made with `guarded`. One that it ends is a
                "content_filter"; the refusal is not among its tokens. A user's last message alone
                is not looked at here: that is a prompt whose margin `margins` reads.

        A prompt that does not fit into the context gives an empty answer, "context".
        """
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise SettingError(f"max_tokens is {max_tokens}", "Give a whole number, 1 or more")
        prompts = list(prompts)
        answers = [Generation() for _ in prompts]
        jobs, choose = self._answering(
            prompts, answers, max_tokens, on_done, stop_at_end, thought, guard
        )
        self._run(jobs, adapters, cancel, choose, None)
        return answers

    def _answering(
        self,
        prompts: Sequence[Sequence[int]],
        answers: list[Generation],
        max_tokens: int,
        on_done: Callable[[int, Generation], None] | None = None,
        stop_at_end: bool = True,
        thought: Thought | None = None,
        guard: Guard | None = None,
    ) -> tuple[list[Job], Choose]:
        """Jobs that fill `answers`, and what takes each one's next token."""
        thinking = set(range(len(prompts))) if thought else set()
        most = max_tokens + (thought.tokens if thought else 0)
        room = guard.room if guard else 0

        def finish(job: Job, reason: Finish) -> None:
            answers[job.index].finish = reason
            if on_done is not None:
                on_done(job.index, answers[job.index])

        def ended(job: Job, token: int) -> bool:
            if stop_at_end and self._is_end(token):
                finish(job, "stop")
                return True
            answers[job.index].tokens.append(token)
            job.tokens.append(token)
            job.n_new -= 1
            if thought and job.index in thinking:
                self._think(job, answers[job.index].tokens, thought, max_tokens, thinking)
            if job.n_new == 0:
                finish(job, "length")
            return job.n_new == 0

        def choose(rows: Floats, jobs: list[Job]) -> list[Job]:
            places = rows.argmax(axis=1)
            _require_numbers(rows[np.arange(len(places)), places], self.llama.model_path)
            chosen = list(zip(jobs, places.tolist(), strict=True))
            done = self._refused(guard, chosen, answers)
            for job in done:
                finish(job, "content_filter")
            return done + [job for job, token in chosen if job not in done and ended(job, token)]

        jobs = [
            Job(i, _tokens(p, self.n_vocab), frozenset(), most, spare=room)
            for i, p in enumerate(prompts)
        ]
        return self._fitting(jobs, finish), choose

    def _fitting(self, jobs: list[Job], finish: Callable[[Job, Finish], None]) -> list[Job]:
        """The jobs that the context can hold; the others are finished."""
        for job in jobs:
            if job.cells(0) > self.n_ctx:
                finish(job, "context")
        return [job for job in jobs if job.cells(0) <= self.n_ctx]

    def _refused(
        self, guard: Guard | None, chosen: list[tuple[Job, int]], answers: list[Generation]
    ) -> list[Job]:
        """Those whose answers a guard ends before these tokens are said."""
        if guard is None:
            return []
        looks = {
            job: guard.look(job.slot, job.fed, self.spare(job.slot))
            for job, token in chosen
            if guard.due(len(answers[job.index].tokens), job.tokens) and not self._is_end(token)
        }
        if not looks:
            return []
        margins = self.forks().margins(guard.openers, list(looks.values()))
        return [job for job, margin in zip(looks, margins, strict=True)
                if margin > guard.threshold]  # fmt: skip

    def margins(
        self,
        prompts: Sequence[Sequence[int]],
        openers: Openers,
        *,
        adapters: Scales | None = None,
    ) -> list[float]:
        """The margin (nats) by which each answer opens with a refusal; see `refusal_margin`."""
        leads = Leads(openers, prompts)
        self.visit_logits(leads.sequences, leads.spans, leads.look, adapters=adapters)
        found = leads.margins()
        _require_numbers(found, self.llama.model_path)
        return [float(margin) for margin in found]

    @staticmethod
    def _think(
        job: Job, tokens: list[int], thought: Thought, max_tokens: int, thinking: set[int]
    ) -> None:
        """Begin to count the answer where the thought ends; give up where it takes too long."""
        if thought.ended(tokens):
            thinking.discard(job.index)
            thought_of = CLOSE in thought.text(tokens)
            job.leave(max_tokens if thought_of else max(max_tokens - len(tokens), 0))
        elif len(tokens) >= thought.tokens:
            job.leave(0)

    def _is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.llama._model.vocab, token))

    # -- scoring ----------------------------------------------------------

    def visit_logits(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        visit: Callable[[int, int, Floats], None],
        *,
        adapters: Scales | None = None,
        exact: bool = False,
        cancel: threading.Event | None = None,
    ) -> None:
        """Show the logits at given positions, without generating.

        Args:
            sequences: token sequences.
            positions: for each sequence, the positions whose next-token logits are wanted;
                position p sees the tokens 0..p.
            visit: called with sequence index, position and a row of n_vocab logits, which
                is valid during the call only.
            exact: decode every sequence alone, from its first token, so that the logits
                are those of a one-sequence llama.cpp context bit for bit. Batching changes
                the order of floating-point sums, which quantised models amplify: on
                SmolLM2-135M Q4_K_M by up to 1 in a logit, as much as llama.cpp's own
                logits move when a prompt is decoded in two pieces.
        """
        jobs = self._visiting(sequences, positions)
        self._run(jobs, adapters, cancel, None, visit, alone=exact)

    def _visiting(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[Job]:
        """Jobs that show the logits at these positions."""
        jobs = []
        for index, (sequence, wanted) in enumerate(zip(sequences, positions, strict=True)):
            if not wanted:
                continue
            if min(wanted) < 0 or max(wanted) >= len(sequence):
                raise SettingError(
                    f"position {max(wanted)} lies outside of sequence {index}, "
                    f"which has {len(sequence)} tokens"
                )
            tokens = _tokens(sequence, self.n_vocab)[
                : max(wanted) + 1
            ]  # what comes later cannot matter
            if len(tokens) > self.n_ctx:
                raise SettingError(
                    f"sequence {index} has {len(tokens)} tokens, the engine {self.n_ctx} cells",
                    "Make the engine with a larger n_ctx",
                )
            jobs.append(Job(index, tokens, frozenset(wanted), 0))
        return jobs

    def answer_and_visit(
        self,
        prompts: Sequence[Sequence[int]],
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        visit: Callable[[int, int, Floats], None],
        see: Callable[[int, int, Floats], None],
        *,
        max_tokens: int,
        adapters: Scales | None = None,
    ) -> list[Generation]:
        """`generate` and `visit_logits` in one run: what both open with is read once.

        Args:
            prompts, max_tokens: as for `generate`.
            sequences, positions, visit: as for `visit_logits`.
            see: called like `visit`, with a prompt's index and the row that each token of its
                answer is chosen from.
        """
        answers = [Generation() for _ in prompts]
        answering, take = self._answering(prompts, answers, max_tokens)
        visiting = self._visiting(sequences, positions)

        def choose(rows: Floats, jobs: list[Job]) -> list[Job]:
            for job, row in zip(jobs, rows, strict=True):
                see(job.index, len(job.tokens) - 1, row)
            return take(rows, jobs)

        self._run([*answering, *visiting], adapters, None, choose, visit)
        return answers

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        adapters: Scales | None = None,
        exact: bool = False,
        cancel: threading.Event | None = None,
    ) -> list[Floats]:
        """Log-likelihood in nats of every completion token, given what precedes it.

        `exact` as in `visit_logits`.
        """
        pairs = list(zip(prompts, completions, strict=True))
        if any(not prompt for prompt, _ in pairs):
            raise SettingError("a prompt to score has no tokens", "Give at least one")
        scores = [np.zeros(len(completion), np.float32) for _, completion in pairs]

        def visit(index: int, position: int, row: Floats) -> None:
            prompt, completion = pairs[index]
            place = position + 1 - len(prompt)
            scores[index][place] = row[completion[place]] - log_sum_exp(row)

        sequences = [[*prompt, *completion] for prompt, completion in pairs]
        spans = [range(len(p) - 1, len(p) + len(c) - 1) for p, c in pairs]
        self.visit_logits(sequences, spans, visit, adapters=adapters, exact=exact, cancel=cancel)
        return scores

    def kl_divergence(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        *,
        reference: Scales,
        adapters: Scales | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Floats]:
        """KL(reference ‖ adapters) in nats at every given position.

        Args:
            sequences, positions: as in `visit_logits`.
            reference: the adapter scales of the reference; {} is the bare model.
            adapters: of the other side; None: as set on the model.

        Memory: one row of n_vocab floats for every position of n_parallel sequences.
        """
        found = [np.zeros(len(wanted), np.float32) for wanted in positions]
        for start in range(0, len(sequences), self.n_parallel):
            part = slice(start, start + self.n_parallel)
            rows: dict[tuple[int, int], Floats] = {}

            def keep(i: int, position: int, row: Floats, rows: Any = rows) -> None:
                rows[i, position] = log_softmax(row)

            def compare(
                i: int, position: int, row: Floats, rows: Any = rows, start: int = start
            ) -> None:
                value = kl_from_logits(rows[i, position], log_softmax(row))
                wanted = positions[start + i]
                found[start + i][[k for k, p in enumerate(wanted) if p == position]] = value

            for scales, visit in ((reference, keep), (adapters, compare)):
                self.visit_logits(
                    sequences[part], positions[part], visit, adapters=scales, cancel=cancel
                )
                if cancel is not None and cancel.is_set():
                    return found
        return found


def _tokens(sequence: Sequence[int], n_vocab: int) -> list[int]:
    tokens = [operator.index(token) for token in sequence]
    if not tokens:
        raise SettingError("a sequence has no tokens", "Give at least one")
    if min(tokens) < 0 or max(tokens) >= n_vocab:
        wrong = next(token for token in tokens if not 0 <= token < n_vocab)
        raise SettingError(
            f"{wrong} is no token: the vocabulary has {n_vocab}", "Tokenize the text"
        )
    return tokens


def _require_numbers(values: npt.NDArray[Any], model: str) -> None:
    """LlamaCppError where a model's logits, or what was made of them, are no numbers."""
    if np.isnan(values).any():
        raise LlamaCppError(
            f"{model}: the model's logits are NaN", "Download or convert it again, or its adapter"
        )
