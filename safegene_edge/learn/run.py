"""`learn`: a safety gene by forward passes through llama.cpp alone, without gradients.

The teacher's refusals and each target's own answers to harmless prompts are what is wanted.
One pass of the teacher and one of the target show the states there; one more fits the layers
(`fit`). design/learning.md says what was tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from ..compat import model_hash, open_model, same_tokenizer, text_tokens, tokenizer_digest
from ..errors import MismatchError, NoEffectError, SettingError
from ..files import PathLike, sha256
from ..gene import SafetyGene
from ..gguf_file import GGUFFile
from ..prompts import Prompt, listed_prompts
from ..recalibrate.aligned import measured
from ..runtime.batch import common_prefix
from ..runtime.chat import require_chat, require_template
from ..runtime.devices import activation_bytes, cache_bytes, memory_bytes, physical_cores
from ..runtime.engine import Engine
from ..runtime.llama import SafeLlama
from ..runtime.lockstep import WRITER
from ..runtime.refusal_margin import refusal_openers
from ..runtime.schedule import Scales
from .base import Model, files_of
from .fit import Fit, Fitted, Target
from .samples import LOOK, choose, header_of, rendered
from .settings import LearnSettings
from .states import Captured, capture, header_goals
from .teachers import TRIED, Taught, best_system_prompt, share_refused

Progress = Callable[[str, int, int], None]
_CONTEXT = 512
_RANK = 8
_SHARE = 0.5  # of the machine's memory: states and regressions take as much again


def learn(
    degraded: PathLike | Iterable[Model],
    aligned: Model | None = None,
    *,
    task: Iterable[Prompt | str] = (),
    family: str = "",
    settings: LearnSettings | None = None,
    progress: Progress | None = None,
) -> SafetyGene:
    """Learn a safety gene from GGUF models, by forward passes alone.

    A model is a GGUF file, or a sequence of one and the GGUF LoRAs that it is run with.

    Args:
        degraded: models that have lost refusals, or one; of one, the gene is that one's own.
        aligned: a model of the family that refuses, or a folder that holds the one which the
            first degraded model names as its base; None: each degraded model under a safety
            system prompt.
        task: prompts as the degraded models' own job has them; no answers are needed.
        family: the family's name; default: that of the first degraded file.
        progress: called with what is being done, and how much of it is done, of how much.

    Raises:
        MismatchError: the models are not of one family.
        NoEffectError: the teacher does not refuse, or not more than the degraded models.
        SettingError: settings make no sense, or no degraded model is given.
        LlamaCppError: the architecture is built otherwise than a fit needs.
    """
    given = [degraded] if isinstance(degraded, (str, os.PathLike)) else degraded
    models = [files_of(model) for model in given]
    if not models:
        raise SettingError("no degraded model is given", "Give at least one")
    teacher = files_of(aligned, models[0][0]) or None
    every = [*models, *([teacher] if teacher else [])]
    _require_family(every)
    prompts, settings = listed_prompts(task), settings or LearnSettings()
    for files in models:
        require_prompts(files, prompts, settings.tokens)
    with ExitStack() as stack:
        work = _Learning(stack, models, teacher, prompts, settings, progress)
        gene = work.run(family)
    return gene if teacher is None else work.with_aligned_facts(gene, teacher)


def require_prompts(
    files: Sequence[PathLike], prompts: Sequence[Prompt | str], tokens: int
) -> None:
    """Raise SettingError, before minutes of work, for a task prompt that a model cannot read.

    Its template refuses it, or there is no room for so many tokens of an answer.
    """
    if not prompts:
        return
    with ExitStack() as stack:
        llama = _Model.load(stack, files).llama
        for one in prompts:
            prompt = one if isinstance(one, Prompt) else Prompt("", one)
            try:
                _require_context(llama, rendered(llama, [prompt])[0], tokens)
            except SettingError as error:
                error.message = f"the task prompt {prompt.text[:60]!r}: {error.message}"
                raise


def _require_context(llama: SafeLlama, asked: Sequence[int], tokens: int) -> None:
    needed, trained = len(asked) + tokens, int(llama._model.n_ctx_train())
    if 0 < trained < needed:
        raise SettingError(
            f"a prompt to learn from needs {needed} tokens, the context of {llama.model_path} has "
            f"{trained}",
            "Give shorter task prompts",
        )


def _require_family(models: Sequence[Sequence[PathLike]]) -> None:
    """One architecture, shapes and tokenizer."""
    first = open_model(models[0][0])
    for files in models[1:]:
        other = open_model(files[0])
        if other.path == first.path:
            continue
        for name, alike in _SHARED.items():
            if not alike(first, other):
                token = f" ({_first_token(first, other)})" if name == "tokenizer" else ""
                raise MismatchError(
                    f"{other.path} is not of the family of {first.path}: another {name}{token}",
                    "Give models of one family: the same base, fine-tuned",
                )


def _first_token(first: GGUFFile, other: GGUFFile) -> str:
    """The first token of text that two vocabularies do not share."""
    one, two = text_tokens(first), text_tokens(other)
    for number, (ours, theirs) in enumerate(zip_longest(one, two, fillvalue="")):
        if ours != theirs:
            return f"token {number} is {_shown(theirs)} in place of {_shown(ours)}"
    return "other merges"


def _shown(token: str) -> str:
    return f"'{token[:64]}'" if token else "a special one"


def _shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in file.tensors.items() if name.startswith("blk.")}


_SHARED: dict[str, Callable[[GGUFFile, GGUFFile], bool]] = {
    "architecture": lambda one, other: one.architecture == other.architecture,
    "shapes": lambda one, other: _shapes(one) == _shapes(other),
    "tokenizer": same_tokenizer,
}


@dataclass
class _Model:
    """A loaded model with its own adapters on."""

    llama: SafeLlama
    scales: Scales

    @classmethod
    def load(cls, stack: ExitStack, files: Sequence[PathLike]) -> _Model:
        llama = stack.enter_context(SafeLlama(str(files[0]), n_ctx=_CONTEXT))
        require_template(llama)
        require_chat(llama)  # before minutes of learning
        llama.attach_each(files[1:])
        return cls(llama, {handle: handle.scale for handle in llama.adapters})

    def engine(self) -> Engine:
        """A batched engine for its answers."""
        return Engine(self.llama, n_parallel=16, flash_attn=True)


class _Learning:
    """One run."""

    def __init__(
        self,
        stack: ExitStack,
        models: list[list[PathLike]],
        teacher: list[PathLike] | None,
        task: tuple[Prompt | str, ...],
        settings: LearnSettings,
        progress: Progress | None,
    ) -> None:
        self.stack, self.files, self.teacher_files = stack, models, teacher
        self.settings = settings.for_teacher(itself=teacher is None)
        self.progress = progress
        self.chosen = choose(self.settings.prompts, self.settings.borderline or 0.0, task)
        self.lanes = settings.threads or physical_cores()
        self._ticks = ("", 0, 0)
        self._read = 0  # tokens
        self._needed = 0  # bytes

    def run(self, family: str) -> SafetyGene:
        """Ask, read, fit."""
        file = open_model(self.files[0][0])
        layers, rank = plan(file, self.settings)
        shared = None if self.teacher_files is None else self._taught(self.teacher_files, layers)
        targets, lessons = [], []
        for files in self.files:
            lessons.append(shared or self._taught(files, layers))
            targets.append(self._target(files, lessons[-1], layers))
        self._begin("fitting", len(layers))
        fit = Fit(targets, self.settings, rank, lanes=self.lanes, tick=self._tick)
        self._read += sum(lane.rows for lane in fit.lanes)
        return self._gene(file, fit.run(layers), [shared] if shared else lessons, family)

    def with_aligned_facts(self, gene: SafetyGene, teacher: list[PathLike]) -> SafetyGene:
        """With what recalibration asks of the aligned model; the targets may be closed by now."""
        self._begin("measuring the aligned model", 1 + len(self.files))
        return measured(gene, teacher, self.files, tick=self._tick)

    def _taught(self, files: list[PathLike], layers: Sequence[int]) -> Taught:
        """A teacher's refusals, and its states there."""
        with ExitStack() as stack:
            model, system = _Model.load(stack, files), ""
            if self.teacher_files is None:
                self._begin("choosing a system prompt", 1)
                with model.engine() as engine:
                    system = best_system_prompt(engine, self.chosen.harmful, model.scales)
                self._tick()
            asked = rendered(model.llama, self.chosen.harmful, system)
            captured = self._captured(
                "asking the teacher", model, asked, layers, look=LOOK, text=not system
            )
            asked = rendered(model.llama, self.chosen.harmless, system)
            header = self._header(model, asked, layers) if self.settings.contrast else None
            return Taught.of(model.llama, self.chosen.harmful, captured, header, system)

    def _target(self, files: list[PathLike], taught: Taught, layers: Sequence[int]) -> Target:
        """What a degraded model reads; it stays loaded for the fit."""
        model = _Model.load(self.stack, files)
        if self.teacher_files is not None:
            self._require_lost(model, taught)
        asked = rendered(model.llama, (*self.chosen.harmless, *self.chosen.tasks))
        harmful = rendered(model.llama, taught.prompts)
        _require_alike(model.llama, taught, harmful, self.settings.tokens)
        self._require_room(model.llama, [*harmful, *asked])
        own = self._captured("asking the degraded model", model, asked, layers, text=True)
        header = self._header(model, harmful, layers) if self.settings.overshoot != 1 else None
        samples = taught.samples(harmful, header)
        samples += [
            own.sample(number, prompt, taught=False, other=header_goals(taught.header, number))
            for number, prompt in enumerate(asked)
        ]
        return Target(model.llama, model.scales, own, taught.captured, samples,
                      {True: header, False: taught.header})  # fmt: skip

    def _header(self, model: _Model, asked: list[list[int]], layers: Sequence[int]) -> Captured:
        """A model's states where an answer begins."""
        return self._captured("comparing the models", model, asked, layers, tokens=0)

    def _captured(
        self, what: str, model: _Model, asked: list[list[int]], layers: Sequence[int], **more: Any
    ) -> Captured:
        more = {"tokens": self.settings.tokens, **more}
        captured = capture(
            model.llama, model.scales, asked, layers, header=header_of(model.llama),
            lanes=self.lanes, tell=partial(self._tell, what), **more,
        )  # fmt: skip
        self.stack.enter_context(captured.goals)
        self._read += captured.read
        return captured

    def _require_room(self, llama: SafeLlama, asked: Sequence[Sequence[int]]) -> None:
        """All prompts of all models are read at once, on as many contexts as they fill."""
        _require_context(llama, max(asked, key=len), self.settings.tokens)
        cells = sum(map(len, asked)) - (len(asked) - 1) * common_prefix(asked)
        model = open_model(llama.model_path)
        self._needed += (cache_bytes(model, cells) or 0) + (activation_bytes(model, cells) or 0)
        if (memory := memory_bytes()) and self._needed > _SHARE * memory:
            raise SettingError(
                f"reading the prompts to learn from takes at least {self._needed / 2**30:.1f} GiB "
                f"beside {llama.model_path}, and there are {memory / 2**30:.0f}",
                "Give shorter or fewer task prompts, or fewer --prompts",
            )

    def _require_lost(self, model: _Model, taught: Taught) -> None:
        """Of a few prompts, and of all where these do not show it."""
        with model.engine() as engine:
            for tried in (self.chosen.harmful[-TRIED:], self.chosen.harmful):
                own = share_refused(engine, tried, model.scales)
                aligned = sum(prompt in taught.prompts for prompt in tried) / len(tried)
                if aligned > own:
                    return
        raise NoEffectError(
            f"the aligned model refuses no more than {model.llama.model_path}: {aligned:.0%} "
            f"and {own:.0%} of {len(tried)} harmful prompts",
            "Nothing was lost that it could bring back; give a model that refuses (--aligned)",
        )

    def _gene(
        self, file: GGUFFile, found: Fitted, lessons: Sequence[Taught], family: str
    ) -> SafetyGene:
        sources = {}
        named = {"aligned": [self.teacher_files] if self.teacher_files else [],
                 "degraded": self.files}  # fmt: skip
        for role, models in named.items():
            for number, files in enumerate(models, 1):
                name = role if len(models) == 1 else f"{role}-{number}"
                for place, path in enumerate(files):
                    hashed = sha256 if place else model_hash
                    sources[f"{name}+{place}" if place else name] = hashed(path)
        learnt = {
            "safegene.learn.teacher": "itself" if self.teacher_files is None else "aligned",
            "safegene.learn.system_prompt": lessons[0].system,
            "safegene.learn.refused": sum(len(taught.kept) for taught in lessons),
            "safegene.learn.asked": sum(taught.asked for taught in lessons),
            "safegene.learn.harmless": len(self.chosen.harmless) + len(self.chosen.tasks),
            "safegene.learn.tokens_read": self._read,
            **{f"safegene.learn.{key}": value
               for key, value in asdict(self.settings).items() if isinstance(value, (int, float))},
        }  # fmt: skip
        return SafetyGene(
            file.architecture, 0.0, found.pairs, {key: v for key, v in learnt.items() if v != ""},
            family=family or file.text("general.name", "") or file.path.stem,
            sources=sources, scores=found.scores,
            refusal_openers=refusal_openers(
                [answer for taught in lessons for answer in taught.answers]
            ), tokenizer=tokenizer_digest(file),
        )  # fmt: skip

    def _begin(self, what: str, total: int) -> None:
        self._ticks = what, -1, total
        self._tick()

    def _tick(self) -> None:
        what, done, total = self._ticks
        self._ticks = what, done + 1, total
        self._tell(*self._ticks)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def _require_alike(
    llama: SafeLlama, taught: Taught, asked: Sequence[Sequence[int]], tokens: int
) -> None:
    """Rows are counted from where an answer begins, and the target reads what the teacher says."""
    count = taught.captured.header
    pairs = zip(taught.kept, asked, strict=True)
    if header_of(llama) != count or any(
        list(taught.captured.prompts[number][-count:]) != list(prompt[-count:])
        for number, prompt in pairs
    ):
        raise MismatchError(
            f"{llama.model_path}: its chat template opens an answer otherwise than the aligned "
            "model's",
            "Give files with the same chat template; `gguf-new-metadata --chat-template` puts one "
            "in",
        )
    answers = [taught.captured.answers[number][:tokens] for number in taught.kept]
    if (said := max((max(answer, default=0) for answer in answers), default=0)) >= llama.n_vocab():
        raise MismatchError(
            f"{llama.model_path}: lacks the token {said}, which the aligned model's refusals have",
            "Give files with the same special tokens",
        )


def plan(file: GGUFFile, settings: LearnSettings) -> tuple[list[int], int]:
    """The layers and the rank of a gene for a model, within the budget; settings `for_teacher`.

    Raises:
        SettingError: the model has not these layers, or no `attn_output` in one of them.
    """
    count, lowest = file.whole(f"{file.architecture}.block_count", 0), settings.lowest or 0
    first, last = settings.layers or (max(1, int(count * lowest)), max(1, count - 2))
    if not 1 <= first <= last <= count - 2:
        raise SettingError(
            f"the layers are {first} to {last}, and {file.path} has the layers 0 to {count - 1}",
            f"Give layers from 1 to {count - 2}",
        )
    layers = list(range(first, last + 1))
    shapes = []
    for layer in layers:
        name = f"blk.{layer}.{WRITER}.weight"
        if name not in file.tensors:
            raise SettingError(
                f"{file.path}: has no tensor '{name}', which a gene would change",
                "A gene for this architecture cannot be learnt by forward passes",
            )
        shapes.append(file.tensors[name].shape)
    if settings.rank is not None:
        return layers, settings.rank
    size = sum(info.n_elements for info in file.tensors.values())
    budget = min(settings.budget, size // 100)
    return layers, max(1, min(_RANK, budget // sum(map(sum, shapes))))
