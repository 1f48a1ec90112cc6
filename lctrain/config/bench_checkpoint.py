"""Settings of `lctrain bench checkpoint`."""

from __future__ import annotations

from lctrain.config.launcher import NonEmpty
from lctrain.config.strict import Positive, PositiveFloat, Strict


class CheckpointBenchConfig(Strict):
    """`lctrain bench checkpoint`: a state of weights and two moments, fp32, saved in several ways between training steps."""

    mb: Positive = 1000
    """Size of the state in MB (10^6 bytes)."""
    tensors: Positive = 64
    """Weights to divide it into; each has two moments."""
    repeats: Positive = 3
    """Saves of each kind, taken in turn, after one of each that is not counted."""
    steps: Positive = 4
    """Training steps after each save: matrix products on all threads, then an update of the whole state in place."""
    step_s: PositiveFloat = 0.5
    """Seconds that the matrix products of a step take, about."""
    folder: NonEmpty = "."
    """Where to write: the file system to measure. It needs room for four states."""
    threads: Positive | None = None
    """CPU threads of steps, copies and files; null: all cores that the command may use."""
    output: str | None = None
    """JSON file for the results and a description of this machine."""
