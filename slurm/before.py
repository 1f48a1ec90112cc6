"""What one process per node does before the ranks start: `python -m lctrain.slurm.before CONFIG OUTCOME NODE,NODE,...`.

All nodes are measured; then the first one prepares the corpora that do not exist yet, and waits until nobody else trains in the
run directory. OUTCOME gets `prepared`, `refused`, `busy` with who still trains there, or `exclude` or `unfit` with the nodes
that may not take part. No outcome: told to stop, or failed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lctrain.errors import UserError
from lctrain.launch.signals import Stopped, stop_at_once
from lctrain.slurm.outcome import claim_outcome, write_outcome

LOCK_S = 180.0
"""What an earlier start gets to end: on a node that SLURM has given up its processes may live, and file servers let go of the
lock of a machine that has died with some delay."""


def main(config_file: Path, outcome: Path, nodes: list[str]) -> int:
    """Exit status: 0 unless this process itself has failed; the outcome tells what comes next."""
    try:
        with stop_at_once():  # there is nothing to save here, and corpora may take hours to prepare
            _run(config_file, outcome, nodes)
        return 0
    except Stopped as stopped:
        print(f"stopped by {stopped} before training began", file=sys.stderr)
        return 0
    except UserError as error:
        if claim_outcome(outcome, "refused"):
            print(f"error: {error}", file=sys.stderr)
        return 2


def _run(config_file: Path, outcome: Path, nodes: list[str]) -> None:
    from lctrain.config.render import from_yaml
    from lctrain.config.schema import TrainConfig
    from lctrain.data.prepare import ensure_corpora
    from lctrain.launch.preflight import preflight

    config = from_yaml(TrainConfig, config_file.read_text())
    node = int(os.environ["SLURM_NODEID"])
    settings = config.launcher.preflight
    if settings.enabled:
        place = Path(config.run_dir)
        verdict = preflight(settings, node, nodes, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1, place)
        if verdict is not None and not verdict.may_start:
            write_outcome(outcome, f"{verdict.action} {','.join(verdict.unfit)}")
            return
    if node == 0:
        ensure_corpora(config.data, config.model.vocab_size)
        holder = _last_holder(config.run_dir)
        write_outcome(outcome, "prepared" if holder is None else f"busy {holder}")


def _last_holder(run_dir: str) -> str | None:
    """Who still holds the run directory after LOCK_S; None as soon as nobody does."""
    from lctrain.run_dir import RunDir, lock_holder

    deadline = time.monotonic() + LOCK_S
    told = False
    while (holder := lock_holder(RunDir(run_dir))) is not None and time.monotonic() < deadline:
        if not told:
            told = True
            print(f"{run_dir} is still in use by pid {holder}: waiting for its end", file=sys.stderr)
        time.sleep(0.5)
    return holder


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")))
