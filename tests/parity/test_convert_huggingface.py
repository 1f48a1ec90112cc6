"""Every family: Hugging Face -> lctrain -> Hugging Face gives every bit again, and both sides compute the same logits."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils import logging

from lctrain.convert.families import FAMILIES
from lctrain.convert.function import differences
from lctrain.convert.huggingface import hf_logits, open_hf
from lctrain.convert.native import open_native
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.convert.verify import our_logits, random_tokens
from lctrain.devices import choose_device
from lctrain.errors import UserError
from lctrain.launch.ranks import run_ranks
from lctrain.models.model import LanguageModel
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta
from tests.conversion import run

VOCAB = 96
BASE = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": None},
}
NO_ATTENTION = dict.fromkeys(("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"))
MAMBA = {"n_groups": 2, "conv_kernel": 4}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
DEEPSEEK = {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    **{"v_head_dim": 10, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "n_shared_experts": 2},
    **{"moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6},
}
NEMOTRON = {
    **{"num_hidden_layers": None, "head_dim": 8, "hybrid_override_pattern": "M-*E", "mamba_num_heads": 8, "mamba_head_dim": 8},
    **{"n_groups": 2, "ssm_state_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 24},
    **{"moe_shared_expert_intermediate_size": 20, "use_mamba_kernels": False},
}
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"head_dim": 8, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "head_dim": 8, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1]},
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.9}},
    ),
    "mamba2": (
        "mamba2",
        {**NO_ATTENTION, "num_heads": 8, "head_dim": 8, "state_size": 16, "time_step_limit": (0.01, 0.5), **MAMBA},
    ),
    "bamba": (
        "bamba",
        {
            **{"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16},
            **{"head_dim": 8, "mamba_proj_bias": True},
        },
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "jamba": (
        "jamba",
        {
            **{"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"num_experts": 4, "use_mamba_kernels": False},
        },
    ),
}


def make(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A tiny model with random values everywhere, biases and norms too."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    family, settings = MODELS[name]
    settings = {**BASE, **settings, **changes}
    absent = {*NO_ATTENTION, "num_hidden_layers"}
    settings = {key: value for key, value in settings.items() if value is not None or key not in absent}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in tensor_name:
                continue
            noise = torch.randn_like(tensor)
            if tensor.dim() > 1:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            elif tensor_name.endswith("A_log"):
                tensor.copy_(noise.abs())
            else:
                tensor.add_(0.3 * noise)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name): (Hugging Face folder, converted folder)."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / "x"
            theirs = make(folder / "theirs", name)
            assert run(input=theirs, output=folder / "ours", to="lctrain") == 0
            made[name] = (theirs, folder / "ours")
        return made[name]

    return get


def bits(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name) for name in source.infos}


def assert_same_bits(found: Path, wanted: Path) -> None:
    a, b = bits(found), bits(wanted)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert torch.equal(a[name], tensor), name


def test_every_family_is_tested():
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(models, tmp_path, name):
    theirs, ours = models(name)
    assert run(input=ours, output=tmp_path / "back", to="hf") == 0
    assert_same_bits(tmp_path / "back", theirs)
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (theirs, tmp_path / "back"))
    before["_name_or_path"] = after["_name_or_path"]
    if "rope_parameters" in before:  # what was left to a default is said
        before["rope_parameters"] = {**after["rope_parameters"], **before["rope_parameters"]}
    assert {key: value for key, value in before.items() if after.get(key, value) != value} == {}
    assert not differences(open_hf(theirs).config, open_hf(tmp_path / "back").config)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"temperature": 0.7}


@pytest.mark.parametrize("name", MODELS)
def test_logits(models, name):
    theirs, ours = models(name)
    tokens = random_tokens(40, VOCAB)
    native = open_native(ours)
    found, wanted = our_logits(native.config, native.source, tokens), hf_logits(theirs, tokens)
    assert found.shape == wanted.shape == (40, VOCAB)
    assert wanted.abs().max() > 0.5
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


def shared_logits(rank: int, cp: int, folder: str):
    """This rank's part of the logits."""
    native = open_native(Path(folder))
    with torch.device("meta"):
        model = LanguageModel(native.config)
    model.to_empty(device=choose_device("cpu"))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(native.source.read(name))
        tokens = random_tokens(40, VOCAB)[None]
        documents, layout = ((0, 40),), SequenceLayout("zigzag", cp, 40)
        positions = document_positions(documents, 40)
        shard, positions = (layout.shard(x, rank, 1) for x in (tokens, positions))
        seq = SequenceMeta(layout, RankGroup(torch.distributed.group.WORLD), positions, documents)
        return model.eval().hidden(shard, seq) @ model.output_weight.t()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_sequence_over_two_ranks(models, name):
    theirs, ours = models(name)
    parts = run_ranks(shared_logits, 2, str(ours))
    found = SequenceLayout("zigzag", 2, 40).unshard(parts, 1)[0]
    wanted = hf_logits(theirs, random_tokens(40, VOCAB))
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_bf16_comes_back_too(tmp_path):
    theirs = make(tmp_path / "theirs", "bamba", torch.bfloat16)
    assert run(input=theirs, output=tmp_path / "ours", to="lctrain", verify=True) == 0
    assert run(input=tmp_path / "ours", output=tmp_path / "back", to="hf", verify=True) == 0
    assert_same_bits(tmp_path / "back", theirs)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rounding_to_bf16_spares_the_recurrence(models, tmp_path):
    theirs, ours = models("bamba")
    assert run(input=ours, output=tmp_path / "back", to="hf", dtype="bf16", verify=True) == 0
    for name, tensor in bits(tmp_path / "back").items():
        kept = name.endswith(("A_log", ".D", "dt_bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(tensor, bits(theirs)[name].to(tensor.dtype))


def test_a_padded_vocabulary_comes_off_again(models, tmp_path):
    theirs, _ = models("llama")
    assert run(input=theirs, output=tmp_path / "ours", to="lctrain", vocab_multiple=64, verify=True) == 0
    native = open_native(tmp_path / "ours")
    assert native.config.vocab_size == 128
    assert not native.source.read("head.weight")[VOCAB:].any()
    assert run(input=tmp_path / "ours", output=tmp_path / "back", to="hf", verify=True) == 0
    assert_same_bits(tmp_path / "back", theirs)
    with pytest.raises(UserError, match="vocab_size=200 is more than the 128 rows"):
        run(input=tmp_path / "ours", output=tmp_path / "more", to="hf", vocab_size=200)


def test_shards_and_their_index(models, tmp_path):
    theirs, ours = models("mixtral")
    assert run(input=ours, output=tmp_path / "back", to="hf", shard_gb=2e-5, verify=True) == 0
    assert len(list((tmp_path / "back").glob("model-0*.safetensors"))) > 3
    assert_same_bits(tmp_path / "back", theirs)


def test_another_family_that_can_express_it(models, tmp_path):
    _, ours = models("mistral")
    with pytest.raises(UserError, match=r"llama cannot express model.pattern=W-W-"):
        run(input=ours, output=tmp_path / "back", to="hf", family="llama")
    theirs, ours = models("qwen3")
    assert run(input=ours, output=tmp_path / "moe", to="hf", family="qwen3", verify=True) == 0
    assert_same_bits(tmp_path / "moe", theirs)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, r'hidden_act="gelu"'),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "long_factor": [1.0]}}, "long_factor="),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate=false"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ("llama", {"model_type": "gemma3"}, "no table for model_type=gemma3"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("deepseek_v3", {"topk_method": "greedy"}, r'topk_method="greedy"'),
        ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size=8"),
        ("nemotron_h", {"attention_bias": True}, "attention_bias=true"),
        ("jamba", {"attn_layer_period": 2}, "1 Mamba-1 layers"),
        ("mamba2", {"expand": 4}, "not expand x hidden_size=128"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ],
)
def test_what_we_lack_is_refused_by_name(models, tmp_path, name, changes, message):
    theirs, _ = models(name)
    content = {**json.loads((theirs / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(theirs / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_hf(tmp_path)


def test_a_key_may_be_accepted(models, tmp_path):
    theirs, _ = models("llama")
    content = {**json.loads((theirs / "config.json").read_text()), "my_note": "hello", "other": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(theirs / "model.safetensors")
    assert open_hf(tmp_path, accept=("my_note",)).listed == ['my_note="hello"', "other=null"]


def test_settings_of_older_transformers(models, tmp_path):
    theirs, _ = models("llama")
    content = json.loads((theirs / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(theirs / "model.safetensors")
    assert not differences(open_hf(tmp_path).config, open_hf(theirs).config)
