"""Extract a safety gene from an aligned model and degraded ones, once a family.

`extract` computes the teachers' answers, learns the gene (or takes the weights' difference), and
keeps the layers that matter under a budget. The kept layers are strengthened to do what all did.
Each step's result is kept in a folder; a run that was killed continues there.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..compat import open_model, tokenizer_digest
from ..converters import convert
from ..converters.names import BaseNames
from ..errors import FileFormatError, MissingExtraError, OutputError, SafeGeneError, SettingError
from ..files import PathLike, write_text
from ..gene import Adapter, Pair, SafetyGene, layer_of
from ..gguf_file import GGUFFile
from ..prompts import Prompt, harmful_prompts, harmless_prompts
from ..recalibrate.examples import Examples
from ..runtime.llama import SafeLlama
from ..runtime.refusal_margin import Openers, Tokens
from .delta import delta_adapter
from .distil import (
    Trainer,
    TrainingExample,
    load_training_examples,
    mean_loss,
    own_answers,
    rotation,
    save_training_examples,
    taught,
)
from .loss import Example
from .models import GENE, LiveModel, Source, require_family
from .processes import Processes
from .recipe import rendered, require_extra
from .refusals import Refusals, divergence
from .select import Gain, Gains, layer_gains, select
from .settings import ExtractSettings, Log

METHODS = ("distil", "delta")
REFUSALS = "refusals.json"  # in the work folder: `Refusals`
GAINS = "gains.json"  # likewise: what each layer gains in each degraded model
MAX_PARAMETERS, MAX_SHARE = 600_000, 0.01  # of the model; the smaller of both is the budget
Refuses = Callable[[str, str], bool]


def judged_refusal(prompt: str, answer: str) -> bool:
    """Whether the project's judge calls an answer a refusal."""
    from ..evals.judge import judge

    return judge(prompt, answer).label == "refused"


def extract(
    aligned: PathLike | Source,
    degraded: Sequence[PathLike | Source],
    *,
    folder: PathLike,
    method: str = "distil",
    settings: ExtractSettings | None = None,
    base: PathLike | None = None,
    family: str = "",
    harmful: Sequence[Prompt] | None = None,
    harmless: Sequence[Prompt] | None = None,
    refuses: Refuses = judged_refusal,
    report: Log = lambda line: None,
) -> SafetyGene:
    """The gene of a family: what the aligned model has and the degraded ones have lost.

    Args:
        aligned: an HF folder, a GGUF file, or "MODEL,ADAPTER" with a PEFT folder.
        degraded: likewise; a PEFT folder alone lies on top of `aligned`.
        folder: for checkpoints; the same call with the same folder goes on where it stopped.
        method: "distil" learns; "delta" takes the truncated SVD of the weights' difference.
        base: a GGUF of the family, for names and chat template; default: the first one given.
        family: what the gene calls its family; default: the base's name.
        harmful, harmless: prompts to learn from; default: the project's own.
        refuses: (prompt, answer) to whether the answer is a refusal.

    Returns:
        The gene; A is r×in and B out×r for each tensor.

    Raises:
        FileFormatError: an input is missing or malformed.
        MismatchError: the models are not of one family.
        MissingExtraError: the packages for training are not installed.
        SettingError: a setting makes no sense, or the folder belongs to another extraction.
        SafeGeneError: the aligned model refuses nothing, or the training diverged.
    """
    settings = settings or ExtractSettings()
    if method not in METHODS:
        raise SettingError(f"the method is '{method}'", f"One of {', '.join(METHODS)}")
    if not degraded:
        raise SettingError("no degraded model is given", "Give one, or --degrade auto")
    safe = Source.parse(aligned)
    worse = [Source.parse(item, safe) for item in degraded]
    require_family([safe, *worse])
    model = open_model(base or _first_gguf([safe, *worse]))
    require_family([Source(model.path), safe])
    if method == "distil" or settings.select:
        require_extra()
    prompts = harmful or harmful_prompts(), harmless or harmless_prompts()
    sources = {"aligned": safe.digest()}
    sources.update({f"degraded {n + 1}": source.digest() for n, source in enumerate(worse)})
    world = Processes.current()
    report = world.reporting(report)
    work = _Work(safe, worse, settings, model, Path(folder), prompts, refuses, report)
    with world.first():
        work.claim(method, sources)
    adapter, scores, refusals = work.distil() if method == "distil" else work.delta()
    return _gene(
        adapter,
        settings,
        family or _family(model),
        sources,
        scores,
        refusals,
        tokenizer_digest(model),
    )


def _first_gguf(sources: Sequence[Source]) -> Path:
    for source in sources:
        if source.is_gguf:
            return source.base
    raise MissingExtraError(
        "no GGUF file of the family is given: the gene's tensor names come from one",
        "Give --base MODEL.gguf",
    )


def _family(model: GGUFFile) -> str:
    return model.text("general.name", model.path.stem)


def _gene(
    adapter: Adapter,
    settings: ExtractSettings,
    family: str,
    sources: Mapping[str, str],
    scores: Mapping[int, float],
    refusals: Refusals,
    tokenizer: str,
) -> SafetyGene:
    kind = np.dtype(settings.gene_dtype)
    pairs = {n: Pair(p.a.astype(kind), p.b.astype(kind)) for n, p in adapter.pairs.items()}
    return SafetyGene(
        adapter.architecture,
        adapter.alpha,
        pairs,
        family=family,
        sources=dict(sources),
        scores=dict(scores),
        refusal_openers=tuple(refusals.openers),
        aligned_loss=refusals.aligned_loss,
        aligned_over_refusal=refusals.aligned_over_refusal,
        aligned_margins=tuple(refusals.aligned_margins),
        aligned_examples=Examples.every_shipped().digest if refusals.aligned_margins else "",
        aligned_kl=refusals.aligned_kl or 0.0,
        tokenizer=tokenizer,
    )


def default_budget(model: GGUFFile) -> int:
    """The smaller of 600,000 parameters and 1 % of the model's."""
    total = sum(info.n_elements for info in model.tensors.values())
    return min(MAX_PARAMETERS, int(total * MAX_SHARE))


@dataclass
class _Work:
    """One extraction and the folder that it is kept in."""

    aligned: Source
    degraded: list[Source]
    settings: ExtractSettings
    model: GGUFFile
    folder: Path
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]]
    refuses: Refuses
    report: Log
    _live: LiveModel | None = None

    def claim(self, method: str, sources: Mapping[str, str]) -> None:
        """Make the folder this extraction's own, or see that it already is."""
        texts = "\n".join(prompt.text for kind in self.prompts for prompt in kind)
        facts = {
            "method": method,
            "sources": dict(sources),
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
            "settings": json.loads(json.dumps(asdict(self.settings))),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: {error.strerror}", "Name a folder") from error
        file = self.folder / "run.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != facts:
            raise SettingError(
                f"{self.folder}: holds an extraction with other models or settings",
                "Name another folder, or delete it",
            )
        write_text(file, json.dumps(facts, indent=2) + "\n")

    # -- the two ways -----------------------------------------------------

    def distil(self) -> tuple[Adapter, dict[int, float], Refusals]:
        """Adapter, scores and the aligned model's refusals, learnt."""
        harmful, harmless = self.training_examples()
        harmful, watched_h = self._split(harmful)
        split = [self._split(rows) for rows in harmless]
        learnt, watched_s = [rows for rows, _ in split], [rows for _, rows in split]
        self._watch("before", watched_h, watched_s, gene=False)
        plan = [
            step
            for epoch in range(self.settings.epochs)
            for step in rotation(harmful, learnt, self.settings, epoch)
        ]
        Trainer(
            self.live(), self.degraded, self.settings, self.folder / "train.pt",
            self.settings.checkpoint, self.report,
        ).run(plan)  # fmt: skip
        self._watch("after", watched_h, watched_s, gene=True)
        refusals = self._measured()
        adapter, scores = self._selected(self._converted(), refusals)
        return adapter, scores, refusals

    def delta(self) -> tuple[Adapter, dict[int, float], Refusals]:
        """Adapter and scores, from the weights alone; of refusals nothing is known."""
        settings = self.settings
        adapter = delta_adapter(
            self.aligned, self.degraded, self.model, settings.targets, settings.rank, self.report
        )
        if settings.select:
            self.live().load_gene(adapter, BaseNames(self.model))
        return *self._selected(adapter, Refusals()), Refusals()

    def live(self) -> LiveModel:
        """The one model in memory, made when first needed."""
        if self._live is None:
            self.report("loading the model")
            everyone = [*self.degraded, self.aligned]
            self._live = LiveModel(everyone, self.settings, self.folder, self.settings.dtype)
        return self._live

    # -- training examples ----------------------------------------------------------

    def training_examples(self) -> tuple[list[TrainingExample], list[list[TrainingExample]]]:
        """Harmful ones of the aligned model, and each degraded one's own harmless ones."""
        self.live()  # all processes make it together
        with Processes.current().first():
            return self._training_examples()

    def _training_examples(self) -> tuple[list[TrainingExample], list[list[TrainingExample]]]:
        file = self.folder / "aligned.npz"
        if not file.exists():
            save_training_examples(self._refusals(), file)
        harmless = []
        for number, source in enumerate(self.degraded):
            own = self.folder / f"degraded-{number + 1}.npz"
            if not own.exists():
                chosen = list(self.prompts[1])[number :: len(self.degraded)]
                save_training_examples(self._kept(source, chosen), own)
                self.report(f"degraded {number + 1}: answered {len(chosen)} harmless prompts")
            harmless.append(load_training_examples(own))
        return load_training_examples(file), harmless

    def _refusals(self) -> list[TrainingExample]:
        """What the aligned model says where it refuses; also writes how it opens that."""
        prompts = self.prompts[0]
        found = []
        with closing(SafeLlama(self.model.path, n_ctx=512)) as llama:
            asked = [rendered(llama, prompt) for prompt in prompts]
            with self.live().as_source(self.aligned, gene=False) as model:
                said = own_answers(model, asked, self.settings.refusal_tokens, llama.token_eos())
                texts = [llama.text(tokens) for tokens in said]
                refused = [self.refuses(p.text, t) for p, t in zip(prompts, texts, strict=True)]
                for tokens, answer, yes in zip(asked, said, refused, strict=True):
                    if yes:
                        found.append(Example(tokens, answer, True))
                if not found:
                    raise SafeGeneError(
                        f"{self.aligned.base} refuses none of {len(prompts)} harmful prompts",
                        "Give a model that was aligned; train one with the safety recipe",
                    )
                self.report(f"aligned: refuses {len(found)}/{len(prompts)} harmful prompts")
                training_examples = taught(model, found, self.settings, self.settings.top_k)
                said_no = [t for t, yes in zip(texts, refused, strict=True) if yes]
                how = Refusals.of(model, llama, said_no, self.settings)
        self.report(
            f"aligned: refuses {1 - how.aligned_loss:.3f} of the harmful calibration examples, "
            f"{how.aligned_over_refusal:.3f} of the harmless ones"
        )
        write_text(self.folder / REFUSALS, json.dumps(asdict(how)) + "\n")
        return training_examples

    def _measured(self) -> Refusals:
        """How the aligned model refuses, and how far the degraded ones are from it."""
        file = self.folder / REFUSALS
        known = Refusals(**json.loads(file.read_text(encoding="utf-8")))
        if known.aligned_kl is not None:
            return known
        with closing(SafeLlama(self.model.path, n_ctx=512)) as llama:
            far = [
                divergence(self.live(), source, self.aligned, llama, self.settings)
                for source in self.degraded
            ]
        self.report(f"KL(degraded ‖ aligned): {', '.join(f'{value:.3f}' for value in far)} nats")
        known = replace(known, aligned_kl=min(far))
        with Processes.current().first():
            write_text(file, json.dumps(asdict(known)) + "\n")
        return known

    def _kept(self, source: Source, prompts: Sequence[Prompt]) -> list[TrainingExample]:
        """What a degraded model says to harmless prompts; what it refuses is left out."""
        settings = self.settings
        found = []
        with closing(SafeLlama(self.model.path, n_ctx=512)) as llama:
            asked = [rendered(llama, prompt) for prompt in prompts]
            with self.live().as_source(source, gene=False) as model:
                said = own_answers(model, asked, settings.kept_tokens, llama.token_eos())
                for prompt, tokens, answer in zip(prompts, asked, said, strict=True):
                    if not self.refuses(prompt.text, llama.text(answer)):
                        weight = settings.borderline if prompt.borderline else 1.0
                        found.append(Example(tokens, answer, False, weight))
                return taught(model, found, settings, settings.top_k)

    def _split(
        self, training_examples: list[TrainingExample]
    ) -> tuple[list[TrainingExample], list[TrainingExample]]:
        """Training examples to learn from, and a few to watch the learning by."""
        order = random.Random(self.settings.seed).sample(training_examples, len(training_examples))
        count = min(self.settings.held_out, len(training_examples) // 4)
        return order[count:], order[:count]

    # -- learning and selecting -------------------------------------------

    def _watch(
        self,
        when: str,
        harmful: list[TrainingExample],
        harmless: list[list[TrainingExample]],
        *,
        gene: bool,
    ) -> None:
        """Log the mean KL divergences on training examples that nothing is learnt from."""
        for number, source in enumerate(self.degraded):
            values = [
                mean_loss(self.live(), source, rows, self.settings, gene=gene)
                for rows in (harmful, harmless[number])
            ]
            self.report(
                f"degraded {number + 1}, {when}: {values[0]:.3f} nats from the aligned model on "
                f"harmful prompts, {values[1]:.3f} from itself on harmless ones"
            )

    def _selected(self, adapter: Adapter, refusals: Refusals) -> tuple[Adapter, dict[int, float]]:
        """The gene in the layers kept, strengthened for those left out, and every layer's score."""
        if not self.settings.select:
            return adapter, {}
        self.live()
        with Processes.current().first():
            gains = self._gains(refusals)
        sizes, scores = sizes_of(adapter), gains.scores()
        kept = select(scores, sizes, self.settings.budget or default_budget(self.model))
        factor = gains.makes_up(kept)
        self.report(
            f"kept {len(kept)} of {len(sizes)} layers, {sum(sizes[layer] for layer in kept):,} "
            f"parameters, {factor:.2f} times as strong"
        )
        return adapter.only(kept).scaled(factor), scores

    def _gains(self, refusals: Refusals) -> Gains:
        """What every layer gains; kept after each degraded model, for each takes minutes."""
        file = self.folder / GAINS
        found = _known_gains(file)
        if len(found) < 2 * len(self.degraded):
            self.report("measuring what each layer gains")
            with closing(SafeLlama(self.model.path, n_ctx=512)) as llama:
                openers = Openers.of(llama, refusals.openers)
                harmful, harmless = self._contrast(llama)
            for gain in layer_gains(
                self.live(), self.degraded, harmful, harmless, openers, self.settings,
                self.report, tuple(found),
            ):  # fmt: skip
                found.append(gain)
                write_text(file, json.dumps(found, indent=2) + "\n")
        return Gains.mean(found)

    def _contrast(self, llama: SafeLlama) -> tuple[list[Tokens], list[Tokens]]:
        """Prompts to measure the layers with; of the harmless ones the borderline."""
        choice = random.Random(self.settings.seed)
        count = self.settings.contrast
        harmless = [p for p in self.prompts[1] if p.borderline] or list(self.prompts[1])
        harmful = list(self.prompts[0])
        kinds = [
            [rendered(llama, text) for text in choice.sample(texts, min(count, len(texts)))]
            for texts in (harmful, harmless)
        ]
        return kinds[0], kinds[1]

    def _converted(self) -> Adapter:
        """The gene's LoRA pairs under their GGUF names."""
        peft, world = self.folder / "peft", Processes.current()
        with world.first():
            if world.is_first:
                shutil.rmtree(peft, ignore_errors=True)
                self.live().model.save_pretrained(str(peft), selected_adapters=[GENE])
        return convert(peft / GENE, base=self.model.path)


def _known_gains(file: Path) -> list[Gain]:
    """What was measured of the layers before, as far as it went."""
    if not file.exists():
        return []
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return [{int(layer): float(v) for layer, v in gain.items()} for gain in stored]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{file}: no layers' gains", "Delete it to start over") from error


def sizes_of(adapter: Adapter) -> dict[int, int]:
    """Layer to the adapter's parameters in it."""
    sizes: Counter[int] = Counter()
    for tensor, pair in adapter.pairs.items():
        sizes[layer_of(tensor)] += pair.n_parameters
    return dict(sizes)
