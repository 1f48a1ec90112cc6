"""Tensors to and from a folder through torch.distributed.checkpoint, which can read what another number of ranks has written.

Its metadata file is a pickle, which could run code when it is read: it goes through a restricted unpickler that knows torch's
records and nothing else. Tensors themselves are read weights-only.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lctrain.checkpoint.agree import is_distributed
from lctrain.checkpoint.state import shape_text
from lctrain.checkpoint.unpickle import load_pickle
from lctrain.errors import UserError


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
    """torch's zip writer hides a full disk behind an error of its own; show the system's error instead."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OSError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            raise


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], group: Any = None) -> None:
    """Write tensors of all ranks; of a plain tensor that several ranks hold under one name, one of them writes it.

    Collective. OSError, on every rank, if the file system refused on any.
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
    """The files that this rank wrote; the metadata file is rank 0's."""
    mine = sorted(folder.glob(f"__{rank}_*.distcp"))
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
            raise UserError(f"checkpoint {folder} has no {name}: it was written by another model or optimizer config")
        if there.size != tensor.shape or there.properties.dtype != tensor.dtype:
            was = f"{list(there.size)} {str(there.properties.dtype).removeprefix('torch.')}"
            raise UserError(
                f"checkpoint {folder} has {name} as {was}, the config makes it {shape_text(tensor)}:"
                " use the config that the checkpoint was written with"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on what is meant so: no process group, and random states that only one rank has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(mismatched keys|torch.distributed is disabled).*")
        yield


def _metadata(folder: Path) -> Metadata:
    return Reader(folder).read_metadata()
