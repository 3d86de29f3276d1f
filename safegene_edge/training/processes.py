"""Several processes of one extraction, as `accelerate launch` starts them.

Each holds the whole model and takes its share of every step's training examples; the gene's
gradients are summed. Answers, scores and files are made by the first process; the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

from .settings import Log

_PATIENCE = timedelta(hours=24)  # the others wait while the first one answers all prompts

_inside: list[bool] = []  # whether this process is in a `first` block


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch; without one it is alone.

    Attributes:
        index: 0 is the first; count: how many there are.
        state: accelerate's, or None.
    """

    index: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    @lru_cache
    def current(cls) -> Processes:
        """As the launcher's environment says."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, state)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process does the block, then the others; they find its files there.

        Within a block the others wait already: one inside of it changes nothing.
        """
        if self.state is None or _inside:
            yield
            return
        with self.state.main_process_first():
            _inside.append(True)
            try:
                yield
            finally:
                _inside.pop()

    def device(self) -> Any:
        """The torch device of this process."""
        import torch

        if self.state is not None:
            return self.state.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def add_up(self, weights: Iterable[Any], value: float) -> float:
        """Sum the weights' gradients over all processes, in place, and a number; returns it."""
        if self.state is None:
            return value
        import torch
        import torch.distributed as world

        held = list(weights)
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in held]
        flat = torch.cat([grad.reshape(-1) for grad in grads] + [grads[0].new_tensor([value])])
        world.all_reduce(flat)
        for weight, part in zip(held, flat[:-1].split([w.numel() for w in held]), strict=True):
            weight.grad = part.view_as(weight).clone()
        return float(flat[-1])

    def reporting(self, report: Log) -> Log:
        """The report of the first process; the others are silent."""
        return report if self.is_first else lambda line: None
