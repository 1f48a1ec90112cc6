"""A tiny model folder of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lctrain.config.convert import ConvertConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.convert.mapping import our_infos
from lctrain.convert.native import write_model
from lctrain.convert.run import convert
from lctrain.convert.safetensors import SafetensorsWriter

LLAMA = ModelConfig(
    pattern="(*-){2}",
    d_model=32,
    vocab_size=320,
    norm_eps=1e-6,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    mlp=MlpConfig(d_ff=48),
)


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(config, name): a model folder of ours with random values everywhere."""

    def make(config: ModelConfig = LLAMA, name: str = "ours") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        infos, _ = our_infos(config)
        writer = SafetensorsWriter(folder, infos, 10**9, {})
        generator = torch.Generator().manual_seed(0)
        for tensor, info in infos.items():
            noise = torch.randn(info.shape, generator=generator)
            writer.write(tensor, [noise * info.shape[-1] ** -0.5 if noise.dim() > 1 else 1 + 0.3 * noise])
        writer.close()
        write_model(folder, name, config)
        return folder

    return make


@pytest.fixture
def run():
    """run(setting=value, ...): a conversion, without the comparison of logits unless asked for."""

    def call(**settings) -> int:
        values = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        return convert(ConvertConfig(**{"verify": False, **values}))

    return call
