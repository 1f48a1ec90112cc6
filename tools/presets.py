"""Every model preset with its pattern and its number of parameters: the table of docs/models.md.

python tools/presets.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import lctrain
from lctrain.config.load import load
from lctrain.config.model import ModelConfig
from lctrain.config.strict import Strict
from lctrain.models.pattern import parse_pattern
from lctrain.models.size import model_size

FOLDER = Path(lctrain.__file__).parent / "configs" / "model"


class _Choice(Strict):
    """A model alone, to load a preset by name."""

    model: ModelConfig


def preset(name: str) -> ModelConfig:
    """configs/model/<name>.yaml."""
    return load(_Choice, "presets", [f"model={name}"]).model


def presets() -> list[str]:
    """Names, by size."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: model_size(preset(name)).total)


def count(number: int) -> str:
    """7.62 B, 1.05 M."""
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:.3g} {name}"


def main() -> None:
    """Print the table in Markdown."""
    print("| `model=` | pattern | sublayers | parameters | per token |")
    print("|---|---|---|---|---|")
    for name in presets():
        config = preset(name)
        size = model_size(config)
        kinds = Counter(layer.symbol for layer in parse_pattern(config.pattern))
        layers = " ".join(f"{n} `{symbol}`" for symbol, n in kinds.items())
        print(f"| {name} | `{config.pattern}` | {layers} | {count(size.total)} | {count(size.active)} |")


if __name__ == "__main__":
    main()
