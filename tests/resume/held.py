"""Run lctrain's command line with one of its functions held at its n-th call, so that a test can act at that very moment.

    python held.py MODULE:FUNCTION CALL FOLDER train model=tiny ...

Every process that arrives there leaves FOLDER/held-<pid> and waits until FOLDER/go appears.
"""

import functools
import importlib
import os
import sys
import time
from pathlib import Path


def hold(target: str, call: int, folder: Path) -> None:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def held(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            (folder / f"held-{os.getpid()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return function(*args, **kwargs)

    setattr(owner, name, held)


if __name__ == "__main__":
    target, call, folder = sys.argv[1:4]
    del sys.argv[1:4]
    hold(target, int(call), Path(folder))

    from lctrain.cli import main

    sys.exit(main())
