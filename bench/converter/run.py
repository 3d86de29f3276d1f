"""Our converter against llama.cpp's convert_lora_to_gguf.py: tensor for tensor, bit for bit.

Both convert the same random adapters for tiny models of every architecture. PEFT's own merged
update of each weight is the truth that both are measured against. llama.cpp's converter is
taken from the sdist of llama-cpp-python (downloaded once with pip), or from `--llama-cpp`.

    python bench/converter/run.py [--llama-cpp DIR] [--cache DIR]

Writes results.json and results.md beside this file. Needs the extras `train` and `dev`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import tiny  # noqa: E402

from safegene_edge.converters import convert  # noqa: E402
from safegene_edge.converters.names import BaseNames  # noqa: E402
from safegene_edge.errors import SafeGeneError  # noqa: E402
from safegene_edge.gene import Adapter  # noqa: E402
from safegene_edge.gguf_file import GGUFFile  # noqa: E402

RIGHT = 1e-5  # relative error up to which a converted update counts as PEFT's own


@dataclass(frozen=True)
class Result:
    """What both converters made of one adapter.

    Errors are the largest over all weights, relative (Frobenius) to PEFT's merged update;
    None where there is no output.
    """

    case: str
    architecture: str
    tensors: int | None
    identical: int | None
    same_alpha: bool | None
    llama_cpp_error: float | None
    our_error: float | None
    llama_cpp_says: str
    we_say: str

    @property
    def verdict(self) -> str:
        """One phrase for the table."""
        theirs = self.llama_cpp_error
        if self.llama_cpp_says:
            return "refused by both" if self.we_say else "llama.cpp's converter fails"
        if self.we_say:
            return "llama.cpp's drops it without a word, safegene-edge refuses by name"
        if theirs is not None and theirs > RIGHT:
            return "llama.cpp's is wrong"
        return "identical" if self.tensors == self.identical and self.same_alpha else "both right"


def cases(arch: str) -> dict[str, dict[str, Any]]:
    """Adapters by name: settings for PEFT; "patch" goes into the saved config alone."""
    first, *_, last = tiny.linear_modules(arch)
    plain = {
        "plain": {},
        "plain, float16": {"dtype": "float16"},
        "plain, bfloat16": {"dtype": "bfloat16"},
        "some layers, one kind": {"target_modules": [last], "layers_to_transform": [0, 2]},
        "alpha/r not a whole number": {"r": 5, "lora_alpha": 7},
        "rank_pattern": {"rank_pattern": {first: 6, last: 2}},
        "use_rslora": {"use_rslora": True},
        "use_rslora + rank_pattern": {"use_rslora": True, "rank_pattern": {first: 3}},
        "alpha_pattern": {"alpha_pattern": {first: 16}},
        "alpha_pattern by layer": {"alpha_pattern": {r"layers\.1\..*": 2}},
        "alpha_pattern + rank_pattern + use_rslora": {
            "use_rslora": True,
            "rank_pattern": {first: 3},
            "alpha_pattern": {last: 3},
        },
    }
    if arch != "llama":
        return plain
    return plain | {
        "lm_head with an output of its own": {"target_modules": ["q_proj", "lm_head"]},
        "use_dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
        "trained norms (as mergekit-extract-lora writes)": {"norms": True},
        "init_lora_weights=pissa": {"patch": {"init_lora_weights": "pissa"}},
        "layer_replication": {"patch": {"layer_replication": [[0, 2], [1, 3]]}},
    }


def main() -> int:
    options = _options()
    script = options.llama_cpp / "convert_lora_to_gguf.py" if options.llama_cpp else None
    script = script or _from_sdist(options.cache)
    with tempfile.TemporaryDirectory() as folder:
        zoo = tiny.TinyZoo(Path(folder))
        jobs = [(arch, name) for arch in tiny.ARCHITECTURES for name in cases(arch)]
        prepared = [_prepare(zoo, arch, name, Path(folder)) for arch, name in jobs]
        with ThreadPoolExecutor(2) as pool:
            theirs = list(pool.map(lambda job: _theirs(script, *job), prepared))
        results = [
            _compare(name, model, peft, output, said)
            for (_, name), (model, peft, output), said in zip(jobs, prepared, theirs, strict=True)
        ]
    _write(results)
    for result in results:
        print(f"{result.architecture:8} {result.case:48} {result.verdict}")
    return 1 if any((result.our_error or 0.0) > RIGHT for result in results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, help="a llama.cpp checkout to take it from")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache/safegene-edge/bench",
        help="for the sdist",
    )
    return parser.parse_args()


def _from_sdist(cache: Path) -> Path:
    """llama.cpp's converter out of the sdist of the installed llama-cpp-python."""
    release = version("llama-cpp-python")
    folder = cache / f"llama_cpp_python-{release}" / "vendor" / "llama.cpp"
    if (folder / "convert_lora_to_gguf.py").exists():
        return folder / "convert_lora_to_gguf.py"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", name, f"llama-cpp-python=={release}"]
        subprocess.run(command, check=True)
        archive = next(Path(name).glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if "/vendor/llama.cpp/" in m.name and _needed(m)]
            tar.extractall(cache, wanted, filter="data")
    return folder / "convert_lora_to_gguf.py"


def _needed(member: tarfile.TarInfo) -> bool:
    inside = member.name.partition("/vendor/llama.cpp/")[2]
    return inside.endswith(".py") and inside.startswith(("convert_", "conversion/", "gguf-py/"))


def _prepare(
    zoo: tiny.TinyZoo, arch: str, name: str, folder: Path
) -> tuple[tiny.TinyModel, Path, Path]:
    settings = dict(cases(arch)[name])
    patch, norms = settings.pop("patch", {}), settings.pop("norms", False)
    slug = f"{arch}-{list(cases(arch)).index(name)}"
    peft = Path(shutil.copytree(zoo.adapter(arch, **settings), folder / slug))
    config = peft / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | patch))
    if norms:
        _add_norms(peft / "adapter_model.safetensors")
    return zoo.model(arch), peft, folder / f"{slug}.gguf"


def _add_norms(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    norm = "base_model.model.model.layers.{}.input_layernorm.weight"
    norms = {norm.format(n): np.full(tiny.WIDTH, 2.0, np.float32) for n in range(tiny.LAYERS)}
    save_file(load_file(path) | norms, path)


def _theirs(script: Path, model: tiny.TinyModel, peft: Path, output: Path) -> str:
    """Run llama.cpp's converter; empty, or the last line of what it says when it fails."""
    command = [sys.executable, str(script), str(peft), "--base", str(model.hf_dir)]
    done = subprocess.run(
        [*command, "--outfile", str(output)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and output.exists():
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return lines[0] if lines else "it failed"


def _compare(name: str, model: tiny.TinyModel, peft: Path, output: Path, says: str) -> Result:
    ours, refusal = None, ""
    try:
        ours = convert(peft, model.gguf_path)
    except SafeGeneError as error:
        refusal = type(error).__name__
    theirs = None if says else _load(output)
    truth = None if refusal else tiny.peft_deltas(model, peft)
    both = ours is not None and theirs is not None
    return Result(
        case=name,
        architecture=model.arch,
        tensors=2 * len(ours.pairs) if ours else None,
        identical=_identical(ours, theirs) if both else None,
        same_alpha=bool(ours.alpha == theirs.alpha) if ours and theirs else None,
        llama_cpp_error=_error(theirs, model, truth) if theirs and truth else None,
        our_error=_error(ours, model, truth) if ours and truth else None,
        llama_cpp_says=says.replace(str(peft), "PEFT_DIR"),
        we_say=refusal,
    )


def _load(output: Path) -> Adapter | None:
    """llama.cpp's file; None where it holds more than pairs (its loader skips the rest)."""
    try:
        return Adapter.load(output)
    except SafeGeneError:
        return None


def _identical(ours: Any, theirs: Any) -> int:
    """Tensors of the same name, type, shape and bytes."""
    count = 0
    for name in ours.pairs.keys() & theirs.pairs.keys():
        for half in ("a", "b"):
            one, other = getattr(ours.pairs[name], half), getattr(theirs.pairs[name], half)
            same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
            count += same_kind and one.tobytes() == other.tobytes()
    return count


def _error(adapter: Adapter, model: tiny.TinyModel, truth: dict[str, Any]) -> float:
    names = BaseNames(GGUFFile(model.gguf_path))
    errors = []
    for module, delta in truth.items():
        tensor = names.tensor(module)
        if tensor not in adapter.pairs:
            return 1.0
        got = names.to_hf_rows(tensor, adapter.delta(tensor))
        errors.append(tiny.relative_error(got, delta))
    return float(f"{max(errors):.2e}")


def _write(results: list[Result]) -> None:
    found = {
        "llama_cpp_python": version("llama-cpp-python"),
        "peft": version("peft"),
        "results": [asdict(result) | {"verdict": result.verdict} for result in results],
    }
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(_table(found, results), encoding="utf-8")


def _table(found: dict[str, Any], results: list[Result]) -> str:
    lines = [
        "# safegene-edge's converter and llama.cpp's",
        "",
        f"convert_lora_to_gguf.py of llama-cpp-python {found['llama_cpp_python']} against "
        "safegene-edge's, on random adapters for tiny models; the truth is the merged update of "
        f"PEFT {found['peft']}.",
        "Made by `python bench/converter/run.py`; all figures are in `results.json`.",
        "",
        "| adapter | architectures | tensors bit for bit equal | error of llama.cpp's "
        "| safegene-edge's | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case, result.verdict), []).append(result)
    lines += [_row(case, verdict, group) for (case, verdict), group in groups.items()]
    wrong, dropped = (
        sorted({result.case for result in results if word in result.verdict})
        for word in ("wrong", "drops")
    )
    equal = all(
        result.verdict in ("identical", "refused by both")
        for result in results
        if result.case not in (*wrong, *dropped)
    )
    lines += [
        "",
        f"llama.cpp's converter applies a wrong scale for: {', '.join(wrong) or 'nothing here'}.",
        f"It drops, without a word: {', '.join(dropped) or 'nothing here'}.",
        f"Everywhere else the files are equal bit for bit: {'yes' if equal else 'no'}.",
        "It reads `lora_alpha` alone. That is right for `rank_pattern` too: "
        "llama.cpp divides by the rank of each B.",
    ]
    return "\n".join(lines) + "\n"


def _row(case: str, verdict: str, group: list[Result]) -> str:
    names = ", ".join(result.architecture for result in group)
    equal, total = (
        [getattr(r, key) for r in group if r.identical is not None]
        for key in ("identical", "tensors")
    )
    shown = f"{sum(equal)}/{sum(total)}" if equal else "–"
    theirs, ours = (
        _worst([getattr(result, key) for result in group])
        for key in ("llama_cpp_error", "our_error")
    )
    return f"| {case} | {names} | {shown} | {theirs} | {ours} | {verdict} |"


def _worst(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.1e}" if known else "–"


if __name__ == "__main__":
    sys.exit(main())
