"""The JSON report of a verification."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lctrain.console import say
from lctrain.whole_file import write_json


def store_report(output: str | None, content: dict[str, Any]) -> None:
    """Write it, if the user wants one."""
    if output is not None:
        write_json(Path(output), content)
        say(f"report in {output}")


def finite(number: float | None) -> float | str | None:
    """JSON has no inf and no NaN."""
    return number if number is None or math.isfinite(number) else str(number)
