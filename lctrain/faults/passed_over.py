"""Batches that a run leaves out because of what they did to the loss: decided once, kept for good.

They stand in `<run_dir>/passed_over.json`, written before the run goes back, so that a crash in between forgets nothing, and in
the meta of every later checkpoint, so that a run which continues elsewhere leaves them out too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lctrain.errors import UserError
from lctrain.whole_file import write_json

MOST_DOCUMENTS = 100
"""Documents of one batch that are named; the samples name them all."""


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """One global batch that is not trained on.

    step: the step it belongs to, counted from 1; the step is counted, but does nothing. samples: its first and last sample.
    documents: (corpus, document) pairs. returned_to: finished steps of the checkpoint to which the run went back. found_at: the
    step whose loss was the problem.
    """

    step: int
    digest: str
    samples: tuple[int, int]
    documents: tuple[tuple[int, int], ...]
    problem: str
    returned_to: int
    found_at: int

    @classmethod
    def of_json(cls, entry: dict[str, Any]) -> PassedOver:
        """From what dataclasses.asdict gave, after a detour over JSON."""
        first, last = entry["samples"]
        documents = tuple((corpus, document) for corpus, document in entry["documents"])
        numbers = entry["returned_to"], entry["found_at"]
        return cls(entry["step"], entry["digest"], (first, last), documents, entry["problem"], *numbers)


def read_passed_over(path: Path) -> list[PassedOver]:
    """The entries of a file, in the order of decision; empty if there is none. UserError if it is damaged."""
    try:
        return [PassedOver.of_json(entry) for entry in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it lists the batches that the run leaves out; restore it from a backup, or"
            " delete it to train on them again"
        ) from None


def write_passed_over(path: Path, entries: Iterable[PassedOver]) -> None:
    """Replace the file. UserError if the disk refuses."""
    try:
        write_json(path, to_json(entries))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; free some space, then give the same command again"
        ) from None


def to_json(entries: Iterable[PassedOver]) -> list[dict[str, Any]]:
    """For a file, a checkpoint's meta or an event."""
    return [dataclasses.asdict(entry) for entry in entries]


def merged(*lists: Iterable[PassedOver]) -> list[PassedOver]:
    """All entries, the first of each step."""
    by_step: dict[int, PassedOver] = {}
    for entry in (entry for entries in lists for entry in entries):
        by_step.setdefault(entry.step, entry)
    return list(by_step.values())
