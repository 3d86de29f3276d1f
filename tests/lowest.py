"""The lowest versions that pyproject.toml allows, as constraints for pip; see `make versions`.

Of the package itself and its extras `serve`, `cluster` and `sign`. What models and tests need
(`train`, `dev`, `demo`) keeps its newest ones, which also want a newer `huggingface_hub`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pip._vendor import tomli

EXTRAS = ("serve", "cluster", "sign")


def lowest() -> list[str]:
    """name==version of each direct dependency that names its lowest version."""
    project = tomli.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    found = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", line) for line in lines)
    return sorted(f"{match[1]}=={match[2]}" for match in found if match)


if __name__ == "__main__":
    print("\n".join(lowest()))
