"""A rehearsal on tensors without data counts exactly what the same code does on real ones."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.launcher import LauncherConfig
from lctrain.config.mamba import LinearAttentionConfig, MambaConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.kernels.attention import fused
from lctrain.parallel.mesh import ProcessMesh
from lctrain.plan.cost import PartCost
from lctrain.plan.counted_group import counted
from lctrain.plan.counting import CostCounter
from lctrain.plan.rehearse import Rehearsal, build, make_sequence, rehearse

LENGTH = 96


def config(
    pattern: str = "*W-M+LE", dtype: str = "fp32", checkpointing: str = "none", micro_batch: int = 1, **moe
) -> TrainConfig:
    return TrainConfig(
        run_dir="unused",
        model=ModelConfig(
            pattern=pattern,
            d_model=32,
            vocab_size=61,
            attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=20, qk_norm=True, bias=True),
            mlp=MlpConfig(d_ff=48),
            mamba=MambaConfig(head_dim=8, d_state=8, n_groups=2, chunk=16),
            linear_attention=LinearAttentionConfig(n_heads=4),
            latent_attention=LatentAttentionConfig(
                n_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
            ),
            moe=MoeConfig(
                **{
                    "n_experts": 4,
                    "d_ff": 24,
                    "shared_d_ff": 16,
                    "shared_gate": True,
                    "balance": BalanceConfig(switch=1e-2, z_loss=1e-3, bias_rate=1e-3),
                    **moe,
                }
            ),
        ),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
        parallel=ParallelConfig(),
        engine=EngineConfig(dtype=dtype, activation_checkpointing=checkpointing, device="cpu"),
        trainer=TrainerConfig(seq_len=LENGTH, global_batch=2, micro_batch=micro_batch, z_loss=1e-4, loss_chunk=40),
        launcher=LauncherConfig(processes=1),
    )


def real(settings: TrainConfig) -> dict[str, PartCost]:
    """The same parts on tensors with data, experts as grouped products, which is how they are planned."""
    groups = ProcessMesh(0).make_groups()
    counter = CostCounter()
    groups = counted(groups, counter)
    seq = make_sequence(settings, groups, settings.trainer.seq_len, torch.device("cpu"))
    torch.manual_seed(0)
    fused._mask.cache_clear()  # a plan does not know what ran before
    with patch("lctrain.kernels.routed_mlp.blocked.suits", lambda x: False):
        model = build(settings, groups, torch.device("cpu"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        return Rehearsal(settings, model, seq, counter).parts()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_all_but_mixtures_equal_a_real_run(dtype, checkpointing):
    """Every kernel with its bytes, memory kept and most held: the same to the byte."""
    settings = config("*W-M+L", dtype, checkpointing, micro_batch=2)
    assert rehearse(settings, on_cuda=False) == real(settings)
