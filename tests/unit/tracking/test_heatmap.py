"""The picture of experts' load, and what becomes of values per layer on their way to the logs."""

import random

import pytest

from lctrain.tracking.console_line import format_line
from lctrain.tracking.heatmap import plot_load
from lctrain.tracking.jsonl import MetricsLog, read_metrics
from lctrain.tracking.scalars import scalars
from lctrain.tracking.tracker import Tracker


def record(step: int, layers: int = 3, experts: int = 8, kinds: tuple[str, ...] = ("moe",)) -> dict:
    fields: dict = {"step": step, "loss": 1.0}
    for kind in kinds:
        fields[f"{kind}_load"] = [[random.random() / experts for _ in range(experts)] for _ in range(layers)]
        fields[f"{kind}_max_violation"] = [random.random() for _ in range(layers)]
    return fields


@pytest.mark.parametrize(("steps", "layers", "kinds"), [(1, 1, ("moe",)), (500, 3, ("moe", "moh")), (7, 2, ("moh",))])
def test_picture(run, steps: int, layers: int, kinds: tuple[str, ...]) -> None:
    log = MetricsLog(run.metrics, 0)
    for step in range(1, steps + 1):
        log.step(record(step, layers, kinds=kinds))
    log.close()
    path = plot_load(run)
    assert path == run.expert_load
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_no_picture_of_a_dense_model(run) -> None:
    log = MetricsLog(run.metrics, 0)
    log.step({"step": 1, "loss": 1.0})
    log.close()
    assert plot_load(run) is None
    assert not run.expert_load.exists()


def test_loads_are_recorded_every_so_many_steps_and_at_the_end(run, make_config, capsys) -> None:
    config = make_config(load_every=4)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 7})})
    tracker = Tracker(run, config, 0)
    for step in range(1, 8):
        tracker.step(record(step))
    tracker.close()
    records = read_metrics(run.metrics)
    assert [entry["step"] for entry in records if "moe_load" in entry] == [4, 7]
    assert all(len(entry["moe_max_violation"]) == 3 for entry in records)
    assert "max violation" in capsys.readouterr().out


def test_wandb_gets_a_curve_per_layer() -> None:
    flat = scalars({"step": 3, "moe_entropy": [1.0, 2.0], "moe_load": [[0.5, 0.5], [0.5, 0.5]]})
    assert flat == {"step": 3, "moe_entropy/0": 1.0, "moe_entropy/1": 2.0}


def test_the_console_shows_the_worst_layer() -> None:
    assert "max violation 0.75" in format_line({"step": 1, "moe_max_violation": [0.25, 0.75]}, 10, "1 s")
