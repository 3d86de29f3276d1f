"""What a target says with the gene at some strength: margins, and the KL divergence it costs.

The KL is taken on the first tokens of the target's own answers, without the gene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingError
from ..prompts import Prompt
from ..runtime.llama import SafeLlama
from ..runtime.logits import kl_from_logits, log_softmax
from ..runtime.refusal_margin import Leads, Openers
from .examples import Examples

if TYPE_CHECKING:
    from ..runtime.engine import Engine

Values = npt.NDArray[np.float64]
Visit = Callable[[int, int, npt.NDArray[np.float32]], None]  # index, position, row of logits
_CELLS = 4096  # KV cells, where no example needs more


@dataclass(frozen=True)
class Reading:
    """What was read at one strength, a number a prompt.

    Attributes:
        harmful, harmless: the margins by which answers open with a refusal, nats.
        kl, task_kl: KL divergence from the target without the gene, nats a token.
        borderline: of the harmless margins, those of prompts that are worded like harm.
    """

    harmful: Values
    harmless: Values
    kl: Values
    task_kl: Values
    borderline: Values = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Asked:
    """Examples as tokens, and which of the harmless ones are borderline."""

    harmful: list[list[int]]
    harmless: list[list[int]]
    task: list[list[int]]
    borderline: tuple[bool, ...] = ()

    @classmethod
    def of(cls, llama: SafeLlama, examples: Examples) -> Asked:
        """Rendered by the target's template, up to where an answer begins."""

        def rendered(prompts: Iterable[Prompt]) -> list[list[int]]:
            return [llama.render_answer(prompt.as_dicts()) for prompt in prompts]

        return cls(
            rendered(examples.harmful), rendered(examples.harmless), rendered(examples.task),
            tuple(prompt.borderline for prompt in examples.harmless),
        )  # fmt: skip

    def cells(self, openers: Openers, tokens: int) -> int:
        """KV cells that the longest sequence takes."""
        longest = max(map(len, [*self.harmful, *self.harmless, *self.task]))
        return longest + max(tokens, *(len(path) for path, _ in openers.paths))


def context_for(needed: int, n_ctx: int | None, trained: int) -> int:
    """KV cells for the engine.

    Raises:
        SettingError: the longest example fits neither the model nor the cells that were asked for.
    """
    if needed > (n_ctx or needed):
        raise SettingError(
            f"an example needs {needed} KV cells, and n_ctx is {n_ctx}",
            f"Give n_ctx (--ctx) {needed}",
        )
    if 0 < trained < needed and n_ctx is None:
        raise SettingError(
            f"an example needs {needed} tokens, the model's context has {trained}",
            "Give shorter examples, or a model with a longer context; `recalibrate` goes beyond it "
            f"with n_ctx (--ctx) {needed}",
        )
    return n_ctx or max(_CELLS, needed)


class _Kept:
    """The target's own answers to prompts, and the log-probabilities of the rows there."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts, self.answers = prompts, [list[int]() for _ in prompts]
        self._rows: list[dict[int, npt.NDArray[np.float32]]] = [{} for _ in prompts]

    def keep(self, index: int, position: int, row: npt.NDArray[np.float32]) -> None:
        """Take the target's own logits that a token is chosen from."""
        self._rows[index][position] = log_softmax(row)

    def take(self, answers: Sequence[list[int]], n_vocab: int) -> None:
        """Take the answers, each up to a token that a model of so many tokens lacks.

        The row that such a token was chosen from goes, too, and a prompt with no row left.
        """
        whole = list(zip(self.prompts, answers, self._rows, strict=True))
        self.prompts, self.answers, self._rows = [], [], []
        for prompt, answer, rows in whole:
            known = list(takewhile(lambda token: token < n_vocab, answer))
            end = len(prompt) + len(known) - (len(known) < len(answer))
            if left := {at: row for at, row in rows.items() if at < end}:
                self.prompts.append(prompt)
                self.answers.append(known)
                self._rows.append(left)

    def sequences(self) -> tuple[list[list[int]], list[Sequence[int]]]:
        """Each prompt with its answer, and the positions whose rows are kept."""
        whole = [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        return whole, [sorted(rows) for rows in self._rows]

    def compare(self) -> tuple[Visit, Values]:
        """Takes rows with the gene; the array that it adds up in, a prompt's mean each."""
        sums, kept = np.zeros(len(self.prompts)), self._rows

        def visit(index: int, position: int, row: npt.NDArray[np.float32]) -> None:
            value = _kl(kept[index][position], row)
            sums[index] += value / len(kept[index])

        return visit, sums


class Reader:
    """Reads examples at any strength; what does not change is made once.

    Args:
        own: the target's own adapters with their scales.
        handles: the gene's layers, attached.
    """

    def __init__(
        self,
        engine: Engine,
        own: Mapping[Any, float],
        handles: Sequence[Any],
        asked: Asked,
        openers: Openers,
        tokens: int,
    ) -> None:
        self.engine, self.own, self.handles = engine, own, handles
        self.asked, self.openers, self.tokens = asked, openers, tokens
        self._kept: tuple[_Kept, _Kept] | None = None
        self._known: dict[tuple[str, float], Values] = {}

    def scales(self, strength: float) -> dict[Any, float]:
        """Every adapter's scale, the gene's at one strength."""
        return {**self.own, **dict.fromkeys(self.handles, strength)}

    def read_both(self, strength: float) -> None:
        """Read both kinds' margins in one run: most harmless prompts open like a harmful one."""
        asked, kinds = self.asked, (("harmful", strength), ("harmless", strength))
        if not self._known.keys() >= set(kinds):
            margins = self.margins([*asked.harmful, *asked.harmless], self.scales(strength))
            self._known |= zip(kinds, np.split(margins, [len(asked.harmful)]), strict=True)

    def refusals(self, strength: float = 0.0) -> Values:
        """The harmful prompts' margins, read once."""
        return self._margins("harmful", strength)

    def over_refusals(self, strength: float) -> Values:
        """The harmless prompts' margins, read once."""
        return self._margins("harmless", strength)

    def _margins(self, kind: str, strength: float) -> Values:
        key = kind, strength
        if key not in self._known:
            self._known[key] = self.margins(getattr(self.asked, kind), self.scales(strength))
        return self._known[key]

    def without(self) -> Reading:
        """The target's own: its KL is 0. To be called before `at`."""
        asked, scales = self.asked, self.scales(0.0)
        self._kept = kept, task = _Kept(asked.harmless), _Kept(asked.task)
        leads = Leads(self.openers, [*asked.harmless, *asked.harmful])
        for own, paths, look in (
            (kept, (leads.sequences, leads.spans), leads.look),
            (task, ([], []), _ignore),
        ):
            said = self.engine.answer_and_visit(
                own.prompts, *paths, look, own.keep, max_tokens=self.tokens, adapters=scales
            )
            own.answers = [answer.tokens for answer in said]
        none = (np.zeros(len(own.prompts)) for own in self._kept)
        return self._reading(leads, *none)

    def at(self, strength: float) -> Reading:
        """With the gene at one strength. `without` comes first."""
        if self._kept is None:
            raise SettingError("the target was not read without the gene")
        asked, scales, (kept, task) = self.asked, self.scales(strength), self._kept
        see, kl = kept.compare()
        # The harmless ones first: `see` counts from 0.
        leads = Leads(self.openers, [*asked.harmless, *asked.harmful])
        sequences, spans = kept.sequences()
        count = len(leads.sequences)
        self.engine.visit_logits(
            leads.sequences + sequences, leads.spans + spans,
            lambda index, position, row: (
                leads.look(index, position, row) if index < count
                else see(index - count, position, row)
            ),
            adapters=scales,
        )  # fmt: skip
        see_task, task_kl = task.compare()
        self.engine.visit_logits(*task.sequences(), see_task, adapters=scales)
        return self._reading(leads, kl, task_kl)

    def _reading(self, leads: Leads, kl: Values, task_kl: Values) -> Reading:
        """Of the harmless prompts' margins and the harmful ones', in this order."""
        harmless, harmful = np.split(leads.margins(), [len(self.asked.harmless)])
        borderline = harmless[np.array(self.asked.borderline, bool)]
        return Reading(harmful, harmless, kl, task_kl, borderline)

    def kl_to(self, other: Reader, step: int = 4) -> Values:
        """KL(this model ‖ another one) along its own answers to every `step`-th harmless prompt.

        A prompt's mean over its tokens, nats. Tokens that one of both lacks are left out, and
        prompts that have one.
        """
        known = other.engine.n_vocab
        kept = _Kept([prompt for prompt in self.asked.harmless[::step] if max(prompt) < known])
        if not kept.prompts:
            return np.zeros(0)
        said = self.engine.answer_and_visit(
            kept.prompts, [], [], _ignore, kept.keep,
            max_tokens=self.tokens, adapters=self.scales(0.0),
        )  # fmt: skip
        kept.take([answer.tokens for answer in said], known)
        see, sums = kept.compare()
        other.engine.visit_logits(*kept.sequences(), see, adapters=other.scales(0.0))
        return sums

    def margins(self, prompts: list[list[int]], scales: Any) -> Values:
        """The margin by which each answer opens with a refusal (nats); see `refusal_margin`."""
        return np.array(self.engine.margins(prompts, self.openers, adapters=scales))


def _kl(own: npt.NDArray[np.float32], row: npt.NDArray[np.float32]) -> float:
    """Of log-probabilities from a row of logits, over the tokens that both have."""
    if own.size == row.size:
        return kl_from_logits(own, log_softmax(row))
    both = min(own.size, row.size)  # a fine-tune has added tokens
    return kl_from_logits(log_softmax(own[:both]), log_softmax(row[:both]))


def _ignore(*_: Any) -> None:
    """Nobody looks."""
