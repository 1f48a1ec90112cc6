"""Small agreements between the ranks of a run: everybody continues, or everybody raises the same error.

They work on the default process group, or on another one of all ranks, and without one they see a single rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lctrain.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def agreed(action: Callable[[], T], group: Any = None) -> T:
    """The result of `action` on this rank, once it has succeeded on all of them.

    If it fails anywhere, every rank raises: a UserError of any rank on all of them; otherwise the failing rank its
    own exception and the others a RuntimeError with its text. So no rank waits for one that has given up.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcome = None if failure is None else (isinstance(failure, UserError), f"{type(failure).__name__}: {failure}")
    outcomes = gather(outcome, group)
    failed = [(rank, *outcome) for rank, outcome in enumerate(outcomes) if outcome]
    for _, by_user, text in failed:
        if by_user:
            raise UserError(text.removeprefix("UserError: ")) from failure
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"rank {failed[0][0]} failed: {failed[0][2]}")
    return result


def from_rank_0(action: Callable[[], T], group: Any = None) -> T:
    """The result, on every rank, of `action` run on rank 0 alone; raises as `agreed` does."""
    return gather(agreed(lambda: action() if rank() == 0 else None, group), group)[0]
