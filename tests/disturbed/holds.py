"""Hold the processes of a run at a certain call of a function, so that a test can act at that very moment.

The test's side; tests/disturbed/hooks/sitecustomize.py is that of the processes.
"""

from pathlib import Path

HOOKS = Path(__file__).with_name("hooks")


class Holds:
    """Orders that processes find when they start: the latest one counts. They are numbered 1, 2, ..."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "holds"
        self.folder.mkdir(parents=True)
        self.number = 0

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process obey; PYTHONPATH is to be put in front of another one."""
        return {"PYTHONPATH": str(HOOKS), "LCTRAIN_HOLDS": str(self.folder)}

    def order(self, target: str, call: int, until_signal: bool = False) -> None:
        """Hold processes that start from now on at their `call`-th call of `target` (module:function), until go_on.

        until_signal: or until a signal asks them to stop.
        """
        self.number += 1
        temporary = self.folder / "order.tmp"
        temporary.write_text(f"{self.number} {target} {call} {int(until_signal)}")
        temporary.replace(self.folder / "order")

    def no_more(self) -> None:
        """Processes that start from now on are not held."""
        (self.folder / "order").unlink(missing_ok=True)

    def held(self, number: int | None = None) -> list[int]:
        """Pids, on their own machines, of the processes that have come to a hold, the latest one if no other is named."""
        found = self.folder.glob(f"held-{number or self.number}-*")
        return sorted(int(path.name.rpartition("-")[2]) for path in found)

    def go_on(self, number: int | None = None) -> None:
        """Let the processes of a hold continue, the latest one if no other is named."""
        (self.folder / f"go-{number or self.number}").touch()
