"""Print this interpreter's path if its packages can run lctrain and its tests; the Makefile then installs nothing.

Versions are read, not imported, so that this takes milliseconds.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
TEST_PACKAGES = ["pytest", "pytest-timeout", "hypothesis"]


def main() -> None:
    """Silence means no."""
    needed = [*tomllib.loads(PROJECT.read_text())["project"]["dependencies"], *TEST_PACKAGES]
    for requirement in needed:
        name, minimum = re.fullmatch(r"([\w-]+)(?:>=([\d.]+).*)?", requirement).groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return
        if _numbers(version) < _numbers(minimum or "0"):
            return
    print(sys.executable)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]


if __name__ == "__main__":
    main()
