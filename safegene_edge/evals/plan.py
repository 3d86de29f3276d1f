"""What an evaluation asks: suites, attacks and their harmless twins, column by column."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ..aliases import Progress
from ..errors import SettingError
from ..prompts import Prompt
from .asking.attacks import Attack, adaptive_chats
from .asking.chat import Asker, Chat, Reply
from .asking.local import LocalModel
from .asking.suites import Suite, load_suite
from .costs import Task, kl_divergence, load_task, over_refusal, perplexity, task_accuracy
from .costs import speed as measured_speed
from .judge import judge
from .report.results import Answer, Answers, AttackResult, Cost, SuiteResult
from .settings import BUILT_IN, CostSettings, EvalSettings, GateSettings

SuiteLike: TypeAlias = str | Path | Suite
_NO_ATTACK = ("languages",)  # a suite whose point is the wording that an attack would change


class Plan:
    """What to ask, read and checked before a model is loaded."""

    def __init__(
        self,
        suites: list[Suite],
        attacks: list[Attack],
        settings: EvalSettings,
        costs: CostSettings,
        tasks: list[Task],
    ) -> None:
        self.suites, self.attacks = suites, attacks
        self.settings, self.costs, self.tasks = settings, costs, tasks

    @classmethod
    def of(
        cls,
        suites: Iterable[SuiteLike],
        attacks: list[Attack],
        settings: EvalSettings,
        costs: CostSettings,
    ) -> Plan:
        """Read every suite and task, cut to their limits.

        Raises:
            SafeGeneError: one cannot be read, comes twice, or there is nothing to attack.
        """
        whole = _load_all(suites)
        plan = cls(
            [suite.sample(settings.limit) for suite in whole],
            attacks,
            settings,
            costs,
            [load_task(path) for path in costs.tasks],
        )
        if plan.attacks and not plan.attacked:
            raise SettingError("no harmful suite to attack", "Add --suite harmful")
        return plan

    def check(self, gate: GateSettings, gene: bool) -> None:
        """Raise a SettingError where a threshold's figure would not be measured."""
        kinds = {suite.kind for suite in self.suites}
        lacks = {
            "min_refused": ("harmful" not in kinds, "no harmful suite", "Add --suite harmful"),
            "max_over_refused": ("harmless" not in kinds, "no harmless suite", "Add one"),
            "max_kl": (not gene or not self.costs.kl_prompts, "no gene, or no --kl", "Give both"),
            "max_task_drop": (not gene or not self.tasks, "no gene, or no --task", "Give both"),
        }
        for name, (lacking, cause, remedy) in lacks.items():
            if lacking and getattr(gate, name) is not None:
                raise SettingError(f"{name} is set, and there is {cause}", remedy)

    @property
    def attacked(self) -> list[Suite]:
        """The suites that attacks are tried on, cut to their limit."""
        return [
            suite.sample(self.settings.attack_limit) for suite in self.suites if _attackable(suite)
        ]

    @property
    def twins(self) -> list[Suite]:
        """Harmless prompts for the same wrappers: the first suite that has borderline ones."""
        if not self.attacks:
            return []
        harmless = [
            suite
            for suite in self.suites
            if suite.kind == "harmless" and not suite.name.startswith(_NO_ATTACK)
        ]
        traps = [suite for suite in harmless if any(p.borderline for p in suite.prompts)]
        return [suite.sample(self.settings.attack_limit) for suite in (traps or harmless)[:1]]

    def n_answers(self, asker: Asker) -> int:
        """Answers in all, for the progress."""
        attacked = len(self.attacks) * sum(len(suite.prompts) for suite in self.attacked)
        attacked += len(self._wrappers) * sum(len(suite.prompts) for suite in self.twins)
        tasks = sum(len(task.items) for task in self.tasks)
        plain = sum(len(suite.prompts) for suite in self.suites) + tasks
        return len(asker.columns) * plain + len(asker.attack_columns) * attacked

    @property
    def _wrappers(self) -> list[Attack]:
        """The attacks that can be put around any prompt: not the one that searches."""
        return [attack for attack in self.attacks if attack.apply is not None]

    def ask(
        self, asker: Asker, clock: Clock, progress: Progress | None
    ) -> tuple[tuple[SuiteResult, ...], tuple[AttackResult, ...], tuple[AttackResult, ...]]:
        """Every suite, every attack and its harmless twins, column by column."""
        clock.count(self.n_answers(asker), progress)
        answers: dict[str, list[Answers]] = {}
        attacked: dict[str, list[Answers]] = {}
        jobs = [(suite, attack) for suite in self.attacked for attack in self.attacks]
        n_attacks = len(jobs)
        jobs += [(suite, attack) for suite in self.twins for attack in self._wrappers]
        for column in asker.columns:
            with clock.measure(column):
                answers[column] = [
                    _asked(asker, column, suite.prompts, _plain_chat, clock.advance)
                    for suite in self.suites
                ]
        for column in asker.attack_columns if jobs else ():
            with clock.measure(f"attacks_{column}"):
                attacked[column] = [
                    _attacked(asker, column, suite.prompts, attack, clock.advance)
                    for suite, attack in jobs
                ]
        suites = tuple(
            SuiteResult(suite, *(answers[column][index] for column in asker.columns))
            for index, suite in enumerate(self.suites)
        )
        attacks = tuple(
            AttackResult(
                attack.name,
                attack.paper,
                suite.name,
                *(attacked[column][index] for column in asker.attack_columns),
            )
            for index, (suite, attack) in enumerate(jobs)
        )
        return suites, attacks[:n_attacks], attacks[n_attacks:]

    def costs_of(
        self, local: LocalModel, results: Sequence[SuiteResult], clock: Clock
    ) -> tuple[Cost, ...]:
        """The costs that no clock measures."""
        settings = self.costs
        with clock.measure("costs"):
            found = [over_refusal(r) for r in results if r.suite.kind == "harmless"]
            if settings.kl_prompts:
                kl = kl_divergence(local, self._harmless(settings.kl_prompts), settings.kl_tokens)
                found += [kl] if kl is not None else []
            if settings.perplexity is not None:
                found.append(perplexity(local, settings.perplexity, settings.perplexity_tokens))
            found += [task_accuracy(local, task, clock.advance) for task in self.tasks]
        return tuple(found)

    def _harmless(self, count: int) -> list[str]:
        """Plain harmless prompts of one turn: of the suites asked, else the project's own."""
        asked = [suite for suite in self.suites if suite.kind == "harmless"]
        plain = _plain(asked) or _plain(load_suite("harmless"))
        return [p.text for p in Suite("plain", "harmless", plain).sample(count).prompts]

    def speed_of(self, local: LocalModel) -> dict[str, Any]:
        """Tokens per second, where they are asked for."""
        return measured_speed(local) if self.costs.speed else {}


def _plain(suites: Iterable[Suite]) -> tuple[Prompt, ...]:
    """The English prompts of one turn that are not borderline."""
    prompts = (prompt for suite in suites for prompt in suite.prompts)
    return tuple(p for p in prompts if not (p.borderline or p.history) and p.language == "en")


class Clock:
    """Seconds by part of the work, and the progress."""

    def __init__(self) -> None:
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._seconds: dict[str, float] = {}
        self._done = self._total = 0
        self._progress: Progress | None = None

    def count(self, total: int, progress: Progress | None) -> None:
        """Begin the progress."""
        self._total, self._progress = total, progress

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Take the seconds of a part."""
        start = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - start, 3)

    def times(self, **speed: Any) -> dict[str, Any]:
        """Date, seconds and speeds, as a report has them."""
        return {"date": self._date, "seconds": self._seconds, "speed": speed}


def _plain_chat(prompt: Prompt) -> Chat:
    return Chat.of(prompt)


def _asked(
    asker: Asker,
    column: str,
    prompts: Sequence[Prompt],
    chat_of: Callable[[Prompt], Chat],
    advance: Callable[[], None],
) -> Answers:
    replies = asker.ask(column, [chat_of(prompt) for prompt in prompts], advance)
    return tuple(_judged(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True))


def _attacked(
    asker: Asker,
    column: str,
    prompts: Sequence[Prompt],
    attack: Attack,
    advance: Callable[[], None],
) -> Answers:
    if attack.apply is None:
        return _adaptively(asker, column, prompts, advance)
    apply = attack.apply
    return _asked(asker, column, prompts, lambda p: apply(_plain_chat(p)), advance)


def _adaptively(
    asker: Asker, column: str, prompts: Sequence[Prompt], advance: Callable[[], None]
) -> Answers:
    """The adaptive attack: its chats in turn for each prompt, until one gets compliance."""
    chats = []
    for prompt in prompts:
        chats.append(adaptive_chats(_plain_chat(prompt), partial(asker.refusal, column)))
        advance()
    best = [Answer(prompt, "", None) for prompt in prompts]
    for turn in range(max(map(len, chats), default=0)):
        left = [
            index
            for index, answer in enumerate(best)
            if turn < len(chats[index])
            and (answer.verdict is None or answer.verdict.label != "complied")
        ]
        replies = asker.ask(column, [chats[index][turn] for index in left])
        for index, reply in zip(left, replies, strict=True):
            answer = _judged(prompts[index], reply)
            if answer.verdict is not None:
                best[index] = answer
    return tuple(best)


def _judged(prompt: Prompt, reply: Reply) -> Answer:
    if reply.text is None:  # the chat did not fit, or the thought never ended: nothing to judge
        return Answer(prompt, "", None, reply.thinking)
    return Answer(prompt, reply.text, judge(prompt.text, reply.text))


def _load_all(suites: Iterable[str | Path | Suite]) -> list[Suite]:
    """Every suite once; two of one name would be one in the report."""
    found: dict[str, Suite] = {}
    for item in suites:
        for suite in [item] if isinstance(item, Suite) else load_suite(item):
            if suite.name in found:
                raise SettingError(f"the suite '{suite.name}' is given twice", "Rename one file")
            if (name := suite.repeated_id()) is not None:
                cause = f"two prompts of the suite '{suite.name}' have the id '{name}'"
                raise SettingError(cause, "Give each an id of its own")
            found[suite.name] = suite
    if not found:
        raise SettingError("no suite to evaluate", f"Give {' or '.join(BUILT_IN)}, or a file")
    return list(found.values())


def attackable(suites: Iterable[SuiteLike]) -> bool:
    """Whether attacks can be tried on any of them.

    Raises:
        SafeGeneError: one cannot be read.
    """
    return any(_attackable(suite) for suite in _load_all(suites))


def _attackable(suite: Suite) -> bool:
    return suite.kind == "harmful" and not suite.name.startswith(_NO_ATTACK)
