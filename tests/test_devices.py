"""What this machine lets us use: affinity, and the quotas of containers."""

from __future__ import annotations

import ctypes
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from safegene_edge.errors import LlamaCppError
from safegene_edge.gguf_file import kernels
from safegene_edge.merge import MergeSettings, workers
from safegene_edge.runtime import devices
from safegene_edge.runtime.llama import SafeLlama

ROOT = Path(__file__).parents[1]


def system(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"
GROUPS = "proc/self/cgroup"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({GROUPS: "0::/\n", f"{V2}/cpu.max": "200000 100000\n"}, 2.0),
        ({GROUPS: "0::/\n", f"{V2}/cpu.max": "50000 100000\n"}, 0.5),
        ({GROUPS: "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, None),
        ({GROUPS: "0::/a/b\n", f"{V2}/a/b/cpu.max": "max 100000\n",
          f"{V2}/a/cpu.max": "150000 100000\n"}, 1.5),
        ({GROUPS: "0::/a/b\n", f"{V2}/a/b/cpu.max": "300000 100000\n",
          f"{V2}/a/cpu.max": "900000 100000\n"}, 3.0),
        # in a container, where the path is the host's
        ({GROUPS: "0::/../../host\n", f"{V2}/cpu.max": "100000 100000\n"}, 1.0),
        ({f"{V2}/cpu.max": "100000 100000\n"}, 1.0),
        ({GROUPS: "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
          f"{V1}/docker/1/cpu.cfs_quota_us": "250000\n",
          f"{V1}/docker/1/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({GROUPS: "3:cpu,cpuacct:/docker/1\n", f"{V1}/cpu.cfs_quota_us": "100000\n",
          f"{V1}/cpu.cfs_period_us": "50000\n"}, 2.0),
        ({GROUPS: "3:cpu,cpuacct:/\n", f"{V1}/cpu.cfs_quota_us": "-1\n",
          f"{V1}/cpu.cfs_period_us": "100000\n"}, None),
        ({GROUPS: "0::/\n1:cpu:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
          "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 1.0),
        ({GROUPS: "nonsense\n\n0\n", f"{V2}/cpu.max": "garbage"}, None),
        ({GROUPS: "0::/\n", f"{V2}/cpu.max": "100000 0\n"}, None),
        ({GROUPS: "0::/\n", f"{V2}/cpu.max": "0 100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_least_quota_along_the_path(tmp_path, files, quota):
    assert devices.cpu_quota(system(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("quota", "logical", "physical"),
    [(None, 8, 4), (0.5, 1, 1), (1.0, 1, 1), (1.5, 2, 2), (3.0, 3, 3), (6.0, 6, 4), (99.0, 8, 4)],
)
def test_threads_follow_the_quota(monkeypatch, quota, logical, physical):
    """Eight processors of four cores."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(devices, "_linux_cores", lambda: 4)
    monkeypatch.setattr(devices, "cpu_quota", lambda: quota)
    assert (devices.logical_cores(), devices.physical_cores()) == (logical, physical)


def test_models_and_merges_take_as_many_threads(monkeypatch, tiny, quantised, tmp_path):
    from adapters import adapter_for

    from safegene_edge.merge import merge

    monkeypatch.setattr(devices, "cpu_quota", lambda: 1.0)
    with SafeLlama(tiny("llama").gguf_path, n_ctx=64) as llama:
        assert llama.n_threads == llama.n_threads_batch == 1

    def forbidden(*_):
        raise AssertionError("more than one worker")

    monkeypatch.setattr(workers, "_WORTH", 0)
    monkeypatch.setattr(workers, "_with_workers", forbidden)
    gene = adapter_for(quantised(), tmp_path)
    merge(quantised(), [gene], tmp_path / "out.gguf", settings=MergeSettings(run=False))


# -- the build of llama.cpp -----------------------------------------------


@pytest.fixture
def fresh():
    """The library is looked at anew, in the test and after it."""
    for cached in (kernels._library, kernels._to_float):
        cached.cache_clear()
    yield
    for cached in (kernels._library, kernels._to_float):
        cached.cache_clear()


def test_the_installed_ggml_is_the_known_one(fresh):
    assert kernels._library() is kernels._library()
    for number, name in kernels._KNOWN.items():
        assert kernels.TensorType.of(number).name.lower() == name


@pytest.mark.parametrize("lost", ["blck_size_interleave", "type_name", "type_size"])
def test_another_struct_is_not_trusted(fresh, monkeypatch, lost):
    """With another layout, a field of it would be called as a function."""
    fields = [field for field in kernels._Traits._fields_ if field[0] != lost]
    if lost != "blck_size_interleave":  # the field is there, elsewhere
        fields.append((lost, dict(kernels._Traits._fields_)[lost]))
    other = type("Other", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(kernels, "_Traits", other)
    with pytest.raises(LlamaCppError, match="another layout"):
        kernels.needs_imatrix(8)


def test_other_numbers_of_types_are_not_trusted(fresh, monkeypatch):
    monkeypatch.setattr(kernels, "_KNOWN", {8: "q4_0"})
    with pytest.raises(LlamaCppError, match="type 8 is q8_0, not q4_0"):
        kernels.needs_imatrix(8)


def test_a_library_without_the_functions_is_named(fresh, monkeypatch):
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: real(None))  # this process: no ggml in it
    monkeypatch.setattr(kernels, "_declare", lambda library: library.no_such_function)
    with pytest.raises(LlamaCppError, match="is another ggml"):
        kernels.needs_imatrix(8)


def test_llama_cpp_python_is_bound_to_what_was_tested():
    project = (ROOT / "pyproject.toml").read_text()
    bound = Requirement(re.search(r'"(llama-cpp-python>[^"]*)"', project)[1]).specifier
    pinned = re.search(r"^llama-cpp-python==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    *front, last = pinned[1].split(".")
    assert pinned[1] in bound and metadata.version("llama-cpp-python") in bound
    assert ".".join([*front, str(int(last) + 1)]) not in bound


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({GROUPS: "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/memory.max": "4096\n"}, 4096),
        ({GROUPS: "4:memory:/x\n3:cpu:/y\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "99\n",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "500\n"}, 99),
        ({GROUPS: "0::/\n", f"{V2}/memory.max": "max\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_least_memory_along_the_path(tmp_path, monkeypatch, files, limit):
    assert devices.memory_limit(system(tmp_path, files)) == limit
    whole = devices.memory_bytes()
    monkeypatch.setattr(devices, "memory_limit", lambda: limit)
    assert devices.memory_bytes() == (whole if limit is None else limit)
