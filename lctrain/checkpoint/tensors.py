"""Tensors to and from a folder through torch.distributed.checkpoint, which can read what another number of ranks has written.

Its metadata file is a pickle, which could run code when it is read: it goes through a restricted unpickler that knows torch's
records and nothing else. Tensors themselves are read weights-only.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.futures import Future

from lctrain.checkpoint.agree import is_distributed
from lctrain.checkpoint.state import shape_text
from lctrain.checkpoint.unpickle import load_pickle
from lctrain.errors import UserError

MOST_FILES = 4
"""Files of one rank."""
SMALLEST_FILE = 32 * 2**20
"""Bytes below which a second file is not worth it."""
MISFIT = "restore the config of its run, or choose another run_dir"
"""What to do about a checkpoint of another model or optimizer."""


class Reader(dcp.FileSystemReader):
    """torch's reader, but its metadata is unpickled without running code; UserError if it asks for that."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's list of tensors and where they lie."""
        metadata = load_pickle(Path(self.path) / ".metadata")
        if not isinstance(metadata, Metadata):
            raise UserError(f"{self.path}/.metadata is not of torch.distributed.checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Writer(dcp.FileSystemWriter):
    """Writes a rank's tensors into several files at once; they are surely on disk only after `manifest.hash_files`.

    Not by torch's own thread_count: an error in one of its threads, such as a full disk, is printed and then forgotten.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """See torch. OSError where torch's zip writer would hide it behind an error of its own."""

        def write(number: int) -> list[Any]:
            prefix = plan.storage_data.prefix + (f"{number}_" if number else "")
            part = replace(plan, items=parts[number], storage_data=replace(plan.storage_data, prefix=prefix))
            return list(super(_Writer, self).write_data(part, planner).wait())

        parts = _even_parts(plan.items)
        written: Future[list[Any]] = Future()
        try:
            with ThreadPoolExecutor(len(parts)) as pool:
                written.set_result([result for results in pool.map(write, range(len(parts))) for result in results])
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OSError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            raise
        return written


def _even_parts(items: list[Any]) -> list[list[Any]]:
    """What goes into each file: about as many bytes, in no more files than there are threads or than are worth it."""
    sizes = [_bytes_of(item) for item in items]
    count = max(1, min(MOST_FILES, torch.get_num_threads(), sum(sizes) // SMALLEST_FILE, len(items)))
    parts: list[list[Any]] = [[] for _ in range(count)]
    totals = [0] * count
    for place in sorted(range(len(items)), key=lambda place: -sizes[place]):
        least = totals.index(min(totals))
        parts[least].append(items[place])
        totals[least] += sizes[place]
    return parts


def _bytes_of(item: Any) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], group: Any = None) -> None:
    """Write tensors of all ranks; of a plain tensor that several ranks hold under one name, one of them writes it.

    What was written may still be in the page cache. Collective. OSError, on every rank, if the file system refused on any.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=False)
    try:
        with _quiet():
            dcp.save(
                tensors,
                storage_writer=_Writer(folder),
                planner=planner,
                process_group=group,
                no_dist=not is_distributed(),
            )
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from None
        raise


def own_files(folder: Path, rank: int) -> list[Path]:
    """The files that this rank wrote, the largest first; the metadata file is rank 0's."""
    mine = sorted(folder.glob(f"__{rank}_*.distcp"), key=lambda path: (-path.stat().st_size, path.name))
    return [*mine, folder / ".metadata"] if rank == 0 else mine


def load_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors in place, whatever the sharding they were saved in. Collective."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _quiet():
        dcp.load(tensors, storage_reader=Reader(folder), planner=planner, no_dist=not is_distributed())


def stored_names(folder: Path) -> set[str]:
    """Flat names of the tensors in a checkpoint."""
    return set(_metadata(folder).state_dict_metadata)


def check_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """UserError that names the tensor if one is not in the checkpoint, or there in another shape or dtype."""
    stored = _metadata(folder).state_dict_metadata
    for name, tensor in tensors.items():
        there = stored.get(name)
        if not isinstance(there, TensorStorageMetadata):
            raise UserError(f"checkpoint {folder} has no {name}, which the config makes: {MISFIT}")
        if there.size != tensor.shape or there.properties.dtype != tensor.dtype:
            was = f"{list(there.size)} {str(there.properties.dtype).removeprefix('torch.')}"
            raise UserError(f"checkpoint {folder} has {name} as {was}, the config makes it {shape_text(tensor)}: {MISFIT}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on what is meant so: no process group, and random states that only one rank has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(mismatched keys|torch.distributed is disabled).*")
        yield


def _metadata(folder: Path) -> Metadata:
    return Reader(folder).read_metadata()
