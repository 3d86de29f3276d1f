"""Distil a gene: what the aligned model says to harm, what the degraded ones say to the rest.

Minimised over the gene G, with A the aligned model and D one of the degraded models in turn:

    sum over harmful x, y = A's answer   of  sum_t w_t KL(p_A || p_D+G)
    + keep * the same over harmless x, y = D's own answer, of  KL(p_D || p_D+G)

The teachers' distributions are computed once and stored: the likeliest tokens, and all others as
one bin. So the aligned model need not be in memory while the gene learns.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileFormatError, SafeGeneError
from ..files import atomic_output
from .loss import Example, log_probabilities
from .models import LiveModel, Source
from .processes import Processes
from .recipe import batches, remaining, schedule
from .settings import Log, Recipe


@dataclass(frozen=True, slots=True)
class TrainingExample(Example):
    """An example with its teacher's distributions.

    `likely` (answer×k) are token ids; `logs` (answer×(k+1), float16) their log-probabilities
    and, last, that of all other tokens together.
    """

    likely: npt.NDArray[np.int32] = field(
        default_factory=lambda: np.zeros((0, 0), np.int32), compare=False
    )
    logs: npt.NDArray[np.float16] = field(
        default_factory=lambda: np.zeros((0, 1), np.float16), compare=False
    )


# -- teachers -------------------------------------------------------------


def own_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, end: int, batch: int = 16
) -> list[tuple[int, ...]]:
    """Greedy answers of a transformers model, each with the end token where it ended."""
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), end, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        for row, tokens in zip(chosen, _greedy(model, ids, mask, max_tokens, end), strict=True):
            stop = tokens.index(end) + 1 if end in tokens else len(tokens)
            answers[row] = tuple(tokens[:stop])
    return answers


def _greedy(model: Any, ids: Any, mask: Any, max_tokens: int, end: int) -> list[list[int]]:
    """`max_tokens` greedy tokens a row (rows padded on the left), behind `end` anything."""
    import torch

    ids, mask = ids.to(model.device), mask.to(model.device)
    cache, columns = None, []
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for _ in range(max_tokens):
            found = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids, cache = found.logits[:, -1].argmax(-1, keepdim=True), found.past_key_values
            columns.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], -1)
            positions = positions[:, -1:] + 1
            if all(bool((column == end).any()) for column in torch.cat(columns, -1)):
                break
    rows: list[list[int]] = torch.cat(columns, -1).tolist()
    return rows


def taught(
    model: Any, examples: Sequence[Example], recipe: Recipe, top_k: int
) -> list[TrainingExample]:
    """The examples with this model's distributions along their answers."""
    import torch

    found = []
    for start in range(0, len(examples), recipe.batch):
        rows = examples[start : start + recipe.batch]
        with torch.no_grad():
            logs, _, _ = log_probabilities(model, rows, recipe)
        best = logs.topk(min(top_k, logs.shape[-1] - 1), -1)
        rest = _log_rest(best.values)
        kept = torch.cat([best.values, rest[..., None]], -1).cpu().numpy().astype(np.float16)
        likely = best.indices.cpu().numpy().astype(np.int32)
        for row, e in enumerate(rows):
            n = len(e.answer)
            found.append(
                TrainingExample(
                    e.prompt, e.answer, e.harmful, e.weight, likely[row, :n], kept[row, :n]
                )
            )
    return found


def _log_rest(likely: Any) -> Any:
    """log(1 - sum of the likely tokens' probabilities), at least log(1e-6)."""
    share = likely.exp().sum(-1).clamp(max=1 - 1e-6)
    return (-share).log1p()


def distil_loss(model: Any, examples: Sequence[TrainingExample], recipe: Recipe) -> Any:
    """Sum of the weighted KL divergences from the examples' teachers (scalar, nats)."""
    import torch

    logs, _, weights = log_probabilities(model, examples, recipe)
    answer, bins = logs.shape[1], examples[0].logs.shape[1]
    likely = torch.zeros((len(examples), answer, bins - 1), dtype=torch.long)
    teacher = torch.zeros((len(examples), answer, bins))
    for row, example in enumerate(examples):
        likely[row, : len(example.answer)] = torch.from_numpy(example.likely.astype(np.int64))
        teacher[row, : len(example.answer)] = torch.from_numpy(example.logs.astype(np.float32))
    teacher = teacher.log_softmax(-1).to(logs.device)  # float16 has moved the sum off 1
    own = logs.gather(-1, likely.to(logs.device))
    own = torch.cat([own, _log_rest(own)[..., None]], -1)
    return ((teacher.exp() * (teacher - own)).sum(-1) * weights).sum()


def mean_loss(live: LiveModel, source: Source, examples: Sequence[TrainingExample], recipe: Recipe,
              *, gene: bool = True) -> float:  # fmt: skip
    """Mean weighted KL divergence of examples of one kind, as `source`, without learning (nats)."""
    import torch

    total = 0.0
    with live.as_source(source, gene=gene) as model, torch.no_grad():
        for start in range(0, len(examples), recipe.batch):
            total += float(distil_loss(model, examples[start : start + recipe.batch], recipe))
    return total / max(1, len(examples))


# -- training examples on disk ------------------------------------------------------


def save_training_examples(examples: Sequence[TrainingExample], path: Path) -> None:
    """Write training examples as an .npz, atomically."""
    none = np.zeros(0, np.int32)
    arrays: dict[str, Any] = {
        "prompts": np.concatenate([none, *(np.array(x.prompt, np.int32) for x in examples)]),
        "answers": np.concatenate([none, *(np.array(x.answer, np.int32) for x in examples)]),
        "lengths": np.array([(len(x.prompt), len(x.answer)) for x in examples]).reshape(-1, 2),
        "harmful": np.array([x.harmful for x in examples], bool),
        "weights": np.array([x.weight for x in examples]),
        "likely": np.concatenate([x.likely for x in examples]) if examples else none,
        "logs": np.concatenate([x.logs for x in examples]) if examples else none,
    }
    with atomic_output(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)


def load_training_examples(path: Path) -> list[TrainingExample]:
    """Read what `save_training_examples` wrote; FileFormatError for anything else."""
    examples, prompt, answer = [], 0, 0
    try:
        with np.load(path, allow_pickle=False) as stored:
            held = {name: stored[name] for name in stored.files}
        rows = zip(held["lengths"], held["harmful"], held["weights"], strict=True)
        for (asked, said), harmful, weight in rows:
            tokens = held["prompts"][prompt : prompt + asked].tolist()
            words = held["answers"][answer : answer + said].tolist()
            likely, logs = (held[name][answer : answer + said] for name in ("likely", "logs"))
            examples.append(
                TrainingExample(
                    tuple(tokens), tuple(words), bool(harmful), float(weight), likely, logs
                )
            )
            prompt, answer = prompt + asked, answer + said
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{path}: no training examples ({error})", "Delete it to start over"
        ) from error
    return examples


# -- the training ---------------------------------------------------------


def rotation(
    harmful: Sequence[TrainingExample],
    harmless: Sequence[Sequence[TrainingExample]],
    recipe: Recipe,
    epoch: int,
) -> Iterator[tuple[int, list[TrainingExample]]]:
    """One epoch's batches, each with the degraded model that it is for, taken in turn.

    Every harmful training example comes once an epoch, with another degraded model in the next.
    """
    count = len(harmless)
    plans = [
        list(batches([*harmful[(number + epoch) % count :: count], *own], recipe, epoch))
        for number, own in enumerate(harmless)
    ]
    for step in range(max(map(len, plans))):
        for number, plan in enumerate(plans):
            if step < len(plan):
                yield number, plan[step]


@dataclass
class Trainer:
    """Learns the gene of a live model, in steps that a kill can interrupt.

    Attributes:
        path: the checkpoint; a later run with the same file goes on from there.
        every: steps from one checkpoint to the next.
    """

    live: LiveModel
    degraded: Sequence[Source]
    recipe: Recipe
    path: Path
    every: int = 20
    report: Log = lambda line: None
    losses: list[float] = field(default_factory=list)

    def run(self, plan: Sequence[tuple[int, list[TrainingExample]]]) -> list[float]:
        """Take all steps of the plan; returns every step's loss.

        Args:
            plan: (number of the degraded model, training examples) a step.

        Raises:
            SafeGeneError: the loss is no longer finite.
        """
        import torch

        weights = list(self.live.gene_weights().values())
        optimiser = torch.optim.AdamW(weights, lr=self.recipe.learning_rate, weight_decay=0.0)
        begin = self._resume(optimiser)
        started = time.monotonic()
        for step in range(begin, len(plan)):
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.learning_rate * schedule(step, len(plan))
            number, examples = plan[step]
            with self.live.as_source(self.degraded[number], gene=True) as model:
                self._backward(model, examples, step, weights)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            if (step + 1) % self.every == 0 or step + 1 == len(plan):
                if Processes.current().is_first:
                    self._keep(optimiser)
                left = remaining(started, step + 1 - begin, len(plan) - begin)
                recent = self.losses[-10:]
                self.report(
                    f"step {step + 1}/{len(plan)}  loss {sum(recent) / len(recent):.4f}  {left}"
                )
        return self.losses

    def _backward(
        self, model: Any, examples: Sequence[TrainingExample], step: int, weights: Sequence[Any]
    ) -> None:
        world = Processes.current()
        harmful = [example for example in examples if example.harmful]
        harmless = [example for example in examples if not example.harmful]
        value = 0.0
        # One kind after the other: half of the activations at a time.
        for kind, factor in ((harmful, 1.0), (harmless, self.recipe.keep)):
            if rows := kind[world.index :: world.count]:
                loss = distil_loss(model, rows, self.recipe) * (factor / len(examples))
                value += float(loss.detach())
                loss.backward()
        value = world.add_up(weights, value)
        if not math.isfinite(value):
            raise SafeGeneError(
                f"the training diverged in step {step + 1}", "Lower the learning rate"
            )
        self.losses.append(value)

    def _keep(self, optimiser: Any) -> None:
        import torch

        gene = {name: weight.detach().cpu() for name, weight in self.live.gene_weights().items()}
        state = {"gene": gene, "optimiser": optimiser.state_dict(), "losses": self.losses}
        with atomic_output(self.path) as temporary:
            torch.save(state, temporary)

    def _resume(self, optimiser: Any) -> int:
        """Take up the checkpoint, if there is one; returns the steps already taken."""
        import torch

        if not self.path.exists():
            return 0
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            optimiser.load_state_dict(state["optimiser"])
            with torch.no_grad():
                for name, weight in self.live.gene_weights().items():
                    weight.copy_(state["gene"][name])
            self.losses[:] = state["losses"]
        except (
            OSError,
            KeyError,
            RuntimeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise FileFormatError(
                f"{self.path}: no checkpoint of this run ({type(error).__name__})",
                "Delete it to start over",
            ) from error
        self.report(f"going on from step {len(self.losses)}")
        return len(self.losses)
