"""Settings of the commands that look after a run: status, logs, stop."""

from __future__ import annotations

from lctrain.config.schema import NonEmpty
from lctrain.config.strict import NonNegative, Positive, Strict


class StatusConfig(Strict):
    """`lctrain status`."""

    run: NonEmpty
    """Run directory, or the folder of a sweep."""


class LogsConfig(Strict):
    """`lctrain logs`."""

    run: NonEmpty
    """Run directory."""
    rank: NonNegative | None = None
    """Show this rank's own log instead of the job's."""
    lines: Positive = 40
    """Last lines to show."""
    follow: bool = False
    """Go on showing what is written, until Ctrl-C or the end of the run."""


class StopConfig(Strict):
    """`lctrain stop`."""

    run: NonEmpty
    """Run directory, or the folder of a sweep."""
    now: bool = False
    """Do not let the run finish its step and save."""
    wait_s: Positive = 600
    """Seconds to wait for the end of a run on this machine."""


def named_run(args: list[str]) -> list[str]:
    """The arguments with a run directory that stands first, as in `lctrain status runs/demo`, written as a setting."""
    first = args[0] if args else "-"
    return args if first.startswith(("-", "run=")) else [f"run={first}", *args[1:]]
