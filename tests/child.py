"""Scripts in a process of their own, for what would crash the process if it went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def in_child(script: str, **values: Any) -> dict[str, Any]:
    """What a script prints as JSON in its last line; it sees `values`. It must exit with 0.

    The key "stderr" has what it wrote there.
    """
    program = f"import json, sys\nglobals().update(json.loads(sys.argv[1]))\n{script}"
    given = json.dumps(
        {name: value if value is None else str(value) for name, value in values.items()}
    )
    run = subprocess.run(
        [sys.executable, "-c", program, given], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
    return {**json.loads(run.stdout.splitlines()[-1]), "stderr": run.stderr}
