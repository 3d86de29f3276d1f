"""Asking a local model: chats in, replies out, each kept in the journal as it finishes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SettingError
from ...runtime.guard import Guard, alone
from ...runtime.refusal_margin import OPENERS, prefix_free
from ...runtime.schedule import Scales
from ...runtime.thinking import Thought
from .chat import Advance, Chat, Reply
from .journal import Journal, fingerprint

if TYPE_CHECKING:
    from ...runtime.engine import Engine, Generation
    from ...runtime.llama import SafeLlama


GUARDED = "guarded"
ENDED = "ended"  # marks an answer of the journal that a guard has ended


class LocalModel:
    """A model with its adapters, asked through the batched engine.

    Answers come from an engine with flash attention, which is faster; likelihoods from one
    without, which sums more exactly, opened when one is first wanted.

    Args:
        columns: name of a column to its adapters' scales.
        identities: name of a column to a hash of the model, adapters and settings.
        openers: how a refusal opens, for `refusal`.
        think_tokens: of a thought, before the answer's own `max_tokens`.
        no_think: ask for answers without a thought.
        guard: looks at the answers of a column "guarded", which is "after" otherwise.
    """

    def __init__(
        self,
        llama: SafeLlama,
        columns: Mapping[str, Scales],
        identities: Mapping[str, str],
        *,
        max_tokens: int,
        n_parallel: int,
        n_ctx: int,
        journal: Journal,
        openers: Sequence[str] = (),
        think_tokens: int = 512,
        no_think: bool = False,
        guard: Guard | None = None,
    ) -> None:
        from ...runtime.chat import require_chat
        from ...runtime.engine import Engine

        require_chat(llama)
        self.llama = llama
        self.n_parallel, self._n_ctx = n_parallel, n_ctx
        self.engine = Engine(
            llama,
            n_parallel=n_parallel,
            n_ctx=n_ctx,
            flash_attn=True,
            guarded=guard is not None,
        )
        self.scales, self._identities, self.guard = dict(columns), dict(identities), guard
        self.columns = tuple(columns)
        if guard is not None:
            self.scales[GUARDED] = columns["after"]
            facts = {**vars(guard), "openers": guard.openers.all, "openings": None}
            self._identities[GUARDED] = fingerprint(identities["after"], facts)
        self.max_tokens, self.journal = max_tokens, journal
        thinks = llama.thinking.expected and not no_think
        self._opened, self._no_think = thinks and llama.thinking.opens, no_think
        self._thought = Thought(think_tokens, self._shown, self._opened) if thinks else None
        self._openers = prefix_free(tuple(self._tokens(text)) for text in openers or OPENERS)

    @cached_property
    def scorer(self) -> Engine:
        """The engine for likelihoods."""
        from ...runtime.engine import Engine

        return Engine(self.llama, n_parallel=self.n_parallel, n_ctx=self._n_ctx)

    def close(self) -> None:
        """Free the engines; the model stays."""
        self.engine.close()
        if "scorer" in self.__dict__:
            self.scorer.close()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def attack_columns(self) -> tuple[str, ...]:
        return tuple(self.scales)

    def key(self, kind: str, column: str, *parts: Any) -> str:
        """The journal's key of something measured in a column."""
        return fingerprint(kind, self._identities[column], *parts)

    def prompt(self, chat: Chat, *, answering: bool = False) -> list[int]:
        """The chat as tokens, up to where the model goes on.

        Where the template has no system role, its text goes before the user's first words.

        Args:
            answering: go on to where an answer begins, behind any thought. Words put into the
                model's mouth are always there.
        """
        answering = answering or self._no_think or bool(chat.prefill)
        render: Callable[[list[dict[str, str]]], list[int]] = (
            self.llama.render_answer if answering else self.llama.render
        )
        folded = chat.without_system()
        try:
            tokens = render(chat.as_dicts())
            if folded != chat and tokens == render(chat.without_system(keep=False).as_dicts()):
                tokens = render(folded.as_dicts())  # the template leaves it out
        except SettingError:
            if folded == chat:
                raise
            tokens = render(folded.as_dicts())
        return tokens + self._tokens(chat.prefill)

    def _shown(self, tokens: Sequence[int]) -> str:
        return self.llama.text(tokens, special=True)

    def _tokens(self, text: str) -> list[int]:
        return self.llama.spoken(text) if text else []

    def ask(
        self,
        column: str,
        chats: Sequence[Chat],
        advance: Advance | None = None,
        max_tokens: int | None = None,
        directly: bool = False,
    ) -> list[Reply]:
        """Greedy answers; see `Asker`. `max_tokens` if not the run's own.

        Args:
            directly: behind an empty thought, where the model thinks.
        """
        limit = max_tokens or self.max_tokens
        thought = None if directly else self._thought
        empty = self._no_think or (directly and self._thought is not None)
        thinks = (thought.tokens,) if thought else (0,) if empty else ()
        keys = [self.key("reply", column, limit, c.messages, c.prefill, *thinks) for c in chats]
        missing = {k: c for k, c in zip(keys, chats, strict=True) if k not in self.journal}
        names = list(missing)

        def done(count: int = 1) -> None:
            if advance is not None:
                for _ in range(count):
                    advance()

        def keep(part: Sequence[int], index: int, made: Generation) -> None:
            if made.finish != "cancelled":
                said = None if made.finish == "context" else list(made.tokens)
                ended = made.finish == "content_filter"
                self.journal.put(names[part[index]], [ENDED, said] if ended else said)
            done()

        done(len(chats) - len(names))
        guard = self.guard if column == GUARDED else None
        if guard is not None:
            for name in self._refused(guard, missing):
                self.journal.put(name, [ENDED, []])
                done()
            names = [name for name in names if name not in self.journal]
        # Behind words put into its mouth a model does not think any more.
        plain = [i for i, name in enumerate(names) if missing[name].prefill or not thought]
        others = [i for i in range(len(names)) if i not in set(plain)]
        for part, how in ((plain, None), (others, thought)):
            self.engine.generate(
                [self.prompt(missing[names[i]], answering=directly) for i in part],
                max_tokens=limit,
                adapters=self.scales[column],
                on_done=partial(keep, part),
                thought=how,
                guard=guard,
            )
        return [self._reply(c, self.journal[key]) for c, key in zip(chats, keys, strict=True)]

    def _refused(self, guard: Guard, chats: Mapping[str, Chat]) -> list[str]:
        """The chats whose last message alone a guard refuses, by their keys."""
        alones = {}
        for name, chat in chats.items():
            turns = alone(chat.as_dicts()) or (chat.as_dicts() if chat.prefill else None)
            if turns is not None:
                asked = Chat(tuple((turn["role"], turn["content"]) for turn in turns))
                alones[name] = self.prompt(asked, answering=True)
        # One that is longer than the context is not answered either.
        most = self.engine.n_ctx - guard.room
        alones = {name: one for name, one in alones.items() if len(one) <= most}
        if not alones:
            return []
        scales = self.scales[GUARDED]
        margins = self.engine.margins(list(alones.values()), guard.openers, adapters=scales)
        return [name for name, margin in zip(alones, margins, strict=True)
                if margin > guard.request_threshold]  # fmt: skip

    def _reply(self, chat: Chat, kept: list[Any] | None) -> Reply:
        if kept is not None and kept[:1] == [ENDED]:
            assert self.guard is not None
            tokens = kept[1]
            ending = self.guard.ending(bool(tokens or chat.prefill))
            return Reply(self.llama.text(tokens) + ending, tuple(tokens))
        tokens = kept
        if tokens is None:
            return Reply(None)
        shown = self._shown(tokens)
        answer = self.llama.thinking.answer(shown, self._opened and not chat.prefill)
        if answer is None:
            return Reply(None, tuple(tokens), thinking=True)
        return Reply(self.llama.text(tokens) if answer == shown else answer, tuple(tokens))

    def refusal(self, column: str, chat: Chat) -> float:
        """Log-probability in nats that the answer opens with a refusal opener.

        That is the log of the openers' summed probability. One call a chat, so that the openers
        share the prompt's keys and values.
        """
        key = self.key("refusal", column, self._openers, chat.messages, chat.prefill)
        if key not in self.journal:
            prompt = self.prompt(chat, answering=True)
            longest = max(len(opener) for opener in self._openers)
            if len(prompt) + longest * len(self._openers) > self.scorer.n_ctx:
                return 0.0  # does not fit: for an attacker as bad as a sure refusal
            scores = self.scorer.score(
                [prompt] * len(self._openers), self._openers, adapters=self.scales[column]
            )
            sums = [float(score.sum()) for score in scores]
            self.journal.put(key, float(np.logaddexp.reduce(sums)))
        return float(self.journal[key])
