"""Say what a run will cost before it runs: memory of every rank, seconds of a step by cause, hours.

usage: lctrain plan [override of lctrain train ...] [plan.output=FILE] [plan.reserve=0.1]
       lctrain plan plan.search=true plan.gpus=N [override of lctrain train ...] [plan.shown=10]

No GPU is needed. The model of one rank runs without data and is counted; attention is simulated on the cluster, which is
`cluster=`, or the preset of the device here. With plan.search=true, all grids of N devices that the config allows are
planned, and the fastest that fit are listed; exit status 1 if nothing fits. Beside the settings below it takes all of
`lctrain train`.

  lctrain plan model=qwen3_8b trainer.seq_len=131072 parallel.cp=8 parallel.tp=4 engine=megatron engine.dtype=bf16 cluster=h200
  lctrain plan plan.search=true plan.gpus=8 model=qwen3_8b trainer.global_batch=8 engine=megatron engine.dtype=bf16 cluster=h100
"""

from __future__ import annotations

from lctrain.config.load import load
from lctrain.config.plan import PlanSettings
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError


def main(args: list[str]) -> int:
    """Run the command."""
    options = load(PlanSettings, "plan", [arg for arg in args if arg.startswith("plan.") or arg in ("-h", "--help")]).plan
    if options.gpus is not None and not options.search:
        raise UserError(
            f"plan.gpus={options.gpus} is for plan.search=true; without it parallel.* says how many devices there are"
        )
    if options.search and options.gpus is None:
        raise UserError("plan.search=true needs to know how many devices there are: plan.gpus=64")
    overrides = [arg for arg in args if not arg.startswith("plan.")]
    config = load(TrainConfig, "train", overrides)
    from lctrain.plan.command import plan_one, plan_search

    return plan_search(config, options) if options.search else plan_one(config, options)
