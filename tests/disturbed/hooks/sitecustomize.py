"""What the processes of a disturbed run do before anything else: prepare to be held, or make their node look broken.

In the environment: LCTRAIN_HOLDS, the folder of tests/disturbed/holds.py. Its file `order`, if there is one, says `NUMBER
MODULE:FUNCTION CALL UNTIL_SIGNAL`. A process that comes to that call leaves `held-NUMBER-HOST-PID` and waits for `go-NUMBER`,
or, with UNTIL_SIGNAL=1, for a signal that asks it to stop. LCTRAIN_BROKEN_NODE: name of a node that finds no free memory.
"""

import functools
import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


def hold(folder: Path, number: str, name: str, call: int, until_signal: bool, module) -> None:
    function, calls, asked = getattr(module, name), 0, []
    if until_signal:
        from lctrain.launch.signals import StopRequest

        handle = StopRequest._handle

        def noticed(self, *signal):
            asked.append(signal)
            handle(self, *signal)

        StopRequest._handle = noticed

    @functools.wraps(function)
    def held(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            (folder / f"held-{number}-{os.uname().nodename}-{os.getpid()}").touch()
            while not asked and not (folder / f"go-{number}").exists():
                time.sleep(0.01)
        return function(*args, **kwargs)

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
    folder = Path(os.environ["LCTRAIN_HOLDS"])
    if (folder / "order").exists():
        number, target, call, until_signal = (folder / "order").read_text().split()
        module, _, name = target.partition(":")
        action = functools.partial(hold, folder, number, name, int(call), until_signal == "1")
        sys.meta_path.insert(0, AfterImport(module, action))


main()
