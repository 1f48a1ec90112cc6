"""Initial weights."""

import math

import pytest
import torch
from torch import Tensor

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.launch.ranks import run_ranks
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel

CONFIG = ModelConfig(
    pattern="(*-){2}W-",
    d_model=96,
    vocab_size=301,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=8, bias=True, qk_norm=True, sinks=True),
    mlp=MlpConfig(d_ff=128, bias=True),
)


def weights(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_function_of_the_seed() -> None:
    one, again, other = weights(), weights(), weights(seed=1)
    torch.manual_seed(5)
    later = weights()
    for name, weight in one.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, later[name])
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name])


def test_no_two_matrices_start_alike() -> None:
    first = [tuple(weight.flatten()[:4].tolist()) for weight in weights().values() if weight.dim() == 2]
    assert len(set(first)) == len(first)


def test_a_parameter_does_not_depend_on_the_rest_of_the_model() -> None:
    """A deeper model starts with the same embedding: weights hang on names, not on the order of draws."""
    deeper = weights(CONFIG.model_copy(update={"pattern": "(*-){3}W-"}))
    assert torch.equal(weights()["embedding"], deeper["embedding"])


def test_statistics() -> None:
    residual = CONFIG.init_std / math.sqrt(6)
    for name, weight in weights().items():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name.endswith(("bias", "sinks")):
            assert (weight == 0).all(), name
        else:
            std = residual if name.endswith(("mixer.out.weight", "mixer.down.weight")) else CONFIG.init_std
            count = weight.numel()
            assert float(weight.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * count)), name
            assert abs(float(weight.mean())) < 4 * std / math.sqrt(count), name
            assert float(weight.abs().max()) > 3 * std, name


def sharded_weights(rank: int, world_size: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    initialise(model, 0)
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_parameters_start_as_whole_ones(ranks: int) -> None:
    """Three ranks do not divide the embedding's 301 rows."""
    whole = weights()
    for result in run_ranks(sharded_weights, ranks):
        assert result.keys() == whole.keys()
        for name, weight in result.items():
            assert torch.equal(weight, whole[name]), name
