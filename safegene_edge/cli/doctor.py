"""`doctor`: what this machine and this build can do."""

from __future__ import annotations

import json

import click

from ..errors import command
from .options import examples, say_next


@click.command(epilog=examples("doctor", "doctor --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Tell what this machine and this build of llama.cpp can do."""
    from ..runtime.devices import diagnose

    found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    gpu = "yes" if found.gpu_offload else "no (layers run on the CPU)"
    extras = ", ".join(f"{name}: {'yes' if ok else 'no'}" for name, ok in found.extras.items())
    rows = {
        "system": found.system,
        "python": found.python,
        "cores": f"{found.physical_cores} physical (a thread each), {found.logical_cores} logical",
        "memory": f"{found.memory_gib} GiB",
        "safegene-edge": found.safegene_edge,
        "llama-cpp-python": found.llama_cpp_python,
        "GPU offload": gpu,
        "mmap": "yes" if found.mmap else "no",
        "CPU features": " ".join(found.cpu_features),
        "extras": extras,
    }
    for key, value in rows.items():
        click.echo(f"{key:<17} {value}")
    for line in found.advice or ("nothing to mend",):
        click.echo(f"{'advice':<17} {line}")
    say_next(command("restore", "MODEL.gguf", "-o", "fitted.gguf"))
