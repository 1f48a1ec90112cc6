"""What `lctrain plan` does."""

from __future__ import annotations

from pathlib import Path

from lctrain.config.plan import PlanConfig
from lctrain.config.schema import TrainConfig
from lctrain.console import say
from lctrain.errors import UserError
from lctrain.plan.plan import Plan, make_plan
from lctrain.plan.remedies import remedies
from lctrain.plan.report import as_dict, print_found, print_plan, print_remedies
from lctrain.plan.search import search
from lctrain.plan.variants import variant
from lctrain.whole_file import check_output, write_json


def plan_one(config: TrainConfig, options: PlanConfig) -> int:
    """Plan a config, print and store it; returns 1 if it does not fit."""
    path = _place(config, options)
    plan = make_plan(config, options.reserve)
    seconds, tokens = run_seconds(plan, options.reserve)
    print_plan(plan, seconds, tokens)
    if not plan.fits:
        print_remedies(remedies(config, options.reserve))
    write_json(path, as_dict(plan, seconds))
    say(f"plan in {path}")
    return int(not plan.fits)


def plan_search(config: TrainConfig, options: PlanConfig) -> int:
    """Plan all layouts of so many devices, print the best, store all that fit; returns 1 if none does."""
    assert options.gpus is not None
    check_output("plan.output", options.output)
    found = search(config, options.gpus, options.reserve)
    print_found(found, options.shown)
    if options.output is not None:
        write_json(Path(options.output), [as_dict(plan) for plan in found.plans])
        say(f"layouts in {options.output}")
    return int(not found.plans)


def run_seconds(plan: Plan, reserve: float) -> tuple[float, int]:
    """Seconds and tokens of the whole run, stages of sequence-length warm-up included."""
    config = plan.config
    stages = config.trainer.stages
    rest = config.trainer.steps - sum(stage.steps for stage in stages)
    seconds, tokens = rest * plan.step.total, rest * plan.tokens
    for stage in stages:
        short = make_plan(variant(config, trainer__seq_len=stage.seq_len, trainer__stages=()), reserve)
        seconds += stage.steps * short.step.total
        tokens += stage.steps * short.tokens
    return seconds, tokens


def _place(config: TrainConfig, options: PlanConfig) -> Path:
    """Where the plan goes: where the user wants it, else in the run directory, whose report will show it."""
    check_output("plan.output", options.output)
    if options.output is not None:
        return Path(options.output)
    try:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir} cannot be used: {error.strerror}; choose another run_dir") from None
    return Path(config.run_dir) / "plan.json"
