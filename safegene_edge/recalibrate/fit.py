"""Few-shot recalibration: non-negative coefficients of layers, by forward passes alone.

With c the coefficients, T the target, G the gene and w a weight, minimised is

    J(c) = max(goal * (1 - room), mean over harmful of L_refuse)
           + w * mean over harmless of KL(p_T || p_{T+cG})

The mean of L_refuse is the share of answers that open with none of the gene's refusal openers,
smoothed over the margin by which they do or do not (`openers`); the KL is taken on the first
tokens of the target's own answers. The goal is the aligned model's own share, which the gene
carries: what was lost shall come back, and not much more, for what lies beyond is paid with
refusals of harmless prompts. But a few examples tell a share only roughly, so it goes beyond the
goal where that is not paid: room is 1 while no larger a share of the harmless examples is refused
than the aligned model refuses, and falls to 0 at three points above it. Of all the points that
were looked at, the one with the smallest J and a KL within the budget is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..compat import open_model, require_fit
from ..errors import NoEffectError, SettingError
from ..files import PathLike, sha256
from ..gene import Expression, SafetyGene
from .examples import Examples
from .refusal_margin import Openers, Tokens, refusal_loss

if TYPE_CHECKING:
    from ..runtime.engine import Engine

_TOLERATED = 0.03  # over-refusal beyond the aligned model's: the most that the project promises
_OVER_BUDGET = 500.0  # what a nat beyond the budget adds to the search's objective
# Of 16 × 16 pairs, five fine-tunes of SmolLM2 and an identity-shifted Qwen2.5-Coder order 83 % and
# more with twice the gene, twenty strangers at most 61 %; with the gene once that Qwen orders 66 %.
_ORDERED, _TWICE = 0.7, 2.0
Scaling = npt.NDArray[np.float64]
Visit = Callable[[int, int, npt.NDArray[np.float32]], None]  # index, position, row of logits


@dataclass(frozen=True)
class Settings:
    """Settings of a recalibration.

    Attributes:
        weight: w, how much a nat of KL counts against all refusals; chosen on SmolLM2's
            fine-tunes.
        tokens: of each harmless answer that the KL sees.
        upper: the largest coefficient that is looked at.
        passes: points looked at, at most; each is one pass over the examples.
        groups: coefficients that are searched for; neighbouring layers share one, since a
            search needs a few passes for each.
    """

    weight: float = 1.5
    tokens: int = 8
    upper: float = 2.0
    passes: int = 24
    groups: int = 6

    def __post_init__(self) -> None:
        finite = self.weight >= 0 and self.upper > 0 and isfinite(self.weight + self.upper)
        if not finite or min(self.tokens, self.groups) < 1 or not 6 <= self.passes < 100:
            raise SettingError(f"the recalibration has senseless settings: {self}")


@dataclass(frozen=True)
class Point:
    """One evaluated point.

    Attributes:
        refusal_loss: smoothed share of harmful examples that are not refused, 0 to 1.
        kl: KL divergence on the harmless ones, in nats a token.
        room: whether refusals beyond the aligned model's are welcome, from 1 (no more of the
            harmless ones are refused than it refuses) to 0.
        task_kl: KL divergence on the task's prompts, in nats a token; None without any.
    """

    coefficients: tuple[float, ...]
    refusal_loss: float
    kl: float
    room: float = 0.0
    task_kl: float | None = None

    def objective(self, weight: float, goal: float = 0.0) -> float:
        """J of this point."""
        paid = self.kl if self.task_kl is None else (self.kl + self.task_kl) / 2
        return max(goal * (1 - self.room), self.refusal_loss) + weight * paid

    def most(self) -> float:
        """The larger of the KL divergences, which the budget bounds."""
        return max(self.kl, self.task_kl or 0.0)


def recalibrate(
    target: PathLike,
    gene: SafetyGene,
    examples: Examples | None = None,
    *,
    adapters: Iterable[PathLike] = (),
    kl_budget: float = 0.1,
    settings: Settings | None = None,
    gene_file: PathLike | None = None,
    curve: list[Point] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Expression:
    """Find the gene's coefficients for a quantised target.

    Args:
        target: the model as it will be run; nothing is written to it.
        examples: what to calibrate on; default: the shipped ones.
        adapters: GGUF LoRAs that the target is run with, such as its task's.
        kl_budget: nats a token that the point may cost on harmless prompts, and on the task's.
        gene_file: its hash goes into the expression.
        curve: gets every evaluated point, in order; the first is the target itself.
        progress: called with the passes done and their limit.

    Raises:
        MismatchError: the gene does not fit the target.
        SettingError: settings make no sense, or the labels look swapped.
        NoEffectError: no point within the budget lowers the refusal loss.
    """
    from ..runtime.engine import Engine
    from ..runtime.llama import SafeLlama

    if not kl_budget > 0:
        raise SettingError(f"the KL budget is {kl_budget}", "Give a positive number")
    settings = settings or Settings()
    require_fit(gene, open_model(target))
    points: list[Point] = [] if curve is None else curve
    points.clear()
    with SafeLlama(str(target), n_ctx=512) as llama, Engine(llama, n_parallel=16) as engine:
        for adapter in adapters:
            llama.attach(adapter)
        own = {handle: handle.scale for handle in llama.adapters}
        handles = [llama.attach(part, 0.0) for part in gene.split().values()]
        objective = _Objective(engine, own, handles, gene, examples or Examples.shipped(), settings)
        objective.require_labels()

        def look(alpha: Scaling) -> float:
            alpha = np.clip(alpha, 0.0, settings.upper)
            point = objective.at(alpha)
            points.append(point)
            if progress is not None:
                progress(len(points), settings.passes)
            over = max(0.0, point.most() - kl_budget)
            return point.objective(settings.weight, gene.aligned_loss) + _OVER_BUDGET * over

        _search(look, len(handles), settings)
    best = _choose(points, kl_budget, settings.weight, gene.aligned_loss)
    found = dict(zip(gene.split(), best.coefficients, strict=True))
    return Expression(found, sha256(gene_file) if gene_file else "", sha256(Path(target)))


def taken(expression: Expression, curve: Sequence[Point]) -> Point:
    """The point of a recalibration's curve that became its expression."""
    values = tuple(expression.coefficients.values())
    return next(point for point in curve if point.coefficients == values)


def _search(look: Callable[[Scaling], float], count: int, settings: Settings) -> None:
    """A line of common scales, then COBYLA in the box from the best of them."""
    from scipy.optimize import minimize

    line = [0.0, 1.0, 0.5, 1.5, 2.0]
    losses = [look(np.full(count, min(scale, settings.upper))) for scale in line]
    start = min(line[int(np.argmin(losses[1:])) + 1], settings.upper)
    n_groups = min(count, settings.groups)
    left = settings.passes - len(line)
    if left < n_groups + 2:
        return
    group = np.arange(count) * n_groups // count
    minimize(
        lambda x: look(np.asarray(x, np.float64)[group]),
        np.full(n_groups, start),
        method="COBYLA",
        bounds=[(0.0, settings.upper)] * n_groups,
        options={"rhobeg": 0.4, "maxiter": left, "tol": 0.01},
    )


def _choose(points: Sequence[Point], budget: float, weight: float, goal: float = 0.0) -> Point:
    own, others = points[0], points[1:]
    fits = [p for p in others if p.most() <= budget and p.refusal_loss < own.refusal_loss]
    if not fits:
        least = min(others, key=lambda p: p.refusal_loss)
        raise NoEffectError(
            f"no coefficients within a KL of {budget:g} nats raise refusals: the refusal loss is "
            f"{own.refusal_loss:.3f} without the gene and at best {least.refusal_loss:.3f} "
            f"with it, at a KL of {least.most():.3f}",
            "Check that the gene is of the model's family and that the labels are right",
        )
    return min(fits, key=lambda p: p.objective(weight, goal))


def _share_in_order(harmful: Scaling, harmless: Scaling) -> float:
    """Share of pairs whose harmful margin is larger, ties half: the area under the ROC curve."""
    return float((np.sign(harmful[:, None] - harmless) + 1).mean() / 2)


class _Kept:
    """Prompts, the target's own answers to them, and the log-probabilities of the rows there."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        from ..runtime.logits import kl_from_logits, log_softmax

        self._softmax, self._kl = log_softmax, kl_from_logits
        self.prompts, self.answers = prompts, answers
        self._reference: dict[tuple[int, int], npt.NDArray[np.float32]] = {}

    def keep(self, index: int, position: int, row: npt.NDArray[np.float32]) -> None:
        """Take a row of the target's own logits."""
        self._reference[index, position] = self._softmax(row)

    def compare(self) -> tuple[Visit, Callable[[], float]]:
        """Takes rows with the gene; gives the mean KL divergence of a token."""
        sums = np.zeros(len(self.prompts))

        def visit(index: int, position: int, row: npt.NDArray[np.float32]) -> None:
            value = self._kl(self._reference[index, position], self._softmax(row))
            sums[index] += value / (len(self.answers[index]) + 1)

        return visit, lambda: float(sums.mean())


class _Objective:
    """Refusal loss and KL at given coefficients; what does not change is made once."""

    def __init__(
        self,
        engine: Engine,
        own: Mapping[Any, float],
        handles: Sequence[Any],
        gene: SafetyGene,
        examples: Examples,
        settings: Settings,
    ) -> None:
        llama = engine.llama
        self.engine, self.own, self.handles = engine, own, handles
        self.off = {**own, **dict.fromkeys(handles, 0.0)}
        self.over_refusal = gene.aligned_over_refusal

        def render(text: str) -> list[int]:
            return list(llama.render([{"role": "user", "content": text}]))

        self.openers = Openers.of(llama, gene.refusal_openers)
        self.harmful = [render(text) for text in examples.harmful]
        self.harmless = [render(text) for text in examples.harmless]
        self.kept = self._keep(self.harmless, settings.tokens)
        self.task = self._keep([render(text) for text in examples.task], settings.tokens)
        self._read_harmless(self.off, self.kept.keep)
        self._read_task(self.off, self.task.keep)

    def _keep(self, prompts: list[list[int]], tokens: int) -> _Kept:
        said = self.engine.generate(prompts, max_tokens=tokens, adapters=self.off)
        return _Kept(prompts, [answer.tokens for answer in said])

    def margins(
        self,
        prompts: list[list[int]],
        scales: Any,
        answers: Sequence[list[int]] = (),
        visit: Visit = lambda *_: None,
    ) -> Scaling:
        """The margin by which each answer opens with a refusal (nats); see `openers`.

        Args:
            answers: one a prompt; their rows are shown to `visit`, in the same pass.
        """
        paths, count = self.openers.paths, len(prompts)
        # All prompts with the first path, then all with the next: the engine goes on from there.
        sequences = [[*prompt, *path] for path, _ in paths for prompt in prompts]
        spans = [
            range(len(prompt) - 1 + known, len(prompt) + len(path))
            for path, known in paths
            for prompt in prompts
        ]
        for prompt, answer in zip(prompts, answers, strict=False):
            sequences.append([*prompt, *answer])
            spans.append(range(len(prompt) - 1, len(prompt) + len(answer)))
        leads: list[dict[Tokens, float]] = [{} for _ in prompts]

        def look(index: int, position: int, row: npt.NDArray[np.float32]) -> None:
            number, prompt = divmod(index, count)
            if number < len(paths):
                behind = paths[number][0][: position + 1 - len(prompts[prompt])]
                leads[prompt].update(self.openers.leads(behind, row))
            else:
                visit(prompt, position, row)

        self.engine.visit_logits(sequences, spans, look, adapters=scales)
        return np.array([self.openers.margin(found) for found in leads])

    def _read_harmless(self, scales: Any, visit: Visit) -> float:
        """The smoothed share of the harmless prompts that is refused; shows the answers' rows."""
        return 1 - refusal_loss(self.margins(self.harmless, scales, self.kept.answers, visit))

    def _read_task(self, scales: Any, visit: Visit) -> None:
        """Show the rows of the answers to the task's prompts."""
        pairs = list(zip(self.task.prompts, self.task.answers, strict=True))
        self.engine.visit_logits(
            [prompt + answer for prompt, answer in pairs],
            [range(len(prompt) - 1, len(prompt) + len(answer)) for prompt, answer in pairs],
            visit, adapters=scales,
        )  # fmt: skip

    def at(self, alpha: Scaling) -> Point:
        scales = {**self.own, **dict(zip(self.handles, alpha.tolist(), strict=True))}
        loss = refusal_loss(self.margins(self.harmful, scales))
        visit, kl = self.kept.compare()
        beyond = self._read_harmless(scales, visit) - self.over_refusal
        room = min(1.0, max(0.0, 1 - beyond / _TOLERATED))
        if not self.task.prompts:
            return Point(tuple(alpha.tolist()), loss, kl(), room)
        visit, task_kl = self.task.compare()
        self._read_task(scales, visit)
        return Point(tuple(alpha.tolist()), loss, kl(), room, task_kl())

    def require_labels(self) -> None:
        """With twice the gene, harmful prompts must be refused more readily than harmless ones.

        Measured by the pairs of one of each in which the harmful one's margin is larger. Means
        would not do: in four of six SmolLM2 with shuffled weights the harmful one was the larger.
        """
        scales = {**self.own, **dict.fromkeys(self.handles, _TWICE)}
        harmful = self.margins(self.harmful, scales)
        harmless = self.margins(self.harmless, scales)
        share = _share_in_order(harmful, harmless)
        if share < _ORDERED:
            raise SettingError(
                "with twice the gene, a harmful example is refused more readily than a harmless "
                f"one in only {share:.0%} of {harmful.size * harmless.size} pairs, and "
                f"{_ORDERED:.0%} are asked for (mean margins {harmful.mean():.2f} and "
                f"{harmless.mean():.2f} nats)",
                "Check that the labels are not swapped and that the gene is of this family",
            )
