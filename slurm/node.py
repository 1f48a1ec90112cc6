"""One node of a job in launcher.mode=torchrun: `python -m lctrain.slurm.node CONFIG OUTCOME` becomes that node's torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from lctrain.config.render import from_yaml
from lctrain.config.schema import TrainConfig


def main(config_file: Path, outcome: Path) -> NoReturn:
    """Replace this process by torchrun; node numbers are SLURM's, so that ranks follow the order of its node list."""
    launcher = from_yaml(TrainConfig, config_file.read_text()).launcher
    # torchrun dies of the warning that it should leave to its ranks. They turn it on again for themselves.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={launcher.nodes}",
        f"--nproc-per-node={launcher.processes_per_node}",
        f"--node-rank={os.environ['SLURM_NODEID']}",
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ['MASTER_PORT']}",
        "--max-restarts=0",  # a restart inside the job would meet the store of the ranks that died
        *("-m", "lctrain.slurm.rank", str(config_file), str(outcome)),
    ]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
