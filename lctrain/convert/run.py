"""`lctrain convert`: open, plan, check, stream, verify, and only then give the result its name."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lctrain.checkpoint.folders import free_bytes
from lctrain.config.convert import ConvertConfig
from lctrain.console import progress, say, warn
from lctrain.convert.check import verify
from lctrain.convert.formats import Plan, note_of, open_input, plan_output
from lctrain.convert.huggingface import carried_files
from lctrain.convert.keys import NAME
from lctrain.convert.listing import list_mapping
from lctrain.convert.native import NOTE
from lctrain.convert.opened import Opened
from lctrain.convert.stream import Info
from lctrain.devices import DTYPES
from lctrain.errors import UserError
from lctrain.whole_file import sync_folder

SPARE_BYTES = 50_000_000
"""Room for headers, settings and a tokenizer, beside the tensors."""


def convert(options: ConvertConfig) -> int:
    """Returns 0; UserError for whatever the user can correct, with no output left behind."""
    kind, opened = open_input(options)
    plan = plan_output(options, opened)
    infos = plan.mapping.their_infos(_dtypes(options, opened, plan))
    total = sum(info.bytes for info in infos.values())
    say(f"{options.input} ({kind}{', ' + opened.family if opened.family else ''}) -> {options.to}: {plan.says},")
    say(f"  {len(infos):,} tensors, {total / 1e9:.2f} GB, pattern {opened.config.pattern}")
    for line in opened.listed:
        say(f"  not used: {line}")
    for why in sorted(set(opened.dropped.values())):
        names = [name for name, reason in opened.dropped.items() if reason == why]
        say(f"  dropped {len(names)} ({why}): {names[0]}{', ...' if len(names) > 1 else ''}")
    if options.dry_run:
        list_mapping(opened, plan, infos)
        return 0
    _check_unmatched(options, opened)
    output = _output(options)
    _check_space(output, total)
    with _temporary(output, options.overwrite) as folder:
        _write(plan, opened, infos, folder, total)
        _carry(plan, opened, folder)
        (folder / NOTE).write_text(json.dumps(note_of(opened, opened.config, kind), indent=1) + "\n")
        plan.finish(folder, infos)
        _sync(folder)
        if options.verify:
            verify(options, kind, opened, folder, rounded=_rounds(options, opened, infos))
    say(f"wrote {output}", style="green")
    if options.to == "lctrain":
        from lctrain.convert.native import name_of

        say(f"  lctrain train --config-dir {output} model={name_of(output)} init_from={output} ...")
    return 0


def _dtypes(options: ConvertConfig, opened: Opened, plan: Plan) -> dict[str, Info]:
    """Ours with the dtypes that they will have in the output."""
    found = {}
    for name, info in opened.ours.infos.items():
        if name not in plan.mapping.ours:
            continue
        dtype = plan.dtype or info.dtype
        if plan.dtype is None and options.dtype != "keep" and name not in plan.mapping.fp32:
            dtype = torch.float16 if options.dtype == "fp16" else DTYPES[options.dtype]
        found[name] = Info(info.shape, dtype)
    return found


def _rounds(options: ConvertConfig, opened: Opened, infos: Mapping[str, Info]) -> bool:
    widest = max(info.dtype.itemsize for info in opened.ours.infos.values())
    return options.dtype in ("bf16", "fp16") and widest > 2


def _check_unmatched(options: ConvertConfig, opened: Opened) -> None:
    if not opened.unmatched:
        return
    shown = ", ".join(opened.unmatched[:3]) + (", ..." if len(opened.unmatched) > 3 else "")
    if options.unmatched == "error":
        raise UserError(
            f"{len(opened.unmatched)} tensors of the input are unknown to the table: {shown}; see them all with dry_run=true,"
            " and leave them out with unmatched=drop"
        )
    warn(f"{len(opened.unmatched)} tensors of the input are left out: {shown}")


def _output(options: ConvertConfig) -> Path:
    if options.output is None:
        raise UserError("output has no value: add output=FOLDER (or dry_run=true)")
    output, source = Path(options.output).absolute(), Path(options.input).resolve()
    if output.resolve() == source or source in output.resolve().parents or output.resolve() in source.parents:
        raise UserError(f"output={options.output} and input={options.input} lie in each other: choose another output")
    if output.exists() and not options.overwrite:
        raise UserError(f"output={options.output} exists: choose another, or overwrite=true")
    return output


def _check_space(output: Path, total: int) -> None:
    free = free_bytes(output.parent)
    if free < total + SPARE_BYTES:
        raise UserError(
            f"output={output} needs {(total + SPARE_BYTES) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: make room, or choose"
            " another output or dtype=bf16"
        )


@contextmanager
def _temporary(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the output that takes its name when everything has gone well, and is removed when not."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        folder.mkdir()
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}") from None
    try:
        yield folder
        old = output.with_name(f".{output.name}.{secrets.token_hex(4)}.old") if output.exists() else None
        if old is not None:
            output.rename(old)
        folder.rename(output)
        sync_folder(output.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    """What conversions to the same place have left that were killed."""
    for path in output.parent.glob(f".{output.name}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _write(plan: Plan, opened: Opened, infos: Mapping[str, Info], folder: Path, total: int) -> None:
    target = plan.begin(folder, infos)
    with progress("convert", total, "B") as advance:
        for name, blocks in plan.mapping.to_theirs(opened.ours):
            target.write(name, _counted(blocks, infos[name].dtype, advance))
    target.close()


def _counted(blocks: Iterator[Tensor], dtype: torch.dtype, advance: object) -> Iterator[Tensor]:
    for block in blocks:
        block = block.to(dtype)
        yield block
        advance(block.numel() * block.element_size())  # type: ignore[operator]


def _carry(plan: Plan, opened: Opened, folder: Path) -> None:
    if opened.carried is None:
        return
    place = folder / plan.carries
    place.mkdir(exist_ok=True)
    for path in carried_files(opened.carried):
        if path.name != NAME or plan.carries:
            shutil.copy2(path, place / path.name)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (*(each for each in folder.rglob("*") if each.is_dir()), folder):
        sync_folder(path)
