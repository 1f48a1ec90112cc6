"""What tests of conversions share: a model folder to start from, and a conversion in one line."""

from pathlib import Path

import torch

from lctrain.config.convert import ConvertConfig
from lctrain.config.model import ModelConfig
from lctrain.convert.mapping import our_infos
from lctrain.convert.native import write_model
from lctrain.convert.run import convert
from lctrain.convert.safetensors import SafetensorsWriter


def random_model(folder: Path, config: ModelConfig) -> Path:
    """A new model folder of ours with random values everywhere, scaled so that logits neither vanish nor explode."""
    folder.mkdir()
    infos, _ = our_infos(config)
    writer = SafetensorsWriter(folder, infos, 10**9, {})
    generator = torch.Generator().manual_seed(0)
    for name, info in infos.items():
        noise = torch.randn(info.shape, generator=generator)
        writer.write(name, [noise * info.shape[-1] ** -0.5 if noise.dim() > 1 else 1 + 0.3 * noise])
    writer.close()
    write_model(folder, folder.name, config)
    return folder


def run(**settings) -> int:
    """The exit status of a conversion, without the comparison of logits unless asked for."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return convert(ConvertConfig(**{"verify": False, **values}))
