"""A record as curves: what wandb and TensorBoard draw."""

from __future__ import annotations

from typing import Any


def scalars(record: dict[str, Any]) -> dict[str, Any]:
    """Values per layer, rank or bucket as curves of their own, `name/index`; tables stay in metrics.jsonl alone."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat |= {f"{key}/{index}": item for index, item in enumerate(value) if not isinstance(item, list)}
        else:
            flat[key] = value
    return flat
