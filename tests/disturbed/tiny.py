"""The smallest run worth disturbing, and what is compared of two runs: shared by tests/resume and tests/slurm."""

import json
import random
from pathlib import Path

from lctrain.data.prepare import prepare
from lctrain.tracking.jsonl import read_events

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 4
SETTINGS = (
    "data=custom",
    "model.d_model=32",
    "model.pattern=(*-){2}",
    "model.vocab_size=257",
    "model.attention.n_heads=2",
    "model.attention.n_kv_heads=1",
    "model.mlp.d_ff=32",
    "data.valid_fraction=0.1",
    f"trainer.steps={STEPS}",
    "trainer.seq_len=203",
    "trainer.global_batch=4",
    "trainer.micro_batch=2",
    "trainer.eval_every=5",
    "trainer.eval_batches=1",
    f"checkpoint.every={EVERY}",
    "parallel.cp=2",
    "launcher.threads=1",
    "engine.device=cpu",
    "tracking.plot=false",
)
COMPARED = ("step", "loss", "grad_norm", "lr", "eval_loss", "digest", "tokens", "targets", "consumed")


def make_corpus(folder: Path) -> str:
    """60 documents of made-up words, from 20 to about 3,000 bytes; returns the prefix of the prepared corpus."""
    random_ = random.Random(0)
    words = ["".join(random_.choices("etaoinshrdlu", k=random_.randint(2, 8))) for _ in range(200)]
    for number in range(60):
        text = " ".join(random_.choices(words, k=int(4 * 150 ** random_.random())))
        (folder / f"{number:02}.txt").write_text(text)
    prepare([str(folder)], f"{folder}/corpus", workers=1)
    return f"{folder}/corpus"


class Records:
    """What stands in a run directory."""

    run_dir: Path

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl as they stand there, without what depends on the clock."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: record[key] for key in COMPARED if key in record} for record in map(json.loads, lines)]

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.run_dir / "events.jsonl") if event["kind"] == kind]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())

    def checkpoint(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step-{step:08d}"
