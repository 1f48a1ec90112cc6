"""Run lctrain's command line with one of its ranks getting stuck, or raising, inside a collective.

python stuck.py {sleep,raise} RANK CALL train model=tiny ...

The CALL-th all_reduce of that rank sleeps for ever, or raises.
"""

import sys
import time

import torch.distributed as dist


def plant(what: str, rank: int, call: int) -> None:
    all_reduce, calls = dist.all_reduce, 0

    def planted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if dist.get_rank() == rank and calls == call:
            if what == "raise":
                raise ValueError("planted")
            sleep_for_ever()
        return all_reduce(*args, **kwargs)

    dist.all_reduce = planted


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    what, rank, call = sys.argv[1:4]
    del sys.argv[1:4]
    plant(what, int(rank), int(call))

    from lctrain.cli import main

    sys.exit(main())
