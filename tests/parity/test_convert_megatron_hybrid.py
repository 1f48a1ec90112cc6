"""Hybrids: megatron-core's own MambaModel loads our checkpoints and computes the same; a plain scan is put for mamba_ssm's."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest

if find_spec("megatron") is None or find_spec("einops") is None:
    pytest.skip("megatron-core or einops is not installed", allow_module_level=True)

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron decorates with torch.compile; this halves its import

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from lctrain.adapters.megatron_cpu import megatron_on_cpu
from lctrain.config.mamba import MambaConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.convert.native import open_native
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.convert.verify import our_logits, random_tokens
from lctrain.errors import UserError
from lctrain.launch.ranks import close_pools, run_ranks
from tests.conversion import random_model, run

VOCAB, LENGTH = 96, 24
CONFIG = ModelConfig(
    pattern="M-*-M*",
    d_model=32,
    vocab_size=VOCAB,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, rope=RopeConfig(fraction=0.5)),
    mamba=MambaConfig(head_dim=8, d_state=16, n_groups=2),
    mlp=MlpConfig(d_ff=48, activation="relu2"),
)


class GatedNorm(torch.nn.Module):
    """mamba_ssm's RMSNormGated without a kernel."""

    def __init__(self, size, eps, group_size, norm_before_gate, device, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x, z):
        y = (x * F.silu(z)).unflatten(-1, (-1, self.group_size))
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def scan(x, dt, A, B, C, chunk, D, z, dt_bias, dt_softplus, **_):
    """The recurrence as it is defined, token by token: x [b, l, h, p], dt [b, l, h], B and C [b, l, g, n]."""
    dt = F.softplus(dt + dt_bias)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    state, out = 0, []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, dim=1)


def hybrid_modules():
    """megatron-core's modules of hybrids, which want Triton and mamba_ssm for their import."""
    norm, combined = types.ModuleType("norm"), types.ModuleType("combined")
    norm.RMSNorm = GatedNorm
    combined.mamba_chunk_scan_combined, combined.mamba_split_conv1d_scan_combined = scan, None
    update = types.ModuleType("update")
    update.selective_state_update = None
    stand_ins = {
        **{name: MagicMock() for name in ("triton", "triton.language", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")},
        "mamba_ssm.ops.triton.layernorm_gated": norm,
        "mamba_ssm.ops.triton.ssd_combined": combined,
        "mamba_ssm.ops.triton.selective_state_update": update,
    }
    with patch.dict(sys.modules, stand_ins):
        names = ("models.mamba.mamba_model", "ssm.mamba_block", "ssm.mamba_layer", "ssm.mamba_mixer", "ssm.mlp_layer")
        return [importlib.import_module(f"megatron.core.{name}") for name in names]


model_module, block, layer, mixer, mlp_layer = hybrid_modules()


def stack_spec() -> ModuleSpec:
    """The layers of a hybrid from megatron's own linears; norms are modules of their own."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = block.MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=layer.MambaLayer,
            submodules=layer.MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(
                    module=mixer.MambaMixer,
                    submodules=mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                ),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=mlp_layer.MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=ModuleSpec(module=MLP, submodules=mlp),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    )
    return ModuleSpec(module=block.MambaStack, submodules=parts)


def their_logits(rank: int, world: int, folder: str, tp: int, pp: int):
    """[T, V] on the ranks of the last stage, by megatron-core with a checkpoint of ours."""
    multiprocessing.current_process()._config["daemon"] = False
    with megatron_on_cpu(), torch.no_grad(), patch.object(block, "TENorm", WrappedTorchNorm):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp, pp)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        settings = json.loads((Path(folder) / "transformer_config.json").read_text())
        assert settings["class"] == "MambaModel"
        values = {**settings["transformer_config"], "activation_func": squared_relu, "use_mamba_mem_eff_path": False}
        config = TransformerConfig(
            **values,
            use_cpu_initialization=True,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = model_module.MambaModel(
            config,
            stack_spec(),
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            pg_collection=groups,
            **settings["model"],
        )
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
        tokens = random_tokens(LENGTH, VOCAB)[None]
        mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
        if not parallel_state.is_pipeline_first_stage():
            received = torch.empty(LENGTH, 1, config.hidden_size)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        out = model.eval()(tokens, torch.arange(LENGTH)[None], mask)
        if not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        return (gather_from_tensor_model_parallel_region(out) if tp > 1 else out)[0].float()


@pytest.fixture(scope="module", autouse=True)
def _end_ranks():
    """Every model that megatron-core or DeepSpeed builds leaves process groups, with threads of their own."""
    yield
    close_pools()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_their_model_computes_the_same(tmp_path, tp, pp):
    ours = random_model(tmp_path / "ours", CONFIG)
    assert run(input=ours, output=tmp_path / "theirs", to="megatron") == 0
    native = open_native(ours)
    wanted = our_logits(native.config, native.source, random_tokens(LENGTH, VOCAB))
    found = [out for out in run_ranks(their_logits, tp * pp, str(tmp_path / "theirs"), tp, pp) if out is not None]
    assert len(found) == tp
    for out in found:
        assert (out - wanted).abs().max() / wanted.abs().max() < 1e-5
    assert run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain") == 0
    a, b = SafetensorsFolder(ours), SafetensorsFolder(tmp_path / "back")
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.infos)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"mamba": MambaConfig(head_dim=8, n_groups=2, conv_kernel=3)}, "mamba.conv_kernel"),
        ({"mamba": MambaConfig(head_dim=8, n_groups=2, dt_limit_min=0.001)}, "mamba.dt_limit_min"),
        ({"attention": AttentionConfig(rope=RopeConfig(scaling="llama3", factor=2.0))}, "rope.scaling=llama3"),
    ],
)
def test_what_a_hybrid_lacks_there(tmp_path, change, message):
    ours = random_model(tmp_path / "ours", CONFIG.model_copy(update=change))
    with pytest.raises(UserError, match=message):
        run(input=ours, output=tmp_path / "theirs", to="megatron")
    if "dt_limit" in message:
        assert run(input=ours, output=tmp_path / "theirs", to="megatron", accept=("mamba.dt_limit_min",)) == 0
