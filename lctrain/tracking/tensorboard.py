"""Metrics as TensorBoard event files under <run_dir>/tensorboard, in full precision."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.run_dir import RunDir
from lctrain.tracking.scalars import scalars

FLUSH_S = 10
"""Seconds after which what was recorded is on disk."""


def check_tensorboard(config: TrainConfig) -> None:
    """UserError if the config asks for TensorBoard's files and the package that writes them is missing."""
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard=true needs tensorboard: pip install 'lctrain[tensorboard]', or set it to false")


class TensorBoardLog:
    """One event file per start; a failure is said once and ends the recording."""

    def __init__(self, run: RunDir, start_step: int, say: Callable[[str], None]) -> None:
        """start_step: TensorBoard is told to forget what an earlier start recorded after it."""
        self._say, self._writer = say, None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run.tensorboard), purge_step=start_step + 1, flush_secs=FLUSH_S)
        except Exception as error:
            self._stop(error)

    def step(self, record: dict[str, Any]) -> None:
        """Record the finite numbers of one step; no other value has a place in a curve."""
        if self._writer is None:
            return
        try:
            for name, value in scalars(record).items():
                if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                    # new_style: the older form of a scalar is fp32 whatever double_precision says
                    self._writer.add_scalar(name, float(value), record["step"], new_style=True, double_precision=True)
        except Exception as error:
            self._stop(error)

    def close(self) -> None:
        """Write the rest."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._writer = None
        self._say(f"tensorboard is off for the rest of the run: {error}")
