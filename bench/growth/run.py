"""How cost grows: with prompts, sequences at once, a gene's layers; and to the first token.

    SAFEGENE_QWEN=QWEN.gguf LLAMA_COMPLETION=.../llama-completion python bench/growth/run.py

Three sizes: SmolLM2-135M; Qwen2.5-Coder-0.5B, if it is named; and that one's architecture at 1.5B
with random weights, which is good for speed alone. The first token is timed from the start of the
process: `safegene-edge chat` with a gene on all layers, beside llama-cpp-python without one and, if
it is named, llama.cpp's `llama-completion` without one, in turn. A run goes on where one stopped:
finished cells lie in the cache folder until all are measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import cache_folder, machine, smollm2, table, write

from safegene_edge import Engine, SafeLlama
from safegene_edge.evals.asking.suites import load_suite
from safegene_edge.files import atomic_output
from safegene_edge.gene import Adapter, Pair
from safegene_edge.gguf_file import GGUFFile

CELLS = cache_folder() / "bench-growth.json"
ROUNDS, ANSWER = 3, 24
PROMPTS = (50, 100, 200, 400, 800)
SEQUENCES = (1, 2, 4, 8, 16, 32)
LAYERS = (0, 1, 2, 4, 8, 15, 30)
STARTS = 5
LARGE = 1_000_000_000  # parameters; such a model answers fewer prompts
WIDE = {"embedding_length": 1536, "feed_forward_length": 8960, "block_count": 28,
        "attention.head_count": 12, "attention.head_count_kv": 2}  # fmt: skip
PEER = """
import llama_cpp, sys
llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, verbose=False, n_threads=int(sys.argv[2]))
asked = [{"role": "user", "content": "Name a tree."}]
for chunk in llama.create_chat_completion(asked, max_tokens=8, stream=True):
    print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
"""


def main() -> None:
    cells: dict[str, Any] = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    for name, measure in measurements():
        if name not in cells:
            print(name, file=sys.stderr, flush=True)
            cells[name] = measure()
            CELLS.write_text(json.dumps(cells))
    write(Path(__file__).parent, cells, text_of(cells))
    CELLS.unlink()


def measurements() -> Iterator[tuple[str, Callable[[], Any]]]:
    models = {"SmolLM2-135M": smollm2()}
    if given := os.environ.get("SAFEGENE_QWEN"):
        models["Qwen2.5-Coder-0.5B"] = Path(given)
        models["1.5B, random"] = widened(Path(given))
    for name, path in models.items():
        for what, measure in (("prompts", prompts), ("sequences", sequences), ("layers", layers),
                              ("first token", first_token)):  # fmt: skip
            yield f"{name}: {what}", partial(measure, path)


# -- models -------------------------------------------------------------------


def widened(source: Path) -> Path:
    """A model of the source's kind at 1.5B, its weights random and in Q4_0."""
    path = cache_folder() / "bench-growth-1.5b.Q4_0.gguf"
    if path.exists():
        return path
    reader, rng = gguf.GGUFReader(source), np.random.default_rng(0)
    arch = str(GGUFFile(source).metadata["general.architecture"])
    with atomic_output(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        for field in reader.fields.values():
            key = field.name
            if key.startswith("GGUF.") or key == gguf.Keys.General.ARCHITECTURE:
                continue
            value, kind = field.contents(), field.types[0]
            value = WIDE.get(key.removeprefix(f"{arch}."), value)
            writer.add_key_value(
                key, value, kind, field.types[-1] if len(field.types) > 1 else None
            )
        for name, shape in shapes(GGUFFile(source)).items():
            writer.add_tensor(name, *random_tensor(shape, rng))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """The tensors of the wide model: the source's, with its widths for the old ones."""
    arch = file.architecture
    old = {name: int(file.metadata[f"{arch}.{name}"]) for name in WIDE}
    heads, kv = (f"attention.head_count{end}" for end in ("", "_kv"))
    size = {old["embedding_length"]: WIDE["embedding_length"],
            old["feed_forward_length"]: WIDE["feed_forward_length"],
            old["embedding_length"] // old[heads] * old[kv]: 128 * WIDE[kv]}  # fmt: skip
    found = {}
    for name, info in file.tensors.items():
        shape = tuple(size.get(n, n) for n in info.shape)
        if not name.startswith("blk."):
            found[name] = shape
        elif name.startswith("blk.0."):
            for layer in range(WIDE["block_count"]):
                found[name.replace("blk.0.", f"blk.{layer}.")] = shape
    return found


def random_tensor(shape: tuple[int, ...], rng: Any) -> tuple[Any, ...]:
    """A tensor and its type: a matrix as random blocks of Q4_0, anything else in float32."""
    if len(shape) == 1:
        return np.ones(shape, np.float32), None, gguf.GGMLQuantizationType.F32
    blocks = np.empty((shape[0], shape[1] // 32, 18), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, (*blocks.shape[:2], 16), dtype=np.uint8)
    data = blocks.reshape(shape[0], -1)
    return data, None, gguf.GGMLQuantizationType.Q4_0


def random_gene(model: Path, n_layers: int) -> Adapter:
    """Rank 8 on attn_output of so many layers, spread evenly; it changes next to nothing."""
    file, rng = GGUFFile(model), np.random.default_rng(1)
    count = int(file.metadata[f"{file.architecture}.block_count"])
    n_layers = min(n_layers, count)
    pairs = {}
    for place in range(n_layers):
        name = f"blk.{place * count // n_layers}.attn_output.weight"
        rows, columns = file.tensors[name].shape
        a = rng.standard_normal((8, columns)).astype(np.float32) / 30
        pairs[name] = Pair(a, rng.standard_normal((rows, 8)).astype(np.float32) / 3000)
    return Adapter(file.architecture, 0.0, pairs)


def is_large(model: Path) -> bool:
    return sum(t.n_elements for t in GGUFFile(model).tensors.values()) > LARGE


# -- what grows ---------------------------------------------------------------


def texts() -> list[str]:
    suites = [suite for name in ("harmful", "borderline", "harmless") for suite in load_suite(name)]
    return [prompt.text for suite in suites for prompt in suite.prompts]


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prompts(model: Path) -> dict[str, float]:
    """Seconds to answer so many prompts with 24 tokens each, 16 at a time; one run each."""
    most = {False: PROMPTS, True: PROMPTS[:2]}[is_large(model)]
    with SafeLlama(model, n_ctx=512) as llama, Engine(llama, flash_attn=True) as engine:
        asked = [llama.render([{"role": "user", "content": text}]) for text in texts()]
        engine.generate(asked[:16], max_tokens=4)
        return {
            str(n): round(timed(partial(engine.generate, asked[:n], max_tokens=ANSWER)), 2)
            for n in most
            if n <= len(asked)
        }


def sequences(model: Path) -> dict[str, float]:
    """Tokens of answer a second, so many sequences side by side; medians."""
    found = {}
    with SafeLlama(model, n_ctx=512) as llama:
        for n in SEQUENCES:
            with Engine(llama, n_parallel=n, n_ctx=max(512, 128 * n), flash_attn=True) as engine:
                asked = [[100 + 7 * i + j for j in range(8)] for i in range(n)]
                work = partial(engine.generate, asked, max_tokens=ANSWER, stop_at_end=False)
                work()
                seconds = statistics.median(timed(work) for _ in range(ROUNDS))
                found[str(n)] = round(n * ANSWER / seconds, 1)
    return found


def layers(model: Path) -> dict[str, dict[str, float]]:
    """Tokens a second, read and answered, with a gene on so many layers; in turn, medians."""
    asked = [[100 + 7 * i + j for j in range(128)] for i in range(8)]
    with SafeLlama(model, n_ctx=512) as llama, Engine(llama, flash_attn=True) as engine:
        genes: dict[int, Any] = {}
        for n in LAYERS:
            adapter = random_gene(model, n) if n else None
            genes[n] = {} if adapter is None else {llama.attach(adapter, prove=False): 1.0}
        taken: dict[int, list[tuple[float, float]]] = {n: [] for n in genes}
        for number in range(ROUNDS + 1):
            for n, scales in genes.items():
                read = timed(partial(engine.visit_logits, asked, [[127]] * 8, lambda *_: None,
                                     adapters=scales))  # fmt: skip
                short = [prompt[:4] for prompt in asked]
                said = timed(partial(engine.generate, short, max_tokens=ANSWER, adapters=scales,
                                     stop_at_end=False))  # fmt: skip
                if number:
                    taken[n].append((8 * 128 / read, 8 * ANSWER / said))
    return {
        str(n): {
            what: round(
                statistics.median(a[k] / b[k] for a, b in zip(own, taken[0], strict=True)), 3
            )
            for k, what in enumerate(("prefill kept", "decode kept"))
        }
        for n, own in taken.items()
    }


def first_token(model: Path) -> dict[str, float]:
    """Seconds from the start of a process to the first byte of an answer; in turn, medians."""
    gene = cache_folder() / "bench-growth.gene.gguf"
    random_gene(model, 99).save(gene)
    threads = str(machine()["physical_cores"])
    ours = [sys.executable, "-m", "safegene_edge", "chat", model, "--ctx", "512", "--max-tokens",
            "8", "--no-history", "--gene", gene]  # fmt: skip
    ways = {
        "chat, with a gene": ours,
        "chat, without": ours[:-2],
        "llama-cpp-python, without": [sys.executable, "-c", PEER, model, threads],
    }
    if program := os.environ.get("LLAMA_COMPLETION"):
        ways["llama-completion, without"] = [
            program, "-m", model, "-p", "Name a tree.", "-n", "8", "-c", "512", "-t", threads,
            "--no-display-prompt", "-st",
        ]  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(STARTS + 1):
        for name, words in ways.items():
            seconds = until_first_byte([str(word) for word in words])
            if number:
                taken[name].append(seconds)
    return {name: round(statistics.median(values), 3) for name, values in taken.items()}


def until_first_byte(words: list[str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"Name a tree.\n")
        child.stdin.close()
        if not child.stdout.read(1):
            raise RuntimeError(f"no answer: {' '.join(words)}")
        seconds = time.perf_counter() - start
        child.kill()
    return seconds


# -- the table ----------------------------------------------------------------


def text_of(cells: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(key.partition(": ")[0] for key in cells))

    def rows(what: str, shown: Callable[[Any], str] = str) -> list[list[Any]]:
        found = [cells.get(f"{name}: {what}", {}) for name in names]
        keys = list(dict.fromkeys(key for one in found for key in one))
        return [[key, *(shown(one[key]) if key in one else "" for one in found)] for key in keys]

    def shares(one: Mapping[str, float]) -> str:
        return f"{one['prefill kept']:.1%}, {one['decode kept']:.1%}"

    return "\n".join([
        "# Growth\n",
        f"Seconds to answer so many prompts, {ANSWER} tokens each, 16 at a time (one run each)\n",
        table(["prompts", *names], rows("prompts")),
        f"Tokens of answer a second, by sequences at once (medians of {ROUNDS})\n",
        table(["sequences", *names], rows("sequences")),
        "Prefill and decode kept with a gene of rank 8 on attn_output of so many layers, "
        "8 sequences; "
        f"medians of {ROUNDS} rounds in turn\n",
        table(["layers", *names], rows("layers", shares)),
        "Seconds from the start of the process to the first byte of an answer "
        f"(medians of {STARTS}, in turn; the gene is on all layers)\n",
        table(["", *names], rows("first token")),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
