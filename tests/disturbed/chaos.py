"""Kills at random: where a run is hit, and what of it. tests/resume hits runs on this machine, tests/slurm those of a cluster.

LCTRAIN_KILLS and LCTRAIN_CHAOS_SEED choose another number of kills per run and other draws.
"""

import os
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.disturbed.tiny import Records

SEED = int(os.environ.get("LCTRAIN_CHAOS_SEED", "0"))


class Place(NamedTuple):
    """A function, its latest call at which a run is hit, and whether all ranks come there or only the first."""

    target: str
    latest: int
    everyone: bool


PLACES = {
    "a step": Place("lctrain.train:_agree", 5, True),
    "reading a checkpoint": Place("lctrain.checkpoint.store:load_tensors", 1, True),
    "evaluation": Place("lctrain.train:_evaluate", 1, True),
    "writing tensors": Place("lctrain.checkpoint.store:save_tensors", 2, True),
    "hashing": Place("lctrain.checkpoint.store:hash_files", 2, True),
    "writing a manifest": Place("lctrain.checkpoint.store:write_manifest", 2, False),
    "publishing": Place("lctrain.checkpoint.folders:publish", 2, False),
    "deleting old checkpoints": Place("lctrain.checkpoint.folders:retain", 2, False),
    "rewriting the metrics": Place("lctrain.train:open_tracker", 1, True),
}
RANK, LAUNCHER, EVERYTHING, SLURMD, NODE = "a rank", "the launcher", "everything", "a node's slurmd", "a node"
ANYWHERE = (RANK, LAUNCHER, EVERYTHING)
"""What can be killed of every run. The launcher is lctrain, srun or torchrun; everything is all processes of a run at once."""
ON_A_CLUSTER = (*ANYWHERE, SLURMD, NODE)


class Hit(NamedTuple):
    """One draw: the run is held at the `call`-th call of `target`; then `victim` is killed."""

    victim: str
    place: str
    target: str
    call: int
    everyone: bool


class Chaos:
    """Draws of one test. Victims and places are dealt like cards, so that none is left out for long.

    random: for what a test chooses besides.
    """

    def __init__(self, kills: int, victims: Sequence[str]) -> None:
        self.random = random.Random(SEED)
        self.kills = int(os.environ.get("LCTRAIN_KILLS", kills))
        self._victims, self._places = self._deal(victims), self._deal(list(PLACES))

    @property
    def settings(self) -> tuple[str, ...]:
        """Checkpoints and evaluations often, and more steps than all lives of the run together can make before the last."""
        return f"trainer.steps={40 + 10 * self.kills}", "checkpoint.every=3", "trainer.eval_every=4"

    def hit(self, run: Records) -> Hit:
        """The next one; a run without a checkpoint is not hit while it reads one."""
        place = next(self._places)
        if place == "reading a checkpoint" and not any(run.run_dir.glob("checkpoints/step-*")):
            place = "a step"
        target, latest, everyone = PLACES[place]
        return Hit(next(self._victims), place, target, self.random.randint(1, latest), everyone)

    def _deal(self, cards: Sequence[str]) -> Iterator[str]:
        while True:
            yield from self.random.sample(cards, len(cards))
