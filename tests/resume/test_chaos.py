"""Thirty kills at random over one run: the losses are those of the undisturbed run, bit for bit, and the audit is clean."""

import os
import signal
import time

import pytest

from lctrain.commands.audit import main
from tests.disturbed.chaos import ANYWHERE, EVERYTHING, LAUNCHER, Chaos


def kill(run, victim: str, pid: int) -> None:
    """SIGKILL, of rank `pid` if the victim is a rank, then let the survivors go on and come to their end."""
    if victim == LAUNCHER:
        run.kill_launcher()
        run.go_on()
        run.wait_until(lambda: not run.processes())
        return
    if victim == EVERYTHING:
        os.killpg(run.launcher, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    run.go_on()
    assert run.finish()[0] in (-signal.SIGKILL, 128 + signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_kills(training, capsys):
    chaos = Chaos(30, ANYWHERE)
    whole = training(*chaos.settings)
    whole.complete()
    run = training(*chaos.settings)
    told = []
    while len(told) < chaos.kills:
        hit = chaos.hit(run)
        asynchronous = f"checkpoint.asynchronous={chaos.random.choice(('true', 'false'))}"
        began = time.monotonic()
        run.start_to_hold(hit.target, hit.call, asynchronous)
        held = run.held(2 if hit.everyone else 1)
        kill(run, hit.victim, chaos.random.choice(held))
        told.append(f"{hit.victim} killed in {hit.place} ({asynchronous}) after {time.monotonic() - began:.1f} s")
        print(told[-1])
    run.complete("checkpoint.asynchronous=false")
    assert run.metrics() == whole.metrics(), told
    assert main([str(run.run_dir)]) == 0, (told, capsys.readouterr().out)
    with capsys.disabled():
        print(f"\n{chaos.kills} kills, {len(run.events('resume'))} resumes; " + "; ".join(told))
