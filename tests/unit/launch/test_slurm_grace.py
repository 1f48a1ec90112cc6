"""The warning that a run could not save in the time between SLURM's warning and the time limit."""

import pytest

from lctrain.config.launcher import LauncherConfig, SlurmConfig
from lctrain.launch import grace


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(grace.time, "monotonic", lambda: now[0])
    return now


def test_warns_once_when_step_and_save_outlast_the_grace_period(clock):
    period = grace.GracePeriod(LauncherConfig(kind="slurm", slurm=SlurmConfig(warn_s=30)))
    period.stop_checked()
    clock[0] = 12.0
    period.stop_checked()
    assert period.saved(18.0) is None
    clock[0] = 15.0
    period.stop_checked()  # a shorter step does not count
    assert period.saved(18.5) == (
        "warning: noticing that the time limit is near may take 12.0 s and a checkpoint 18.5 s, more than"
        " launcher.slurm.warn_s=30: set it to 61 or more, or a time limit loses work"
    )
    assert period.saved(100.0) is None


def test_a_run_on_this_machine_has_all_the_time(clock):
    period = grace.GracePeriod(LauncherConfig())
    assert period.saved(1e6) is None
