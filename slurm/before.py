"""What one process per node does before the ranks start: `python -m lctrain.slurm.before CONFIG OUTCOME NODE,NODE,...`.

All nodes are measured; then the first one prepares the corpora that do not exist yet. OUTCOME gets `prepared`, `refused`, or
`exclude` or `unfit` with the nodes that may not take part. No outcome: told to stop, or failed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lctrain.errors import UserError
from lctrain.launch.signals import Stopped, stop_at_once
from lctrain.slurm.outcome import claim_outcome, write_outcome


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
        write_outcome(outcome, "prepared")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")))
