"""A gene's layers fitted from low to high in one forward pass, each with the ones below at work.

In a layer, x is what `attn_output` reads and h the residual stream with the attention added. On the
decision rows of harmful prompts (the assistant's header and the first tokens of a refusal) h shall
be the teacher's; an aligned teacher's also on every fourth token of their text, so that what is
attended to later is the aligned model's. On all others h shall be what the target itself had:
y = wanted - h. In the header it
shall go beyond, away from the other model: h_D + overshoot (h_A - h_D) on harmful prompts, and
h_D - contrast (h_A - h_D) on harmless ones. `solve` gives the update; h + B A x goes back into the
pass, and the next layer sees it.

Where a norm lies between `attn_output` and the stream (Gemma), h = u + g * o / rms(o), with o what
`attn_output` gives and g the norm's weights. Wanted is then o* = (wanted - u) / g * rms(o'), with
o' what the teacher's, or the target's own, `attn_output` gave. The errors that count are those of
the stream: g * (B A x) / rms(o') against g * (o* - o) / rms(o').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..aliases import Floats
from ..compat import open_model
from ..gene import Pair
from ..runtime.llama import SafeLlama
from ..runtime.lockstep import WRITER, Lane, States, run
from ..runtime.schedule import Scales
from .settings import LearnSettings
from .solve import Rows, explained, reduced_rank
from .states import THIN, Captured, Ints, Sample, rms, spread

_PREFIX = 10  # what all prompts of a lane open with counts as so many tokens of the text


@dataclass(frozen=True)
class Target:
    """What the fit reads of one degraded model.

    Attributes:
        own: its answers and states; taught: its teacher's.
        samples: of both.
        headers: by whether a sample is taught, the other model's states in its header.
    """

    llama: SafeLlama
    scales: Scales
    own: Captured
    taught: Captured
    samples: Sequence[Sample]
    headers: Mapping[bool, Captured | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chosen:
    """The rows of a lane that count: where their goals are, of which model, and weights."""

    rows: Ints
    goals: Ints
    taught: npt.NDArray[np.bool_]
    weights: Floats
    others: Ints  # where the other model's states are kept, of rows that go beyond; or -1


@dataclass(frozen=True)
class Fitted:
    """What a pass found: pairs by tensor, and each layer's share of the wanted change."""

    pairs: dict[str, Pair]
    scores: dict[int, float]
    logits: list[Floats]


class Fit:
    """One pass over all targets, in which the layers are fitted.

    Args:
        settings: those `for_teacher`.
        lanes: contexts side by side, of each target, or more where there is much.
        tick: called once a layer.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        settings: LearnSettings,
        rank: int,
        *,
        lanes: int = 1,
        outputs: bool = False,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.rank, self.tick = settings, rank, tick
        self.lanes: list[Lane] = []
        self._of: list[tuple[Target, _Chosen]] = []  # each lane's
        for target in targets:
            texts = [sample.tokens for sample in target.samples]
            for numbers in spread([len(text) for text in texts], lanes):
                wanted = [[len(texts[n]) - 1] if outputs else () for n in numbers]
                lane = Lane(target.llama, [texts[n] for n in numbers], target.scales, wanted)
                self.lanes.append(lane)
                samples = [target.samples[n] for n in numbers]
                self._of.append((target, _rows(lane, target.own, samples, settings)))
        self._norms = _norm_weights(targets[0].llama)
        self.pairs: dict[str, Pair] = {}
        self.scores: dict[int, float] = {}

    def run(self, layers: Sequence[int]) -> Fitted:
        """Fit these layers."""
        logits = run(self.lanes, layers, self._layer)
        return Fitted(self.pairs, self.scores, logits)

    def _layer(self, layer: int, lanes: list[States]) -> list[Floats]:
        gain = self._norms.get(layer) if lanes[0].output is not None else None
        found = [
            _regression(states, rows, _goal(layer, target, rows, self.settings), gain)
            for states, (target, rows) in zip(lanes, self._of, strict=True)
        ]
        pair = reduced_rank(found, self.rank, self.settings.ridge)
        self.scores[layer] = explained(found, pair)
        if gain is not None:
            safe = np.where(np.abs(gain) > 1e-6, gain, np.inf)
            pair = Pair(pair.a, (pair.b / safe[:, None]).astype(np.float32))
        self.pairs[f"blk.{layer}.{WRITER}.weight"] = pair
        self.tick()
        return [_changed(states, pair, gain) for states in lanes]


def _goal(layer: int, target: Target, rows: _Chosen, settings: LearnSettings) -> Floats:
    """The wanted rows of a lane, as `Goals` keeps them."""
    assert settings.contrast is not None
    width = int(target.llama.n_embd()) + 1
    goal = np.empty((len(rows.rows), width), np.float32)
    for taught, source, beyond in (
        (True, target.taught, settings.overshoot - 1), (False, target.own, settings.contrast)
    ):  # fmt: skip
        chosen = rows.taught == taught
        goal[chosen] = source.goals.get(layer, rows.goals[chosen])
        if (other := target.headers.get(taught)) is not None:
            chosen &= rows.others >= 0
            away = goal[chosen, :-1] - other.goals.get(layer, rows.others[chosen])[:, :-1]
            goal[chosen, :-1] += beyond * away
    return goal


def _rows(lane: Lane, own: Captured, samples: Sequence[Sample], settings: LearnSettings) -> _Chosen:
    assert settings.harmless_weight is not None
    shared = min(lane.prefix, own.prefix)
    rows, goals = [np.arange(shared)], [own.prefix_goals[:shared]]
    taught = [np.zeros(shared, bool)]
    weights = [np.full(shared, settings.text_weight * _PREFIX)]
    kept = [np.full(shared, -1)]
    for place, sample in enumerate(samples):
        positions = len(sample.prompt) + sample.offsets
        rows.append(np.array([lane.row(place, int(position)) for position in positions], int))
        goals.append(sample.goals)
        taught.append(np.full(len(positions), sample.taught))
        weight = np.full(len(positions), 1.0 if sample.taught else settings.harmless_weight)
        weight[: sample.text] = settings.text_weight * THIN
        weights.append(weight)
        kept.append(_kept(sample))
    return _Chosen(
        np.concatenate(rows), np.concatenate(goals), np.concatenate(taught),
        np.concatenate(weights, dtype=np.float32), np.concatenate(kept),
    )  # fmt: skip


def _kept(sample: Sample) -> Ints:
    """Where the other model's states of a sample's header are kept; -1 of other rows."""
    place = np.arange(len(sample.offsets))
    header = (place >= sample.text) & (sample.offsets < 0) & (sample.other >= 0)
    return np.where(header, sample.other + place - sample.text, -1)


def _regression(states: States, chosen: _Chosen, goal: Floats, gain: Floats | None) -> Rows:
    """Features and wanted changes of rows; see the top."""
    rows = chosen.rows
    x, h, wanted = states.inputs[rows], states.stream[rows], goal[:, :-1]
    if gain is None or states.output is None:
        return Rows(x, wanted - h, chosen.weights)
    output, size = states.output[rows], goal[:, -1:]
    below = h - gain * output / rms(output)[:, None]
    return Rows(x / size, (wanted - below) - gain * output / size, chosen.weights)


def _changed(states: States, pair: Pair, gain: Floats | None) -> Floats:
    """The stream with the update at work; its own array."""
    update = (states.inputs @ pair.a.T) @ pair.b.T
    if gain is None or states.output is None:
        states.stream[:] += update
        return states.stream
    before, after = states.output, states.output + update
    states.stream[:] += gain * (after / rms(after)[:, None] - before / rms(before)[:, None])
    return states.stream


def _norm_weights(llama: SafeLlama) -> dict[int, Floats]:
    """The weights of the norm behind `attn_output`, by layer, where there is one."""
    file, found = open_model(llama.model_path), {}
    for name in file.tensors:
        if name.endswith(".post_attention_norm.weight"):
            found[int(name.split(".")[1])] = file.floats(name).reshape(-1)
    return found
