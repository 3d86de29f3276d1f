"""Outputs whole or not at all, errors that name the file at fault, no change of the process."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest
from adapters import adapter_for

from safegene_edge.errors import FileFormatError, OutputError
from safegene_edge.files import (
    atomic_folder,
    atomic_output,
    check_output,
    hold,
    require_file,
    scratch_file,
    scratch_folder,
    sha256,
    write_text,
)
from safegene_edge.gguf_file import GGUFFile, rewrite
from safegene_edge.merge import MergeSettings, merge, workers

planning = import_module("safegene_edge.merge.plan")  # the package's name is the function's
LONGEST = 255  # bytes of a name, on most file systems


# -- names ----------------------------------------------------------------


@pytest.mark.parametrize("letter", ["a", "ü", "字"])
@pytest.mark.parametrize("length", [100, 250, LONGEST])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, letter, length):
    name = letter * (length // len(letter.encode()))
    write_text(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"
    with atomic_folder(tmp_path / f"{name[:-1]}x") as made:
        (made / "file").write_text("in it")
    assert (tmp_path / f"{name[:-1]}x" / "file").read_text() == "in it"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["a" * 256, "字" * 90, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused_before_any_work(tmp_path, name):
    for make in (check_output, atomic_output, atomic_folder):
        with pytest.raises(OutputError, match="cannot be written"):
            made = make(tmp_path / name)
            with made:  # a context, where it is one
                pytest.fail("work has begun")
    for read in (require_file, sha256, GGUFFile):
        with pytest.raises(FileFormatError, match=r"cannot be read|no such file"):
            read(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_long_name_on_the_command_line_is_one_line(tmp_path, quantised):
    gene = adapter_for(quantised(), tmp_path)
    for output in (tmp_path / f"{'a' * 300}.gguf", tmp_path / "none" / "x.gguf"):
        ran = subprocess.run(
            [sys.executable, "-m", "safegene_edge", "merge", quantised(), gene, "-o", output],
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 2 and ran.stderr.startswith("error: ")
        assert len(ran.stderr.splitlines()) == 1


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(OutputError, match="no regular file"):
            write_text(path, "x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


# -- faults ---------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "replace", "fsync"])
@pytest.mark.parametrize("make", [atomic_output, atomic_folder])
def test_a_fault_at_any_step_names_the_output_and_leaves_nothing(tmp_path, monkeypatch, call, make):
    if (make, call) == (atomic_folder, "open"):
        call = "mkdir"
    real = getattr(os, call)

    def fault(first, *args, **options):
        if call == "fsync" or str(first).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error", first if call != "fsync" else None)
        return real(first, *args, **options)

    path = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(OutputError, match=r"out: cannot be wr"):
        patched.setattr(os, call, fault)
        with make(path) as temporary:
            target = temporary if make is atomic_output else temporary / "file"
            target.write_text("whole")
    assert not list(tmp_path.iterdir())


def test_an_input_that_cannot_be_read_is_named_and_not_the_output(tmp_path):
    source = tmp_path / "source"
    with (
        pytest.raises(FileFormatError, match=r"source: No such file"),
        atomic_output(tmp_path / "out") as temporary,
    ):
        temporary.write_bytes(source.read_bytes())
    assert not list(tmp_path.iterdir())


def test_a_temporary_file_that_cannot_be_made_is_an_error_of_ours(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match="TMPDIR"):
        scratch_file()
    with pytest.raises(OutputError, match="TMPDIR"), scratch_folder():
        pass


class FaultyDisk:
    """os.pread and the kernel's copy fail on one file, as on a disk with a bad sector."""

    def __init__(self, monkeypatch, path, number):
        self.at = path.stat().st_ino, number
        for name in ("pread", "copy_file_range"):
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))

    def watched(self, call):
        def read(source, *args):
            if os.fstat(source).st_ino == self.at[0]:
                raise OSError(self.at[1], os.strerror(self.at[1]))
            return call(source, *args)

        return read


@pytest.mark.parametrize("touched", [True, False])
def test_merge_names_the_model_where_the_disk_cannot_read_it(
    touched, quantised, tmp_path, monkeypatch
):
    """Reading fails in the midst of writing: it was said of the output."""
    source = tmp_path / "model.gguf"
    source.write_bytes(quantised().read_bytes())
    gene = adapter_for(source, tmp_path)
    if touched:
        monkeypatch.setattr(planning, "copy", lambda *_: None)
    else:
        monkeypatch.setattr(planning, "run_jobs", lambda *_: [])
    FaultyDisk(monkeypatch, source, errno.EIO)
    with pytest.raises(FileFormatError, match=r"model\.gguf: cannot be read \(Input/output"):
        merge(source, [gene], tmp_path / "out.gguf", settings=MergeSettings(run=False))
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "gene.gguf"}


def test_merge_names_the_output_where_the_disk_cannot_take_it(quantised, tmp_path, monkeypatch):
    gene = adapter_for(quantised(), tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"out\.gguf: cannot be written \(No space left"):
        merge(quantised(), [gene], tmp_path / "out.gguf", settings=MergeSettings(run=False))
    assert [path.name for path in tmp_path.iterdir()] == ["gene.gguf"]


def test_an_input_that_shrinks_is_named(quantised, tmp_path, monkeypatch):
    source = tmp_path / "model.gguf"
    source.write_bytes(quantised().read_bytes())
    gene = adapter_for(source, tmp_path)
    begin = rewrite.begin

    def cut(path, n_bytes):
        os.truncate(source, 100_000)
        return begin(path, n_bytes)

    monkeypatch.setattr(planning, "begin", cut)
    with pytest.raises(FileFormatError, match=r"model\.gguf: cannot be read \(it became shorter"):
        merge(source, [gene], tmp_path / "out.gguf", settings=MergeSettings(run=False))
    assert not (tmp_path / "out.gguf").exists()


def test_a_worker_names_the_file_at_fault(quantised, tmp_path, monkeypatch):
    """The model goes away between the plan and the workers."""
    from safegene_edge.merge.plan import Plan

    source = tmp_path / "model.gguf"
    source.write_bytes(quantised().read_bytes())
    plan = Plan.of(source, [adapter_for(source, tmp_path)])
    jobs = plan.jobs([p for p in plan.draft(0, 1).places if p.info.name in plan.updates])
    source.unlink()
    monkeypatch.setattr(workers, "_WORTH", 0)
    with pytest.raises(FileFormatError, match=r"model\.gguf: cannot be read \(No such file"):
        workers.run_jobs(jobs, None, 2, None)


def test_a_fault_that_names_no_file_is_still_one_line(monkeypatch, capsys):
    from safegene_edge import cli

    for error, words in (
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "not enough memory"),
    ):

        def fault(error=error, **_):
            raise error

        monkeypatch.setattr(cli.cli, "main", fault)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1


# -- the mask -------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_outputs_have_the_mode_that_the_users_mask_allows(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_text(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_the_mask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    """Another thread would write files that everyone may read or write in that moment."""

    def forbidden(mask):
        raise AssertionError("os.umask was called")

    monkeypatch.setattr(os, "umask", forbidden)
    faults = []

    def write(number):
        try:
            write_text(tmp_path / str(number), "x")
            with atomic_folder(tmp_path / f"{number}-folder"):
                pass
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(list(tmp_path.iterdir())) == 16


# -- places in files ------------------------------------------------------


def without(monkeypatch, *names):
    """As on Windows, which has none of these."""
    for name in names:
        monkeypatch.delattr(os, name, raising=False)


POSIX = ("pread", "pwrite", "copy_file_range", "posix_fallocate", "posix_fadvise",
         "sched_getaffinity")  # fmt: skip


@pytest.mark.parametrize("lacking", [(), ("pread", "pwrite")])
def test_reading_and_writing_at_places(tmp_path, monkeypatch, lacking):
    without(monkeypatch, *lacking)
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    handle = rewrite.open_binary(path, os.O_RDWR)
    rewrite.write_at(handle, b"\r\n\n\x1a", 50)
    assert rewrite.read_at(handle, 10, 45) == bytes(range(45, 50)) + b"\r\n\n\x1a" + bytes([54])
    with pytest.raises(OSError, match="shorter"):
        rewrite.read_at(handle, 10, 95)
    os.close(handle)


def test_short_reads_and_writes_are_gone_on_with(tmp_path, monkeypatch):
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda file, n, at: pread(file, min(n, 3), at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:3], at))
    path = tmp_path / "x"
    path.touch()
    handle = rewrite.open_binary(path, os.O_RDWR)
    rewrite.write_at(handle, bytes(range(20)), 0)
    assert rewrite.read_at(handle, 20, 0) == bytes(range(20))
    os.close(handle)


def test_a_merge_on_a_system_without_posix_calls_writes_the_same(quantised, tmp_path, monkeypatch):
    gene = adapter_for(quantised(), tmp_path)
    settings = MergeSettings(run=False)
    merge(quantised(), [gene], tmp_path / "posix.gguf", settings=settings)
    without(monkeypatch, *POSIX)
    monkeypatch.setattr(os, "O_BINARY", os.O_CLOEXEC, raising=False)
    opened = []
    real = os.open

    def watched(path, flags, *mode):
        opened.append((str(path), flags))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", watched)
    merge(quantised(), [gene], tmp_path / "plain.gguf", settings=settings)
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "posix.gguf").read_bytes()
    binary = {path for path, flags in opened if flags & os.O_BINARY}
    assert str(quantised()) in binary  # bytes 10 stay single
    assert any(path.endswith(".tmp") for path in binary)


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_nobody_holds_a_file(tmp_path, monkeypatch, number):
    """NFS locks only what is open for writing; others have no locks at all."""
    (tmp_path / "note").write_text("a")

    def flock(handle, how):
        assert handle.writable()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("safegene_edge.files.fcntl.flock", flock)
    with hold(tmp_path / "note") as held:
        assert held.read() == b"a"
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        hold(tmp_path / "note")
