"""The JSON report of a verification."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from lctrain.console import say
from lctrain.errors import UserError
from lctrain.whole_file import write_json


def check_output(output: str | None) -> None:
    """UserError now rather than after minutes, if the report could not be written."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"output={output}: not a file in an existing folder that can be written to")


def store_report(output: str | None, content: dict[str, Any]) -> None:
    """Write it, if the user wants one."""
    if output is not None:
        write_json(Path(output), content)
        say(f"report in {output}")


def finite(number: float | None) -> float | str | None:
    """JSON has no inf and no NaN."""
    return number if number is None or math.isfinite(number) else str(number)
