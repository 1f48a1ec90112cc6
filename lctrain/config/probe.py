"""Settings of the recall probe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lctrain.config.strict import NonNegative, Positive, Strict


class ProbeConfig(Strict):
    """How well the model recalls a passage of held-out text that it has seen far back, by depth and length of the context."""

    every: NonNegative = 0
    """Steps between probes, and after the last step; 0: never. One costs about passages x (depths + 1) x 2 forward passes over
    trainer.seq_len tokens."""
    lengths: Positive = 3
    """Context lengths: trainer.seq_len, half of it, a quarter and so on, as far as the passage goes in four times."""
    depths: Annotated[int, Field(ge=2)] = 5
    """Places of the passage, evenly from the beginning of the context to its end."""
    passage: Annotated[int, Field(ge=6)] = 48
    """Tokens of the passage. It comes again at the end of the context: the first third then tells the model which passage it
    is, and the loss of the rest counts."""
    passages: Positive = 2
    """Passages, each in a context of its own, to average over."""

    def check_run(self, seq_len: int) -> None:
        """ValueError with the fix if no context is long enough."""
        if self.every and seq_len < 4 * self.passage:
            raise ValueError(
                f"probe.passage={self.passage} needs trainer.seq_len={seq_len} to be at least {4 * self.passage}:"
                f" lower probe.passage to {max(6, seq_len // 4)}, or set probe.every=0"
            )

    def context_lengths(self, seq_len: int) -> list[int]:
        """Longest first."""
        lengths = [seq_len // 2**halvings for halvings in range(self.lengths)]
        return [length for length in lengths if length >= 4 * self.passage]
