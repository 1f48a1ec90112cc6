"""Checkpoints of a run: each is complete and verified, or it is not there."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lctrain.checkpoint import folders
from lctrain.checkpoint.agree import agreed, from_rank_0, gather, rank, world_size
from lctrain.checkpoint.manifest import hash_files, problems, read_manifest, write_manifest
from lctrain.checkpoint.rng import RNG
from lctrain.checkpoint.state import State, global_bytes, put_values, tensors_of, values_of
from lctrain.checkpoint.tensors import MISFIT, check_tensors, load_tensors, own_files, save_tensors, stored_names
from lctrain.errors import UserError

T = TypeVar("T")
OVERHEAD_BYTES = 2048
"""What torch's file format adds to every tensor, about."""


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class CheckpointStore:
    """The folder `checkpoints/` of a run, with one folder `step-00000123` per checkpoint.

    `save`, `newest_verified` and `load` are collective over the default process group, and work without one. The folder must be
    the same for all ranks, and only one run at a time may save into it, which RunDir's lock ensures.

    keep_last: newest checkpoints kept. keep_every: multiples of this many steps are kept for good.
    say: receives warnings, on rank 0.
    """

    def __init__(
        self, folder: str | Path, keep_last: int, keep_every: int | None = None, say: Callable[[str], None] = _tell
    ) -> None:
        self.folder = Path(folder)
        self.keep_last, self.keep_every, self.say = keep_last, keep_every, say
        self._cleaned = False
        self._verified: set[Path] = set()

    def save(self, step: int, state: State, meta: dict[str, Any]) -> Path:
        """Write a checkpoint and return its folder; one of the same step is replaced.

        state: nested dict of tensors, DTensors and JSON values; ranks may have different tensors. A plain tensor that several
            ranks hold under one name must be equal on them and is written once; values are rank 0's.
        meta: JSON values that `load` gives back.
        UserError on every rank if any of them cannot write; the checkpoints that were there are then untouched.
        """
        return self.write(step, tensors_of(state), values_of(state), meta)

    def write(
        self, step: int, tensors: dict[str, torch.Tensor], values: State, meta: dict[str, Any], group: Any = None
    ) -> Path:
        """`save` of a state taken apart (tensors_of, values_of), with its collectives on another group of all ranks."""
        sizes = {name: size for part in gather(global_bytes(tensors), group) for name, size in part.items()}
        needed = sum(sizes.values()) + OVERHEAD_BYTES * len(sizes)
        final = self.folder / folders.checkpoint_name(step)
        temporary = self.folder / from_rank_0(lambda: folders.temporary_name(final.name), group)

        def guarded(action: Callable[[], T]) -> Callable[[], T]:
            return lambda: self._explained(action, final, needed)

        def publish() -> None:
            content = {
                "step": step,
                "meta": meta,
                "values": values,
                "world_size": world_size(),
                "torch": torch.__version__,
                "time": time.time(),
                "files": {name: entry for part in parts for name, entry in part.items()},
            }
            write_manifest(temporary, content)
            folders.publish(temporary, final)

        try:
            from_rank_0(guarded(lambda: self._begin(temporary, needed)), group)
            agreed(guarded(lambda: save_tensors(temporary, tensors, group)), group)
            parts = gather(agreed(guarded(lambda: hash_files(own_files(temporary, rank()))), group), group)
            from_rank_0(guarded(publish), group)
        except BaseException:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        from_rank_0(lambda: self._tidy(step, final), group)
        return final

    def newest_verified(self) -> Path | None:
        """The newest checkpoint all of whose files match their hashes; None if the run has no checkpoint.

        Damaged newer ones are passed over with a warning. UserError if there are checkpoints but every one is damaged: to start
        such a run anew is a person's decision.
        """
        path: Path | None = from_rank_0(self._newest_verified)
        return path

    def verify(self, path: str | Path) -> list[str]:
        """What is wrong with a checkpoint, one line per file; empty if nothing is. Not collective."""
        return problems(Path(path))

    def load(self, path: str | Path, state: State) -> dict[str, Any]:
        """Fill a state in place from a checkpoint saved by any number of ranks, and return its meta.

        The state must have the checkpoint's names and shapes in each part (first key) that it has; parts that it lacks are not
        read, so `{"model": ...}` alone is fine. The random state of ranks that the checkpoint does not know stays as it is.
        UserError, on every rank, if the checkpoint is damaged or does not fit, naming the file or the tensor.
        """
        path = Path(path)
        manifest = from_rank_0(lambda: self._verified_manifest(path))
        tensors, values = tensors_of(state), values_of(state)
        known = {name for names in gather([*tensors, *values]) for name in names}  # pipeline stages have some each

        def select() -> dict[str, torch.Tensor]:
            stored = stored_names(path)
            wanted = {name: tensor for name, tensor in tensors.items() if name in stored or not name.startswith(f"{RNG}/")}
            check_tensors(path, wanted)
            parts = {name.partition("/")[0] for name in known} - {RNG}
            for name in sorted({*stored, *manifest["values"]}):
                if name.partition("/")[0] in parts and name not in known:
                    raise UserError(f"checkpoint {path} has {name}, which the config does not make: {MISFIT}")
            for name in sorted(values):
                if name not in manifest["values"]:
                    raise UserError(f"checkpoint {path} has no {name}, which the config makes: {MISFIT}")
            return wanted

        wanted = agreed(select)
        agreed(lambda: load_tensors(path, wanted))
        put_values(state, manifest["values"])
        meta: dict[str, Any] = manifest["meta"]
        return meta

    def _begin(self, temporary: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._cleaned:
            folders.clean(self.folder)
            self._cleaned = True
        if folders.free_bytes(self.folder) < needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        temporary.mkdir()

    def _tidy(self, step: int, final: Path) -> None:
        self._verified.discard(final)
        try:
            for path in folders.retain(self.folder, step, self.keep_last, self.keep_every):
                self.say(f"warning: a checkpoint later than step {step}, which the run no longer leads to, is now {path}")
        except OSError as error:
            self.say(f"warning: old checkpoints in {self.folder} could not be deleted: {error.strerror}")

    def _newest_verified(self) -> Path | None:
        found = [path for _, path in reversed(folders.checkpoints(self.folder))]
        for path in found:
            wrong = problems(path)
            if not wrong:
                self._verified.add(path)
                return path
            self.say(f"warning: checkpoint {path} is not used: {'; '.join(wrong)}")
        if found:
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({len(found)} damaged): restore one,"
                " or delete them all to start the run from its beginning"
            )
        return None

    def _verified_manifest(self, path: Path) -> dict[str, Any]:
        if not path.is_dir():
            raise UserError(f"checkpoint {path} does not exist; name a folder such as <run_dir>/checkpoints/step-00000100")
        if path not in self._verified and (wrong := problems(path)):
            raise UserError(f"checkpoint {path} cannot be used: {'; '.join(wrong)}")
        self._verified.add(path)
        return read_manifest(path)

    def _explained(self, action: Callable[[], T], final: Path, needed: int) -> T:
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"checkpoint {final} cannot be written: {error.strerror or error}; it needs {_size(needed)} and"
                f" {_size(folders.free_bytes(self.folder))} are free; earlier checkpoints are untouched"
            ) from error


def _size(count: float) -> str:
    """`512 B`, `3.4 MB`: decimal units, as disks have."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
