"""Kills at random over one run on two nodes, of whatever can die there: losses bit for bit, and a clean audit.

Ranks, srun or torchrun, the whole job, a node's slurmd, a node; in steps, checkpoints, evaluations and while one is read.
"""

import contextlib
import os
import signal
import time

import pytest

from lctrain.commands.audit import main
from tests.disturbed.chaos import EVERYTHING, LAUNCHER, NODE, ON_A_CLUSTER, RANK, SLURMD, Chaos, Hit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
QUICK = ("launcher.preflight.enabled=false", "tracking.wandb.mode=disabled", "launcher.slurm.restarts=100")
ENDED = ("CANCELLED", "FAILED", "COMPLETED")


class Disturber:
    """Kills parts of a run that is held; on return it is on its way to its next start."""

    def __init__(self, lab, run, chaos: Chaos) -> None:
        self.lab, self.run, self.chaos = lab, run, chaos
        self.mode = "torchrun"
        self.hold = 0

    def submit(self) -> None:
        """Each submission has the other mode, and checkpoints in the background or not."""
        self.mode = "torchrun" if self.mode == "srun" else "srun"
        asynchronous = f"checkpoint.asynchronous={self.chaos.random.choice(('true', 'false'))}"
        self.run.submit_hooked(*QUICK, f"launcher.mode={self.mode}", asynchronous)

    def order(self) -> Hit:
        """Where the run is hit next."""
        hit = self.chaos.hit(self.run)
        self.run.holds.order(hit.target, hit.call)
        return hit

    def wait(self, hit: Hit) -> None:
        """Until the run has come there."""
        self.run.wait_until_held(4 if hit.everyone else 1)
        self.hold = self.run.holds.number

    def kill(self, victim: str) -> str:
        """Returns what has been done."""
        how = {RANK: self.rank, LAUNCHER: self.launcher, EVERYTHING: self.job, SLURMD: self.slurmd, NODE: self.node}[victim]
        mode = self.mode
        return f"{how(self.run.restarts())} ({mode})"

    def let_go(self) -> None:
        self.run.holds.go_on(self.hold)

    def requeued(self, restarts: int) -> None:
        self.run.wait_until(lambda: self.run.restarts() > restarts)

    def rank(self, restarts: int) -> str:
        rank = self.chaos.random.randrange(4)
        os.kill(self.run.ranks()[rank], signal.SIGKILL)
        self.let_go()
        self.requeued(restarts)
        return f"rank {rank}"

    def launcher(self, restarts: int) -> str:
        os.kill(self.chaos.random.choice(self.run.launchers()), signal.SIGKILL)
        self.let_go()
        self.requeued(restarts)
        return self.mode

    def job(self, restarts: int) -> str:
        """Requeued by an operator, or cancelled (both leave it a grace period), or killed to the last process."""
        how = self.chaos.random.choice(("requeued", "cancelled", "killed"))
        if how == "requeued":
            self.lab.order("scontrol", "requeue", self.run.job)
            self.let_go()
            self.requeued(restarts)
            return "job requeued"
        if how == "cancelled":
            self.lab.order("scancel", self.run.job)
            self.let_go()
        else:
            for pid in self.run.everything():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.run.wait_until(lambda: self.run.state() in ENDED, wrong=())
        self.submit()
        return f"job {how} and submitted again"

    def slurmd(self, restarts: int) -> str:
        """Back soon: its job does not notice, and then loses a rank. Back late: the controller has given the node up."""
        node = self.chaos.random.choice("12")
        self.lab.tool("crash", node)
        if self.chaos.random.random() < 0.5:
            time.sleep(1)
            self.lab.tool("start", node)
            return f"slurmd of node {node}, back in a second, and then {self.rank(restarts)}"
        self.requeued(restarts)
        self.let_go()
        self.lab.tool("start", node)
        return f"slurmd of node {node} until it was given up"

    def node(self, restarts: int) -> str:
        node = self.chaos.random.choice("12")
        self.lab.tool("kill", node)
        self.let_go()
        self.requeued(restarts)
        self.lab.tool("start", node)
        return f"node {node}"


def test_random_kills_under_slurm(power, new_run, capsys):
    chaos = Chaos(30, ON_A_CLUSTER)
    whole = new_run(*chaos.settings)
    whole.complete_here()
    run = new_run(*chaos.settings)
    disturber = Disturber(power, run, chaos)
    told: list[str] = []
    hit = disturber.order()
    disturber.submit()
    while True:
        began = time.monotonic()
        disturber.wait(hit)
        place, victim = hit.place, hit.victim
        last = len(told) + 1 == chaos.kills
        if not last:
            hit = disturber.order()  # before the kill, since the next start may begin soon after it
        told.append(f"{disturber.kill(victim)} in {place} after {time.monotonic() - began:.0f} s")
        print(told[-1], flush=True)
        if last:
            break
    run.wait_for_end()
    assert run.events("give_up") == []
    assert run.metrics() == whole.metrics(), told
    assert main([str(run.run_dir)]) == 0, (told, capsys.readouterr().out)
    assert run.ranks() == {}
    with capsys.disabled():
        print(f"\n{chaos.kills} kills, {len(run.events('resume'))} resumes; " + "; ".join(told))
