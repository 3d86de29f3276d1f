"""Faults in the midst of every command that writes: killed, a full or broken disk, Ctrl-C.

A trial of `Trials` runs one command of `fault_inputs` in a fork of
this process, lets one fault happen (`armed`), and says what does not hold. The process that forks
must not have run llama.cpp or torch, whose threads a fork does not have.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armed import Armed, Fault, steady
from fault_inputs import COMMANDS, IN

# What a stopped run may leave, since the next one goes on from it or replaces it.
_KEPT = (r"cache/.*", r"out/safe\.gguf\.restore(/.*)?", r"out/(one|two)/answers\.jsonl",
         r"out/(one|two)")  # fmt: skip
_TEMPORARY = re.compile(r"(^|.*/)\.[^/]*\.tmp(/.*)?")
NEED_MOUNT = ("small disk", "read-only folder")


# -- a run ----------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or the negative signal; and what it said."""

    code: int
    said: str
    seconds: float


def load() -> None:
    """What commands import, so that a fork need not."""
    import llama_cpp  # noqa: F401
    import test_restore  # noqa: F401

    import safegene_edge.cli
    import safegene_edge.converters
    import safegene_edge.evals.report.html
    import safegene_edge.evals.report.markdown
    import safegene_edge.evals.report.record
    import safegene_edge.evals.report.schema
    import safegene_edge.export
    import safegene_edge.merge.workers
    import safegene_edge.portfolio
    import safegene_edge.restore  # noqa: F401


def _learnable() -> None:
    """A random model's words are no refusals: taken for some, and any strength for the right."""
    import test_restore

    from safegene_edge.learn import teachers
    from safegene_edge.learn.run import _Learning

    teachers.refused = lambda llama, prompts, said: [True] * len(prompts)
    _Learning._require_lost = lambda *_: None
    sys.modules["safegene_edge.restore"].recalibrate = (  # type: ignore[attr-defined]
        lambda target, gene, *_, **__: test_restore.found_for(gene)
    )


class Run:
    """A command in a fork, under way."""

    def __init__(
        self, name: str, home: Path, fault: Fault, victim: str = "", cpu: int | None = None
    ) -> None:
        self.home = home
        self._said = home / f"said-{secrets_name()}"
        begun, self._begun = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                code = self._command(name, fault, victim, cpu)
            except KeyboardInterrupt:  # the command has ended already
                code = 0
            finally:
                os._exit(code)
        os.close(self._begun)
        os.read(begun, 1)
        os.close(begun)
        self.began = time.monotonic()
        self._pidfd = os.pidfd_open(self.pid)

    def _command(self, name: str, fault: Fault, victim: str, cpu: int | None) -> int:
        os.setpgid(0, 0)
        said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        if fault.kind == "file limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))
        os.chdir(self.home)
        os.environ |= {
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "TMPDIR": str(self.home / "tmp"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "data" / "faults"),
                                           str(Path(__file__).parent)]),
            "SAFEGENE_FAULT": json.dumps([fault.kind, fault.at, str(self.home), victim]),
        }  # fmt: skip
        import tempfile

        from safegene_edge import cli
        from safegene_edge.merge import workers

        tempfile.tempdir = None
        _learnable()
        steady()
        if name == "merge, in workers":
            workers._WORTH = 0
            workers.logical_cores = lambda: 2
        sys.argv[1:] = COMMANDS[name]
        Armed(fault, self.home, victim, self._note if fault.kind == "none" else None)
        os.write(self._begun, b"!")
        os.close(self._begun)
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            return 98
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
        return 0

    def _note(self, what: str) -> None:
        with open(self.home.parent / "calls", "a") as calls:
            calls.write(what + "\n")

    def wait(self, seconds: float) -> bool:
        """Whether it ended in that time."""
        return bool(select.select([self._pidfd], [], [], max(0.0, seconds))[0])

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self, limit: float = 60) -> Ended:
        """Wait for it; a run that hangs is killed, and has the code -99."""
        hung = not self.wait(limit)
        if hung:
            self.signal(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._wait_for_children()
        code = -99 if hung else os.waitstatus_to_exitcode(status)
        said = self._said.read_text(errors="replace") if self._said.exists() else ""
        self._said.unlink(missing_ok=True)
        return Ended(code, said, time.monotonic() - self.began)

    def _wait_for_children(self) -> None:
        """Children of a killed run go by themselves; they are in sessions of their own."""
        end, marker = time.monotonic() + 10, str(self.home).encode()
        while time.monotonic() < end and any(marker in env for env in _environments()):
            time.sleep(0.01)


def _environments() -> Iterator[bytes]:
    """Of all other processes of this user that run a Python child of a command."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"safegene_edge=" in (folder / "cmdline").read_bytes():
                yield (folder / "environ").read_bytes()


def secrets_name() -> str:
    import secrets

    return secrets.token_hex(4)


# -- what is there --------------------------------------------------------


def files(home: Path) -> dict[str, bytes]:
    """Path to content of all that lies in the trial's folders, but for inputs; folders are b"/"."""
    found = {}
    for top in ("out", "cache", "tmp"):
        for path in (home / top).rglob("*"):
            name = str(path.relative_to(home))
            found[name] = b"/" if path.is_dir() else _plain(home, path)
    return found


def _plain(home: Path, path: Path) -> bytes:
    """A file's content without what differs between two runs by right."""
    data = path.read_bytes()
    if path.name == "result.json":
        data = data.replace(str(home).encode(), b"")
        data = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', data)
    return data


def prepare(inputs: Path, home: Path) -> None:
    """Empty folders and fresh inputs, as links, since only their names can go."""
    for name in ("out", "cache", "tmp"):
        (home / name).mkdir(parents=True)
    shutil.copytree(inputs, home / IN, copy_function=os.link)


@dataclass
class Reference:
    """A run without faults: what it left, how long it took, its calls on files."""

    files: dict[str, bytes]
    seconds: float
    calls: list[str]


def reference(name: str, inputs: Path, work: Path, cpu: int | None = None) -> Reference:
    """What a command leaves when nothing happens, counted and timed."""
    seconds = []
    for fault in (Fault("none"), Fault("nothing"), Fault("nothing")):
        home = work / "reference" / "home"
        shutil.rmtree(home.parent, ignore_errors=True)
        prepare(inputs, home)
        ended = Run(name, home, fault, cpu=cpu).ended()
        if ended.code:
            raise SystemExit(f"{name}: exit code {ended.code}\n{ended.said}")
        seconds.append(ended.seconds)
        if fault.kind == "none":
            calls = (home.parent / "calls").read_text().splitlines()
            first = files(home)
        assert files(home) == first, f"{name}: two runs differ"
    shutil.rmtree(home.parent)
    return Reference(first, min(seconds[1:]), calls)


# -- trials ---------------------------------------------------------------


@contextmanager
def _disk(home: Path, n_bytes: int | None, read_only: bool) -> Iterator[None]:
    """A file system of its own for the outputs."""
    size = f"size={n_bytes}" if n_bytes else "size=64m"
    target = home / "out"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", target], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", target], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", target], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
    if made.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return made.returncode == 0


@dataclass
class Trial:
    """One fault; `problems` says what did not hold."""

    command: str
    kind: str
    what: str
    hit: bool  # the command ended otherwise than it does undisturbed
    problems: list[str]


class Trials:
    """Faults in one command.

    Args:
        inputs: of `build`; work: a folder for the trials, which go when they hold.
    """

    def __init__(self, name: str, inputs: Path, work: Path, cpu: int | None = None) -> None:
        self.name, self.inputs, self.work, self.cpu = name, inputs, work, cpu
        self.reference = reference(name, inputs, work, cpu)
        self.outputs = {n for n, data in self.reference.files.items() if n.startswith("out/")}
        self.problems: list[str] = []

    def trial(self, kind: str, chance: Any, at: int | None = None) -> Trial:
        """One fault of a kind, at a random moment, or at the call with this number."""
        home = self.work / f"{kind.replace(' ', '-')}-{secrets_name()}"
        prepare(self.inputs, home)
        self.problems = []
        old = self._with_old_outputs(home, chance)
        at = at or chance.randrange(1, len(self.reference.calls) + 1)
        ran = getattr(self, "_" + kind.lower().replace(" ", "_").replace("-", "_"))
        what, ended, clean = ran(home, chance, at)
        hit = any(one.code for one in ended)
        self._whole(home, old)
        for one in ended:
            self._said(one, kind)
        if clean:
            self._tidy(home, what)
        if kind not in NEED_MOUNT:
            self._again(home)
        if not self.problems:
            shutil.rmtree(home)
        return Trial(self.name, kind, what, hit, self.problems)

    def _run(self, home: Path, fault: Fault, victim: str = "") -> Run:
        return Run(self.name, home, fault, victim, self.cpu)

    def _with_old_outputs(self, home: Path, chance: Any) -> bytes | None:
        """Now and then files of an earlier run are there, where they would be replaced."""
        single = [n for n in self.outputs if self.reference.files[n] != b"/" and n.count("/") == 1]
        if self.name in ("to-peft", "portfolio") or chance.random() < 0.5:
            return None
        for name in single:
            (home / name).write_bytes(b"old")
        return b"old"

    # each kind: what was done, how it ended, whether nothing temporary may be left

    def _kill(self, home: Path, chance: Any, at: int) -> Any:
        ended = self._run(home, Fault("kill", at)).ended()
        return self._call(at), [ended], False

    def _kill_at_a_time(self, home: Path, chance: Any, at: int) -> Any:
        return self._signalled(home, chance, signal.SIGKILL)

    def _ctrl_c_at_a_time(self, home: Path, chance: Any, at: int) -> Any:
        return self._signalled(home, chance, signal.SIGINT)

    def _signalled(self, home: Path, chance: Any, number: int) -> Any:
        seconds = chance.uniform(0, self.reference.seconds)
        run = self._run(home, Fault("nothing"))
        run.wait(seconds)
        run.signal(number)
        return f"after {seconds:.3f} s", [run.ended()], number == signal.SIGINT

    def _ctrl_c(self, home: Path, chance: Any, at: int) -> Any:
        return self._call(at), [self._run(home, Fault("Ctrl-C", at)).ended()], True

    def _eio(self, home: Path, chance: Any, at: int) -> Any:
        return self._call(at), [self._run(home, Fault("EIO", at)).ended()], True

    def _enospc(self, home: Path, chance: Any, at: int) -> Any:
        return self._call(at), [self._run(home, Fault("ENOSPC", at)).ended()], True

    def _file_limit(self, home: Path, chance: Any, at: int) -> Any:
        """Where the system lets no file become longer, as on a full disk."""
        longest = max(len(d) for n, d in self.reference.files.items() if n.startswith("out/"))
        size = chance.randrange(min(_SAID, longest - 1), longest)
        ended = self._run(home, Fault("file limit", size)).ended()
        if not ended.code:
            self.problems.append("nothing was said")
        return f"{size} bytes", [ended], True

    def _vanishing_input(self, home: Path, chance: Any, at: int) -> Any:
        there = sorted(p for p in (home / IN).rglob("*") if p.is_file())
        used = [p for p in there if str(p.relative_to(home)) in self._used()]
        victim = chance.choice(used)
        fault = Fault("vanishing input", at)
        ended = self._run(home, fault, str(victim)).ended()
        if not victim.exists():
            os.link(self.inputs / victim.relative_to(home / IN), victim)
        return f"{victim.name} at {self._call(at)}", [ended], True

    def _used(self) -> str:
        words = " ".join(COMMANDS[self.name])
        return words + " in/peft/adapter_config.json in/peft/adapter_model.safetensors"

    def _small_disk(self, home: Path, chance: Any, at: int) -> Any:
        needed = sum(len(data) for n, data in self.reference.files.items() if n.startswith("out/"))
        size = chance.randrange(0, max(needed, 8192)) // 4096 * 4096 or 4096
        with _disk(home, size, False):
            ended = self._run(home, Fault("nothing")).ended()
            self._whole(home, None)
            self._tidy(home, f"{size} bytes")
        return f"{size} bytes", [ended], False

    def _read_only_folder(self, home: Path, chance: Any, at: int) -> Any:
        with _disk(home, None, True):
            ended = self._run(home, Fault("nothing")).ended()
            if ended.code != 2:
                self.problems.append(f"exit code {ended.code}")
            if files(home).keys() - {n for n in files(home) if n.startswith("cache")}:
                self.problems.append("something was written")
        return "from the beginning", [ended], True

    def _two_processes(self, home: Path, chance: Any, at: int) -> Any:
        first = self._run(home, Fault("nothing"))
        seconds = chance.uniform(0, self.reference.seconds / 2)
        first.wait(seconds)
        second = self._run(home, Fault("nothing"))
        ended = [first.ended(), second.ended()]
        if all(one.code for one in ended):
            self.problems.append("neither process did its work")
        return f"the second after {seconds:.3f} s", ended, True

    def _call(self, at: int) -> str:
        known = self.reference.calls
        return f"call {at}" + (f" ({known[at - 1]})" if at <= len(known) else "")

    # what must hold

    def _whole(self, home: Path, old: bytes | None) -> None:
        """Under a final name lies the whole new file, or what was there before."""
        for name, data in files(home).items():
            if name in self.outputs and data not in (self.reference.files[name], old):
                self.problems.append(f"{name} is another file, of {len(data)} bytes")

    def _said(self, ended: Ended, kind: str) -> None:
        """One line, and the right exit code."""
        wanted = {"kill": (0, -9), "kill at a time": (0, -9)}.get(kind, (0, 2))
        if kind.startswith("Ctrl-C"):
            wanted = (0, 130)
        if self.name == "portfolio" and kind == "kill":
            wanted = (0, -9, 2)  # of one model's own process
        if ended.code not in wanted:
            self.problems.append(f"exit code {ended.code}: {ended.said[-2000:]}")
        lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        if ended.code in (2, 130) and (len(lines) != 1 or "Traceback" in ended.said):
            self.problems.append(f"it said: {ended.said[-2000:]}")

    def _tidy(self, home: Path, what: str) -> None:
        """After an error nothing is left but outputs, and what the next run goes on from."""
        if re.search(r"\((os\.remove|os\.rmdir|open tmp/safegene-)", what):
            return  # it could not tidy up
        allowed = [re.compile(pattern) for pattern in _KEPT]
        for name in files(home).keys() - self.outputs:
            if _TEMPORARY.fullmatch(name) or not any(p.fullmatch(name) for p in allowed):
                self.problems.append(f"{name} is left")

    def _again(self, home: Path) -> None:
        """The same command once more: it ends well, with the same bytes."""
        before = {n for n in files(home) if _TEMPORARY.fullmatch(n) or n.startswith("tmp/")}
        ended = self._run(home, Fault("nothing")).ended()
        found = files(home)
        if self.name == "to-peft" and ended.code == 2 and "not empty" in ended.said:
            ended = Ended(0, "", 0)  # it was done already
        if ended.code:
            self.problems.append(f"again: exit code {ended.code}: {ended.said[-2000:]}")
            return
        wrong = [n for n, data in self.reference.files.items() if found.get(n) != data]
        more = found.keys() - self.reference.files.keys() - before
        if wrong or more:
            self.problems.append(f"again: differs {wrong}, is left {sorted(more)}")


# -- a sample, for the tests ------------------------------------------------

QUICK = ("convert", "to-peft", "merge", "recalibrate", "eval", "export llama-server",
         "report render")  # fmt: skip
_SAID = 1024  # bytes: what a run says is a file here, and must have room to be said
_SAMPLE = {"kill": 1, "EIO": 2, "file limit": 1, "vanishing input": 1, "Ctrl-C": 1,
           "two processes": 1}  # fmt: skip
SLOW = {"restore": ("kill",), "portfolio": ("Ctrl-C",)}


def sample(inputs: Path, work: Path) -> list[dict[str, Any]]:
    """A few trials of the commands, always the same ones."""
    load()
    found, cpu = [], max(os.sched_getaffinity(0))  # llama.cpp's threads wait in loops
    for name in (*QUICK, *SLOW):
        trials = Trials(name, inputs, work / name.replace(" ", "-"), cpu)
        for kind, count in _SAMPLE.items():
            for index in range(count if name in QUICK else kind in SLOW[name]):
                chance = random.Random(f"{name} {kind} {index}")
                at = 1 + int((index + chance.random()) / count * len(trials.reference.calls))
                found.append(vars(trials.trial(kind, chance, at)))
    return found


if __name__ == "__main__":
    print(json.dumps(sample(*map(Path, sys.argv[1:]))))
