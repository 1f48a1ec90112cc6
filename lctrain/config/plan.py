"""Settings of `lctrain plan`: how the plan is made; what is planned is a config of `lctrain train`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lctrain.config.strict import Positive, Strict


class PlanConfig(Strict):
    """`lctrain plan`."""

    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of a device's memory that must stay free: what libraries take, and holes between tensors."""
    search: bool = False
    """Look for the layouts that train fastest on `gpus` devices."""
    gpus: Positive | None = None
    """search: devices."""
    shown: Positive = 10
    """search: layouts to print."""
    output: str | None = None
    """JSON file for the plan, or for all layouts found; null: plan.json in the run directory (search: none)."""


class PlanSettings(Strict):
    """What `lctrain plan` has beside the settings of `lctrain train`."""

    plan: PlanConfig = PlanConfig()
    """How the plan is made."""
