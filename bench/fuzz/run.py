"""Damaged files: what this package's reader does with them, and what llama.cpp's own loader does.

    python bench/fuzz/run.py [--adapters N] [--models N] [--llama N] [--seconds N] [--fresh]

Mutations of the headers of a tiny adapter and a tiny model, as tests/mutations.py makes them from
a seed. The package's reader takes each in a process of a few hundred files, where time and memory
are measured; llama.cpp's takes the first of the same ones in children, which may crash. What was
done is kept, and the next call goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
from common import cache_folder, rows_of, table, write
from mutations import KINDS, mutations

from safegene_edge.errors import SafeGeneError
from safegene_edge.gguf_file import GGUFFile

HERE = Path(__file__).parent
HOME = Path(os.environ.get("SAFEGENE_FUZZ_BENCH", cache_folder() / "bench-fuzz"))
SEED, PIECE, LIMIT, MEMORY = 33, 500, 2.0, 64 << 20
ADDRESSES = 8 << 30  # bytes that a child may ask the system for
FILES = {"adapter": "adapter.gguf", "model": "model.gguf"}
KIND_NAMES = [kind.__name__[1:] for kind in KINDS]


def build() -> None:
    """A tiny model and an adapter of it, in a process of its own: torch must not be forked."""
    import tiny
    from adapters import adapter_for

    made = HOME / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    model = tiny.build("llama", made / "model").gguf_path
    adapter = adapter_for(model, made, family="tiny", coefficients={0: 0.5, 2: 1.0})
    shutil.copy(model, HOME / FILES["model"])
    shutil.copy(adapter, HOME / FILES["adapter"])


def corpus(name: str, start: int, stop: int) -> Iterator[tuple[int, str, bytes]]:
    """Number, kind of mutation ("several" where there are more) and content."""
    path = HOME / FILES[name]
    end = max(end for _, end in GGUFFile(path).spans.values()) + 2000  # and tensor records
    for piece in range(start // PIECE, -(-stop // PIECE)):
        made = mutations(path.read_bytes(), end, PIECE, SEED * 1_000_000 + piece)
        for number, (what, data) in enumerate(made, piece * PIECE):
            kinds = [part.split()[0] for part in what.partition(": ")[2].split(", ")]
            if start <= number < stop:
                yield number, kinds[0] if len(kinds) == 1 else "several", data


# -- readers --------------------------------------------------------------


def ours(name: str) -> Callable[[Path], str]:
    """What the package says of a file: "loaded" or "refused"; any other error passes."""
    from test_fuzz import read_gene, read_model

    read = read_gene if name == "adapter" else read_model

    def take(path: Path) -> str:
        try:
            read(path)
        except SafeGeneError:
            return "refused"
        return "loaded"

    return take


def llama_cpp_s(name: str) -> Callable[[Path], str]:
    """llama.cpp's own loader, on the file alone."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0

    def load(path: Path) -> Any:
        return llama_cpp.llama_model_load_from_file(os.fsencode(path), params)

    base = load(HOME / FILES["model"])

    def take(path: Path, _: Any = silent) -> str:
        if name == "model":
            model = load(path)
            if model:
                llama_cpp.llama_model_free(model)
            return "loaded" if model else "refused"
        adapter = llama_cpp.llama_adapter_lora_init(base, os.fsencode(path))
        if adapter:
            llama_cpp.llama_adapter_lora_free(adapter)
        return "loaded" if adapter else "refused"

    return take


# -- children -------------------------------------------------------------


def child(files: list[tuple[int, str, bytes]], take: Callable[[Path], str], folder: Path) -> int:
    """A fork that takes the files one by one; the end of a pipe that its answers come from."""
    answers, mine = os.pipe()
    if os.fork():
        os.close(mine)
        return answers
    try:
        os.close(answers)
        devnull = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(devnull, stream)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        path = folder / f"file-{os.getpid()}.gguf"
        before = _peak()
        for number, _, data in files:
            path.write_bytes(data)
            began = time.perf_counter()
            try:
                said = take(path)
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"[:200]
            seconds = time.perf_counter() - began
            facts = [number, said, seconds, max(0, _peak() - before)]
            os.write(mine, json.dumps(facts).encode() + b"\n")
        path.unlink()
    finally:
        os._exit(0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcomes(
    files: list[tuple[int, str, bytes]], take: Callable[[Path], str], folder: Path
) -> Iterator[tuple[int, str, float, int]]:
    """Of each file: its number, what was said, the seconds, the most memory so far."""
    left = list(files)
    while left:
        pipe = child(left, take, folder)
        said, hung = b"", False
        while True:
            hung = not select.select([pipe], [], [], 5 * LIMIT)[0]
            data = b"" if hung else os.read(pipe, 1 << 16)
            if not data:
                break
            said += data
        os.close(pipe)
        lines = [json.loads(line) for line in said.splitlines()]
        yield from ((n, what, seconds, memory) for n, what, seconds, memory in lines)
        status = _end(hung)
        if len(lines) < len(left):
            broke = left[len(lines)][0]
            yield broke, "hung" if hung else f"crashed ({status})", 0.0, 0
        left = left[len(lines) + 1 :]


def _end(hung: bool) -> str:
    """Reap the child; the signal that ended it."""
    if hung:
        for entry in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            os.kill(int(entry), signal.SIGKILL)
    _, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# -- the whole ------------------------------------------------------------


def work(reader: str, name: str, count: int, end: float) -> None:
    """Go on with one reader and one kind of file, piece by piece."""
    kept = HOME / f"{reader}-{name}.jsonl"
    done = len(kept.read_text().splitlines()) if kept.exists() else 0
    take = ours(name) if reader == "ours" else llama_cpp_s(name)
    judge = None if reader == "ours" else ours(name)
    folder = HOME / f"work-{reader}-{name}"
    folder.mkdir(exist_ok=True)
    size = (HOME / FILES[name]).stat().st_size
    with open(kept, "a") as journal:
        for piece in range(done, -(-count // PIECE)):
            if time.monotonic() > end:
                return
            files = list(islice(corpus(name, piece * PIECE, count), PIECE))
            kinds = {number: kind for number, kind, _ in files}
            contents = {number: data for number, _, data in files}
            facts: dict[str, Any] = {"tried": Counter(), "slowest": 0.0, "memory": 0, "odd": []}
            for number, said, seconds, memory in outcomes(files, take, folder):
                word = said if said in ("loaded", "refused", "hung") else said.partition(" ")[0]
                slow = seconds > LIMIT
                facts["tried"][f"{kinds[number]}/{'slow' if slow else word}"] += 1
                facts["slowest"] = max(facts["slowest"], seconds)
                facts["memory"] = max(facts["memory"], memory)
                if word not in ("loaded", "refused"):
                    path = folder / "odd.gguf"
                    path.write_bytes(contents[number])
                    facts["odd"].append([number, said, judge(path) if judge else ""])
            facts["over"] = facts["memory"] > 3 * size + MEMORY
            journal.write(json.dumps(facts) + "\n")
            journal.flush()


def summary() -> None:
    """Tables by kind of mutation."""
    text = "# Damaged files\n\nHeaders of a tiny adapter and a tiny model, changed at random.\n"
    results: dict[str, Any] = {"seed": SEED}
    for name in FILES:
        found = {reader: _added(reader, name) for reader in ("ours", "llama.cpp")}
        results[name] = found
        words = {
            reader: sorted({key.partition("/")[2] for key in facts["tried"]})
            for reader, facts in found.items()
        }
        rows = []
        for kind in [*KIND_NAMES, "several", "all"]:
            row: list[Any] = [kind]
            for reader, facts in found.items():
                of = {w: sum(n for key, n in facts["tried"].items()
                             if key == f"{kind}/{w}" or (kind == "all" and key.endswith(f"/{w}")))
                      for w in words[reader]}  # fmt: skip
                row += [of[word] for word in words[reader]]
            rows.append(row)
        head = [f"{'package' if r == 'ours' else r}: {w}" for r in found for w in words[r]]
        size = (HOME / FILES[name]).stat().st_size
        mine, odd = found["ours"], found["llama.cpp"]["odd"]
        passed = sum(verdict == "loaded" for _, _, verdict in odd)
        text += (
            f"\n## {name.capitalize()}s, {size:,} bytes\n\n"
            + table(["kind of change", *head], rows)
            + f"\nThe package's slowest took {mine['slowest']:.2f} s; a process took at "
            f"most {mine['memory'] / 2**20:.0f} MiB beyond what it began with (allowed: "
            f"{(3 * size + MEMORY) / 2**20:.0f}). Of {len(odd)} files on which "
            f"llama.cpp crashed or hung, the package's reader lets {passed} pass.\n"
        )  # fmt: skip
    text += (
        "\nThe package reads, shows, saves and reads again; llama.cpp loads. A file that llama.cpp "
        "crashes on ended its process by a signal. The package hands it a file only after its own "
        "reader took it.\n"
    )
    write(HERE, results, text)


def _added(reader: str, name: str) -> dict[str, Any]:
    kept = HOME / f"{reader}-{name}.jsonl"
    pieces = rows_of(kept)
    tried: Counter[str] = Counter()
    for piece in pieces:
        tried.update(piece["tried"])
    return {
        "files": sum(tried.values()),
        "tried": dict(tried),
        "slowest": max((piece["slowest"] for piece in pieces), default=0.0),
        "memory": max((piece["memory"] for piece in pieces), default=0),
        "pieces over the memory": sum(piece["over"] for piece in pieces),
        "odd": [odd for piece in pieces for odd in piece["odd"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--models", type=int, default=20_000)
    parser.add_argument("--llama", type=int, default=20_000, help="of each, for llama.cpp")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--work", nargs=3)
    given = parser.parse_args()
    if given.build:
        return build()
    if given.work:
        reader, name, count = given.work
        return work(reader, name, int(count), time.monotonic() + given.seconds)
    if given.fresh:
        shutil.rmtree(HOME, ignore_errors=True)
    again = [sys.executable, __file__]
    if not (HOME / FILES["adapter"]).exists():
        subprocess.run([*again, "--build"], check=True, stdout=2)
    began = time.monotonic()
    counts = {"adapter": given.adapters, "model": given.models}
    for number, (name, count) in enumerate(counts.items(), 1):
        end = began + given.seconds * number / len(counts)
        jobs = (("ours", count), ("llama.cpp", min(count, given.llama)))
        running = [
            subprocess.Popen([*again, "--seconds", str(max(1, end - time.monotonic())),
                              "--work", reader, name, str(most)])
            for reader, most in jobs
        ]  # fmt: skip
        for one in running:
            one.wait()
    return summary()


if __name__ == "__main__":
    main()
