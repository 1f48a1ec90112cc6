"""Thirty kills at random over one run: the losses are those of the undisturbed run, bit for bit, and the audit is clean.

LCTRAIN_KILLS and LCTRAIN_CHAOS_SEED choose another number of kills and other places.
"""

import os
import random
import signal
import time

import pytest

from lctrain.commands.audit import main

KILLS = int(os.environ.get("LCTRAIN_KILLS", "30"))
SEED = int(os.environ.get("LCTRAIN_CHAOS_SEED", "0"))
SETTINGS = (f"trainer.steps={40 + 10 * KILLS}", "checkpoint.every=3", "trainer.eval_every=4")
PLACES = {
    "a step": ("lctrain.train:_agree", 5, 2),
    "reading a checkpoint": ("lctrain.checkpoint.store:load_tensors", 1, 2),
    "evaluation": ("lctrain.train:_evaluate", 1, 2),
    "writing tensors": ("lctrain.checkpoint.store:save_tensors", 2, 2),
    "hashing": ("lctrain.checkpoint.store:hash_files", 2, 2),
    "writing a manifest": ("lctrain.checkpoint.store:write_manifest", 2, 1),
    "publishing": ("lctrain.checkpoint.folders:publish", 2, 1),
    "deleting old checkpoints": ("lctrain.checkpoint.folders:retain", 2, 1),
    "rewriting the metrics": ("lctrain.train:open_tracker", 1, 2),
}
"""What is interrupted: the function, its latest call, and how many ranks come there. The first start has nothing to read."""
VICTIMS = ("rank 0", "rank 1", "launcher", "everything")


def kill(run, victim: str, ranks: list[int]) -> None:
    """SIGKILL, then let the survivors go on and come to their end."""
    if victim == "launcher":
        run.kill_launcher()
        run.go_on()
        run.wait_until(lambda: not run.processes())
        return
    if victim == "everything":
        os.killpg(run.launcher, signal.SIGKILL)
    else:
        os.kill(ranks[int(victim[-1]) % len(ranks)], signal.SIGKILL)
    run.go_on()
    assert run.finish()[0] in (-signal.SIGKILL, 128 + signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_kills(training, capsys):
    chance = random.Random(SEED)
    whole = training(*SETTINGS)
    whole.complete()
    run = training(*SETTINGS)
    told = []
    while len(told) < KILLS:
        places = [place for place in PLACES if place != "reading a checkpoint" or any(run.run_dir.glob("checkpoints/step-*"))]
        place, victim = chance.choice(places), chance.choice(VICTIMS)
        target, latest, count = PLACES[place]
        asynchronous = f"checkpoint.asynchronous={chance.choice(('true', 'false'))}"
        began = time.monotonic()
        run.start_to_hold(target, chance.randint(1, latest), asynchronous)
        held = run.held(count)
        kill(run, victim, held)
        told.append(f"{victim} killed in {place} ({asynchronous}) after {time.monotonic() - began:.1f} s")
        print(told[-1])
    run.complete("checkpoint.asynchronous=false")
    assert run.metrics() == whole.metrics(), told
    assert main([str(run.run_dir)]) == 0, (told, capsys.readouterr().out)
    with capsys.disabled():
        print(f"\n{KILLS} kills, {len(run.events('resume'))} resumes; " + "; ".join(told))
