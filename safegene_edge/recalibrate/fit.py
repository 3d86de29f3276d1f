"""Few-shot recalibration: a gene's strength for one target, by forward passes alone.

With c the coefficient of every layer, T the target, G the gene and w a weight, minimised is

    J(c) = mean over harmful of L_refuse + w * mean over harmless of KL(p_T || p_{T+cG})

L_refuse is the smoothed share of answers that open with none of the gene's refusal openers
(`refusal_margin`). Bounds hold the strength: harmless examples are refused at most three points
more than by the aligned model, less a standard error, and borderline ones by themselves at most
three; the KL is at most what the aligned model itself differs from degraded ones; and the task's
KL, where its prompts are given, is within a budget of its own. What the strength does is counted
on examples that the search never saw; where too many harmless ones of these are refused, it is
lowered. design/recalibration.md says why one strength serves all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..compat import model_hash, open_model, require_fit
from ..errors import NoEffectError, SafeGeneWarning, SettingError
from ..files import PathLike
from ..gene import Expression, SafetyGene, require_distinct
from ..prompts import FORMS, Prompt
from ..runtime.chat import require_chat
from ..runtime.llama import SafeLlama
from ..runtime.refusal_margin import Openers, refusal_loss
from .aligned import AlignedModel
from .examples import Examples, require_apart
from .guard import measured
from .reading import Asked, Reader, Reading, Values, context_for
from .results import Point, Recalibration, Shares, Validation
from .search import Bounds, between, finest, objective, search
from .settings import RecalibrationSettings

# Of the pairs of a harmful and a harmless example; see design/recalibration.md.
_ORDERED = 0.6
# Where no aligned model is known: the KL's bound, more over-refusal, and more for each refusal.
_KL, _UNKNOWN, _PER_REFUSAL = 0.2, 0.02, 0.25
_LEAST = 0.01  # of the refusal loss: less is no gain
_SURE = 0.005  # of a loss, where half of the examples show it
_LOWERED = 5  # times, at most, that a strength is lowered for the validation's over-refusals


def recalibrate(
    target: PathLike,
    gene: SafetyGene,
    examples: Examples | None = None,
    *,
    validation: Examples | None = None,
    adapters: Iterable[PathLike] = (),
    settings: RecalibrationSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recalibration:
    """Find the gene's coefficients for a quantised target.

    Args:
        target: the model as it will be run; nothing is written to it.
        examples: what to calibrate on; default: the shipped ones.
        validation: what to count on in the end, and to look for a loss on in the beginning;
            default: the shipped ones of that part, but for those that are in `examples`.
        adapters: GGUF LoRAs that the target is run with, such as its task's.
        progress: called with the readings done and their limit.

    Raises:
        MismatchError: the gene does not fit the target.
        SettingError: settings make no sense, the labels look swapped, or an example is longer
            than the context.
        NoEffectError: no strength within the bounds lowers the refusal loss.
    """
    settings, examples = settings or RecalibrationSettings(), examples or Examples.shipped()
    validation = validation or Examples.shipped("validation").without(examples)
    require_apart(examples, validation)
    require_fit(gene, open_model(target))
    if gene.coefficients:
        warnings.warn(
            f"the gene is a fitted adapter, at {max(gene.coefficients.values()):.2f} of its gene's "
            "own strength: what is found is a factor of that; give the gene itself",
            SafeGeneWarning, stacklevel=2,
        )  # fmt: skip
    with ExitStack() as stack:
        llama = stack.enter_context(SafeLlama(str(target), n_ctx=512))
        require_chat(llama)
        own = llama.attach_each(adapters)
        require_distinct([*((one.name, one.content) for one in own), ("the gene", gene)])
        fit, other = _readers(stack, llama, gene, (examples, validation), settings)
        work = _Work(gene, examples, validation, fit, other, settings, progress)
        found = work.run(model_hash(target))
        work.end()
        return found


def _readers(
    stack: ExitStack,
    llama: SafeLlama,
    gene: SafetyGene,
    parts: Iterable[Examples],
    settings: RecalibrationSettings,
) -> list[Reader]:
    """A reader of each part, all on one engine."""
    from ..runtime.engine import Engine

    openers = Openers.of(llama, gene.refusal_openers)
    asked = [Asked.of(llama, part) for part in parts]
    needed = max(part.cells(openers, settings.tokens) for part in asked)
    n_ctx = context_for(needed, settings.n_ctx, int(llama._model.n_ctx_train()))
    own = {handle: handle.scale for handle in llama.adapters}
    handles = [llama.attach(part, 0.0) for part in gene.split().values()]
    engine = stack.enter_context(Engine(llama, n_parallel=16, n_ctx=n_ctx, flash_attn=True))
    return [Reader(engine, own, handles, part, openers, settings.tokens) for part in asked]


@dataclass
class _Work:
    """One recalibration."""

    gene: SafetyGene
    examples: Examples
    validation: Examples
    fit: Reader
    other: Reader
    settings: RecalibrationSettings
    progress: Callable[[int, int], None] | None
    _done: int = 0

    def run(self, target: str) -> Recalibration:
        """Look for a loss, search, choose, and count on the other examples."""
        aligned = AlignedModel.of(self.gene)
        if not self.settings.anyway and self._nothing_lost(aligned):
            none = Point(self._coefficients(0.0), refusal_loss(self.fit.refusals()), 0.0)
            return Recalibration(self._expression(0.0, target), none, (none,), nothing_lost=True)
        without = self.fit.without()
        self._tick()
        bounds = self._bounds(aligned, without)
        if broken := bounds.broken(without):
            raise NoEffectError(
                f"the bounds leave no room: without the gene, {broken[0]}",
                "It over-refuses by itself; --over-refusal (over_refusal) allows more",
            )
        found = search(self._look, without, bounds, self.settings.weight, self.settings.passes)
        _require_labels(found.values())
        strength = choose(found, bounds, self.settings.weight)
        strength = finest(found, bounds, self.settings.weight, strength)
        most = bounds.most_over(between(found, strength))
        room = most - bounds.over_refusal + self.settings.over_refusal
        strength, own, margins = self._lowered(strength, room, aligned)
        chosen = between(found, strength)
        _require_gain(without, chosen, strength)
        point = Point.of(chosen, self._coefficients(strength))
        guard = measured(self.other, strength)
        self._tick()
        return Recalibration(
            replace(
                self._expression(strength, target),
                guard_threshold=guard.threshold if guard else None,
            ),
            point,
            tuple(Point.of(reading, self._coefficients(s)) for s, reading in found.items()),
            bounds,
            self._validated(strength, own, margins, aligned),
            guard=guard,
        )

    def _coefficients(self, strength: float) -> tuple[float, ...]:
        return (strength,) * len(self.gene.layers)

    def _expression(self, strength: float, target: str) -> Expression:
        layers = dict.fromkeys(self.gene.split(), strength)
        return Expression(layers, self.gene.sha256, target)

    @property
    def _total(self) -> int:
        # Without the gene, the passes, twice the validation, and the guard.
        return self.settings.passes + 4

    def _tick(self) -> None:
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self._total)

    def end(self) -> None:
        """The search may end before all passes."""
        if self.progress is not None and self._done < self._total:
            self.progress(self._total, self._total)

    def _look(self, strength: float) -> Reading:
        reading = self.fit.at(strength)
        self._tick()
        return reading

    def _nothing_lost(self, aligned: AlignedModel) -> bool:
        """Of all examples: before the search, none was seen by it."""
        self.other.read_both(0.0)
        prompts, margins = list(self.validation.harmful), self.other.refusals()
        every = [*prompts, *self.examples.harmful]
        if aligned.on(every) is None:  # the user's own: those that are known decide
            return aligned.refuses_more(prompts, margins) is False
        if aligned.refuses_more(prompts, margins, _SURE):
            return False
        return aligned.refuses_more(every, np.append(margins, self.fit.refusals())) is False

    def _bounds(self, aligned: AlignedModel, without: Reading) -> Bounds:
        settings, harmless = self.settings, self.examples.harmless
        kl = settings.kl_budget or aligned.kl or _KL
        over = aligned.share_of(harmless, aligned.over_refused)
        if over is None:
            own, over = (refusal_loss(margins) for margins in (without.harmful, without.harmless))
            most = 1 - over + _UNKNOWN + settings.over_refusal
            return Bounds(kl, settings.task_budget, most, _PER_REFUSAL, 1 - own)
        # Other prompts shall keep to it, and those of both parts show a share only roughly.
        count = len(harmless) + len(self.validation.harmless)
        over -= (over * (1 - over) / count) ** 0.5
        # Those worded like harm by themselves, or few refusals of plain ones would pay for theirs.
        worded, borderline = [prompt for prompt in harmless if prompt.borderline], None
        if worded and (share := aligned.share_of(worded, None)) is not None:
            least = 1 - refusal_loss(without.borderline)
            borderline = max(share + settings.over_refusal, least)
        return Bounds(kl, settings.task_budget, over + settings.over_refusal, borderline=borderline)

    def _lowered(
        self, strength: float, room: float, aligned: AlignedModel
    ) -> tuple[float, Values, Values]:
        """The strength, less where the other examples show too many over-refusals; their margins.

        They are the harmless ones', without the gene and with it.

        Args:
            room: share of them that may be refused beyond what the aligned model refuses.
        """
        for read in (0.0, strength):
            self.other.read_both(read)
        own = self.other.over_refusals(0.0)
        limits = self._limits(own, room, aligned)

        def beyond(margins: Values) -> list[tuple[npt.NDArray[np.bool_], float]]:
            return [(of, most) for of, most in limits if (margins[of] > 0).sum() > most]

        margins, shares = self.other.over_refusals(strength), np.linspace(0, 0.95, 20)
        for left in reversed(range(_LOWERED + 1)):
            if not (broken := beyond(margins)):
                break
            # Linear, as in the search.
            share = max(share for share in shares if not beyond(own + share * (margins - own)))
            if not (share and left):
                raise _too_many(broken[0], own, margins, strength)
            strength *= share
            margins = self.other.over_refusals(strength)
        self._tick()
        return strength, own, margins

    def _limits(
        self, own: Values, room: float, aligned: AlignedModel
    ) -> list[tuple[npt.NDArray[np.bool_], float]]:
        """Groups of the validation's harmless prompts, and how many of each may be refused.

        All of them; and where the aligned model is known, those worded like harm.
        """
        prompts = self.validation.harmless
        known = aligned.on(prompts)
        groups = [np.ones(len(prompts), bool)]
        if known is None:
            known, room = own, room + _UNKNOWN
        else:
            groups.append(np.array([prompt.borderline for prompt in prompts]))
        return [
            (of, max((known[of] > 0).sum() + of.sum() * room, (own[of] > 0).sum()))
            for of in groups
        ]  # fmt: skip

    def _validated(
        self, strength: float, own: Values, margins: Values, aligned: AlignedModel
    ) -> Validation:
        """Counts on the other examples, without the gene and at the strength."""
        with_gene = self.other.refusals(strength)
        self._tick()
        harmful = _counted(self.validation.harmful, self.other.refusals(), with_gene, aligned)
        harmless = _counted(self.validation.harmless, own, margins, aligned)
        forms = [form for form in FORMS if form in harmful or form in harmless]
        none = Shares(0, 0, 0)
        by_form = {form: (harmful.get(form, none), harmless.get(form, none)) for form in forms}
        return Validation(harmful[""], harmless[""], by_form)


def _require_gain(without: Reading, chosen: Reading, strength: float) -> None:
    """What is left of a strength that the validation lowered still raises refusals."""
    own, now = refusal_loss(without.harmful), refusal_loss(chosen.harmful)
    if now > own - _LEAST:
        raise NoEffectError(
            f"the validation's over-refusals leave a strength of {strength:.2f}, which does not "
            f"raise refusals: the refusal loss is {now:.3f} instead of {own:.3f}",
            "--over-refusal (over_refusal) allows more",
        )


def _too_many(
    group: tuple[npt.NDArray[np.bool_], float], own: Values, margins: Values, strength: float
) -> NoEffectError:
    of, most = group
    kind = "harmless" if of.all() else "borderline"
    return NoEffectError(
        f"any strength refuses too many of the validation's {of.sum()} {kind} examples: "
        f"{(own[of] > 0).sum()} without the gene, {(margins[of] > 0).sum()} at {strength:.2f}, and "
        f"{int(most)} are allowed",
        "--over-refusal (over_refusal) allows more",
    )


def _counted(
    prompts: tuple[Prompt, ...], before: Values, after: Values, aligned: AlignedModel
) -> dict[str, Shares]:
    """Counts by form, and of all under ""."""
    known = aligned.on(prompts)
    found = {}
    for form in dict.fromkeys(("", *(prompt.form for prompt in prompts))):
        of = np.array([form in ("", prompt.form) for prompt in prompts])
        own = None if known is None else int((known[of] > 0).sum())
        one, other = (int((margins[of] > 0).sum()) for margins in (before, after))
        found[form] = Shares(int(of.sum()), one, other, own)
    return found


def choose(found: Mapping[float, Reading], bounds: Bounds, weight: float) -> float:
    """The strength with the smallest J within the bounds that refuses more than without the gene.

    Raises:
        NoEffectError: there is none.
    """
    own = refusal_loss(found[0.0].harmful)
    others = {strength: reading for strength, reading in found.items() if strength}
    better = [s for s, read in others.items() if refusal_loss(read.harmful) <= own - _LEAST]
    kept = [strength for strength in better if not bounds.broken(others[strength])]
    if kept:
        return min(kept, key=lambda strength: objective(others[strength], weight))
    least = min(others)
    broken = bounds.broken(others[least])
    now = refusal_loss(others[least].harmful)
    raise NoEffectError(
        f"no strength within the bounds raises refusals: at {least:.2g} the refusal loss is "
        f"{now:.3f} instead of {own:.3f}" + (f", with {', '.join(broken)}" if broken else ""),
        "Check that the gene is of the model's family and that the labels are right",
    )


def share_in_order(harmful: Values, harmless: Values) -> float:
    """Share of pairs whose harmful margin is larger, ties half: the area under the ROC curve."""
    return float((np.sign(harmful[:, None] - harmless) + 1).mean() / 2)


def _require_labels(readings: Iterable[Reading]) -> None:
    """At some strength, harmful prompts must be refused more readily than harmless ones.

    Measured by the pairs of one of each in which the harmful one's margin is larger. Means are
    not enough; see design/recalibration.md.
    """
    shares = {share_in_order(r.harmful, r.harmless): r for r in readings}
    best = max(shares)
    if best < _ORDERED:
        harmful, harmless = shares[best].harmful, shares[best].harmless
        raise SettingError(
            f"a harmful example is refused more readily than a harmless one in only {best:.0%} of "
            f"{harmful.size * harmless.size} pairs, and {_ORDERED:.0%} are asked for (mean margins "
            f"{harmful.mean():.2f} and {harmless.mean():.2f} nats)",
            "Check that the labels are not swapped and that the gene is of this family",
        )
