"""What may be set of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import SettingError

if TYPE_CHECKING:
    from ..files import PathLike

RUN_UP_TO = 160_000_000  # bytes of a model: of SmolLM2's 145 MB in Q8_0 a merge takes 389 MB


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge.

    Attributes:
        imatrix: an importance matrix, as llama-imatrix writes it; some types need one.
        promote: how many tensors, those that keep least of their update, get a larger type.
        run: run the model first, so that rounding errors keep off what its tensors read; or do
            not, which is fast and takes little memory. By default a model of up to 160 MB is run.
        threads: default: the processors that this process may use.
    """

    imatrix: PathLike | None = None
    promote: int = 0
    run: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.promote < 0:
            raise SettingError(f"promote is {self.promote}", "Give 0 or more")
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads is {self.threads}", "Give 1 or more")
