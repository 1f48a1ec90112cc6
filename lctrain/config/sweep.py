"""Settings with several values: one typed config for every combination of them."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lctrain.config.fields import annotation_at, kind_of
from lctrain.config.load import load
from lctrain.config.overrides import split
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError


class SweepRun(NamedTuple):
    """One run of a sweep; the label, `1-lr-0.0003`, is empty where there is but one run and no sweep."""

    label: str
    config: TrainConfig


def load_sweep(args: list[str]) -> list[SweepRun]:
    """The configs of `lctrain train args`: one, or with launcher=slurm_array all combinations, in order, last setting fastest.

    The runs of a sweep lie in <run_dir>/<label> and share the wandb group named after run_dir, if no group is set.
    """
    options = [_values(argument) for argument in args]
    swept = [number for number, values in enumerate(options) if len(values) > 1]
    if not swept:
        config = load(TrainConfig, "train", args)
        if config.launcher.kind == "slurm_array":
            raise UserError("launcher=slurm_array needs a setting with several values, such as optim.lr=1e-3,3e-4")
        return [SweepRun("", config)]
    combinations = list(itertools.product(*options))
    first = _sweep_config(list(combinations[0]), args)
    if first is None:
        return [SweepRun("", load(TrainConfig, "train", args))]
    runs = []
    for number, arguments in enumerate(combinations):
        config = load(TrainConfig, "train", list(arguments))
        label = "-".join([str(number), *(_label(arguments[position]) for position in swept)])
        wandb = config.tracking.wandb
        group = wandb.group or re.sub(r".*/", "", config.run_dir.rstrip("/"))
        tracking = config.tracking.model_copy(update={"wandb": wandb.model_copy(update={"group": group})})
        update = {"run_dir": f"{config.run_dir.rstrip('/')}/{label}", "tracking": tracking}
        runs.append(SweepRun(label, config.model_copy(update=update)))
    folders = {run.config.run_dir.rpartition("/")[0] for run in runs}
    if len(folders) > 1:
        raise UserError(f"the runs of a sweep share one folder: set run_dir (it would be {' and '.join(sorted(folders)[:2])})")
    if any(run.config.launcher != first.launcher for run in runs):
        raise UserError("the runs of a sweep share one job array: give settings of the launcher one value each")
    return runs


def _sweep_config(arguments: list[str], all_arguments: list[str]) -> TrainConfig | None:
    """The first run's config if it asks for a sweep; else None: several values are then for `load` to judge."""
    if not any(argument.endswith("launcher=slurm_array") for argument in all_arguments):
        try:
            config = load(TrainConfig, "train", arguments)
        except UserError:
            return None
    else:
        config = load(TrainConfig, "train", arguments)
    return config if config.launcher.kind == "slurm_array" else None


def _values(argument: str) -> list[str]:
    """The argument once for each of its values; just itself if it has one, is an option, or fills a list."""
    if argument.startswith("-") or "=" not in argument:  # an option, or its value
        return [argument]
    key, raw = split(argument).key, split(argument).raw
    if raw is None or key == "run_dir":
        return [argument]
    annotation = annotation_at(TrainConfig, key.split("."))
    if annotation is not None and get_origin(kind_of(annotation).core) is tuple and re.match(r"\w+\(", raw) is None:
        return [argument]
    try:
        override = OverridesParser.create().parse_override(f"key={raw}")
    except HydraException:
        return [argument]
    if not override.is_sweep_override():
        return [argument]
    sign = argument[: argument.index(key)]
    return [f"{sign}{key}={value}" for value in override.sweep_string_iterator()]


def _label(argument: str) -> str:
    """`lr-0.0003`: the last part of the name and the value, of characters that need no quoting anywhere."""
    key, _, value = argument.lstrip("+~").partition("=")
    return re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")[:40]
