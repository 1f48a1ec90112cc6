"""Settings of `lctrain report`."""

from __future__ import annotations

from lctrain.config.schema import NonEmpty
from lctrain.config.strict import Strict


class ReportConfig(Strict):
    """`lctrain report`."""

    run: NonEmpty
    """Run directory."""
    output: NonEmpty | None = None
    """The page; null: <run>/report.html."""
