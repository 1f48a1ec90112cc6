"""Settings of where metrics go."""

from __future__ import annotations

from typing import Literal

from lctrain.config.strict import Positive, Strict


class WandbConfig(Strict):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """offline writes a run folder that `wandb sync` uploads later."""
    project: str = "lctrain"
    """Project name."""
    entity: str | None = None
    """Team or user."""
    group: str | None = None
    """Group of runs."""
    tags: tuple[str, ...] = ()
    """Tags."""
    artifacts: Literal["none", "last", "all"] = "none"
    """Checkpoints handed to wandb as versions of an artifact: the last one when the run ends, or each as it is saved."""


class TrackingConfig(Strict):
    """Where metrics go besides <run_dir>/metrics.jsonl."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write event files for TensorBoard under <run_dir>/tensorboard."""
    plot: bool = True
    """Draw <run_dir>/loss.png and report.html when the run ends, and experts.png if the model has mixtures."""
    load_every: Positive = 10
    """Steps between records of every single expert's load in metrics.jsonl (summaries per layer are in every step)."""
    log_every: Positive = 1
    """Steps between console lines, and between metrics that ranks exchange for them: loss by position, slowest rank, exposed
    communication, memory by kind (all others are in every step's line of metrics.jsonl)."""
