"""Whether a run could save in the time that SLURM leaves it after a warning, from what steps and saves have taken so far."""

from __future__ import annotations

import math
import time

from lctrain.config.launcher import LauncherConfig


class GracePeriod:
    """Measures the longest way from a warning to a finished checkpoint.

    A stop is noticed at the beginning of a step: at worst one step, evaluation and checkpoint after it was asked for. Then a
    checkpoint is written. Tells nothing on this machine, where nobody ends a run that was asked to stop.
    """

    def __init__(self, launcher: LauncherConfig) -> None:
        self._given_s = launcher.slurm.warn_s if launcher.is_slurm else float("inf")
        self._checked_at: float | None = None
        self._longest_wait_s = 0.0
        self._longest_save_s = 0.0
        self._warned = False

    def stop_checked(self) -> None:
        """The ranks have just agreed on whether to stop."""
        now = time.monotonic()
        if self._checked_at is not None:
            self._longest_wait_s = max(self._longest_wait_s, now - self._checked_at)
        self._checked_at = now

    def saved(self, seconds: float) -> str | None:
        """A checkpoint took this long; the text of a warning, once, when the grace period has turned out to be too short."""
        self._longest_save_s = max(self._longest_save_s, seconds)
        needed_s = self._longest_wait_s + self._longest_save_s
        if self._warned or needed_s <= self._given_s:
            return None
        self._warned = True
        return (
            f"warning: noticing that the time limit is near may take {self._longest_wait_s:.1f} s and a checkpoint"
            f" {self._longest_save_s:.1f} s, more than launcher.slurm.warn_s={self._given_s:.0f}: set it to"
            f" {math.ceil(2 * needed_s)} or more, or a time limit loses work"
        )
