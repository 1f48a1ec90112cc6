"""What SLURM tells a task of srun: who it is, where the others are, and which network leads to them."""

from __future__ import annotations

import fcntl
import re
import socket
import struct
import subprocess
from collections.abc import Mapping, MutableMapping

from lctrain.errors import UserError

SIOCGIFADDR = 0x8915


def srun_task(env: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """(rank, world size, local rank, local size) of a task of a step with several; None in a batch script or on a login node.

    The variables of the step count, not those of the job: a batch script has the latter too, and is no rank.
    """
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
    if any(name not in env for name in names) or env["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    try:
        rank, size, local, node = (int(env[name]) for name in names)
        return rank, size, local, tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node]
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"SLURM's variables of this task cannot be read ({error}): start it with srun") from None


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` as [2, 2, 2, 1]; ValueError for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def set_meeting_place(env: MutableMapping[str, str]) -> None:
    """Fill in what is missing of MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME, for a task of srun.

    lctrain's own batch script has set the first two. They are the address, as SLURM knows it, of the job's first node, and a
    port that depends on the job and on how often it was requeued, so that no store of an earlier start answers.
    """
    if "SLURM_JOB_ID" not in env:
        return
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_address(env["SLURM_JOB_NODELIST"])
    if "MASTER_PORT" not in env:
        life = int(env.get("SLURM_RESTART_COUNT", "0"))
        env["MASTER_PORT"] = str(20000 + (int(env["SLURM_JOB_ID"]) * 20 + life % 10 * 2) % 10000)
    if "GLOO_SOCKET_IFNAME" not in env:
        # Gloo would look up this node's host name, which need not resolve, or may resolve to another network.
        interface = interface_towards(env["MASTER_ADDR"])
        if interface is not None:
            env["GLOO_SOCKET_IFNAME"] = interface


def first_address(nodes: str) -> str:
    """NodeAddr of the first node of a SLURM node list; UserError if SLURM does not answer."""
    try:
        first = _output("scontrol", "show", "hostnames", nodes).split()[0]
        return re.findall(r" NodeAddr=(\S+)", _output("scontrol", "-o", "show", "node", first))[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(f"scontrol does not tell the address of the first of {nodes}: set MASTER_ADDR in the script") from None


def interface_towards(address: str) -> str | None:
    """The network interface whose address packets to `address` leave from; None if there is no way, or none with a name."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name[:15].encode())
                try:
                    answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        return None
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
