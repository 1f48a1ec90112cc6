"""Seconds by cause: a vector that adds up."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Where the seconds of an optimizer step go on the rank that takes longest; nothing counts twice.

    products: matrix products but attention's. memory: operations that move more than they multiply. attention: its kernels,
    mean of the ranks of a sequence. attention_exchange: its messages that no kernel hides. attention_idle: waiting for ranks
    that have more to do. sequence: all else that these ranks exchange, such as states of recurrent layers. tensor, experts,
    data: exchanges of tensor, expert and data parallelism that nothing hides. pipeline: messages between stages. bubble:
    waiting for other stages. optimizer: gradient norm, clipping, update.
    """

    products: float = 0.0
    memory: float = 0.0
    attention: float = 0.0
    attention_exchange: float = 0.0
    attention_idle: float = 0.0
    sequence: float = 0.0
    tensor: float = 0.0
    experts: float = 0.0
    data: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> StepTime:
        return StepTime(*(seconds * times for seconds in dataclasses.astuple(self)))


CAUSES = {
    "products": "matrix products",
    "memory": "other operations",
    "attention": "attention",
    "attention_exchange": "attention: exposed messages",
    "attention_idle": "attention: waiting for other ranks",
    "sequence": "context parallelism, the rest",
    "tensor": "tensor parallelism, exposed",
    "experts": "expert parallelism, exposed",
    "data": "data parallelism, exposed",
    "pipeline": "messages between stages",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
}
"""Fields of StepTime, for people."""
