"""The picture of a run."""

import math

import numpy as np
import pytest

from lctrain.errors import UserError
from lctrain.tracking.jsonl import MetricsLog, append_event
from lctrain.tracking.plot import plot_loss
from lctrain.tracking.series import restarts, smooth, thin


def record(run, count, **extra):
    log = MetricsLog(run.metrics, 0)
    for step in range(1, count + 1):
        log.step({"step": step, "loss": 3 / step, "lr": 1e-3, "grad_norm": 1.0, **extra})
    log.close()


@pytest.mark.parametrize("count", [1, 2, 9, 60])
def test_picture_of_any_length(run, count):
    record(run, count)
    append_event(run.events, "resume", step=1)
    path = plot_loss(run)
    assert path == run.plot
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_records_without_the_usual_fields(run):
    record(run, 3, loss=math.nan, grad_norm=None, skipped=True)
    assert plot_loss(run).exists()


def test_a_run_without_steps_is_an_error_not_a_blank_page(run):
    with pytest.raises(UserError, match="no finished step"):
        plot_loss(run)


def test_restarts_come_from_the_events(run):
    for kind, step in (("start", 0), ("resume", 20), ("checkpoint", 25), ("resume", 10), ("resume", 20), ("resume", 99)):
        append_event(run.events, kind, step=step)
    assert restarts(run, [{"step": 50}]) == [10, 20]


def test_smoothing_is_a_centred_mean():
    values = list(np.random.default_rng(0).normal(size=30))
    smoothed = smooth(values, 3)
    assert smoothed[0] == pytest.approx(np.mean(values[:4]))
    assert smoothed[10] == pytest.approx(np.mean(values[7:14]))
    assert smoothed[29] == pytest.approx(np.mean(values[26:]))
    assert smooth([5.0], 3) == [5.0]


def test_thinning_keeps_ends_and_spikes():
    values = [1.0] * 5000
    values[1234], values[4000] = 9.0, -9.0
    xs, ys = thin(list(range(5000)), values, 100)
    assert len(xs) <= 102
    assert (xs[0], xs[-1]) == (0, 4999)
    assert {9.0, -9.0} <= set(ys)
    assert xs == sorted(xs)
    assert thin([1, 2], [3.0, 4.0], 100) == ([1, 2], [3.0, 4.0])
