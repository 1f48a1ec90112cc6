"""Reading pickles without running what they contain.

A pickle is a program: it may call anything that can be imported. Here it may only name what a checkpoint is made of: tensors
and their storages, plain containers, and the records of torch.distributed.checkpoint. Everything else is refused by its name,
before anything of it runs. Records of other programs (DeepSpeed, megatron-core, argparse) become inert objects without code.
"""

from __future__ import annotations

import importlib
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from lctrain.errors import UserError

_TENSORS = """torch:Size,device,Tensor torch.nn.parameter:Parameter torch.storage:UntypedStorage
torch._utils:_rebuild_tensor,_rebuild_tensor_v2,_rebuild_parameter torch._tensor:_rebuild_from_type_v2
torch.serialization:_get_layout collections:OrderedDict,defaultdict
builtins:set,frozenset,dict,list,tuple,int,float,complex,bool,str,bytes,bytearray,slice,range
_codecs:encode pathlib:Path,PurePath,PosixPath,PurePosixPath,WindowsPath,PureWindowsPath
torch.distributed.checkpoint.metadata:Metadata,TensorStorageMetadata,BytesStorageMetadata,TensorProperties,ChunkStorageMetadata
torch.distributed.checkpoint.metadata:MetadataIndex,StorageMeta,_MEM_FORMAT_ENCODING
torch.distributed.checkpoint.planner:SavePlan,WriteItem,WriteItemType,TensorWriteData,BytesIOWriteData
torch.distributed.checkpoint.filesystem:_StorageInfo,_StoragePrefix"""

ALLOWED = frozenset(
    (module, name) for entry in _TENSORS.split() for module, _, names in [entry.partition(":")] for name in names.split(",")
)
"""(module, name) of all that is imported for a pickle, beside torch's dtypes and typed storages."""

INERT = ("deepspeed", "megatron", "argparse", "apex", "transformer_engine")
"""Packages whose objects are read as records without code, and without importing the package."""

_ELSEWHERE = {("pathlib", name): ("pathlib", "PurePosixPath") for name in ("PosixPath", "WindowsPath", "Path")}
"""Paths as mere text: what a checkpoint says of the machine it was written on need not exist here."""


class Record:
    """An object of a package that is not imported: what it was made of, and nothing that it could do."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments
        self.__dict__.update(named)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:
            state = {**(state[0] or {}), **(state[1] or {})}
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __call__(self, *arguments: Any) -> Record:
        return Record(*arguments)


class RestrictedUnpickler(pickle.Unpickler):
    """Like pickle's, but UserError for whatever a checkpoint has no need of."""

    origin = "a pickle"

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        module = "builtins" if module == "__builtin__" else module  # its name in the older protocols, torch.save's among them
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch" and name.endswith("Storage") and name.removesuffix("Storage").isalnum():
            return getattr(torch, name)
        if (module, name) in ALLOWED:
            module, name = _ELSEWHERE.get((module, name), (module, name))
            return getattr(importlib.import_module(module), name)
        if module.partition(".")[0] in INERT and "." not in name:
            return type(name, (Record,), {"__module__": module})
        raise UserError(
            f"{self.origin} is refused: its pickle asks for {module}.{name}, which no checkpoint needs; it could run code"
        )


def load_pickle(path: Path) -> Any:
    """The object in a file of plain pickle; UserError if it asks for anything else than data, or is damaged."""
    with open(path, "rb") as file:
        return _guarded(path, lambda: _unpickler(str(path))(file).load())


def load_torch(path: Path, mmap: bool = True) -> Any:
    """The object in a file of torch.save, tensors on CPU and, with mmap, left on disk until they are used.

    UserError as for load_pickle, and for the formats of before torch 1.6 and of TorchScript.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is refused: it is damaged, or in the format of before torch 1.6; save it again with a newer torch"
        )
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(f"{path} is refused: it holds a TorchScript program, not tensors")

    def load() -> Any:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False, pickle_module=_module(str(path)))

    return _guarded(path, load)


def _unpickler(origin: str) -> type[RestrictedUnpickler]:
    return type("Unpickler", (RestrictedUnpickler,), {"origin": origin})


def _module(origin: str) -> Any:
    """What torch.load takes for the module `pickle`."""
    module = types.ModuleType("restricted_pickle")
    unpickler = _unpickler(origin)

    def load(file: IO[bytes], **_: Any) -> Any:
        return unpickler(file).load()

    module.__dict__.update(Unpickler=unpickler, load=load, loads=lambda data, **_: unpickler(io.BytesIO(data)).load())
    return module


def _guarded(path: Path, action: Any) -> Any:
    try:
        return action()
    except UserError:
        raise
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from None
