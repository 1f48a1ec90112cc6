"""Distributed checkpoints: ours are read by megatron-core's own GPTModel on any grid, and what that writes is read by us."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron decorates with torch.compile; this halves its import

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig, multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils

from lctrain.adapters.megatron_cpu import megatron_on_cpu
from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.config.rope import RopeConfig
from lctrain.convert.native import open_native
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.convert.verify import our_logits, random_tokens
from lctrain.errors import UserError
from lctrain.launch.ranks import close_pools, run_ranks
from tests.conversion import random_model, run

VOCAB, LENGTH = 96, 24
CONFIGS = {
    "dense": ModelConfig(
        pattern="(*-){4}",
        d_model=32,
        vocab_size=VOCAB,
        attention=AttentionConfig(
            n_heads=4, n_kv_heads=2, qk_norm=True, bias=True, rope=RopeConfig(scaling="llama3", factor=8.0)
        ),
        mlp=MlpConfig(d_ff=48),
    ),
    "partly rotated": ModelConfig(
        pattern="(*-){2}",
        d_model=64,
        vocab_size=VOCAB,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, rope=RopeConfig(fraction=0.5)),
        mlp=MlpConfig(d_ff=48, activation="relu2"),
    ),
    "experts": ModelConfig(
        pattern="*-(*E){3}",
        d_model=32,
        vocab_size=VOCAB,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
        mlp=MlpConfig(d_ff=48),
        moe=MoeConfig(
            n_experts=4,
            d_ff=24,
            shared_d_ff=20,
            router=RouterConfig(score="sigmoid", scale=2.5),
            balance=BalanceConfig(switch=0.0, bias_rate=0.001),
        ),
        tie_embeddings=True,
    ),
    "all experts": ModelConfig(
        pattern="(*E){4}",
        d_model=32,
        vocab_size=VOCAB,
        attention=AttentionConfig(n_heads=4, n_kv_heads=4),
        moe=MoeConfig(n_experts=4, d_ff=24),
    ),
    "latent": ModelConfig(
        pattern="(+-){4}",
        d_model=32,
        vocab_size=VOCAB,
        latent_attention=LatentAttentionConfig(
            n_heads=4,
            q_lora_rank=16,
            kv_lora_rank=12,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=12,
        ),
        mlp=MlpConfig(d_ff=48),
    ),
}
moe_utils.te_general_gemm = None  # missing without Transformer Engine, and then asked whether it is None
for name in ("TELinear", "TEColumnParallelLinear"):  # None without it, and then asked for instances
    setattr(multi_latent_attention, name, type(name, (), {}))
ACTIVATIONS = {"silu": torch.nn.functional.silu, "squared_relu": squared_relu}


class LatentCore(DotProductAttention):
    """megatron's own attention, which does not know that latent attention says its heads' sizes."""

    def __init__(self, *args, k_channels=None, v_channels=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.hidden_size_per_partition = (v_channels or 1) * self.num_attention_heads_per_partition


def build(folder: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> GPTModel:
    """Their model, from the settings that lie beside a checkpoint."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    settings = json.loads((folder / "transformer_config.json").read_text())
    assert settings["class"] == "GPTModel"
    values = settings["transformer_config"]
    values["activation_func"] = ACTIVATIONS[values["activation_func"]]
    kind = MLATransformerConfig if values.pop("multi_latent_attention", False) else TransformerConfig
    config = kind(
        **values,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=False,
        pipeline_dtype=torch.float32,
        **({"multi_latent_attention": True} if kind is MLATransformerConfig else {}),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if kind is MLATransformerConfig:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentCore
    return GPTModel(
        config,
        spec,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **settings["model"],
    )


def their_logits(rank: int, world: int, folder: str, tp: int, pp: int):
    """[T, V] on the ranks of the last stage, by megatron-core with a checkpoint of ours."""
    with megatron_on_cpu(), torch.no_grad():
        model = build(Path(folder), tp, pp, ep=1)
        state = model.sharded_state_dict()
        model.load_state_dict(dist_checkpointing.load(state, folder))
        model.eval()
        tokens = random_tokens(LENGTH, VOCAB)[None]
        positions = torch.arange(LENGTH)[None]
        mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
        if not parallel_state.is_pipeline_first_stage():
            received = torch.empty(LENGTH, 1, model.config.hidden_size)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        out = model(tokens, positions, mask)
        if not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            out = None
        elif tp > 1:
            out = gather_from_tensor_model_parallel_region(out)
        return None if out is None else out[0].float()


def save_again(rank: int, world: int, folder: str, output: str, tp: int, pp: int) -> None:
    """Load a checkpoint on a grid and let megatron-core write what it has."""
    multiprocessing.current_process()._config["daemon"] = False  # it writes in processes of its own
    filesystem_async._results_queue = queue.Queue()  # not through a manager, whose start would import everything again
    with megatron_on_cpu(), torch.no_grad():
        model = build(Path(folder), tp, pp)
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
        if rank == 0:
            Path(output).mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(model.sharded_state_dict(), output)


@pytest.fixture(scope="module", autouse=True)
def _end_ranks():
    """Every model that megatron-core or DeepSpeed builds leaves process groups, with threads of their own."""
    yield
    close_pools()


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        ("dense", 1, 1),
        ("dense", 2, 2),
        ("experts", 1, 1),
        ("experts", 1, 2),
        ("all experts", 1, 1),
        ("latent", 1, 1),
        ("partly rotated", 1, 1),
    ],
)
def test_their_model_computes_the_same(tmp_path, name, tp, pp):
    ours = random_model(tmp_path / "ours", CONFIGS[name])
    assert run(input=ours, output=tmp_path / "theirs", to="megatron") == 0
    native = open_native(ours)
    wanted = our_logits(native.config, native.source, random_tokens(LENGTH, VOCAB))
    found = [out for out in run_ranks(their_logits, tp * pp, str(tmp_path / "theirs"), tp, pp) if out is not None]
    assert len(found) == tp
    for out in found:
        assert (out - wanted).abs().max() / wanted.abs().max() < 1e-5
    assert run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain") == 0
    a, b = SafetensorsFolder(ours), SafetensorsFolder(tmp_path / "back")
    assert a.infos == b.infos
    for tensor in a.infos:
        assert torch.equal(a.read(tensor), b.read(tensor)), tensor


@pytest.mark.parametrize(("name", "tp", "pp"), [("dense", 2, 2), ("experts", 1, 2), ("all experts", 1, 1)])
def test_what_megatron_writes_is_read(tmp_path, name, tp, pp):
    ours = random_model(tmp_path / "ours", CONFIGS[name])
    assert run(input=ours, output=tmp_path / "theirs", to="megatron") == 0
    run_ranks(save_again, tp * pp, str(tmp_path / "theirs"), str(tmp_path / "again"), tp, pp)
    assert run(input=tmp_path / "again", output=tmp_path / "back", to="lctrain", config=ours / "model" / "ours.yaml") == 0
    a, b = SafetensorsFolder(ours), SafetensorsFolder(tmp_path / "back")
    assert a.infos == b.infos
    for tensor in a.infos:
        assert torch.equal(a.read(tensor), b.read(tensor)), tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": AttentionConfig(sinks=True)}, "model.attention.sinks"),
        ({"attention": AttentionConfig(out_bias=True)}, "model.attention.out_bias"),
        ({"attention": AttentionConfig(rope=RopeConfig(scaling="yarn", factor=2.0))}, "rope.scaling=yarn"),
        ({"pattern": "*-L-"}, r"model.pattern \(L\)"),
        ({"mlp": MlpConfig(bias=True)}, "model.mlp.bias"),
    ],
)
def test_what_megatron_lacks_is_refused_by_name(tmp_path, change, message):
    config = ModelConfig(**{"pattern": "*-", "d_model": 32, "vocab_size": VOCAB, **change})
    ours = random_model(tmp_path / "ours", config)
    with pytest.raises(UserError, match=message):
        run(input=ours, output=tmp_path / "theirs", to="megatron")
    assert not (tmp_path / "theirs").exists()


def test_a_checkpoint_that_says_not_what_it_is(tmp_path):
    ours = random_model(tmp_path / "ours", CONFIGS["dense"])
    assert run(input=ours, output=tmp_path / "theirs", to="megatron") == 0
    (tmp_path / "theirs" / "lctrain_model.yaml").unlink()
    with pytest.raises(UserError, match=r"add config=FILE.yaml"):
        run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain")
