"""Settings of `lctrain audit`."""

from __future__ import annotations

from lctrain.config.launcher import NonEmpty
from lctrain.config.strict import Positive, Strict


class AuditConfig(Strict):
    """`lctrain audit`."""

    run: NonEmpty
    """Run directory."""
    steps: Positive | None = None
    """Compute the digests of at most this many steps again, spread evenly, those around every restart among them; null: of
    all."""
