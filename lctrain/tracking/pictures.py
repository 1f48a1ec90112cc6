"""What is drawn when a run ends: its loss curve, the load of its experts, its report."""

from __future__ import annotations

from collections.abc import Callable

from lctrain.errors import UserError
from lctrain.run_dir import RunDir


def draw_pictures(run: RunDir, say: Callable[[str], None]) -> None:
    """Draw all that there are values for, and say where they are or why not; the run itself is done and saved."""
    from lctrain.report.page import write_report
    from lctrain.tracking.heatmap import plot_load
    from lctrain.tracking.plot import plot_loss

    for name, draw in (("loss curve", plot_loss), ("load of experts", plot_load), ("report", write_report)):
        try:
            if (path := draw(run)) is not None:
                say(f"{name}: {path}")
        except (UserError, OSError) as error:  # nothing to draw, or a full disk
            say(f"no {name}: {error}")
