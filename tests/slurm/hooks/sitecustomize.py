"""Hold the processes of a job at a certain call, so that a test can act at that very moment, or make a node look broken.

In the environment: LCTRAIN_HOLDS, such as `lctrain.train:_agree@7 lctrain.train:_agree@4`: the first time a rank runs, it is
held at its 7th call of that function, the next time at its 4th call. A held rank leaves `held-<number of the hold>-<rank>` in
the folder LCTRAIN_HOLD_AT and waits until `go-<number of the hold>` appears there or a signal asks it to stop.
LCTRAIN_BROKEN_NODE: name of a node that finds no free memory.
"""

import functools
import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


def hold(name: str, call: int, number: int, module) -> None:
    from lctrain.launch.signals import StopRequest

    folder, rank = Path(os.environ["LCTRAIN_HOLD_AT"]), os.environ.get("RANK", os.environ["SLURM_PROCID"])
    function, calls, asked = getattr(module, name), 0, []
    handle = StopRequest._handle

    def noticed(self, *signal):
        asked.append(signal)
        handle(self, *signal)

    @functools.wraps(function)
    def held(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            (folder / f"held-{number}-{rank}").touch()
            while not asked and not (folder / f"go-{number}").exists():
                time.sleep(0.05)
        return function(*args, **kwargs)

    StopRequest._handle = noticed
    setattr(module, name, held)


def break_node(name: str, module) -> None:
    import dataclasses

    measure = module._measure_alone

    def measured(node, place):
        found = measure(node, place)
        return dataclasses.replace(found, memory_gb=0.0) if node == name else found

    module._measure_alone = measured


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs `action(module)` as soon as the module has been imported."""

    def __init__(self, name, action) -> None:
        self.name, self.action = name, action

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_and_act(module):
            execute(module)
            self.action(module)

        spec.loader.exec_module = exec_and_act
        return spec


def main() -> None:
    if node := os.environ.get("LCTRAIN_BROKEN_NODE"):
        sys.meta_path.insert(0, AfterImport("lctrain.launch.preflight", functools.partial(break_node, node)))
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    for number, target in enumerate(os.environ.get("LCTRAIN_HOLDS", "").split()):
        if rank is not None and not Path(os.environ["LCTRAIN_HOLD_AT"], f"held-{number}-{rank}").exists():
            place, _, call = target.partition("@")
            module, _, name = place.partition(":")
            sys.meta_path.insert(0, AfterImport(module, functools.partial(hold, name, int(call), number)))
            return


main()
