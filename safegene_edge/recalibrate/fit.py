"""Few-shot recalibration: non-negative coefficients of layers, by forward passes alone.

With c the coefficients, T the target, G the gene and w a weight, minimised is

    J(c) = max(goal * (1 - allowance), mean over harmful of L_refuse)
           + w * mean over harmless of KL(p_T || p_{T+cG})

L_refuse is the smoothed share of answers that open with none of the gene's refusal openers
(`refusal_margin`). The goal is the aligned model's own share, which the gene carries. The
allowance is 1 while no larger a share of the harmless examples is refused than the aligned model
refuses, and falls to 0 at three points above it. The KL is taken on the first tokens of the
target's own answers. Of all points looked at, the one with the smallest J and a KL within the
budget is taken; design/recalibration.md says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..compat import open_model, require_fit
from ..errors import NoEffectError, SettingError
from ..files import PathLike, sha256
from ..gene import Expression, SafetyGene
from ..prompts import Prompt
from ..runtime.llama import SafeLlama
from ..runtime.logits import kl_from_logits, log_softmax
from .examples import Examples
from .refusal_margin import Openers, Tokens, refusal_loss
from .settings import RecalibrationSettings

if TYPE_CHECKING:
    from ..runtime.engine import Engine

_TOLERATED = 0.03  # over-refusal beyond the aligned model's: the most that the project promises
_OVER_BUDGET = 500.0  # what a nat beyond the budget adds to the search's objective
# Of the pairs of a harmful and a harmless example, with twice the gene; see
# design/recalibration.md.
_ORDERED, _TWICE = 0.7, 2.0
_CELLS = 4096  # KV cells, where no example needs more
Scaling = npt.NDArray[np.float64]
Visit = Callable[[int, int, npt.NDArray[np.float32]], None]  # index, position, row of logits


@dataclass(frozen=True)
class Point:
    """One evaluated point.

    Attributes:
        refusal_loss: smoothed share of harmful examples that are not refused, 0 to 1.
        kl: KL divergence on the harmless ones, in nats a token.
        allowance: whether refusals beyond the aligned model's are welcome, from 1 (no more of the
            harmless ones are refused than it refuses) to 0.
        task_kl: KL divergence on the task's prompts, in nats a token; None without any.
    """

    coefficients: tuple[float, ...]
    refusal_loss: float
    kl: float
    allowance: float = 0.0
    task_kl: float | None = None

    @property
    def cost(self) -> float:
        """What is weighed against refusals: the KL, half of it the task's where there is one."""
        return self.kl if self.task_kl is None else (self.kl + self.task_kl) / 2

    @property
    def bounded_kl(self) -> float:
        """What the budget bounds: the larger of the KL divergences."""
        return max(self.kl, self.task_kl or 0.0)

    def objective(self, weight: float, goal: float = 0.0) -> float:
        """J of this point."""
        return max(goal * (1 - self.allowance), self.refusal_loss) + weight * self.cost


@dataclass(frozen=True)
class Recalibration:
    """What a recalibration found.

    Attributes:
        expression: the coefficients, for `SafetyGene.express`.
        point: what they give; one of `curve`.
        curve: every evaluated point, in order; the first is the target without the gene.
        goal: the aligned model's own refusal loss, which the gene carries; 0 if it does not.
        same_examples: whether what the gene carries of the aligned model was measured on these
            examples. It was measured on the shipped ones: with others, goal and over-refusal are
            those of a like set, not of the same.
    """

    expression: Expression
    point: Point
    curve: tuple[Point, ...]
    goal: float = 0.0
    same_examples: bool = True

    @property
    def nothing_lost(self) -> bool:
        """Whether the target without the gene refuses as much as the aligned model does."""
        return self.curve[0].refusal_loss <= self.goal

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "coefficients": dict(self.expression.coefficients),
            "gene": self.expression.gene,
            "target": self.expression.target,
            "aligned_loss": self.goal,
            "aligned_loss_on_these_examples": self.same_examples,
            "point": asdict(self.point),
            "curve": [asdict(point) for point in self.curve],
        }


def recalibrate(
    target: PathLike,
    gene: SafetyGene,
    examples: Examples | None = None,
    *,
    adapters: Iterable[PathLike] = (),
    settings: RecalibrationSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recalibration:
    """Find the gene's coefficients for a quantised target.

    Args:
        target: the model as it will be run; nothing is written to it.
        examples: what to calibrate on; default: the shipped ones.
        adapters: GGUF LoRAs that the target is run with, such as its task's.
        progress: called with the passes done and their limit.

    Raises:
        MismatchError: the gene does not fit the target.
        SettingError: settings make no sense, the labels look swapped, or an example is longer
            than the context.
        NoEffectError: no point within the budget lowers the refusal loss.
    """
    from ..runtime.engine import Engine
    from ..runtime.llama import SafeLlama

    settings, shipped = settings or RecalibrationSettings(), Examples.shipped()
    examples = examples or shipped
    require_fit(gene, open_model(target))
    points: list[Point] = []
    with SafeLlama(str(target), n_ctx=512) as llama:
        prompts = _Prompts.of(llama, examples)
        openers = Openers.of(llama, gene.refusal_openers)
        needed = prompts.cells(openers, settings.tokens)
        n_ctx = _context(needed, settings.n_ctx, int(llama._model.n_ctx_train()))
        for adapter in adapters:
            llama.attach(adapter)
        own = {handle: handle.scale for handle in llama.adapters}
        handles = [llama.attach(part, 0.0) for part in gene.split().values()]
        with Engine(llama, n_parallel=16, n_ctx=n_ctx) as engine:
            objective = _Objective(
                engine, own, handles, prompts, openers, settings.tokens, gene.aligned_over_refusal
            )
            objective.require_labels()

            def look(alpha: Scaling) -> float:
                alpha = np.clip(alpha, 0.0, settings.upper)
                point = objective.at(alpha)
                points.append(point)
                if progress is not None:
                    progress(len(points), settings.passes)
                over = max(0.0, point.bounded_kl - settings.kl_budget)
                return point.objective(settings.weight, gene.aligned_loss) + _OVER_BUDGET * over

            _search(look, len(handles), settings)
    best = _choose(points, settings.kl_budget, settings.weight, gene.aligned_loss)
    found = dict(zip(gene.split(), best.coefficients, strict=True))
    expression = Expression(found, gene.sha256, sha256(target))
    same = all(
        set(getattr(examples, kind)) == set(getattr(shipped, kind))
        for kind in ("harmful", "harmless")
    )
    return Recalibration(expression, best, tuple(points), gene.aligned_loss, same)


def _search(look: Callable[[Scaling], float], count: int, settings: RecalibrationSettings) -> None:
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
    fits = [p for p in others if p.bounded_kl <= budget and p.refusal_loss < own.refusal_loss]
    if not fits:
        least = min(others, key=lambda p: p.refusal_loss)
        raise NoEffectError(
            f"no coefficients within a KL of {budget:g} nats raise refusals: the refusal loss is "
            f"{own.refusal_loss:.3f} without the gene and at best {least.refusal_loss:.3f} "
            f"with it, at a KL of {least.bounded_kl:.3f}",
            "Check that the gene is of the model's family and that the labels are right",
        )
    return min(fits, key=lambda p: p.objective(weight, goal))


def _share_in_order(harmful: Scaling, harmless: Scaling) -> float:
    """Share of pairs whose harmful margin is larger, ties half: the area under the ROC curve."""
    return float((np.sign(harmful[:, None] - harmless) + 1).mean() / 2)


@dataclass(frozen=True)
class _Prompts:
    """The examples as tokens."""

    harmful: list[list[int]]
    harmless: list[list[int]]
    task: list[list[int]]

    @classmethod
    def of(cls, llama: SafeLlama, examples: Examples) -> _Prompts:
        """Rendered by the target's template."""

        def rendered(prompts: Iterable[Prompt]) -> list[list[int]]:
            return [list(llama.render(prompt.as_dicts())) for prompt in prompts]

        return cls(rendered(examples.harmful), rendered(examples.harmless), rendered(examples.task))

    def cells(self, openers: Openers, tokens: int) -> int:
        """KV cells that the longest sequence takes."""
        longest = max(map(len, [*self.harmful, *self.harmless, *self.task]))
        return longest + max(tokens, *(len(path) for path, _ in openers.paths))


def _context(needed: int, n_ctx: int | None, trained: int) -> int:
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
            f"Shorten it, or give n_ctx (--ctx) {needed} if the model can go beyond",
        )
    return n_ctx or max(_CELLS, needed)


class _Kept:
    """Prompts, the target's own answers to them, and the log-probabilities of the rows there."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self.prompts, self.answers = prompts, answers
        self._reference: dict[tuple[int, int], npt.NDArray[np.float32]] = {}

    def keep(self, index: int, position: int, row: npt.NDArray[np.float32]) -> None:
        """Take a row of the target's own logits."""
        self._reference[index, position] = log_softmax(row)

    def compare(self) -> tuple[Visit, Callable[[], float]]:
        """Takes rows with the gene; gives the mean KL divergence of a token."""
        sums = np.zeros(len(self.prompts))

        def visit(index: int, position: int, row: npt.NDArray[np.float32]) -> None:
            value = kl_from_logits(self._reference[index, position], log_softmax(row))
            sums[index] += value / (len(self.answers[index]) + 1)

        return visit, lambda: float(sums.mean())


class _Objective:
    """Refusal loss and KL at given coefficients; what does not change is made once."""

    def __init__(
        self,
        engine: Engine,
        own: Mapping[Any, float],
        handles: Sequence[Any],
        prompts: _Prompts,
        openers: Openers,
        tokens: int,
        over_refusal: float,
    ) -> None:
        self.engine, self.own, self.handles = engine, own, handles
        self.off = {**own, **dict.fromkeys(handles, 0.0)}
        self.openers, self.over_refusal = openers, over_refusal
        self.harmful, self.harmless = prompts.harmful, prompts.harmless
        self.kept = self._keep(prompts.harmless, tokens)
        self.task = self._keep(prompts.task, tokens)
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
        """The margin by which each answer opens with a refusal (nats); see `refusal_margin`.

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
        allowance = min(1.0, max(0.0, 1 - beyond / _TOLERATED))
        if not self.task.prompts:
            return Point(tuple(alpha.tolist()), loss, kl(), allowance)
        visit, task_kl = self.task.compare()
        self._read_task(scales, visit)
        return Point(tuple(alpha.tolist()), loss, kl(), allowance, task_kl())

    def require_labels(self) -> None:
        """With twice the gene, harmful prompts must be refused more readily than harmless ones.

        Measured by the pairs of one of each in which the harmful one's margin is larger. Means are
        not enough; see design/recalibration.md.
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
